"""Which images are unlike those that were trained on? The method's own score, and distances between features.

Images of one set are to be told from those of another. Every score is higher for the stranger image; nothing is fitted
to the strange ones.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from underpaint.evaluate.result import Measured, measured, redraw

NEIGHBOURS = 10
DRAWS = 200
CHUNK = 2_000  # images whose similarities are held at once


def neighbour_distance(train: Float[Tensor, "n d"], x: Float[Tensor, "m d"]) -> Float[np.ndarray, "m"]:
    """1 minus the mean cosine to the nearest `NEIGHBOURS` of train."""
    known = F.normalize(train.float(), dim=1)
    count = min(NEIGHBOURS, len(known))
    parts = [(F.normalize(part.float(), dim=1) @ known.T).topk(count, dim=1).values.mean(1) for part in x.split(CHUNK)]
    return (1 - torch.cat(parts)).double().numpy()


def mahalanobis(train: Float[Tensor, "n d"], x: Float[Tensor, "m d"]) -> Float[np.ndarray, "m"]:
    """Squared distance to the mean of train, in units of its covariance (shrunk as Ledoit and Wolf 2004 do)."""
    from sklearn.covariance import LedoitWolf

    known = train.double().numpy()
    scale = known.std(0)
    scale[scale <= 1e-6 * np.abs(known.mean(0)).max()] = 1.0
    fitted = LedoitWolf().fit(known / scale)
    return fitted.mahalanobis(x.double().numpy() / scale)


def separation(
    usual: Float[np.ndarray, "n"],
    strange: Float[np.ndarray, "m"],
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> Measured:
    """How well a score tells strange images from usual ones. `groups` of the usual ones are redrawn whole.

    Returns:
        auroc; aupr (strange images are what is sought); fpr95: the share of strange images that still pass where 95 %
        of the usual ones pass.
    """
    found = _separation(usual, strange)
    generator = np.random.default_rng(seed)
    draws = [
        _separation(usual[redraw(len(usual), groups, generator)], generator.choice(strange, len(strange)))
        for _ in range(DRAWS)
    ]
    return measured(("auroc", "aupr", "fpr95"), found, draws)


def _separation(usual: np.ndarray, strange: np.ndarray) -> tuple[float, float, float]:
    from sklearn.metrics import average_precision_score, roc_auc_score

    scores = np.concatenate([usual, strange])
    truth = np.concatenate([np.zeros(len(usual)), np.ones(len(strange))])
    passed = float((strange <= np.quantile(usual, 0.95)).mean())
    return float(roc_auc_score(truth, scores)), float(average_precision_score(truth, scores)), passed
