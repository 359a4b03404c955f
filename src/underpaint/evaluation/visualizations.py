"""What the features see, as pictures: patches by colour, nearest neighbours, and a map of images.

Nothing random is left: the same encoder and images give the same files. Where features are not finite there are no
pictures, and of constant ones there is no map.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from underpaint.backbones import Backbone
from underpaint.data import ImageSet, eval_batches
from underpaint.evaluation.features import Images, Known, extract
from underpaint.evaluation.probes import ProbeSuite
from underpaint.evaluation.splits import Split, stratified
from underpaint.files import replacing, write_json
from underpaint.patches import Standardize
from underpaint.report.figures.pictures import sheet, to_rgb

PATCH_IMAGES, PATCH_TOKENS = 256, 32_768  # at most, to find the colours by
QUERIES, CANDIDATES = 500, 1_500  # labelled images whose neighbours are sought, and among which
SHOWN, NEIGHBOURS = 8, 5  # queries on the picture, and neighbours of each
MAPPED, FEWEST = 400, 10  # images on the map: at most, and below that there is none
TILE, THUMBNAIL = 64, 32  # pixels of the longer side, among neighbours and on the map
SAME = 1e-5  # of the features' size: what differs less is rounding
SAME_LABEL = (0, 130, 90)  # RGB of the bar under a neighbour with the query's label


def write_visualizations(
    encoder: Backbone,
    untrained: Backbone,
    suite: ProbeSuite,
    standardize: Standardize,
    folder: Path,
    before: str = "untrained",
    known: tuple[Sequence[Known], Sequence[Known]] = ((), ()),
) -> None:
    """Write features.png, neighbours.png, map.png and looks.json; older ones are replaced or removed. `before` is what the
    encoder before training is called on them, `known` what both encoders made of images already.

    looks.json: `images` (how many were compared), `queries`, `neighbours` (of each query), and with labels
    `same_label`: the share of nearest neighbours with the query's label, "pretrained", "untrained" and their
    "difference", each with its standard error over queries ("..._error"), and "chance", the share among all
    candidates.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("features.png", "neighbours.png", "map.png", "looks.json"):
        (folder / name).unlink(missing_ok=True)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        networks = {before: untrained, "pretrained": encoder}
        _write_features(
            networks, suite, standardize, folder / "features.png", {before: known[1], "pretrained": known[0]}
        )
        compared = _Compared.of(encoder, untrained, suite, standardize, known)
        looks: dict[str, object] = {"images": len(compared.tiles)}
        if compared.finite and compared.count:
            after, earlier = compared.neighbours(compared.pretrained), compared.neighbours(compared.untrained)
            looks |= {"queries": len(compared.queries), "neighbours": compared.count}
            if compared.labels is not None:
                looks["same_label"] = same_label(compared.labels, compared.queries, compared.candidates, after, earlier)
            _write_neighbours(compared, {"pretrained": after, before: earlier}, folder / "neighbours.png")
        if compared.finite:
            _write_map(compared, folder / "map.png")
    write_json(folder / "looks.json", looks)


# -- patches by colour --------------------------------------------------------------------------------------------------


@dataclass
class Colours:
    """The first three principal components of patch features, as red, green and blue."""

    mean: Float[np.ndarray, "d"]
    components: Float[np.ndarray, "d k"]  # k is 3, or d where that is less
    low: Float[np.ndarray, "k"]  # the 2 % quantile of each component
    width: Float[np.ndarray, "k"]  # from there to the 98 % quantile; 0 where nothing differs

    @classmethod
    def of(cls, patches: Float[Tensor, "n d"]) -> "Colours":
        """Fitted to finite features of patches; the largest loading of a component is positive."""
        x = patches.double().numpy()
        mean = x.mean(axis=0)
        size = float(np.sqrt(np.square(x).mean(axis=0).sum()))
        x = x - mean
        components = principal(x)
        values = x @ components
        low, high = np.quantile(values, [0.02, 0.98], axis=0)
        rare = high - low <= SAME * size  # few patches differ: quantiles do not see them
        low[rare], high[rare] = values.min(axis=0)[rare], values.max(axis=0)[rare]
        width = high - low
        width[width <= SAME * size] = 0
        return cls(mean, components, low, width)

    def __call__(self, patches: Float[Tensor, "b n d"]) -> Float[Tensor, "b n 3"]:
        """Colours in [0, 1]; a component in which nothing differs is 0.5."""
        values = (patches.double().numpy() - self.mean) @ self.components - self.low
        colours = np.full((*patches.shape[:2], 3), 0.5)
        differ = np.flatnonzero(self.width)
        colours[..., differ] = (values[..., differ] / self.width[differ]).clip(0, 1)
        return torch.from_numpy(colours).float()


