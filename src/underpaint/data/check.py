"""What would be read from DATA, how it was understood, and what can be done with it; no training."""

import csv
import hashlib
import itertools
import math
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from underpaint.console import progress
from underpaint.data.alike import CHUNK, NONE, SIDE, alike_groups, look_of
from underpaint.data.annotations import CocoAnnotations, Masks, coco_annotations, masks_of
from underpaint.data.decode import MAX_PIXELS, Unreadable, decode, read_header
from underpaint.data.open import open_source
from underpaint.data.parallel import MANY, ordered_map, spare_workers
from underpaint.data.sheets import alike_sheet, annotated_sheet
from underpaint.data.sources.base import Source
from underpaint.data.sources.tree import MaskFiles
from underpaint.data.splits import labelled_indices, labels_judge, pretraining_indices
from underpaint.errors import InputError
from underpaint.files import AS_IT_IS, replacing, utf8, write_json

MANY_ALIKE = 0.1  # share of the images from which on it is said what else may make them alike
WORTH = 15.0  # seconds in one process from which on it is worth the start of several
HASHED = 100_000  # images compared for near-duplicates
READ_MASKS = 200  # of which the classes are counted, evenly spread
SHOWN_IMAGES, SHOWN_GROUPS = 16, 12  # on a sheet
NAMED = 20  # classes in a text for people
WHAT = ["images with class labels", "images with a number each", "masks of classes", "boxes or outlines of objects"]

Seen = tuple[int, int, int, str, bytes, int, np.ndarray]  # height, width, channels, type, digest, and `look_of`


def check(
    data: str | Path,
    *,
    max_pixels: int = MAX_PIXELS,
    groups: str | None = None,
    masks: MaskFiles = "aside",
    workers: int = 0,
    out: Path | None = None,
) -> dict[str, Any]:
    """Read every image of DATA once and describe the set (`examine`).

    Raises:
        InputError: as `open_source`.
    """
    source = open_source(data, groups=groups, masks=masks)
    return examine(source, max_pixels=max_pixels, workers=workers, out=out)


