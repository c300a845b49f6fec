"""Data in ADE20K's layout: pairs, each kind of bad label, classes, and the geometry of images with their labels."""

import io
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from images import encode, picture, write_png_4, write_tar, write_tree
from PIL import Image
from segment_data import NAMES, ade_files, image_of, labels_of

from util.data.files import pack
from util.data.joint_transforms import EvaluationResize, ProbeResize, TrainingCrop, distort, fit, resize_label
from util.data.label_checks import check_files, checked_sources, describe_labels
from util.data.segmentation import LabelFormat, LabelledImage, class_names, find_pairs
from util.data.sources import build_source

REDUCED, PLAIN = LabelFormat(), LabelFormat(reduce_zero=False)


def png(array):
    return encode(Image.fromarray(array), "PNG")


def source(path, split="train", form=REDUCED):
    return find_pairs(build_source(str(path), None), split, form)


def classes_of(path, num_classes=None, form=REDUCED, trust_zero=False):
    files = build_source(str(path), None)
    return len(checked_sources(files, ["train", "val"], form, num_classes, trust_zero=trust_zero)[1])


# --------------------------------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize("top", ["", "ADEChallengeData2016/"])
@pytest.mark.parametrize("kind", ["folder", "tar", "tar.gz"])
def test_a_folder_and_an_archive_hold_the_same_pairs(tmp_path, kind, top):
    files = ade_files(top=top)
    if kind == "folder":
        path = write_tree(tmp_path / "data", files)
    else:
        path = write_tar(tmp_path / f"data.{kind}", files, "w:gz" if kind == "tar.gz" else "w")
    train, val = source(path), source(path, "val")
    assert (len(train), len(val)) == (8, 5)
    assert train.stems[3] == "p_003"
    assert train.name(3).endswith("images/training/p_003.jpg")
    image, label = train.load(3)
    expected = labels_of(3, size=(49, 50))
    assert image.shape == (49, 50, 3)
    np.testing.assert_array_equal(label, np.where(expected == 0, 255, expected - 1))
    assert class_names(train.files, REDUCED) == NAMES
    assert classes_of(path) == 3


def test_predictions_go_back_to_the_labels_of_the_data_set():
    labels = labels_of(0)[:, 2:]
    np.testing.assert_array_equal(REDUCED.to_labels(REDUCED.to_classes(labels)), labels)
    np.testing.assert_array_equal(PLAIN.to_labels(PLAIN.to_classes(labels)), labels)


def test_names_of_classes(tmp_path):
    files = ade_files()
    for name in [name for name in files if name.endswith(".txt")]:
        del files[name]
    path = write_tree(tmp_path, files)
    assert class_names(build_source(str(path), None), REDUCED) == []
    assert classes_of(path) == 3  # the largest label
    text = "index\tname\tshare\n0\tvoid\t0.2\n1\twall\t0.5\n2\tsky, heaven\t0.3\n"
    write_tree(tmp_path, {"objectInfo2.txt": text.encode()})
    assert class_names(build_source(str(path), None), REDUCED) == ["wall", "sky, heaven"]
    assert class_names(build_source(str(path), None), PLAIN) == ["void", "wall", "sky, heaven"]
    text = "Idx\tName\n1\twall\n3\tsky\n"  # label 2 is missing; without the shift, so is label 0
    write_tree(tmp_path, {"objectInfo2.txt": text.encode()})
    assert class_names(build_source(str(path), None), REDUCED) == ["wall", "label 2", "sky"]
    assert class_names(build_source(str(path), None), PLAIN) == ["label 0", "wall", "label 2", "sky"]
    write_tree(tmp_path, {"objectInfo2.txt": b"Idx\tName\n0\twall\n1\tsky\n255\tvoid\n"})
    assert class_names(build_source(str(path), None), PLAIN) == ["wall", "sky"]
    write_tree(tmp_path, {"objectInfo2.txt": b"1 wall\n2 sky\n"})
    with pytest.raises(ValueError, match=r"objectInfo2.txt: expected a tab-separated table with a column 'name'"):
        class_names(build_source(str(path), None), REDUCED)
    for row in (b"sky\t2", b"2"):  # as in a table whose first column is the name
        write_tree(tmp_path, {"objectInfo2.txt": b"Idx\tName\n1\twall\n" + row + b"\n\n"})
        with pytest.raises(ValueError, match=rf"objectInfo2.txt: expected a label in the first .*'{row.decode()[0]}"):
            class_names(build_source(str(path), None), REDUCED)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_names_that_are_not_utf_8_are_an_error_that_names_the_file(tmp_path, kind):
    for encoding in ("utf-8", "utf-8-sig", "latin-1"):
        files = ade_files() | {"objectInfo3.txt": "Idx\tName\n1\tcafé\n".encode(encoding)}
        path = tmp_path / encoding
        path = write_tree(path, files) if kind == "folder" else write_tar(path.with_suffix(".tar"), files)
        read = build_source(str(path), None)
        if encoding == "latin-1":
            with pytest.raises(ValueError, match=r"objectInfo3.txt is not UTF-8 \(byte 0xe9 at 14\): save it as UTF-8"):
                class_names(read, PLAIN)
        else:
            assert class_names(read, PLAIN) == ["label 0", "café"]


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("annotations/training/p_002.png", r"1 of 8 images have no label map, the first is .*training/p_002.jpg"),
        ("images/training/p_004.jpg", r"1 of 8 label maps have no image, the first is .*training/p_004.png"),
        ("validation", r"looked for images/validation/NAME.jpg and annotations/validation/NAME.png, found 16 other"),
    ],
)
def test_files_that_do_not_pair(tmp_path, removed, message):
    path = write_tree(tmp_path, {name: data for name, data in ade_files().items() if removed not in name})
    with pytest.raises(ValueError, match=message):
        classes_of(path)


