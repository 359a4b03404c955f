"""Nearest neighbours: a judgement of features that trains nothing."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from underpaint.console import progress
from underpaint.evaluation.results import Probe
from underpaint.evaluation.splits import Labels, as_task, hold_out, stratified

CHUNK = 2**24  # similarities that are held at once
CHOOSING = 2_000  # images of the validation part that choose k


def knn(
    train_x: Float[Tensor, "n d"],
    train_y: Labels,
    test_x: Float[Tensor, "m d"],
    test_y: Labels,
    *,
    ks: Sequence[int] = (1, 5, 10, 20, 50),
    temperature: float = 0.07,
    seed: int = 0,
) -> Probe:
    """Weighted nearest neighbours by cosine (Wu et al., arXiv 1805.01978): votes of exp(similarity / temperature).

    `ks` above the number of training images are left out; k is the one that is best on a fifth of train (at most
    2,000 images) from the rest, the smallest among equals. It runs where `train_x` lies.
    Raises InputError for labels or features that cannot be probed.
    """
    task = as_task(train_x, train_y, test_x, test_y)
    fit, held = hold_out(task.train, seed)
    candidates = sorted({min(k, len(fit)) for k in ks})
    train_x = F.normalize(train_x.float(), dim=1)
    best = candidates[0]
    if len(held) and len(candidates) > 1:
        held = held[stratified(task.train[held], CHOOSING, seed)]
        found = _predict(train_x[fit], task.train[fit], train_x[held], candidates, temperature)
        best = candidates[int((found == task.train[held]).mean(axis=1).argmax())]
    test_x = F.normalize(test_x.to(train_x.device).float(), dim=1)
    predicted = _predict(train_x, task.train, test_x, [best], temperature)[0]
    return Probe.of(task.hits(predicted), {"k": float(best)}, task.classes[predicted])


def _predict(
    x: Float[Tensor, "n d"],
    y: Int[np.ndarray, "n"],
    queries: Float[Tensor, "m d"],
    ks: list[int],
    temperature: float,
) -> Int[np.ndarray, "k m"]:
    """The winning class of every query, for each of the ascending `ks`; all vectors have length 1."""
    labels = torch.from_numpy(y).to(x.device)
    winners = []
    for part in progress(queries.split(max(1, CHUNK // len(x))), "nearest neighbours"):
        similarity, index = (part @ x.T).topk(ks[-1], dim=1)
        # the common factor exp(1 / temperature) left out, so that a small temperature cannot overflow
        weight = ((similarity.double() - 1) / temperature).exp()
        neighbours = labels[index]
        votes = weight.new_zeros(len(part), int(labels.max()) + 1)
        by_k = []
        for low, high in zip([0, *ks], ks, strict=False):
            votes.scatter_add_(1, neighbours[:, low:high], weight[:, low:high])
            by_k.append(votes.argmax(dim=1))
        winners.append(torch.stack(by_k))
    return torch.cat(winners, dim=1).cpu().numpy()
