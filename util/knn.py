"""Weighted k-nearest-neighbour classification (Wu et al. 2018, DINO's form): exact, in bounded memory.

Shapes: N training features, Q queries, E width, K neighbours.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

TEMPERATURE = 0.07  # of the votes, DINO's


def nearest(train_features: Tensor, queries: Tensor, k: int, chunk: int = 65536) -> tuple[Tensor, Tensor]:
    """The k most similar of (N, E) for each of (Q, E), best first -> similarity (Q, K), index (Q, K).

    Training features are compared `chunk` at a time, so no (Q, N) matrix is built.
    """
    similarity = queries.new_empty(len(queries), 0)
    index = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    for start in range(0, len(train_features), chunk):
        new = queries @ train_features[start : start + chunk].T  # (Q, chunk)
        new, position = new.topk(min(k, new.shape[1]), dim=1)
        similarity, index = torch.cat([similarity, new], dim=1), torch.cat([index, position + start], dim=1)
        similarity, order = similarity.topk(min(k, similarity.shape[1]), dim=1)
        index = index.gather(1, order)
    return similarity, index


def knn_correct(
    train_features: Tensor,
    train_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    ks: Sequence[int],
    T: float,
    num_classes: int,
    query_chunk: int = 256,
) -> dict[int, tuple[int, int]]:
    """Features (N, E), labels (N,), queries (Q, E), their labels (Q,) -> per k, correct in the top 1 and the top 5.

    Each of the k neighbours votes for its label with weight exp(similarity / T), up to a factor per query. Ties go to
    the lower class index.

    Raises:
        ValueError: k exceeds the number of training features.
    """
    if max(ks) > len(train_features):
        raise ValueError(f"k = {max(ks)} exceeds the {len(train_features)} training images: choose a smaller k")
    correct = {k: [0, 0] for k in ks}
    for start in range(0, len(queries), query_chunk):
        similarity, index = nearest(train_features, queries[start : start + query_chunk], max(ks))
        nearer = similarity - similarity[:, :1]  # relative to the nearest, so that small T cannot overflow
        voted, weight = train_labels[index], (nearer / T).exp()  # (Q, K)
        target = labels[start : start + query_chunk, None]
        for k in ks:
            votes = weight.new_zeros(len(voted), num_classes).scatter_add_(1, voted[:, :k], weight[:, :k])
            ranked = votes.argsort(dim=1, descending=True, stable=True)[:, :5] == target
            correct[k][0] += int(ranked[:, 0].sum())
            correct[k][1] += int(ranked.sum())
    return {k: (top1, top5) for k, (top1, top5) in correct.items()}


def knn_classifier(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    k: int,
    T: float,
    num_classes: int,
) -> tuple[float, float]:
    """L2-normalised features (N, E), (Q, E), labels (N,), (Q,) -> top-1 and top-5 accuracy in percent."""
    correct = knn_correct(train_features, train_labels, test_features, test_labels, [k], T, num_classes)
    top1, top5 = correct[k]
    return 100.0 * top1 / len(test_labels), 100.0 * top5 / len(test_labels)
