"""Pictures of results, as PNG: confusion matrices, histograms, sheets of small pictures."""

from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Float, Int, Shaped, UInt8
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from underpaint.files import replacing
from underpaint.report.figures.plots import PALETTE

NUMBERED = 12  # classes up to which the cells of a matrix are numbered
TILE = 96  # pixels of the longer side of a small picture
NAMED = 40  # and up to which rows and columns are named


def confusion_picture(
    wanted: Int[np.ndarray, "n"], said: Int[np.ndarray, "n"], name: Callable[[int], str], path: Path
) -> None:
    """Shares of each true class (a row) that were taken for each class (a column)."""
    labels = np.unique(np.concatenate([wanted, said]))
    counts = np.zeros((len(labels), len(labels)))
    np.add.at(counts, (np.searchsorted(labels, wanted), np.searchsorted(labels, said)), 1)
    matrix_picture(counts, [name(label) for label in labels.tolist()], path)


def matrix_picture(counts: Shaped[np.ndarray, "k k"], names: list[str], path: Path) -> None:
    """Rows as shares of their sums; a class that never occurs is an empty row."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = float(np.clip(0.42 * len(names) + 1.6, 3.2, 11))
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(side + 0.6, side), layout="constrained", dpi=110)
        axes = figure.add_subplot()
        shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        if len(names) <= NUMBERED:
            for (row, column), share in np.ndenumerate(shares):
                colour = "white" if share > 0.5 else "black"
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=colour, fontsize=8)
        if len(names) <= NAMED:
            axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
            axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("taken for")
        axes.set_ylabel("true class")
        figure.colorbar(shown, label="share of the true class", shrink=0.8)
        _save(figure, path)


def histogram_picture(groups: dict[str, Float[np.ndarray, "n"]], x_label: str, path: Path) -> None:
    """Distributions of a score over each other, each of area 1."""
    together = np.concatenate(list(groups.values()))
    low, high = np.quantile(together, [0.002, 0.998])
    edges = np.linspace(low, high if high > low else low + 1, 60)
    with matplotlib.rc_context({"font.size": 10}):
        figure = Figure(figsize=(5.2, 3.0), layout="constrained", dpi=110)
        axes = figure.add_subplot()
        for (name, values), colour in zip(groups.items(), PALETTE, strict=False):
            axes.hist(values.clip(edges[0], edges[-1]), edges, density=True, alpha=0.55, color=colour, label=name)
        axes.set_xlabel(x_label)
        axes.set_ylabel("density")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        _save(figure, path)


def contact_sheet(tiles: list[tuple[UInt8[np.ndarray, "h w 3"], str]], path: Path, columns: int = 6) -> None:
    """Small pictures, each with a line below."""
    gap, line = 8, 18
    wide, tall = TILE + 24, TILE + line
    rows = -(-len(tiles) // columns)
    canvas = Image.new("RGB", (columns * (wide + gap) + gap, rows * (tall + gap) + gap), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for number, (tile, text) in enumerate(tiles):
        x, y = gap + number % columns * (wide + gap), gap + number // columns * (tall + gap)
        scale = TILE / max(tile.shape[:2])
        size = (max(1, round(tile.shape[1] * scale)), max(1, round(tile.shape[0] * scale)))
        resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        canvas.paste(Image.fromarray(tile).resize(size, resample), (x, y))
        while text and font.getlength(text) > wide:
            text = text[:-2].rstrip() + "…" if not text.endswith("…") else text[:-2] + "…"
        pen.text((x, y + TILE + 2), text, fill="black", font=font)
    with replacing(path) as temporary:
        canvas.save(temporary, format="PNG")


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
