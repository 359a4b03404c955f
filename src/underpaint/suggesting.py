"""Which images to label first: the most typical of every cluster, or those between which a first probe wavers."""

import csv
import heapq
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from underpaint.console import say
from underpaint.data import open_source, pretraining_indices
from underpaint.errors import InputError
from underpaint.evaluation.bundle import open_bundle
from underpaint.evaluation.features import stored_features
from underpaint.evaluation.linear import statistics
from underpaint.evaluation.neighbourhood import clusters, directions, typicality
from underpaint.evaluation.splits import Split
from underpaint.files import AS_IT_IS, check_writable, replacing

MOST_IMAGES = 100_000
MOST_CLUSTERS = 500  # and clusters of fewer than SMALLEST images come last: as in TypiClust (arXiv 2202.02794)
SMALLEST = 5
ENOUGH = 10  # labels a class, from which on choosing was not measurably better than chance (docs/explore.md)
POOL = 10  # times as many images as are wanted: the least certain ones, of which each cluster gives some
STRENGTH = 0.1  # of the probe: weight of the summed loss against half the squared weights
WAYS = {
    "typical": "the most typical image of each cluster, the largest clusters without a label first",
    "margin": "where a linear probe on the labels that there are hesitates most between two classes",
    "random": "by chance: what the others are to be compared with",
}


class Choice(NamedTuple):
    """An image to label."""

    image: int
    cluster: int
    typicality: float
    reason: str


def suggest(
    encoder: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    count: int = 100,
    labels: str | Path | None = None,
    by: str | None = None,
    image_size: tuple[int, int] | None = None,
) -> int:
    """Write which images to label first as CSV (path, cluster, typicality, reason), the first one first; how many.

    Images are those of the train split, or all where there is none, without those that have a label.

    Args:
        encoder: a run, a file of weights, a Hugging Face folder, or `timm:NAME`.
        labels: a CSV with the columns path and label, which stand in place of those of the data; rows without a label
            count as not labelled, so it may be an earlier `out` with a column more.
        by: one of `WAYS`; where None, "margin" if two classes have labels, else "typical".

    Raises:
        InputError: an encoder, data or labels that cannot be used; nothing left to label; a file that cannot be written.
    """
    path = Path(out)
    check_writable(path, file=True)
    if count < 1:
        raise InputError(f"--count {count}: must be at least 1")
    source = open_source(data)
    for note in source.notes:
        say(note)
    chosen = pretraining_indices(source, all_images=True)
    said = None if labels is None else _labels(Path(labels))
    if len(chosen) > MOST_IMAGES:
        say(f"{len(chosen):,} images: the choice is among {MOST_IMAGES:,} of them, drawn at random")
        chosen = np.sort(np.random.default_rng(0).permutation(chosen)[:MOST_IMAGES])
    bundle = open_bundle(str(encoder), image_size=image_size).scaled(source, chosen)
    for note in bundle.notes:
        say(note)
    images = bundle.images(source, chosen)
    features = stored_features(bundle, Split(images, range(len(images))), with_patches=False)
    names = [images.names[k] for k in features.samples]
    if said is None:
        known, classes = images.labels[features.samples].astype(np.int64), images.classes or []
    else:
        known, classes = _known(names, said, str(labels), str(data))
    left = int((known < 0).sum())
    if not left:
        raise InputError(
            f"{data}: every image has a label, so nothing is left to label; to choose as if some had none, give those "
            "that count with --labels FILE.csv (path,label)"
        )
    found = choose(features.pooled, count, known, by=by, classes=classes)
    told, kinds = int((known >= 0).sum()), len(np.unique(known[known >= 0]))
    if by != "random" and kinds and told >= ENOUGH * kinds:
        say(
            f"{told:,} images of {kinds} classes have labels: from {ENOUGH} a class on, choosing gained nothing where it was "
            "measured (docs/explore.md); --by random is as good, and leaves a fair sample"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8", errors=AS_IT_IS) as file:
            writer = csv.writer(file)
            writer.writerow(["path", "cluster", "typicality", "reason"])
            writer.writerows([names[k], cluster, f"{typical:.3f}", reason] for k, cluster, typical, reason in found)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error.strerror}") from error
    return len(found)


def choose(
    features: Float[Tensor, "n d"],
    count: int,
    labels: Int[np.ndarray, "n"],
    *,
    by: str | None = None,
    classes: list[str] | None = None,
    seed: int = 0,
) -> list[Choice]:
    """At most `count` of the images whose label is -1, the first to label first.

    Raises:
        InputError: `by` is none of `WAYS`; "margin" without labels of two classes; features that are not finite.
    """
    several = len(np.unique(labels[labels >= 0])) > 1
    by = by or ("margin" if several else "typical")
    if by not in WAYS:
        raise InputError(f"--by {by}: expected {', '.join(WAYS)}")
    if by == "margin" and not several:
        raise InputError("--by margin: needs labels of at least two classes; --by typical needs none")
    x = directions(features)
    wanted = min(count + int((labels >= 0).sum()), MOST_CLUSTERS)
    cluster = clusters(x, wanted, seed)
    typical = typicality(x, cluster)
    free = np.flatnonzero(labels < 0)
    if by == "random":
        reasons = dict.fromkeys(np.random.default_rng(seed).permutation(free)[:count].tolist(), "drawn at random")
    elif by == "typical":
        reasons = _typical(cluster, typical, labels, count)
    else:
        reasons = _hesitating(features, cluster, labels, count, classes or [])
    return [Choice(k, int(cluster[k]), float(typical[k]), reason) for k, reason in reasons.items()]


