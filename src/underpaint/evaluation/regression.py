"""A number for each image: ridge regression on pooled features, which were computed once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor, nn

from underpaint.computing import output
from underpaint.data import Source, split_indices
from underpaint.errors import InputError
from underpaint.evaluation.base import ENCODER, PIXELS, Context, Evaluation, Kept, Row
from underpaint.evaluation.bundle import EncoderBundle
from underpaint.evaluation.classify import PICTURE, TABLE, Splits, Tiles, every, table
from underpaint.evaluation.frozen import Headed, LinearHead
from underpaint.evaluation.keep import Saved
from underpaint.evaluation.linear import statistics
from underpaint.evaluation.results import Measured, bootstrap, means, together
from underpaint.evaluation.settings import NoSettings
from underpaint.evaluation.splits import hold_out
from underpaint.evaluation.written import Written
from underpaint.files import replacing

MEAN = "mean"
PENALTIES = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)  # of squared weights, over the squared error an image
REDRAWS = 200


class Ridge(NamedTuple):
    """Numbers of features as they come: `x @ weight + bias`."""

    weight: Float[Tensor, "d"]  # float64
    bias: float
    penalty: float | None = None  # that was chosen

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[np.ndarray, "n"]:
        return (x.double() @ self.weight + self.bias).numpy()


def ridge(x: Float[Tensor, "n d"], y: Float[np.ndarray, "n"], *, seed: int = 0) -> Ridge:
    """Least squares with a penalty on the weights, on features standardised with the statistics of train.

    The penalty is chosen on a fifth of train by the squared error (the strongest among equals), then all of train is
    fitted again with it. Raises InputError for features that are not all finite.
    """
    if not bool(torch.isfinite(x.sum(dtype=torch.float64))):
        raise InputError("the features to regress on are not all finite")
    mean, scale = (each.double() for each in statistics(x.float()))
    standard, wanted = (x.double() - mean) / scale, torch.from_numpy(y)
    fitted, held = (torch.from_numpy(part) for part in hold_out(np.zeros(len(y), int), seed))
    penalty = PENALTIES[len(PENALTIES) // 2]  # where there is nothing to choose by
    if len(held):
        errors = [
            float((standard[held] @ weight + bias - wanted[held]).square().mean())
            for weight, bias in _solved(standard[fitted], wanted[fitted], PENALTIES)
        ]
        penalty = PENALTIES[int(np.argmin(errors))]
    ((weight, bias),) = _solved(standard, wanted, [penalty])
    weight = weight / scale
    return Ridge(weight, float(bias - mean @ weight), penalty)


def _solved(
    x: Float[Tensor, "n d"], y: Float[Tensor, "n"], penalties: Sequence[float]
) -> list[tuple[Float[Tensor, "d"], Float[Tensor, ""]]]:
    """Weights and bias by penalty."""
    mean, middle, (n, d) = x.mean(0), y.mean(), x.shape
    x, y = x - mean, y - middle
    unit = torch.eye(min(n, d), dtype=x.dtype)
    if d <= n:
        gram, moment = x.T @ x / n, x.T @ y / n
        weights = [torch.linalg.solve(gram + penalty * unit, moment) for penalty in penalties]
    else:  # the same weights, which lie in the span of the images
        gram = x @ x.T / n
        weights = [x.T @ torch.linalg.solve(gram + penalty * unit, y / n) for penalty in penalties]
    return [(weight, middle - mean @ weight) for weight in weights]


class Regression(Evaluation[NoSettings, Splits, Ridge, Float[np.ndarray, "n"]]):
    """Mean absolute error and R2 of an encoder, the same one untrained, pixels, and the mean of train."""

    annotation = "number"
    input = "pooled"
    Config = NoSettings

    def __init__(self, name: str, context: Context, data: Splits, config: NoSettings):
        super().__init__(name, context, data, config)
        self.train, self.test = data
        # of those that can be read
        self.seen = [context.features(ENCODER, split).samples.tolist() for split in data]
        self.known, self.wanted = (split.numbers_of(seen) for split, seen in zip(data, self.seen, strict=True))
        self.penalties: dict[str, float] = {}

    @classmethod
    def annotated(cls, source: Source) -> tuple[np.ndarray, np.ndarray]:
        """Raises InputError: no image has a number, or those to train on or to test on have none."""
        numbers = source.entries.numbers
        if numbers is None:
            raise InputError(
                f"{source.location} has no numbers; expected a numeric column (the only one, or one called number, target "
                "or value) of parquet files, or of labels.csv or metadata.csv beside the images"
            )
        train, test = split_indices(source, np.flatnonzero(~np.isnan(numbers)))
        if len(train) < 2 or not len(test):
            raise InputError(
                f"{source.location}: {len(train)} images with a number to train on, {len(test)} to test on"
            )
        return train, test

    @classmethod
    def load(cls, context: Context) -> Splits:
        train, test = cls.annotated(context.source)
        return context.load(context.source, context.fewer(train)), context.load(context.source, test)

    def rows(self) -> list[Row]:
        return [Row(who, who) for who in (*self.context.encoders, *PIXELS, MEAN)]

    def fit(self, row: Row) -> Ridge:
        if row.who == MEAN:
            return Ridge(torch.zeros(self.context.bundle.encoder.dim, dtype=torch.float64), float(self.known.mean()))
        return ridge(self.context.features(row.who, self.train).pooled, self.known, seed=self.context.options.seed)

    def predict(self, row: Row, model: Ridge) -> Float[np.ndarray, "n"]:
        if model.penalty is not None:
            self.penalties[row.name] = model.penalty
        return model(self.context.features(ENCODER if row.who == MEAN else row.who, self.test).pooled)

    def measure(self, found: Float[np.ndarray, "n"]) -> Measured:
        wanted, groups = self.wanted, self.test.groups_of(self.seen[1])

        def explained(chosen: Int[np.ndarray, "k"]) -> dict[str, float]:
            spread = np.square(wanted[chosen] - wanted[chosen].mean()).sum()
            left = np.square(wanted[chosen] - found[chosen]).sum()
            return {"r2": float(1 - left / spread) if spread > 0 else float("nan")}

        errors = means({"mae": np.abs(found - wanted)}, groups)
        return together(errors, bootstrap(explained, [(len(wanted), groups)], REDRAWS, self.context.options.seed))

    def facts(self) -> dict[str, object]:
        return {"train": len(self.known), "test": len(self.wanted), "number": self.context.source.number}

    def details(self, found: Mapping[str, Float[np.ndarray, "n"]]) -> dict[str, object]:
        return {"penalties": self.penalties}

    def kept(self, row: Row, model: Ridge) -> Kept:
        head = LinearHead(len(model.weight), 1)
        head.load_state_dict({"linear.weight": model.weight[None].float(), "linear.bias": torch.tensor([model.bias])})
        encoder = self.context.encoders[row.who].encoder
        return Kept(Headed(encoder, head, False), [], {"settings": {"number": self.context.source.number or "number"}})

    def visualize(self, row: Row, found: Float[np.ndarray, "n"], folder: Path) -> None:
        """What was said over what is so."""
        if row.who != ENCODER:
            return
        folder.mkdir(parents=True, exist_ok=True)
        name = self.context.source.number or "number"
        with matplotlib.rc_context({"font.size": 10}), replacing(folder / "numbers.png") as temporary:
            figure = Figure(figsize=(4.2, 4.0), layout="constrained", dpi=110)
            axes = figure.add_subplot(xlabel=name, ylabel=f"{name}, predicted")
            axes.scatter(self.wanted, found, s=10, alpha=0.6, linewidths=0)
            axes.axline((self.wanted.mean(), self.wanted.mean()), slope=1, color="grey", linewidth=1)
            axes.spines[["top", "right"]].set_visible(False)
            figure.savefig(temporary, format="png")

    @classmethod
    def rebuild(cls, saved: Saved, bundle: EncoderBundle) -> nn.Module:
        return Headed(bundle.encoder, LinearHead(bundle.encoder.dim, 1), False)

    @classmethod
    @torch.no_grad()
    def write(cls, model: nn.Module, saved: Saved, bundle: EncoderBundle, source: Source, folder: Path) -> Written:
        """predictions.csv (path, and the number by its name) and predictions.png."""
        images, name = bundle.images(source), saved["settings"]["number"]
        tiles = Tiles(len(images))
        said: list[np.ndarray] = []
        with table(folder, ["path", name]) as add:
            for batch in every(images, bundle):
                numbers = output(model, bundle.standardize(batch.images)).squeeze(1)
                for k, number in zip(batch.samples, numbers.tolist(), strict=True):
                    add([images.names[k], f"{number:.6g}"])
                tiles.add(batch, [f"{number:.4g}" for number in numbers.tolist()])
                said.append(numbers.cpu().numpy())
        tiles.write(folder / PICTURE)
        levels = {
            "smallest": 0.0,
            "a quarter below": 0.25,
            "half below": 0.5,
            "three quarters below": 0.75,
            "largest": 1.0,
        }
        rows = [[level, f"{np.quantile(np.concatenate(said), share):.4g}"] for level, share in levels.items()]
        return Written(tiles.count, ["", name], rows, {TABLE: f"an image a line: path, {name}"}, PICTURE)