def examine(
    source: Source, *, max_pixels: int = MAX_PIXELS, workers: int = 0, out: Path | None = None
) -> dict[str, Any]:
    """Read every image of a source once and describe the set.

    Args:
        out: a folder for pictures: annotated.png, alike.png, and alike.csv, what looks alike; check.json, all that is
            returned.

    Returns:
        `location`, `notes`; `images` and `readable` (counts); `height`, `width` (min, median, max in pixels);
        `channels`, `dtypes`, `splits` (counts by value; "none" for no split); `scaling` (lines on how values would
        become 0 to 1, none where all is 8 bit); `classes` (images by class name);
        `unreadable` and `left_out` ({"path", "reason"}); `duplicates` and `near_duplicates` (groups of names with the
        same bytes, or that look alike: difference hashes at most 2 of 64 bits apart, and small pictures that correlate), `duplicates_across_splits` and
        `near_duplicates_across_splits` (how many of those groups), `compared` (images hashed for likeness), `flat`
        (names of images of one colour, which look alike to no other); `boxes` and `masks` (what was found of them, or
        why none); `tasks` (by name, the command, or why it cannot be done); `pictures` (files).
    """
    entries, chunks = source.entries, range(math.ceil(len(source.entries) / CHUNK))
    numbers = np.zeros((len(entries), 3), np.int32)  # height, width, channels; 0 where it cannot be read
    digests, hashes = np.zeros((len(entries), 2), np.uint64), np.zeros(len(entries), np.uint64)
    pictures = np.zeros((min(len(entries), HASHED), SIDE * SIDE), np.uint8)
    dtypes: Counter[str] = Counter()
    unreadable: list[dict[str, str]] = []
    look, index = _Examine(source, max_pixels), 0
    first = [look(0)]
    began = time.monotonic()  # the first chunk opened what there is to open
    first += map(look, chunks[1:2])
    if not workers and (time.monotonic() - began) * len(chunks) > WORTH:
        workers = spare_workers(MANY)
    made = itertools.chain(first, ordered_map(look, chunks[2:], workers))
    for results in progress(made, f"reading {len(entries):,} images, {CHUNK} at a time", len(chunks)):
        for result in results:
            if isinstance(result, str):
                unreadable.append({"path": entries.names[index], "reason": result})
            else:
                *numbers[index], dtype, digest, hashes[index], picture = result
                if index < len(pictures):
                    pictures[index] = picture
                digests[index] = np.frombuffer(digest, np.uint64)
                dtypes[dtype] += 1
            index += 1
    known = np.flatnonzero(numbers[:, 0])
    channels = Counter({str(k): int(n) for k, n in zip(*np.unique(numbers[known, 2], return_counts=True), strict=True)})
    same = _equal(digests, known)
    copies = np.array([k for group in same for k in group[1:]], np.int64)
    compared = known[(hashes[known] != NONE) & (known < len(pictures))]
    apart = np.setdiff1d(compared, copies)
    near = [[int(apart[p]) for p in group] for group in alike_groups(hashes[apart], pictures[apart])]
    classes = source.classes or []
    labels = np.bincount(entries.labels[entries.labels >= 0], minlength=len(classes)).tolist()
    boxes = _boxes(source)
    masks = _masks(source, boxes)
    result = {
        "location": source.location,
        "notes": source.notes,
        "images": len(entries),
        "readable": len(known),
        "height": _range(numbers[known, 0]),
        "width": _range(numbers[known, 1]),
        "channels": dict(channels.most_common()),
        "dtypes": dict(dtypes),
        "scaling": _scaling(source, channels, dtypes, max_pixels),
        "splits": {split or "none": count for split, count in entries.counts().items()},
        "classes": {name: labels[n] for n, name in enumerate(classes)},
        "unreadable": unreadable,
        "left_out": source.skipped,
        "duplicates": _names(source, same),
        "duplicates_across_splits": _across(source, same),
        "near_duplicates": _names(source, near),
        "near_duplicates_across_splits": _across(source, near),
        "compared": len(compared),
        "flat": [entries.names[i] for i in known[hashes[known] == NONE].tolist()],
        "boxes": _told_boxes(boxes, len(known)),
        "masks": _told_masks(masks),
        "pictures": [],
    }
    result["tasks"] = _tasks(source, result)
    if out is not None:
        _write(source, result, boxes, masks, (same, near), out)
    return result


def _equal(digests: np.ndarray, known: np.ndarray) -> list[list[int]]:
    """Groups of the entries `known` whose digests [n, 2] are equal, in order."""
    order = known[np.lexsort(digests[known].T)]
    starts = np.flatnonzero((np.diff(digests[order].astype(np.uint64), axis=0) != 0).any(axis=1)) + 1
    return sorted(sorted(group.tolist()) for group in np.split(order, starts) if len(group) > 1)


def _boxes(source: Source) -> dict[str, CocoAnnotations] | str:
    try:
        return coco_annotations(source.location, source, lenient=True)
    except InputError as error:
        return str(error)


def _masks(source: Source, boxes: dict[str, CocoAnnotations] | str) -> Masks | str:
    try:
        return masks_of(source.location, source, {} if isinstance(boxes, str) else boxes)
    except InputError as error:
        return str(error)


def _told_boxes(boxes: dict[str, CocoAnnotations] | str, readable: int) -> dict[str, Any]:
    """`kind`, `images` annotated, `objects`, `outlines` (objects that have one), `outside`, `classes` (objects by class),
    `side` (min, median, max of the square root of a box's area, in pixels), `an_image` (the same of objects), `notes`; or
    `reason`."""
    if isinstance(boxes, str):
        return {"images": 0, "objects": 0, "reason": boxes}
    found = [each.objects(index) for each in boxes.values() for index in each.images]
    sides = np.concatenate([np.sqrt(np.prod(one.boxes[:, 2:] - one.boxes[:, :2], axis=1)) for one in found] or [[]])
    names = {number: name for each in boxes.values() for number, name in each.categories.items()}
    counts = Counter(int(label) for one in found for label in one.labels)
    return {
        "kind": next(iter(boxes.values())).kind,
        "images": len(found),
        "objects": len(sides),
        "outlines": sum(segment is not None for one in found for segment in one.segments),
        "outside": sum(each.outside for each in boxes.values()),
        "classes": {names[number]: count for number, count in counts.most_common()},
        "side": _range(sides.round(1)),
        "an_image": _range(np.array([len(one.boxes) for one in found])),
        "notes": list(dict.fromkeys(note for each in boxes.values() for note in each.notes)),
    }