def principal(x: Float[np.ndarray, "n d"], most: int = 3) -> Float[np.ndarray, "d k"]:
    """The directions of largest variance of centred rows, in descending order; at most `most`, and at most d."""
    from scipy.linalg import eigh

    d = x.shape[1]
    _, vectors = eigh(x.T @ x, subset_by_index=[max(0, d - most), d - 1])
    vectors = vectors[:, ::-1]
    largest = vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])]
    return vectors * np.where(largest < 0, -1.0, 1.0)


def _write_features(
    networks: Mapping[str, Backbone],
    suite: ProbeSuite,
    standardize: Standardize,
    path: Path,
    known: Mapping[str, Sequence[Known]],
) -> None:
    """The shown images, and the colours of their patches before and after training."""
    grid = networks["pretrained"].grid(*suite.size)
    count = max(1, min(PATCH_IMAGES, PATCH_TOKENS // (grid[0] * grid[1])))
    sample = _some(suite.pool, count, suite.seed)
    first, images = suite.shown_samples(), suite.shown(standardize.mean.device)

    def tokens(network: Backbone, those: Sequence[Known], samples: list[int], batches: Iterable[Images]) -> Tensor:
        for one in those:
            if (found := one.patches(suite.pool, samples)) is not None:
                return found.float()
        return extract(network, batches, transform=standardize).patches.float()

    columns = {"original": images.cpu()}
    for caption, network in networks.items():
        batches = eval_batches(suite.pool, size=suite.size, indices=sample, device=standardize.mean.device)
        fitted = tokens(network, known[caption], sample, batches)
        shown = tokens(network, known[caption], first, [_Shown(images)])
        if not (torch.isfinite(fitted).all() and torch.isfinite(shown).all()):
            return
        colours = Colours.of(fitted.flatten(0, 1))(shown)
        cells = colours.transpose(1, 2).reshape(len(images), 3, *grid)
        columns[caption] = F.interpolate(cells, suite.size, mode="nearest-exact")
    sheet(columns, path)


@dataclass
class _Shown:
    images: Tensor


# -- neighbours ---------------------------------------------------------------------------------------------------------


@dataclass
class _Compared:
    """Images, small, with their pooled features by both encoders: queries, and those among which they look."""

    tiles: list[np.ndarray]  # uint8 [height, width, 3]
    pretrained: Float[Tensor, "n d"]  # of length 1; float64
    untrained: Float[Tensor, "n d"]
    finite: bool
    queries: Int[np.ndarray, "q"]  # positions in `tiles`
    candidates: Int[np.ndarray, "c"]  # without labels these are the queries too
    labels: np.ndarray | None
    seed: int

    @classmethod
    def of(
        cls,
        encoder: Backbone,
        untrained: Backbone,
        suite: ProbeSuite,
        standardize: Standardize,
        known: tuple[Sequence[Known], Sequence[Known]] = ((), ()),
    ) -> "_Compared":
        if suite.splits is None:
            parts = [Split(suite.pool, _some(suite.pool, QUERIES + CANDIDATES, suite.seed))]
        else:
            parts = [suite.splits[1].subset(QUERIES, suite.seed), suite.splits[0].subset(CANDIDATES, suite.seed)]
        tiles, labels, counts, pretrained, before = [], [], [], [], []
        for part in parts:
            # equal distances are taken in the order of the images, which must not be that of the classes
            indices = np.random.default_rng(suite.seed).permutation(part.indices).tolist()
            seen: list[int] = []
            for batch in eval_batches(part.images, size=suite.size, indices=indices, device=standardize.mean.device):
                tiles += small(batch.images, TILE)
                seen += batch.samples
                for network, kept, those in ((encoder, pretrained, known[0]), (untrained, before, known[1])):
                    found = next((x for k in those if (x := k.pooled(part.images, batch.samples)) is not None), None)
                    if found is None:
                        found = extract(network, [batch], transform=standardize, with_patches=False).pooled
                    kept.append(found)
            counts.append(len(seen))
            if suite.splits is not None:
                labels.append(part.labels_of(seen))
        x, y = torch.cat(pretrained).double(), torch.cat(before).double()
        everything = np.arange(len(tiles))
        return cls(
            tiles,
            F.normalize(x, dim=1),
            F.normalize(y, dim=1),
            bool(torch.isfinite(x).all() and torch.isfinite(y).all()),
            everything[: counts[0]],
            everything if suite.splits is None else everything[counts[0] :],
            np.concatenate(labels) if labels else None,
            suite.seed,
        )

    @property
    def count(self) -> int:
        """Neighbours of each query."""
        return min(NEIGHBOURS, len(self.candidates) - (self.labels is None))

    def neighbours(self, features: Float[Tensor, "n d"]) -> Int[np.ndarray, "q k"]:
        """The nearest candidates of every query by cosine, the nearest first, itself left out."""
        similarity = features[self.queries] @ features[self.candidates].T
        itself = self.queries[:, None] == self.candidates[None]
        similarity[torch.from_numpy(itself)] = -torch.inf
        order = similarity.argsort(dim=1, descending=True, stable=True)
        return self.candidates[order[:, : self.count].numpy()]


def same_label(
    labels: Int[np.ndarray, "n"],
    queries: Int[np.ndarray, "q"],
    candidates: Int[np.ndarray, "c"],
    pretrained: Int[np.ndarray, "q k"],
    untrained: Int[np.ndarray, "q k"],
) -> dict[str, float]:
    """The shares of neighbours (positions in `labels`) that have the query's label, with standard errors."""
    wanted = labels[queries][:, None]
    shares = [(labels[found] == wanted).mean(axis=1) for found in (pretrained, untrained)]
    known = {}
    for name, values in zip(("pretrained", "untrained", "difference"), (*shares, shares[0] - shares[1]), strict=True):
        error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
        known |= {name: float(values.mean()), f"{name}_error": float(error)}
    return known | {"chance": float((labels[candidates][None] == wanted).mean())}


def _write_neighbours(compared: _Compared, nearest: Mapping[str, Int[np.ndarray, "q k"]], path: Path) -> None:
    """A row a query: itself, its neighbours after training, and those before."""
    if compared.labels is None:
        rows = np.arange(min(SHOWN, len(compared.queries)))  # they are in random order
    else:
        rows = stratified(compared.labels[compared.queries], SHOWN, compared.seed)
    height, width, _ = compared.tiles[0].shape
    gap, between, top, bar = 4, 20, 24, 5
    block = compared.count * (width + gap)
    lefts = (gap, gap + max(width, 40) + between, gap + max(width, 40) + 2 * between + max(block, 180))
    canvas = Image.new("RGB", (lefts[2] + max(block, 180), top + len(rows) * (height + bar + gap)), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for left, caption in zip(lefts, ("query", *(f"nearest: {name}" for name in nearest)), strict=True):
        pen.text((left, 2), caption, fill="black", font=font)
    for place, row in enumerate(rows):
        query, y = compared.queries[row], top + place * (height + bar + gap)
        canvas.paste(Image.fromarray(compared.tiles[query]), (lefts[0], y))
        for left, found in zip(lefts[1:], nearest.values(), strict=True):
            for n, neighbour in enumerate(found[row]):
                x = left + n * (width + gap)
                canvas.paste(Image.fromarray(compared.tiles[neighbour]), (x, y))
                if compared.labels is not None and compared.labels[neighbour] == compared.labels[query]:
                    pen.rectangle((x, y + height + 1, x + width - 1, y + height + bar - 1), fill=SAME_LABEL)
    _save(canvas, path)


# -- map ----------------------------------------------------------------------------------------------------------------


def _write_map(compared: _Compared, path: Path) -> None:
    """Images on a square grid, those with like pretrained features beside each other."""
    chosen = compared.queries[:MAPPED]  # they are in random order
    points = plane(compared.pretrained[chosen].numpy(), compared.seed) if len(chosen) >= FEWEST else None
    if points is None:
        return
    cells = on_grid(points)
    side = int(np.ceil(np.sqrt(len(chosen))))
    height, width, _ = compared.tiles[0].shape
    size = (max(1, width * THUMBNAIL // TILE), max(1, height * THUMBNAIL // TILE))
    canvas = Image.new("RGB", (side * size[0], side * size[1]), "white")
    for image, (row, column) in zip(chosen, cells, strict=True):
        tile = Image.fromarray(compared.tiles[image]).resize(size, Image.Resampling.BOX)
        canvas.paste(tile, (int(column) * size[0], int(row) * size[1]))
    _save(canvas, path)


def plane(x: Float[np.ndarray, "n d"], seed: int) -> Float[np.ndarray, "n 2"] | None:
    """Feature vectors of length 1 on a plane, by t-SNE; None where they do not differ."""
    from sklearn.manifold import TSNE  # at the end of a run only: importing it takes a second

    x = x - x.mean(axis=0)
    size = float(np.sqrt(np.square(x).sum(axis=1).mean()))
    if size <= SAME:
        return None
    start = np.zeros((len(x), 2), dtype=np.float32)  # scikit-learn's own start from PCA needs two dimensions
    values = x @ principal(x, 2)
    start[:, : values.shape[1]] = 1e-4 * values / values[:, 0].std()
    tsne = TSNE(
        init=start,  # pyright: ignore[reportArgumentType] -- an array is documented too
        perplexity=min(30.0, (len(x) - 1) / 3),
        random_state=seed % 2**32,
        method="exact" if len(x) <= MAPPED else "barnes_hut",  # exact is as quick for few
    )
    return tsne.fit_transform(x / size)


def on_grid(points: Float[np.ndarray, "n 2"]) -> Int[np.ndarray, "n 2"]:
    """Row and column of each point on the smallest square grid that holds them, no two alike, each near its place."""
    from scipy.optimize import linear_sum_assignment

    side = int(np.ceil(np.sqrt(len(points))))
    low, high = points.min(axis=0), points.max(axis=0)
    places = (points - low) / np.where(high > low, high - low, 1) * (side - 1)  # x, y
    cells = np.stack(np.divmod(np.arange(side * side), side), axis=1)  # row, column
    cost = np.square(places[:, None, ::-1] - cells[None]).sum(axis=2)
    return cells[linear_sum_assignment(cost)[1]]


# -- small things -------------------------------------------------------------------------------------------------------


def small(images: Float[Tensor, "b c height width"], side: int) -> list[np.ndarray]:
    """Images in [0, 1] as uint8 RGB, their longer side `side` pixels; small ones are enlarged to it."""
    height, width = images.shape[-2:]
    scale = side / max(height, width)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    if scale >= 1 and scale == int(scale):
        resized = F.interpolate(images, size, mode="nearest-exact")
    else:
        resized = F.interpolate(images, size, mode="bilinear", antialias=True)
    return list(to_rgb(resized))


def _some(images: ImageSet, count: int, seed: int) -> list[int]:
    """At most `count` random images."""
    return np.sort(np.random.default_rng(seed).permutation(len(images))[:count]).tolist()


def _save(canvas: Image.Image, path: Path) -> None:
    with replacing(path) as temporary:
        canvas.save(temporary, format="PNG")
