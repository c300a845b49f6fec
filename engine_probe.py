"""Forward-only probes of frozen features: of patches (CAPI's k-NN and logistic regression), and of whole images.

A patch's label is the commonest of its pixels, and patches that are mostly ignored are dropped. Hyper-parameters are
chosen on a tenth of the training images. Shapes: B batch, S image side, H, W label map, h, w grid of P patches, p patch
side, E width, N training patches or images, n those in memory at once, Q queries, k neighbours, K classes.
"""

import logging
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from util.knn import nearest
from util.miou import ConfusionMatrix, Scores
from util.rng import generator
from util.run.amp import Amp
from util.run.distributed import all_reduce_sum, gather

log = logging.getLogger("hpm")

KS = (1, 3, 10, 30)
DISTANCES = ("cosine", "euclidean")
COSTS = tuple(10.0 ** (-6 + 11 * i / 7) for i in range(8))  # CAPI's grid of C, the weight of the data term
_ROWS = 65536  # patches in memory at once, beyond the features themselves

Encode = Callable[[Tensor], Tensor]  # (B, 3, S, S) uint8 -> (B, E, h, w) float32
Classify = Callable[[Tensor], dict[str, Tensor]]  # (Q, E) -> predictions (Q,) by name


def patch_labels(labels: Tensor, grid: tuple[int, int]) -> Tensor:
    """The commonest label of each patch, the lower of equals: (B, h p, w p) -> (B, h w)."""
    h, w = grid
    pixels = labels.unflatten(1, (h, -1)).unflatten(3, (w, -1)).permute(0, 1, 3, 2, 4)  # (B, h, w, p, p)
    return pixels.flatten(3).mode(dim=-1).values.flatten(1)