def _told_masks(masks: Masks | str) -> dict[str, Any]:
    """`images` with a mask, `classes` (share of the pixels by class, in the masks looked at), `looked_at`, `unusable`
    (path and reason), `notes`; or `reason`."""
    if isinstance(masks, str):
        return {"images": 0, "reason": masks}
    indices = sorted(masks.names)
    places = np.linspace(0, len(indices) - 1, min(READ_MASKS, len(indices))).round().astype(int).tolist()
    counts: Counter[int] = Counter()
    unusable = []
    for index in (indices[place] for place in places):
        try:
            values, pixels = np.unique(masks[index], return_counts=True)
        except InputError as error:
            unusable.append({"path": masks.names[index], "reason": str(error)})
            continue
        counts.update(dict(zip(values.tolist(), pixels.tolist(), strict=True)))
    total = counts.total()
    named = f" (no class of {len(masks.classes)})" if masks.classes else ""
    names = {k: masks.classes[k] if 0 <= k < len(masks.classes) else f"{k}{named}" for k in counts}
    return {
        "images": len(indices),
        "looked_at": len(places),
        "classes": {names[k]: round(n / total, 6) for k, n in sorted(counts.items())},
        "unusable": unusable,
        "notes": masks.notes,
    }


def _tasks(source: Source, result: dict[str, Any]) -> dict[str, str]:
    """By task, the command that does it, or "no: " and why not."""
    data = shlex.quote(source.location)
    evaluate = f"underpaint evaluate runs/first --data {data} --out runs/worth --task"
    told = {"pretrain": f"underpaint pretrain {data} --out runs/first" if result["readable"] else "no: no image"}
    why = labels_judge(source) or WHAT[0]
    told["classification"] = f"{evaluate} knn,linear" if labelled_indices(source) else f"no: {_needs(why)}"
    numbers = source.entries.numbers is not None
    told["regression"] = f"{evaluate} regression" if numbers else f"no: {_needs(WHAT[1])}"
    masks, boxes = result["masks"], result["boxes"]
    usable = masks["images"] > 1 and len(masks.get("classes", ())) > 1 and not masks["unusable"]
    wrong = masks["unusable"][0]["reason"] if masks.get("unusable") else ""
    told["segmentation"] = f"{evaluate} segment" if usable else f"no: {wrong or _needs(WHAT[2])}"
    told["detection"] = f"{evaluate} detect" if boxes["objects"] else f"no: {_needs(WHAT[3])}"
    return told


def _needs(what: str) -> str:
    return f"needs {what}" if what in WHAT else f"class labels are of no use, {what}"


