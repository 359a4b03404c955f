"""What lies near what among features, without labels: neighbours, clusters, and how typical each image is of its own."""

import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from underpaint.console import progress
from underpaint.errors import InputError

CHUNK = 2**24  # similarities that are held at once
BATCHED = 10_000  # images from which on k-means looks at some of them at a time
FEW = 50  # clusters, for which k-means starts more than once
TYPICAL_BY = 20  # nearest neighbours, as in TypiClust (arXiv 2202.02794)


class Neighbours(NamedTuple):
    """The nearest others of each image, the nearest first."""

    ids: Int[np.ndarray, "n k"]
    distances: Float[np.ndarray, "n k"]  # 1 minus the cosine


def directions(features: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Features without what all images share, their mean, and of length 1.

    Raises:
        InputError: they are not finite.
    """
    if not bool(torch.isfinite(features.sum(dtype=torch.float64))):
        raise InputError("the encoder's features of these images are not all finite")
    return F.normalize(features.float() - features.float().mean(dim=0), dim=1)


def nearest(x: Float[Tensor, "n d"], count: int) -> Neighbours:
    """The `count` nearest others of each of these vectors of length 1; of fewer images, all others."""
    count = min(count, len(x) - 1)
    ids, distances = [], []
    parts = torch.arange(len(x)).split(max(1, CHUNK // len(x)))
    for rows in progress(parts, "nearest neighbours"):
        similarity = x[rows] @ x.T
        similarity[torch.arange(len(rows)), rows] = -torch.inf
        value, index = similarity.topk(count, dim=1)
        ids.append(index)
        distances.append((1 - value).clamp(min=0))
    return Neighbours(torch.cat(ids).numpy(), torch.cat(distances).float().numpy())


def clusters(x: Float[Tensor, "n d"], count: int, seed: int = 0) -> Int[np.ndarray, "n"]:
    """The number of each image's cluster by k-means; 0 is the largest. There are fewer where fewer images differ."""
    from sklearn.cluster import KMeans, MiniBatchKMeans  # importing it takes a second
    from sklearn.exceptions import ConvergenceWarning

    count = min(count, len(x))
    starts: Any = 3 if count <= FEW else 1  # sklearn says str, where whole numbers are documented too
    if len(x) > BATCHED:
        model = MiniBatchKMeans(count, random_state=seed, n_init=starts, batch_size=4_096)
    else:
        model = KMeans(count, random_state=seed, n_init=starts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of images that are alike
        found = model.fit_predict(x.numpy())
    _, found, sizes = np.unique(found, return_inverse=True, return_counts=True)
    rank = np.empty(len(sizes), np.int64)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes))
    return rank[found]


def typicality(x: Float[Tensor, "n d"], cluster: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """One over the mean distance to the 20 nearest (at most half) of an image's cluster; 0 where it is alone there."""
    found = np.zeros(len(x))
    for number in np.unique(cluster):
        members = np.flatnonzero(cluster == number)
        if len(members) > 1:
            near = nearest(x[torch.from_numpy(members)], min(TYPICAL_BY, max(1, len(members) // 2)))
            found[members] = 1 / np.maximum(np.sqrt(2 * near.distances).mean(axis=1), 1e-3)
    return found
