"""A set of images by what an encoder sees of them: a map, neighbours, clusters, odd ones, near-duplicates.

Everything is in one parquet file, which Embedding Atlas opens, and on one page that needs nothing but a browser.
"""

import csv
import io
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from underpaint.console import say
from underpaint.data import ImageSet, Source, eval_batches, open_source
from underpaint.errors import InputError
from underpaint.evaluation.bundle import EncoderBundle, open_bundle
from underpaint.evaluation.features import counted, stored_features
from underpaint.evaluation.neighbourhood import Neighbours, clusters, directions, nearest, typicality
from underpaint.evaluation.splits import Split
from underpaint.evaluation.visualizations import plane, small
from underpaint.files import AS_IT_IS, check_writable, refuse_inside, replacing, utf8
from underpaint.report.exploration import Explored, Row, Section, Tile, write_exploration

MOST = 100_000  # images; of more, so many are drawn at random
NEIGHBOURS = 15  # of each image, in the file; as many as UMAP asks for
CLUSTERS = 40  # at most
LANDMARKS = 3_000  # images that t-SNE lays out; others come between the nearest of them
THUMBNAIL = 64  # pixels of the longer side, at most
GIST, SAME, FLAT = 16, 0.98, 2.0  # pixels by which near-duplicates are told, their correlation, grey levels of contrast
GROUP = 1_000  # rows of the file that are written at a time
SHOWN = 5_000  # images on the page, which is to stay light
TYPICAL, ODD, PAIRS = 7, 24, 24  # images of each cluster, odd ones, groups of near-duplicates, that the page names


@dataclass
class Known:
    """What is known of every image, in the order of the file."""

    names: list[str]
    columns: dict[str, list[str | None]]  # cluster, label, prediction and split, as far as there are some
    x: Float[Tensor, "n d"]
    near: Neighbours
    cluster: Int[np.ndarray, "n"]
    oddness: Float[np.ndarray, "n"]
    copies: Int[np.ndarray, "n"]  # the group of near-duplicates, -1 for none
    places: Float[np.ndarray, "n 2"]
    pictures: list[bytes]  # JPEG


def explore(
    encoder: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    predictions: str | Path | None = None,
    image_size: tuple[int, int] | None = None,
) -> Path:
    """Write images.parquet and explore.html into a folder; the path of the page.

    Args:
        encoder: a run, a file of weights, a Hugging Face folder, or `timm:NAME`.
        data: as for pretraining; of more than 100,000 images so many are drawn at random.
        out: a folder.
        predictions: a predictions.csv of `underpaint predict` (path, class); where there is none, and images have
            labels, what an image's neighbours are stands for it.

    Raises:
        InputError: an encoder, data or predictions that cannot be used; fewer than three images; a folder that cannot be
            written.
    """
    folder = Path(out)
    refuse_inside(out, data)
    check_writable(folder)
    said = None if predictions is None else _predictions(Path(predictions))
    source = open_source(data)
    for note in source.notes:
        say(note)
    chosen = np.arange(len(source.entries))
    if len(chosen) > MOST:
        say(f"{len(chosen):,} images: {MOST:,} of them, drawn at random, are explored")
        chosen = np.sort(np.random.default_rng(0).permutation(chosen)[:MOST])
    bundle = open_bundle(str(encoder), image_size=image_size).scaled(source, chosen)
    for note in bundle.notes:
        say(note)
    found, how = _known(bundle, source, chosen, said)
    facts = {"encoder": bundle.name, "images": f"{len(found.names):,} of {data}", "map": how}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_table(found, folder / "images.parquet")
        return write_exploration(_page(found, facts, said is not None), folder / "explore.html")
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error.strerror}") from error