def _typical(
    cluster: Int[np.ndarray, "n"], typical: Float[np.ndarray, "n"], labels: Int[np.ndarray, "n"], count: int
) -> dict[int, str]:
    """Again and again the most typical image without a label of the cluster that has the fewest labels, the largest first."""
    queues, waiting = {}, []
    for number in np.unique(cluster).tolist():
        members = np.flatnonzero(cluster == number)
        free = members[labels[members] < 0]
        queues[number] = free[np.argsort(-typical[free], kind="stable")].tolist()[::-1]
        has = len(members) - len(free)
        heapq.heappush(waiting, (len(members) < SMALLEST, has, -len(members), number))
    reasons: dict[int, str] = {}
    while waiting and len(reasons) < count:
        small, has, size, number = heapq.heappop(waiting)
        if not queues[number]:
            continue
        whose = f"a cluster of {-size} images with {has or 'no'} label{'s' if has > 1 else ''}"
        reasons[queues[number].pop()] = f"{'most' if not has else 'next'} typical of {whose}"
        heapq.heappush(waiting, (small, has + 1, size, number))
    return reasons


def _hesitating(
    features: Float[Tensor, "n d"],
    cluster: Int[np.ndarray, "n"],
    labels: Int[np.ndarray, "n"],
    count: int,
    classes: list[str],
) -> dict[int, str]:
    """The smallest margins between the two likeliest classes, from each cluster in turn: alike images say the same."""
    known, free = np.flatnonzero(labels >= 0), np.flatnonzero(labels < 0)
    values, probabilities = probe(features, known, labels[known], free)
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :2]
    likeliest = np.take_along_axis(probabilities, best, axis=1)
    margin = likeliest[:, 0] - likeliest[:, 1]
    pool = np.argsort(margin, kind="stable")[: POOL * count]
    turn, seen = np.empty(len(pool), np.int64), dict[int, int]()
    for place, number in enumerate(cluster[free[pool]].tolist()):
        turn[place] = seen[number] = seen.get(number, -1) + 1
    reasons = {}
    for k in pool[np.argsort(turn, kind="stable")][:count].tolist():
        one, other = (_named(int(values[c]), classes) for c in best[k])
        reasons[int(free[k])] = f"{one} or {other}: {margin[k]:.2f} between their probabilities"
    return reasons


def probe(
    features: Float[Tensor, "n d"],
    known: Int[np.ndarray, "k"],
    labels: Int[np.ndarray, "k"],
    asked: Int[np.ndarray, "m"],
) -> tuple[Int[np.ndarray, "c"], Float[np.ndarray, "m c"]]:
    """The classes of some known images, and the probabilities of each for others, by a linear probe.

    Its strength is fixed, since a handful of labels cannot choose one; features are standardised by those of all images.
    """
    from sklearn.linear_model import LogisticRegression  # importing it takes a second

    mean, scale = statistics(features.float())
    x = ((features.float() - mean) / scale).numpy()
    fitted = LogisticRegression(C=STRENGTH, max_iter=1_000).fit(x[known], labels)
    return fitted.classes_, fitted.predict_proba(x[asked])


def _named(label: int, classes: list[str]) -> str:
    return classes[label] if label < len(classes) else f"class {label}"


def _labels(path: Path) -> dict[str, str]:
    """The label of each path of a table that has one."""
    try:
        with open(path, newline="", encoding="utf-8-sig", errors=AS_IT_IS) as file:
            rows = csv.DictReader(file)
            if not {"path", "label"} <= set(rows.fieldnames or ()):
                raise InputError(f"--labels {path}: expected a CSV whose first line names the columns path and label")
            return {row["path"]: row["label"] for row in rows if row["path"] and row["label"]}
    except (OSError, csv.Error) as error:
        raise InputError(f"--labels {path}: cannot be read: {error}") from error


def _known(names: list[str], said: dict[str, str], labels: str, data: str) -> tuple[Int[np.ndarray, "n"], list[str]]:
    """Numbers of the labels, -1 for none, and their names."""
    classes = sorted(set(said.values()))
    numbers = {name: number for number, name in enumerate(classes)}
    known = np.asarray([numbers[said[name]] if name in said else -1 for name in names], np.int64)
    if said and not (known >= 0).any():
        raise InputError(
            f"--labels {labels}: none of its {len(said):,} paths is one of the images of {data}, which are written like "
            f"{names[0]}"
        )
    say(f"labels: {int((known >= 0).sum()):,} of {len(names):,} images, {len(np.unique(known[known >= 0]))} classes")
    return known, classes