@torch.no_grad()
def extract_patches(
    encode: Encode, batches: Iterable, amp: Amp, count: int, per_image: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Features and labels of the training patches, the same on every rank, on the CPU.

    Args:
        count: images in the data set.
        per_image: most patches kept of an image, drawn without replacement.

    Returns:
        (count, P, E) float32 and (count, P) uint8.
    """
    features = torch.empty(0)
    labels = torch.empty(0, dtype=torch.uint8)
    for (images, maps), _, index, *_ in batches:
        tokens = encode(images).cpu()
        rows = tokens.flatten(2).transpose(1, 2)  # (B, P, E)
        classes = patch_labels(maps, tokens.shape[2:])
        if len(features) == 0:
            kept = min(per_image, rows.shape[1])
            features, labels = torch.zeros(count, kept, rows.shape[2]), torch.zeros(count, kept, dtype=torch.uint8)
        for row, values, number in zip(rows, classes, index.tolist(), strict=True):
            chosen = torch.randperm(len(row), generator=generator(seed, number))[: labels.shape[1]].sort().values
            features[number], labels[number] = row[chosen], values[chosen]
    shape = max(gather(tuple(features.shape[1:])), key=len)  # (P, E); a rank may have no image
    if len(features) == 0:
        features, labels = torch.zeros(count, *shape), torch.zeros(count, shape[0], dtype=torch.uint8)
    for part in [*features.split(64), *labels.split(65536)]:  # other ranks' rows are zero here
        part.copy_(all_reduce_sum(part.to(amp.device)))
    return features, labels


def standardization(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature, (N, E) -> (E,), (E,), in float64 and bounded memory."""
    total = torch.zeros(2, features.shape[1], dtype=torch.double, device=features.device)
    for rows in features.split(_ROWS):
        rows = rows.double()
        total += torch.stack([rows.sum(0), rows.square().sum(0)])
    mean, squares = total / len(features)
    return mean.float(), (squares - mean.square()).clamp(min=1e-12).sqrt().float()


# ---------------------------------------------------------------------------------------------------------------- k-NN


def neighbours(features: Tensor, labels: Tensor, ks: Sequence[int], distance: str) -> Classify:
    """Majority vote of the k nearest, the lower class if equal, under names such as 10-NN."""
    keys = _embed(features, distance, query=False)

    def classify(queries: Tensor) -> dict[str, Tensor]:
        _, index = nearest(keys, _embed(queries, distance, query=True), max(ks), _ROWS)
        votes = labels[index]  # (Q, k)
        return {f"{k}-NN": votes[:, :k].mode(dim=1).values for k in ks}

    return classify


def _embed(features: Tensor, distance: str, query: bool) -> Tensor:
    """Vectors whose inner products rank as the distance does."""
    if distance == "cosine":
        return F.normalize(features, dim=1)
    half = -0.5 * features.square().sum(1, keepdim=True)  # -|q - t|^2 / 2 = q t - |t|^2 / 2 - |q|^2 / 2
    return torch.cat([features, torch.ones_like(half) if query else half], dim=1)


# ------------------------------------------------------------------------------------------------ logistic regression


def fit_logistic(
    features: Tensor, labels: Tensor, num_classes: int, cost: float, start: Tensor | None = None, iterations: int = 100
) -> Tensor:
    """Minimise cost x the sum of cross-entropies + |weights|^2 / 2 by L-BFGS; the bias is not penalised.

    Args:
        start: an earlier result to begin from.

    Returns:
        (K, E + 1) weights, with the bias last.
    """
    count, width = features.shape
    solution = features.new_zeros(num_classes, width + 1) if start is None else start.clone()
    penalty = torch.ones_like(solution) / (cost * count)
    penalty[:, -1] = 0
    optimizer = torch.optim.LBFGS(
        [solution], max_iter=iterations, tolerance_grad=1e-6, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        loss = 0.5 * (penalty * solution.square()).sum()
        gradient = penalty * solution
        for rows, classes in zip(features.split(_ROWS), labels.split(_ROWS), strict=True):
            log_shares = F.log_softmax(_logits(rows, solution), dim=1)
            loss += F.nll_loss(log_shares, classes, reduction="sum") / count
            excess = (log_shares.exp() - F.one_hot(classes, num_classes)) / count  # (n, K)
            gradient[:, :-1] += excess.T @ rows
            gradient[:, -1] += excess.sum(0)
        solution.grad = gradient
        return loss

    optimizer.step(closure)
    return solution


def _logits(features: Tensor, solution: Tensor) -> Tensor:
    return F.linear(features, solution[:, :-1], solution[:, -1])


def fit_best(
    features: Tensor, labels: Tensor, held: Tensor, num_classes: int, metric: str, score: Callable[[Tensor], float]
) -> Tensor:
    """Logistic regression on all rows (N, E), with the C of `COSTS` whose fit to the other rows scores best on `held`.

    Args:
        held: (N,) bool.
        metric, score: name of the score for the log; weights (K, E + 1) -> score of the held-out rows.
    """
    best, solution = (-1.0, 0.0, features), None
    for cost in COSTS:
        solution = fit_logistic(features[~held], labels[~held], num_classes, cost, solution)
        scored = score(solution)
        log.info("choice    logreg C=%.2g  %s %.2f", cost, metric, scored)
        if scored > best[0]:
            best = (scored, cost, solution)
    return fit_logistic(features, labels, num_classes, *best[1:])


def logistic_accuracy(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], num_classes: int, seed: int, device: torch.device
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in percent of a logistic regression on the standardised features of images.

    Args:
        train, test: features (N, E) and labels (N,). C is chosen on a tenth of the training images.
    """
    (features, labels), (queries, answers) = ([part.to(device) for part in split] for split in (train, test))
    mean, deviation = standardization(features)
    features, queries = (features - mean) / deviation, (queries - mean) / deviation
    held = held_out(len(features), seed).to(device)

    def score(solution: Tensor) -> float:
        correct = _logits(features[held], solution).argmax(dim=1) == labels[held]
        return float(100 * correct.double().mean())

    ranked = _logits(queries, fit_best(features, labels, held, num_classes, "held_out_acc1", score))
    hits = ranked.topk(min(5, num_classes), dim=1).indices == answers[:, None]  # (Q, 5)
    top1, top5 = (100 * hits[:, :k].any(dim=1).double().mean() for k in (1, 5))
    return float(top1), float(top5)


# ------------------------------------------------------------------------------------------------------------- choices


def logistic(solution: Tensor) -> Classify:
    return lambda queries: {"logreg": _logits(queries, solution).argmax(dim=1)}


def held_out(count: int, seed: int) -> Tensor:
    """Which of the training images are held out to choose hyper-parameters: a tenth, at least one; (count,) bool."""
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.randperm(count, generator=generator(seed))[: max(1, count // 10)]] = True
    return mask


def patch_miou(classify: Classify, features: Tensor, labels: Tensor, num_classes: int) -> dict[str, float]:
    """mIoU in percent of each prediction, over patches."""
    matrices: dict[str, ConfusionMatrix] = {}
    for rows, classes in zip(features.split(1024), labels.split(1024), strict=True):
        for name, prediction in classify(rows).items():
            matrix = matrices.setdefault(name, ConfusionMatrix(num_classes, -1, features.device))
            matrix.update(prediction, classes)
    return {name: matrix.scores(lambda tensor: tensor).miou for name, matrix in matrices.items()}


def build_classifier(
    head: str, features: Tensor, labels: Tensor, held: Tensor, num_classes: int
) -> tuple[Classify, list[str], str]:
    """The classifier of a head, fitted to all patches with the hyper-parameters that the held-out ones choose.

    Args:
        features, labels, held: (N, E), (N,) int64, (N,) bool.

    Returns:
        The classifier, the names of its predictions, and which of them is the chosen one.
    """

    def scores(classify: Classify) -> dict[str, float]:
        return patch_miou(classify, features[held], labels[held], num_classes)

    if head == "logreg":
        fitted = fit_best(
            features, labels, held, num_classes, "patch_mIoU", lambda solution: scores(logistic(solution))["logreg"]
        )
        return logistic(fitted), ["logreg"], "logreg"
    part = features[~held], labels[~held]
    ks = [k for k in KS if k <= len(part[0])]
    candidates: dict[str, float] = {}
    for distance in DISTANCES:
        for name, score in scores(neighbours(*part, ks, distance)).items():
            candidates[f"{name} {distance}"] = score
            log.info("choice    %s %s  patch_mIoU %.2f", name, distance, score)
    name, distance = max(candidates, key=lambda name: candidates[name]).split()
    return neighbours(features, labels, ks, distance), [f"{k}-NN" for k in ks], name


@torch.no_grad()
def probe(
    head: str,
    encode: Encode,
    train: Iterable,
    val: Iterable,
    amp: Amp,
    *,
    num_images: int,
    num_classes: int,
    ignore_index: int,
    max_patches: int,
    seed: int,
    on_prediction: Callable[[int, Tensor], None],
) -> tuple[dict[str, Scores], str]:
    """Fit a classifier to the patches of the training images and score it on the validation images of all ranks.

    Args:
        head: "knn" or "logreg".
        train: images with labels of the same size.
        val: one image at a time, with its label at the original size (H, W), where all pixels of a patch get its class.
        num_images: training images.
        max_patches: most patches in memory; each image gives an equal part.
        on_prediction: gets the index of each validation image of this rank and its predicted classes (H, W).

    Returns:
        Scores by name of the prediction, and the name that the held-out images chose.

    Raises:
        ValueError: no patches to fit, or none to choose hyper-parameters on.
    """
    features, labels = extract_patches(encode, train, amp, num_images, max(1, max_patches // num_images), seed)
    held = held_out(num_images, seed)[:, None].expand(labels.shape)
    valid = labels != ignore_index
    features, labels, held = features[valid].to(amp.device), labels[valid].to(amp.device).long(), held[valid]
    if held.all() or not held.any():
        raise ValueError(
            f"{num_images} training images are too few: a tenth of them chooses hyper-parameters, and that or "
            "the rest has no labelled patch"
        )
    mean, std = standardization(features)
    features.sub_(mean).div_(std)
    log.info("patches   %s, %s held out to choose hyper-parameters", f"{len(labels):,}", f"{int(held.sum()):,}")
    classify, names, chosen = build_classifier(head, features, labels, held.to(amp.device), num_classes)

    matrices = {name: ConfusionMatrix(num_classes, ignore_index, amp.device) for name in names}
    for (images, maps), _, index, *_ in val:
        tokens = encode(images)  # (1, E, h, w)
        rows = (tokens[0].flatten(1).T - mean) / std
        label = maps[0].to(amp.device)
        for name, prediction in classify(rows).items():
            grid = prediction.to(torch.uint8).view(1, 1, *tokens.shape[2:])
            pixels = F.interpolate(grid, size=label.shape, mode="nearest")[0, 0]
            matrices[name].update(pixels, label)
            if name == chosen:
                on_prediction(int(index), pixels)
    return {name: matrix.scores(all_reduce_sum) for name, matrix in matrices.items()}, chosen