def _known(
    bundle: EncoderBundle, source: Source, chosen: Int[np.ndarray, "n"], said: dict[str, str] | None
) -> tuple[Known, str]:
    """What is known of every image, and how the map was made."""
    images = bundle.images(source, chosen)
    features = stored_features(bundle, Split(images, range(len(images))), with_patches=False)
    samples = features.samples
    if len(samples) < 3:
        raise InputError(f"{source.location}: {len(samples)} images can be read; a map needs at least 3")
    names = [images.names[k] for k in samples]
    x = directions(features.pooled)
    near = nearest(x, NEIGHBOURS)
    cluster = clusters(x, min(CLUSTERS, max(2, round((len(x) / 2) ** 0.5))))
    pictures, gists = _thumbnails(bundle, images, samples)
    columns: dict[str, list[str | None]] = {"cluster": [f"cluster {number:02d}" for number in cluster.tolist()]}
    codes, classes = images.labels[samples], images.classes or []
    if (codes >= 0).any():
        columns["label"] = [classes[code] if code >= 0 else None for code in codes.tolist()]
        columns["prediction"] = _by_neighbours(near, codes, classes)
    if said is not None:
        columns["prediction"] = [said.get(name) for name in names]
        if not any(columns["prediction"]):
            raise InputError(f"--predictions: none of its {len(said):,} paths is one of the images, such as {names[0]}")
    entries = source.entries
    split_of = dict(zip((entries.names[k] for k in chosen), entries.splits[chosen].tolist(), strict=True))
    if entries.split_names:
        columns["split"] = [entries.split_names[code] if (code := split_of[name]) >= 0 else None for name in names]
    places, how = layout(x, near)
    oddness = near.distances[:, :10].mean(axis=1)
    columns = {name: [each and utf8(each) for each in values] for name, values in columns.items()}
    shown = [utf8(name) for name in names]
    return Known(shown, columns, x, near, cluster, oddness, copies(near, gists), places, pictures), how


def _thumbnails(
    bundle: EncoderBundle, images: ImageSet, samples: np.ndarray
) -> tuple[list[bytes], UInt8[np.ndarray, "n s"]]:
    """What the encoder sees of each image as a small JPEG, and as a tiny grey picture."""
    side = min(THUMBNAIL, max(bundle.size))
    pictures: list[bytes] = []
    gists = []
    batches = eval_batches(images, size=bundle.size, indices=samples)
    for batch in counted(batches, "thumbnails", len(samples)):
        for array in small(batch.images, side):
            buffer = io.BytesIO()
            Image.fromarray(array).save(buffer, "JPEG", quality=80)
            pictures.append(buffer.getvalue())
        grey = F.interpolate(batch.images.mean(dim=1, keepdim=True), (GIST, GIST), mode="bilinear", antialias=True)
        gists.append((grey.flatten(1).clamp(0, 1) * 255).round().byte().numpy())
    return pictures, np.concatenate(gists)


def copies(near: Neighbours, gists: UInt8[np.ndarray, "n s"]) -> Int[np.ndarray, "n"]:
    """The group of near-duplicates that each image is in, from 0; -1 for none.

    Neighbours by their features are compared by their pixels, so that an encoder that finds all alike names none.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    values = gists.astype(np.float32)
    values -= values.mean(axis=1, keepdims=True)
    contrast = values.std(axis=1)
    values /= np.maximum(contrast, 1e-6)[:, None]
    rows, columns = [], []
    for place in range(near.ids.shape[1]):
        other = near.ids[:, place]
        alike = (values * values[other]).mean(axis=1) >= SAME
        flat = np.minimum(contrast, contrast[other]) < FLAT  # a correlation of next to nothing
        alike[flat] = np.abs(gists[flat].astype(int) - gists[other[flat]]).max(axis=1) <= 2
        rows.append(np.flatnonzero(alike))
        columns.append(other[alike])
    edges = (np.ones(sum(map(len, rows))), (np.concatenate(rows), np.concatenate(columns)))
    _, group = connected_components(coo_array(edges, shape=(len(gists), len(gists))), directed=False)
    _, group, sizes = np.unique(group, return_inverse=True, return_counts=True)
    numbers = np.where(sizes > 1, np.cumsum(sizes > 1) - 1, -1)
    return numbers[group]


def _by_neighbours(near: Neighbours, codes: np.ndarray, classes: list[str]) -> list[str | None]:
    """The class that most of an image's ten nearest neighbours have; None where none of them has a label."""
    votes = np.zeros((len(codes), len(classes)), np.float32)
    for place in range(min(10, near.ids.shape[1])):
        other = codes[near.ids[:, place]]
        known = np.flatnonzero(other >= 0)
        votes[known, other[known]] += 2 - near.distances[known, place]
    best = votes.argmax(axis=1)
    return [classes[best[k]] if votes[k, best[k]] > 0 else None for k in range(len(codes))]