def _write(
    source: Source,
    result: dict[str, Any],
    boxes: dict[str, CocoAnnotations] | str,
    masks: Masks | str,
    alike: tuple[list[list[int]], list[list[int]]],
    out: Path,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    drawn = {} if isinstance(boxes, str) else boxes
    owned = sorted(index for each in drawn.values() for index in each.images)
    shown = owned or ([] if isinstance(masks, str) else sorted(masks.names))
    if shown:
        places = np.linspace(0, len(shown) - 1, min(SHOWN_IMAGES, len(shown))).round().astype(int).tolist()
        chosen = [shown[place] for place in places]
        annotated_sheet(source, drawn, None if isinstance(masks, str) else masks, chosen, out / "annotated.png")
    kinds = [(group, same) for same, groups in zip((1, 0), alike, strict=True) for group in groups]
    kinds.sort(key=lambda kind: not _apart(source, kind[0]))
    with replacing(out / "alike.csv") as part, part.open("w", newline="", encoding="utf-8", errors=AS_IT_IS) as file:
        rows = csv.writer(file)
        rows.writerow(("group", "path", "split", "same_bytes"))
        for number, (group, same) in enumerate(kinds):
            for index in group:
                rows.writerow((number, source.entries.names[index], _split(source, index), same))
    if kinds:
        shown = [group for group, _ in kinds[:SHOWN_GROUPS]]
        alike_sheet(source, shown, out / "alike.png", lambda index: _split(source, index))
    found = [out / name for name in ("annotated.png", "alike.png", "alike.csv", "check.json")]
    result["pictures"] = [str(path) for path in found if path.exists() or path.name == "check.json"]
    write_json(out / "check.json", result)


def format_found(source: Source) -> str:
    """What is known of a source before an image is read, as text for people."""
    return "\n".join([source.location, *(f"  {note}" for note in source.notes)])


def format_check(result: dict[str, Any], *, notes: bool = True) -> str:
    """The result of `check` as text for people; without what `format_found` says already where not `notes`."""
    lines = [result["location"], *(f"  {note}" for note in result["notes"])] if notes else []
    lines.append(f"  readable: {result['readable']:,} of {result['images']:,}")
    for name in ("height", "width"):
        if result[name]:
            low, middle, high = result[name]
            lines.append(f"  {name}: {low} to {high} pixels, median {middle:g}")
    for name in ("channels", "dtypes"):
        lines.append(f"  {name}: " + ", ".join(f"{key} ({count:,})" for key, count in result[name].items()))
    lines += [f"  {line}" for line in result["scaling"]]
    classes = result["classes"]
    if classes:
        counts = sorted(classes.values())
        lines.append(f"  images a class: {counts[0]:,} to {counts[-1]:,}")
        lines += _most(classes, "{:,}")
    lines += [*_box_lines(result["boxes"]), *_mask_lines(result["masks"])]
    for key, title in (("unreadable", "cannot be read"), ("left_out", "left out")):
        skips = result[key]
        lines.append(f"  {title}: {len(skips):,}")
        lines += [f"    {skip['path']}: {skip['reason']}" for skip in skips[:10]]
        lines += [f"    and {len(skips) - 10:,} more"] if len(skips) > 10 else []
    lines.append(f"  of one colour: {len(result['flat']):,}")
    for key, title in (("duplicates", "same bytes"), ("near_duplicates", "look alike")):
        groups, across = result[key], result[f"{key}_across_splits"]
        lines.append(f"  {title}: {len(groups):,} groups, {across:,} of them across splits")
        lines += ["    " + ", ".join(group[:4]) + (", ..." if len(group) > 4 else "") for group in groups[:5]]
        lines += [f"    and {len(groups) - 5:,} more"] if len(groups) > 5 else []
    if result["near_duplicates"] or result["duplicates"]:
        lines.append(
            "    pretrain --drop-duplicates leaves out all but one, and those that look like images to judge by"
        )
        surplus = sum(len(group) - 1 for key in ("duplicates", "near_duplicates") for group in result[key])
        if surplus > MANY_ALIKE * result["readable"]:
            lines.append(
                f"    that is {surplus:,} images: a fixed camera or a video makes images that differ in small things alone; "
                "look at alike.png (--out) first"
            )
    if result["compared"] < result["readable"] - len(result["flat"]):
        lines.append(f"  (only the first {result['compared']:,} images were compared for likeness)")
    lines += ["what can be done with it:", *(f"  {task}: {told}" for task, told in result["tasks"].items())]
    return "\n".join([*lines, *(f"wrote {file}" for file in result["pictures"])])


def _most(counts: dict[str, Any], form: str) -> list[str]:
    shown = sorted(counts.items(), key=lambda item: -item[1])[:NAMED]
    lines = [f"    {utf8(name)}: {form.format(count)}" for name, count in shown]
    return lines + ([f"    and {len(counts) - NAMED} more classes"] if len(counts) > NAMED else [])


def _box_lines(boxes: dict[str, Any]) -> list[str]:
    if "reason" in boxes:
        told = boxes["reason"]
        return (
            ["  boxes: none"]
            if ": no boxes; expected" in told or "read from a folder" in told
            else [f"  boxes: {told}"]
        )
    lines = [
        f"  boxes: {boxes['kind']}, {boxes['objects']:,} objects on {boxes['images']:,} images, {boxes['outlines']:,} of "
        f"them with an outline; {boxes['outside']:,} reach out of their image"
    ]
    lines += [f"    {note}" for note in boxes["notes"]]
    for key, what, unit in (("side", "sides", " px"), ("an_image", "objects an image", "")):
        if boxes[key]:
            low, middle, high = boxes[key]
            lines.append(f"    {what}: {low:g} to {high:g}{unit}, median {middle:g}")
    return lines + _most(boxes["classes"], "{:,}")


def _mask_lines(masks: dict[str, Any]) -> list[str]:
    if "reason" in masks:
        told = masks["reason"]
        return (
            ["  masks: none"]
            if ": no masks; expected" in told or "read from a folder" in told
            else [f"  masks: {told}"]
        )
    lines = [f"  masks: of {masks['images']:,} images; share of the pixels in {masks['looked_at']:,} of them:"]
    lines += [f"    {each['path']}: {each['reason']}" for each in masks["unusable"][:3]]
    return [*lines, *_most(masks["classes"], "{:.2%}"), *(f"    {note}" for note in masks["notes"])]


class _Examine:
    """Size, channels, type, digest and difference hash of the n-th chunk of entries, or the reason why not."""

    def __init__(self, source: Source, max_pixels: int):
        self._source = source
        self._max_pixels = max_pixels

    def __call__(self, chunk: int) -> list[Seen | str]:
        stretch = range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(self._source.entries)))
        results: list[Seen | str] = []
        for index in stretch:
            try:
                results.append(self._one(index))
            except Unreadable as error:
                results.append(str(error))
        return results

    def _one(self, index: int) -> Seen:
        data = self._source.read(index)
        header = read_header(data, max_pixels=self._max_pixels)
        # a reduced JPEG is still read to its end, so that truncation is found
        pixels = decode(data, channels=None, max_pixels=self._max_pixels, reduce_to=16)
        digest = hashlib.blake2b(data, digest_size=16).digest()
        return header.height, header.width, header.channels, header.dtype, digest, *look_of(pixels)


