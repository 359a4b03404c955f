"""Which images are unlike those that were trained on? The method's own score, and distances between features.

Images of one set are to be told from those of another. Every score is higher for the stranger image; nothing is fitted
to the strange ones.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from underpaint.data import eval_batches, open_source, split_indices
from underpaint.errors import InputError
from underpaint.evaluation.base import ENCODER, Context, Evaluation, Row
from underpaint.evaluation.features import counted
from underpaint.evaluation.plots import histogram_picture
from underpaint.evaluation.results import Groups, Measured, bootstrap
from underpaint.evaluation.settings import NoSettings
from underpaint.evaluation.splits import Split
from underpaint.inference import load_method

NEIGHBOURS = 10
REDRAWS = 200
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
    usual: Float[np.ndarray, "n"], strange: Float[np.ndarray, "m"], seed: int = 0, groups: Groups = None
) -> Measured:
    """How well a score tells strange images from usual ones. `groups` of the usual ones are redrawn whole.

    Returns:
        auroc; aupr (strange images are what is sought); fpr95: the share of strange images that still pass where 95 %
        of the usual ones pass.
    """
    scores = np.concatenate([usual, strange])

    def aggregate(chosen: Int[np.ndarray, "k"]) -> dict[str, float]:
        return _separation(scores[chosen[: len(usual)]], scores[chosen[len(usual) :]])

    return bootstrap(aggregate, [(len(usual), groups), (len(strange), None)], REDRAWS, seed)


def _separation(usual: np.ndarray, strange: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import average_precision_score, roc_auc_score

    scores = np.concatenate([usual, strange])
    truth = np.concatenate([np.zeros(len(usual)), np.ones(len(strange))])
    return {
        "auroc": float(roc_auc_score(truth, scores)),
        "aupr": float(average_precision_score(truth, scores)),
        "fpr95": float((strange <= np.quantile(usual, 0.95)).mean()),
    }


class Scores(NamedTuple):
    """Of each image, higher for the stranger."""

    usual: Float[np.ndarray, "n"]
    strange: Float[np.ndarray, "m"]


class Sets(NamedTuple):
    """Images to know, others like them, and those to be told from them."""

    train: Split
    usual: Split
    strange: Split


Distance = Callable[[Float[Tensor, "n d"], Float[Tensor, "m d"]], Float[np.ndarray, "m"]]
DISTANCES: dict[str, Distance] = {"kNN distance": neighbour_distance, "Mahalanobis": mahalanobis}
OWN = "the method's own score"


class Outliers(Evaluation[NoSettings, Sets, None, Scores]):
    """Test images of DATA against all of other images, by every score there is."""

    annotation = "none"
    input = "pooled"
    Config = NoSettings
    asks = ("against",)

    @classmethod
    def load(cls, context: Context) -> Sets:
        if context.options.against is None:
            raise InputError("--task outliers: give the other images with --against DATA")
        source, other = context.source, open_source(context.options.against)
        train, test = split_indices(source, range(len(source.entries)))
        return Sets(
            context.load(source, train), context.load(source, test), context.load(other, range(len(other.entries)))
        )

    def rows(self) -> list[Row]:
        name, trained = self.context.bundle.name, self.context.bundle.trained
        own = [Row(OWN, OWN)] if trained and (Path(name) / "checkpoints").is_dir() else []
        rows = [Row(f"{who}, {how}", who, how) for who in self.context.encoders for how in DISTANCES]
        return [*own, *rows, Row("raw pixels, kNN distance", "raw pixels", "kNN distance")]

    def fit(self, row: Row) -> None:
        """Nothing is: distances are to all of train."""

    def predict(self, row: Row, model: None) -> Scores:
        if row.who == OWN:
            return self._own()
        train, usual, strange = (self.context.features(row.who, split).pooled for split in self.data)
        distance = DISTANCES[row.variant]
        return Scores(distance(train, usual), distance(train, strange))

    @torch.no_grad()
    def _own(self) -> Scores:
        """The energy or the restoration error of a trained run."""
        method, standardize, recipe = load_method(self.context.bundle.name)
        found = []
        for split in (self.data.usual, self.data.strange):
            batches = eval_batches(split.images, size=recipe.data.image_size, batch_size=64)
            some = counted(batches, "scoring", len(split.images))
            found.append(torch.cat([method.score(standardize(batch.images)) for batch in some]).double().cpu().numpy())
        return Scores(*found)

    def measure(self, found: Scores) -> Measured:
        usual = self.data.usual
        seen = self.context.features(ENCODER, usual).samples.tolist()
        return separation(found.usual, found.strange, self.context.options.seed, usual.groups_of(seen))

    def facts(self) -> dict[str, object]:
        train, usual, strange = (len(split.images) for split in self.data)
        return {"train": train, "test": usual, "against": str(self.context.options.against), "strange": strange}

    def visualize(self, row: Row, found: Scores, folder: Path) -> None:
        name = re.sub("[^A-Za-z]+", "-", row.name)
        histogram_picture({"usual": found.usual, "strange": found.strange}, row.name, self.folder / f"{name}.png")