def layout(x: Float[Tensor, "n d"], near: Neighbours) -> tuple[Float[np.ndarray, "n 2"], str]:
    """Each image's place on a map, and how it was made: by UMAP where it is installed, else by t-SNE."""
    try:
        from umap import UMAP  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError:
        return _by_tsne(x)
    count = near.ids.shape[1]
    itself = np.arange(len(x))[:, None]
    known = (np.hstack([itself, near.ids]), np.hstack([np.zeros((len(x), 1), np.float32), near.distances]))
    made = UMAP(n_neighbors=count + 1, metric="cosine", random_state=0, n_jobs=1, precomputed_knn=known)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="precomputed_knn", category=UserWarning)  # nothing is added later
        return np.asarray(made.fit_transform(x.numpy()), np.float32), "UMAP"


def _by_tsne(x: Float[Tensor, "n d"]) -> tuple[Float[np.ndarray, "n 2"], str]:
    chosen = torch.from_numpy(np.random.default_rng(0).permutation(len(x))[:LANDMARKS])
    marks = x[chosen]
    placed = plane(marks.double().numpy(), 0)
    if placed is None:
        return np.zeros((len(x), 2), np.float32), "nothing: all images are alike to this encoder"
    places = np.empty((len(x), 2), np.float32)
    for rows in torch.arange(len(x)).split(4_096):
        near = (x[rows] @ marks.T).topk(min(3, len(marks)), dim=1)
        weight = torch.softmax(20 * near.values, dim=1).numpy()
        places[rows] = (weight[:, :, None] * placed[near.indices]).sum(axis=1)
    places[chosen] = placed
    rest = f"; {len(x) - LANDMARKS:,} others between the nearest of them" if len(x) > LANDMARKS else ""
    return places, f"t-SNE of {len(marks):,} images{rest} (pip install underpaint[explore] for UMAP)"


def _write_table(found: Known, path: Path) -> None:
    """One row an image, in the order that `neighbors` counts."""
    schema = pa.schema(
        [
            ("path", pa.string()),
            *((name, pa.string()) for name in found.columns),
            ("oddness", pa.float32()),
            ("near_duplicates", pa.int32()),
            ("x", pa.float32()),
            ("y", pa.float32()),
            ("neighbors", pa.struct([("ids", pa.list_(pa.int32())), ("distances", pa.list_(pa.float32()))])),
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ]
    )
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for start in range(0, len(found.names), GROUP):
            rows = slice(start, start + GROUP)
            ids, distances = (part[rows].tolist() for part in found.near)
            group = found.copies[rows]
            writer.write_table(
                pa.Table.from_pydict(
                    {
                        "path": found.names[rows],
                        **{name: values[rows] for name, values in found.columns.items()},
                        "oddness": found.oddness[rows],
                        "near_duplicates": pa.array(group, pa.int32(), mask=group < 0),
                        "x": found.places[rows, 0],
                        "y": found.places[rows, 1],
                        "neighbors": [
                            {"ids": one, "distances": other} for one, other in zip(ids, distances, strict=True)
                        ],
                        "image": [
                            {"bytes": picture, "path": name}
                            for picture, name in zip(found.pictures[rows], found.names[rows], strict=True)
                        ],
                    },
                    schema=schema,
                )
            )


def _predictions(path: Path) -> dict[str, str]:
    """The class of each path, as `underpaint predict` wrote it."""
    try:
        with open(path, newline="", encoding="utf-8-sig", errors=AS_IT_IS) as file:
            rows = csv.DictReader(file)
            if not {"path", "class"} <= set(rows.fieldnames or ()):
                raise InputError(
                    f"--predictions {path}: expected a CSV whose first line names the columns path and class"
                )
            return {row["path"]: row["class"] for row in rows if row["path"] and row["class"]}
    except (OSError, csv.Error) as error:
        raise InputError(f"--predictions {path}: cannot be read: {error}") from error