def test_two_images_of_one_name(tmp_path):
    path = write_tree(tmp_path, ade_files() | {"images/training/p_000.png": b""})
    with pytest.raises(ValueError, match=r"p_000.* have the same name"):
        source(path)


# -------------------------------------------------------------------------------------------------------------- labels


def replaced(tmp_path, data, name="annotations/training/p_002.png"):
    return write_tree(tmp_path, ade_files() | {name: data})


FLAT = labels_of(2, size=(46, 52))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (encode(picture(size=(46, 52)), "PNG"), r"p_002.png is of mode RGB, expected L or P .* ADEChallengeData2016"),
        (encode(Image.fromarray(FLAT.astype(np.uint16)), "PNG"), r"p_002.png is of mode I;16, expected L"),
        (write_png_4(FLAT), r"p_002.png is of mode L with 4 bits, expected L or P in a PNG: 8-bit"),
        (encode(Image.fromarray(FLAT), "JPEG"), r"of mode L in a JPEG, where values can change, expected L"),
        (f"P5 {FLAT.shape[1]} {FLAT.shape[0]} 19\n".encode() + FLAT.tobytes(), r"in a PPM, where values can change"),
        (b"nothing", r"p_002.png cannot be used: not a readable image"),
        (png(FLAT[1:]), r"p_002.png has 52 x 45 pixels, its image .*p_002.jpg 52 x 46"),
        (
            png(FLAT + 1),
            r"p_002.png has label 4, which is class 3 counted from 0, but there are 3 classes \(objectInfo",
        ),
        (
            png(FLAT - 1),
            r"p_002.png has label 255, .* if 255 means no class, give --no-reduce_zero_label, .* \(--ignore",
        ),
        (png(np.where(FLAT == 3, 200, FLAT).astype(np.uint8)), r"p_002.png has label 200, which is class 199"),
    ],
    ids=[
        "RGB",
        "16 bits",
        "4 bits",
        "lossy",
        "scaled",
        "damaged",
        "size",
        "unshifted",
        "shifted twice",
        "out of range",
    ],
)
def test_bad_label_maps_name_file_and_value(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        classes_of(replaced(tmp_path, data))


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"p_002.jpg cannot be used: not a readable image"):
        check_files(source(replaced(tmp_path, b"nothing", "images/training/p_002.jpg")))


