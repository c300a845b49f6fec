"""Archives of part of a data set, for the study."""

import os
import tarfile
from io import BytesIO
from pathlib import Path

from util.data.files import ImageFiles
from util.data.sources import build_source


def subset(data_path: str, counts: dict[str, int | None], folder: Path) -> str:
    """An archive of evenly chosen images of both splits, the same number from each class; written once.

    Raises:
        ValueError: there are fewer images than requested.
    """
    path = folder / f"{Path(data_path).name.split('.')[0]}-{'-'.join(str(n or 'all') for n in counts.values())}.tar"
    origin = path.with_suffix(".txt")
    if path.exists():
        if origin.exists() and origin.read_text() != str(Path(data_path).resolve()):
            raise ValueError(f"{path} has images of {origin.read_text()}: remove it, or give another --work_dir")
        return str(path)
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with tarfile.open(partial, "w") as tar:
        for split, count in counts.items():
            files = build_source(data_path, split)
            if not isinstance(files, ImageFiles):
                raise ValueError(f"--data_path {data_path}: expected a folder, list files or one archive")
            if count is not None and count > len(files):
                raise ValueError(f"--{split}_images {count}: {data_path} has {len(files)}")
            for i in range(count or len(files)):
                index = i * len(files) // (count or len(files))
                content = files.read(index)
                name = os.fsdecode(files.names[index])
                member = tarfile.TarInfo(f"{split}/{name}" if "/" in name else f"{split}/{files.labels[index]}/{name}")
                member.size = len(content)
                tar.addfile(member, BytesIO(content))
    origin.write_text(str(Path(data_path).resolve()))
    partial.replace(path)
    return str(path)