def _scaling(source: Source, channels: Counter[str], dtypes: Counter[str], max_pixels: int) -> list[str]:
    """How pretraining would scale these images, in their own number of channels, where they are not plain 8 bit."""
    if set(dtypes) <= {"uint8"}:
        return []
    from underpaint.data.images import measure_scaling  # here: it needs torch, and hardly any set needs it

    found, notes = measure_scaling(
        source,
        pretraining_indices(source),
        size=(224, 224),
        channels=int(channels.most_common(1)[0][0]),
        max_pixels=max_pixels,
    )
    return [] if found.plain else [str(found), *notes]


def _range(values: np.ndarray) -> tuple[int | float, float, int | float] | None:
    return (values.min().item(), float(np.median(values)), values.max().item()) if len(values) else None


def _names(source: Source, groups: Sequence[Sequence[int]]) -> list[list[str]]:
    return [[source.entries.names[i] for i in group] for group in groups]


def _split(source: Source, index: int) -> str:
    code = int(source.entries.splits[index])
    return "none" if code < 0 else source.entries.split_names[code]


def _apart(source: Source, group: Sequence[int]) -> bool:
    return len(np.unique(source.entries.splits[np.asarray(group)])) > 1


def _across(source: Source, groups: Sequence[Sequence[int]]) -> int:
    return sum(_apart(source, group) for group in groups)