def test_the_limit_of_pixels_is_that_of_the_option(tmp_path, monkeypatch):
    """Not Pillow's own, which is lower here."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    path = write_tree(tmp_path, ade_files())
    check_files(source(path))
    assert Image.MAX_IMAGE_PIXELS == 10
    files = build_source(str(path), None, max_image_pixels=2000)
    with pytest.raises(ValueError, match=r"p_000.jpg cannot be used: .* exceed the limit of 2000 \(--max_image_pixels"):
        check_files(find_pairs(files, "train", REDUCED))


@pytest.mark.parametrize("kind", ["L", "P"])
def test_indices_of_a_palette_are_labels(tmp_path, kind):
    label = Image.fromarray(FLAT)
    if kind == "P":
        label = Image.frombytes("P", label.size, label.tobytes())
        label.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
    path = replaced(tmp_path, encode(label, "PNG"))
    np.testing.assert_array_equal(source(path, form=PLAIN).load(2).label, FLAT)


COLOURS = [0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255]


def with_palettes(tmp_path, palettes):
    """The data set with the palette of each label map; None for a grey one."""
    files = ade_files()
    names = sorted(name for name in files if name.startswith("annotations/"))
    for name, palette in zip(names, palettes, strict=True):
        with Image.open(io.BytesIO(files[name])) as image:
            label = image.copy()
        if palette:
            label = Image.frombytes("P", label.size, label.tobytes())
            label.putpalette(palette)
        files[name] = encode(label, "PNG")
    return write_tree(tmp_path, files)


@pytest.mark.parametrize("other", [1, 9], ids=["in a split", "between the splits"])
def test_palettes_that_differ_are_an_error(tmp_path, other):
    """The indices that count are then another class in each file. Files 0 to 7 are of the training split."""
    palettes = [COLOURS] * 13
    palettes[other] = [*COLOURS[:3], *COLOURS[6:9], *COLOURS[3:6], *COLOURS[9:]]
    path = with_palettes(tmp_path, palettes)
    second = ("training/p_001" if other == 1 else "validation/p_001") + ".png"
    message = rf"training/p_000.png and .*{second} have label 1 in different colours, \(255, 0, 0\) and \(0, 255, 0\)"
    with pytest.raises(ValueError, match=rf"{message}: .* one palette"):
        classes_of(path)


def test_palettes_that_agree_in_what_is_used(tmp_path):
    """Colours of other indices may differ, and grey label maps have none."""
    longer = [*COLOURS, 1, 2, 3, 4, 5, 6]
    assert classes_of(with_palettes(tmp_path, [None, COLOURS, longer, [*COLOURS, 9, 9, 9], *[COLOURS] * 9])) == 3


def test_exif_orientation_is_reported(tmp_path, log):
    """Upside down it has the size of its label map; on its side, not."""
    original = Image.open(io.BytesIO(ade_files()["images/training/p_002.jpg"]))
    for orientation, size in ((3, FLAT.shape), (6, FLAT.shape[::-1])):
        tags = Image.Exif()
        tags[0x0112] = orientation
        stored = io.BytesIO()
        original.resize(size[::-1]).save(stored, "JPEG", exif=tags)
        path = replaced(tmp_path / str(orientation), stored.getvalue(), "images/training/p_002.jpg")
        advice = "an EXIF orientation is not applied: rotate the stored pixels if label maps are of the rotated view"
        if orientation == 3:
            check_files(source(path))
            assert f"1 of 8 images are stored rotated, such as {path}/images/training/p_002.jpg; {advice}" in log.text
        else:
            with pytest.raises(ValueError, match=f"they must be equal; {advice}"):
                check_files(source(path))


def test_labels_of_ade20k_need_the_shift(tmp_path):
    path = write_tree(tmp_path, ade_files())
    with pytest.raises(ValueError, match=r"label 3, which is class 3 counted from 0, but there are 3 classes \(--num_"):
        classes_of(path, num_classes=3, form=PLAIN)
    assert classes_of(path, num_classes=7) == 7
    assert classes_of(path, num_classes=4, form=PLAIN) == 4
    assert classes_of(path, num_classes=3, form=LabelFormat(False, ignore_index=3)) == 3


def test_an_ignored_label_that_is_a_class(tmp_path):
    """--ignore_index is the value after the shift: 0 would merge label 0 with the first class."""
    path = write_tree(tmp_path, ade_files())
    with pytest.raises(ValueError, match=r"--ignore_index 0 is a class: .* so it must be 3 or more; omit it"):
        classes_of(path, form=LabelFormat(ignore_index=0))
    assert classes_of(path, form=LabelFormat(ignore_index=3)) == 3


def test_names_that_lead_out_of_the_folder(tmp_path):
    """Predictions are written under the names of the images."""
    files = {f"{kind}/training/../../x.{end}": b"" for kind, end in (("images", "jpg"), ("annotations", "png"))}
    listed = build_source(str(write_tree(tmp_path, ade_files())), None)
    with pytest.raises(ValueError, match="x.jpg leads out of its folder"):
        find_pairs(replace(listed, names=pack([*files])), "train", REDUCED)


def test_a_background_class_is_not_ignored_by_mistake(tmp_path):
    """Labels 0 to 2 with a large background 0; the user may insist."""
    files = ade_files()
    for name in [name for name in files if name.endswith(".png")]:
        label = np.zeros((46, 52), dtype=np.uint8)
        label[:10, :20] = 1
        label[:3, :20] = 2
        files[name] = png(label)
        files[name.replace("annotations", "images").replace(".png", ".jpg")] = encode(image_of(label, 0))
    path = write_tree(tmp_path, files)
    with pytest.raises(ValueError, match=r"label 0 has 92 % of the pixels .*p_000.png.* --no-reduce_zero_label"):
        classes_of(path)
    assert classes_of(path, trust_zero=True) == 3
    assert classes_of(path, form=PLAIN) == 4  # label 0, and those of objectInfo3.txt


def relabelled(tmp_path, labels, split=""):
    """Labels 0 to 3 become `labels`, in the label maps of a split ("" for both)."""
    files = ade_files()
    for name in [name for name in files if name.startswith(f"annotations/{split}")]:
        with Image.open(io.BytesIO(files[name])) as image:
            files[name] = png(np.array(labels, dtype=np.uint8)[np.array(image)])
    return write_tree(tmp_path / f"{labels} {split}", files)


@pytest.mark.parametrize("split", ["", "validation"])
def test_nothing_but_ignored_pixels(tmp_path, split):
    with pytest.raises(ValueError, match=r"every pixel of the label maps is ignored, such as in .*p_000.png"):
        classes_of(relabelled(tmp_path, (0, 0, 0, 0), split), trust_zero=True)


@pytest.mark.parametrize(
    ("labels", "split", "form", "value"),
    [
        ((0, 1, 1, 1), "", REDUCED, 1),  # label 0 has less than half of the pixels
        ((0, 255, 255, 255), "", PLAIN, 0),
        ((1, 1, 1, 1), "", PLAIN, 1),
        ((0, 255, 255, 255), "validation", PLAIN, 0),
    ],
)
@pytest.mark.parametrize("num_classes", [None, 4])
def test_a_single_class_is_an_error(tmp_path, labels, split, form, value, num_classes):
    """Such as a binary mask that is read by the wrong convention: with one class in all, mIoU is 100."""
    advice = (
        r"With --reduce_zero_label 0 is ignored .* with --no-reduce_zero_label 255 is ignored .* masks of 0 and 255"
    )
    where = "validation" if split else "training"
    message = rf"{where}/p_000.png has label {value}, .* the only class of its split: two or more .*{advice}"
    with pytest.raises(ValueError, match=message):
        classes_of(relabelled(tmp_path, labels, split), num_classes, form)


def test_binary_masks_are_two_classes(tmp_path):
    path = relabelled(tmp_path, (0, 1, 1, 1))
    (path / "objectInfo3.txt").unlink()
    assert classes_of(path, form=PLAIN) == 2
    masks = relabelled(tmp_path, (0, 255, 255, 255))
    with pytest.raises(ValueError, match="has label 255, .* a class, as in masks of 0 and 255, write 1 for it"):
        classes_of(masks)


def test_the_histogram_of_labels(tmp_path):
    path = write_tree(tmp_path, ade_files())
    counts = check_files(source(path))
    assert counts.pixels.sum() == sum(source(path).load(i).label.size for i in range(8))
    line = describe_labels(counts, [*NAMES, "moon"], REDUCED)
    assert line.startswith(f"ignored {100 * counts.share(0):.1f} %, ")
    assert f"road {100 * counts.share(3):.1f} %" in line
    assert line.endswith("; absent: moon")
    line = describe_labels(counts, [*NAMES, *"abc"], REDUCED, most=2)
    assert line.endswith(" %, 4 more; absent: a, b and 1 more")
    assert describe_labels(counts, NAMES, REDUCED, most=1).endswith(" %, 2 more; absent: no class")


# ------------------------------------------------------------------------------------------------------------ geometry


@pytest.mark.parametrize(
    ("size", "expected"),
    [((512, 683), (512, 683)), ((300, 400), (512, 683)), ((400, 300), (683, 512)), ((100, 1000), (205, 2048))],
)
def test_the_size_that_fits(size, expected):
    assert fit(*size, 512) == expected


def test_training_crops_keep_image_and_label_together():
    """Colours tell the classes apart, so the label of each pixel can be read off the image."""
    colours = torch.tensor([[0, 0, 255], [0, 255, 0], [255, 0, 0]])
    label = labels_of(1, size=(60, 90)) % 3
    crop = TrainingCrop(48, 48, ignore_index=255)
    paddings = 0
    for seed in range(40):
        random.seed(seed)
        image, cropped, size = crop(LabelledImage(colours.numpy()[label].astype(np.uint8), label))
        assert image.shape == (3, 48, 48)
        assert image.dtype == cropped.dtype == torch.uint8
        height, width = size.tolist()
        assert (cropped[height:] == 255).all()
        assert (cropped[:, width:] == 255).all()
        assert (cropped[:height, :width] < 3).all()
        paddings += height < 48 or width < 48
        counts = torch.bincount(cropped[:height, :width].flatten())
        assert counts.max() < 0.75 * counts.sum()
    assert 5 < paddings < 35


def test_geometry_without_distortion(monkeypatch):
    monkeypatch.setattr("util.data.joint_transforms.distort", lambda image: image)
    label = labels_of(1, size=(60, 90)) % 3
    colours = np.array([[0, 0, 250], [0, 250, 0], [250, 0, 0]], dtype=np.uint8)
    agreement = []
    for seed in range(20):
        random.seed(seed)
        image, cropped, (height, width) = TrainingCrop(48, 48, 255)(LabelledImage(colours[label], label))
        nearest = 2 - image[:, :height, :width].argmax(0)  # of blue, green, red
        agreement.append((nearest == cropped[:height, :width]).float().mean().item())
    assert min(agreement) > 0.93  # the rest are blurred edges


def test_a_crop_of_one_class_is_drawn_again(monkeypatch):
    """Most crops of an image with a rare class show one class; with ten more tries most show both."""
    label = np.zeros((64, 256), dtype=np.uint8)
    label[:, 220:] = 1
    image = np.zeros((64, 256, 3), dtype=np.uint8)
    both = {}
    for tries in (0, 10):
        monkeypatch.setattr("util.data.joint_transforms._TRIES", tries)
        crops = []
        for seed in range(60):
            random.seed(seed)
            crops.append(TrainingCrop(32, 64, 255)(LabelledImage(image, label))[1])
        both[tries] = sum({0, 1} <= set(crop.unique().tolist()) for crop in crops)
    assert both[10] > 2 * both[0]


def test_distortion_stays_in_range_and_varies():
    image = np.array(picture(size=(20, 20)))
    results = []
    for seed in range(30):
        random.seed(seed)
        results.append(distort(image))
    assert all(result.shape == image.shape and result.dtype == np.uint8 for result in results)
    assert len({result.tobytes() for result in results}) > 20
    assert any((result == image).all() for result in results)  # each of the four is off half the time
    shifts = [result.astype(int).mean() - image.mean() for result in results]
    assert min(shifts) < -10
    assert max(shifts) > 10


def test_the_hue_turns_by_at_most_a_tenth(monkeypatch):
    red = np.full((4, 4, 3), (200, 0, 0), dtype=np.uint8)
    monkeypatch.setattr(random, "random", iter([0.9, 0.1, 0.9, 0.9, 0.1]).__next__)  # hue alone
    monkeypatch.setattr(random, "randint", lambda low, high: high)
    turned = distort(red)[0, 0]
    assert turned[0] == 200
    assert 110 < turned[1] < 130  # 36 degrees of 60 towards yellow
    assert turned[2] == 0


def test_evaluation_keeps_the_label_at_its_size():
    label = labels_of(0, size=(30, 50))
    image, kept = EvaluationResize(64)(LabelledImage(np.array(image_of(label, 0)), label))
    assert image.shape == (3, 64, 107)
    np.testing.assert_array_equal(kept.numpy(), label)


def test_the_probe_sees_the_whole_image():
    sample = LabelledImage(np.array(image_of(labels_of(0), 0)), labels_of(0))
    image, label = ProbeResize(32, resize_labels=True)(sample)
    assert image.shape == (3, 32, 32)
    assert label.shape == (32, 32)
    assert ProbeResize(32, resize_labels=False)(sample)[1].shape == (40, 56)


def test_labels_are_resized_by_the_nearest_pixel_as_opencv_does():
    label = np.arange(5, dtype=np.uint8)[None].repeat(5, 0)
    assert resize_label(label, (1, 8))[0].tolist() == [0, 0, 1, 1, 2, 3, 3, 4]  # floor(i * 5 / 8)