# -- the page -----------------------------------------------------------------------------------------------------------


def _page(found: Known, facts: dict[str, str], predicted: bool) -> Explored:
    """The images that the page names, and others by chance."""
    named = _named(found, predicted)
    wanted = list(dict.fromkeys(tile for _, _, rows in named for _, tiles in rows for tile, _ in tiles))
    rest = np.setdiff1d(np.random.default_rng(0).permutation(len(found.names))[:SHOWN], wanted)
    shown = np.sort(np.r_[wanted, rest[: max(0, SHOWN - len(wanted))]].astype(np.int64))
    place = {image: position for position, image in enumerate(shown.tolist())}
    sections = [
        Section(title, text, [Row(name, [Tile(place[k], said) for k, said in tiles]) for name, tiles in rows])
        for title, text, rows in named
    ]
    return Explored(
        facts,
        len(found.names),
        [found.names[k] for k in shown],
        {name: [values[k] for k in shown] for name, values in found.columns.items()},
        found.places[shown],
        found.oddness[shown],
        nearest(found.x[torch.from_numpy(shown)], TYPICAL).ids,
        [found.pictures[k] for k in shown],
        sections,
    )


Named = tuple[str, str, list[tuple[str, list[tuple[int, str]]]]]  # a section: title, text, rows of images with captions


def _named(found: Known, predicted: bool) -> list[Named]:
    label, guess = found.columns.get("label"), found.columns.get("prediction")
    typical = typicality(found.x, found.cluster)
    rows = []
    for number in range(found.cluster.max() + 1):
        members = np.flatnonzero(found.cluster == number)
        best = members[np.argsort(-typical[members], kind="stable")][:TYPICAL].tolist()
        said = f"cluster {number:02d}: {len(members):,} images"
        if label is not None:
            inside = Counter(label[k] for k in members.tolist() if label[k] is not None).most_common(2)
            said += "".join(f", {100 * count / len(members):.0f} % {name}" for name, count in inside)
        rows.append((said, [(k, "") for k in best]))
    sections = [("Clusters", "Images that are alike to this encoder (k-means), the most typical of each first.", rows)]
    odd = np.argsort(-found.oddness, kind="stable")[:ODD].tolist()
    text = "Images far from all others, the farthest first: what is rare, and what went wrong when it was taken."
    sections.append(("Odd ones", text, [("", [(k, f"{found.oddness[k]:.3f}") for k in odd])]))
    groups = [np.flatnonzero(found.copies == number).tolist() for number in range(found.copies.max() + 1)]
    text = (
        f"{len(groups):,} group{'s' if len(groups) > 1 else ''} of {sum(map(len, groups)):,} images that are alike pixel by pixel, but for compression, "
        "size and brightness" + (f"; the first {PAIRS} groups." if len(groups) > PAIRS else ".")
    )
    split = found.columns.get("split")
    where = lambda k: "" if split is None or split[k] is None else str(split[k])  # noqa: E731
    rows = [("", [(k, where(k)) for k in group[:TYPICAL]]) for group in groups[:PAIRS]]
    sections.append(("Near-duplicates", text if groups else "None were found.", rows))
    if label is not None and guess is not None:
        differ = [k for k in range(len(label)) if label[k] is not None and guess[k] not in (None, label[k])]
        known = sum(each is not None for each in label)
        who = "the prediction" if predicted else "that of most of its ten nearest neighbours"
        text = f"{len(differ):,} of {known:,} labels are not {who}"
        text += (
            ": look here for wrong labels. "
            if 2 * len(differ) < known
            else ": this encoder hardly tells the classes apart. "
        )
        text += "Those first whose neighbours have the other label most often."
        against = {k: sum(label[other] == guess[k] for other in found.near.ids[k, :10]) for k in differ}
        first = sorted(differ, key=lambda k: -against[k])[:ODD]
        sections.append(("Unlike their label", text, [("", [(k, f"{label[k]}, not {guess[k]}?") for k in first])]))
    return sections
