"""`underpaint evaluate`: what an encoder is worth, task by task, beside the same one untrained and what needs none."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from underpaint.backbones.norms import batch_norms, settled
from underpaint.console import say
from underpaint.data import (
    ImageSet,
    Source,
    eval_batches,
    fair_batches,
    labelled_indices,
    load_images,
    open_source,
    pretraining_indices,
    same_place,
    settle_scaling,
    split_indices,
)
from underpaint.data.annotations import CocoAnnotations, coco_annotations, masks_of
from underpaint.errors import InputError
from underpaint.evaluate.baselines import raw_pixels
from underpaint.evaluate.bundle import EncoderBundle, open_bundle
from underpaint.evaluate.detect import Detecting, detect
from underpaint.evaluate.finetune import finetune, recipe_for
from underpaint.evaluate.frozen import FROZEN, judge_frozen
from underpaint.evaluate.full_res import FullResImages
from underpaint.evaluate.outliers import mahalanobis, neighbour_distance, separation
from underpaint.evaluate.plots import histogram_picture
from underpaint.evaluate.probes import SETTLING, ProbeSuite
from underpaint.evaluate.segment import VOID, MaskedSplit, Segmenting, segment
from underpaint.evaluate.splits import Split, stratified
from underpaint.evaluate.store import stored_features
from underpaint.evaluate.visualizations import write_visualizations
from underpaint.files import write_json, write_text
from underpaint.recipes.recipe import Recipe
from underpaint.train.fit import changed
from underpaint.train.run_folder import Run, environment

TASKS = (*FROZEN, "finetune", "segment", "detect", "outliers")
FORMAT = 1
IGNORE = 255


def evaluate(
    encoder: str,
    data: str | Path,
    tasks: Sequence[str],
    out: str | Path,
    *,
    image_size: tuple[int, int] | None = None,
    untrained: bool = False,
    label_fraction: float = 1.0,
    minutes: float | None = None,
    seed: int = 0,
    ignore_index: int | None = None,
    against: str | Path | None = None,
    groups: str | None = None,
    recipe: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """ProbeSuite an encoder on answered images; where `out` holds an earlier evaluation of it, go on with it.

    `out` gets results.json, table.md, and a folder a task with pictures and what was trained (`underpaint predict`).

    Args:
        encoder: a run, an exported file, or `timm:NAME`.
        data: images with class labels, masks or boxes, as for pretraining.
        tasks: of knn, linear, attentive, finetune, segment, detect, outliers.
        image_size: height and width in pixels; the encoder's own where None.
        untrained: judge the encoder with weights as before training.
        label_fraction: share of the training images of each class that is used.
        minutes: of training, for each network that a task trains; the task's own number of steps where None.
        ignore_index: of masks; that of classes.json, or 255, where None.
        against: other images, for outliers.
        groups: a regular expression; images of one group stay on one side of a hold-out. That of the run where None;
            "" for none.
        recipe: of fine-tuning; the one that suits encoder and image size where None.
        settings: of what the one trained task trains, by name.

    Returns:
        What results.json holds.

    Raises:
        InputError: an encoder, data or a task that cannot be used, in one line.
        Interrupted: Ctrl-C or SIGTERM; the same call goes on.
    """
    _checked(tasks, label_fraction, against, out)
    folder = Path(out)
    run = run_of(encoder)
    groups = _groups(run, data, groups)
    source = open_source(data, groups=groups)
    for note in source.notes:
        say(note)
    if groups and not source.matched:
        raise InputError(
            f"--groups {groups!r}: no name in {data} matches, the first is {source.entries[0].name}; give a regular "
            "expression that does, or '' for none"
        )
    bundle = open_bundle(encoder, image_size=image_size, untrained=untrained, seed=seed)
    bundle = _scaled(bundle, source)
    for note in bundle.notes:
        say(f"note: {note}")
    if batch_norms(bundle.encoder):
        bundle = replace(bundle, clean=partial(_clean, source, bundle, seed))
        if untrained and bundle.clean is not None:
            bundle = replace(bundle, encoder=settled(bundle.encoder, bundle.clean))
    results = _earlier(
        folder,
        {
            "format": FORMAT,
            "encoder": encoder,
            "untrained": untrained,
            "data": str(data),
            "image_size": list(bundle.size),
            "seed": seed,
            "label_fraction": label_fraction,
            "groups": groups,
        },
    )
    results["notes"] = [*bundle.notes, *_seen(run, data, source)] if bundle.trained else []
    folder.mkdir(parents=True, exist_ok=True)
    given = dict(settings or {})
    found: dict[str, Any] = {}
    if frozen := [task for task in FROZEN if task in tasks]:
        train, test = labelled_parts(source, bundle, seed, label_fraction)
        found = judge_frozen(bundle, train, test, frozen, seed=seed, folder=folder)
        judge = ProbeSuite(train.images, (train, test), bundle.size, seed)
        write_visualizations(
            bundle.encoder, bundle.random_init(seed).encoder, judge, bundle.standardize, folder / "pictures"
        )
        _write(folder, results, found)
    if "finetune" in tasks:
        train, test = labelled_parts(source, bundle, seed, label_fraction)
        chosen = recipe_for(bundle, recipe, given)
        numbers = finetune(bundle, train, test, chosen, minutes=minutes, seed=seed, folder=folder / "finetune")
        _write(folder, results, {"finetune": numbers})
    if "segment" in tasks:
        chosen_segmenting = changed(Segmenting(), given, "segmentation")
        parts, names = masked_parts(source, data, bundle, ignore_index, seed, label_fraction)
        numbers = segment(
            bundle, *parts, names, chosen_segmenting, minutes=minutes, seed=seed, folder=folder / "segment"
        )
        _write(folder, results, {"segment": numbers})
    if "detect" in tasks:
        chosen_detecting = changed(Detecting(), given, "detection")
        scenes, *boxed = boxed_parts(source, data, bundle, seed, label_fraction)
        numbers = detect(
            bundle, scenes, boxed[0], boxed[1], chosen_detecting, minutes=minutes, seed=seed, folder=folder / "detect"
        )
        _write(folder, results, {"detect": numbers})
    if "outliers" in tasks:
        assert against is not None
        numbers = judge_outliers(bundle, source, against, seed, folder / "outliers")
        _write(folder, results, {"outliers": numbers})
    for line in table(results):
        say(line)
    say(f"done: {folder / 'results.json'}")
    return results


def _scaled(bundle: EncoderBundle, source: Source) -> EncoderBundle:
    """With a scaling for all images of the evaluation: its own, else that of those it trains on."""
    train, _ = labelled_indices(source) or split_indices(source, list(range(len(source.entries))))
    channels = bundle.encoder.channels
    found = settle_scaling(bundle.scaling, source, train, size=bundle.size, channels=channels, tell=say)
    return replace(bundle, scaling=found)


def _load(source: Source, indices: Sequence[int], bundle: EncoderBundle) -> ImageSet:
    images = load_images(
        source, list(indices), size=bundle.size, channels=bundle.encoder.channels, scaling=bundle.scaling
    )
    if images.skipped:
        first = f"{images.skipped[0]['path']}: {images.skipped[0]['reason']}"
        say(f"{len(images.skipped)} images of {source.location} are left out, the first: {first}")
    return images


def run_of(encoder: str) -> Recipe | None:
    """The recipe of the run that an encoder is from; None for public weights and for files without one."""
    folder = Path(encoder) if Path(encoder).is_dir() else Path(encoder).parent
    if encoder.startswith("timm:") or not (folder / "recipe.yaml").is_file():
        return None
    return Run(folder).recipe()


def _groups(run: Recipe | None, data: str | Path, given: str | None) -> str | None:
    """The pattern by which images are grouped: the one given, else that of the run.

    Raises:
        InputError: on the run's own images another one than the run's, which would part its groups.
    """
    if run is None or not run.data.groups:
        return given
    if given is None:
        say(f"groups are those of the run: {run.data.groups!r}")
        return run.data.groups
    own = any(place is not None and same_place(place, data) for place in (run.data.path, run.data.labels))
    if own and given != run.data.groups:
        raise InputError(
            f"--groups {given!r}: the run kept groups by {run.data.groups!r} on one side of {data}; leave --groups away"
        )
    return given


def _seen(run: Recipe | None, data: str | Path, source: Source) -> list[str]:
    """A sentence where a run was pretrained on images that judge here."""
    if run is None or run.data.path is None or not same_place(run.data.path, data):
        return []
    apart = run.data.labels is not None and not same_place(run.data.labels, run.data.path)
    trained = pretraining_indices(open_source(data, groups=run.data.groups), all_images=run.data.all_images or apart)
    sides = labelled_indices(source) or split_indices(source, list(range(len(source.entries))))
    shared = len(set(trained) & set(sides[1]))
    if not shared:
        return []
    return [f"{shared:,} of the {len(sides[1]):,} images held out to test on were pretrained on, without their labels."]


def _clean(source: Source, bundle: EncoderBundle, seed: int) -> Iterator[Tensor]:
    """Training images for the batch norms of a random-init network."""
    train, _ = split_indices(source, list(range(len(source.entries))))
    images = _load(source, train, bundle)
    device = bundle.standardize.mean.device
    for batch in fair_batches(images, size=bundle.size, count=SETTLING, seed=seed, device=device):
        yield bundle.standardize(batch.images)


def _checked(tasks: Sequence[str], label_fraction: float, against: Any, out: str | Path) -> None:
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        shown = f"'{unknown[0]}'" if unknown else "none"
        raise InputError(f"--task {shown}: there are {', '.join(TASKS)}")
    if not 0 < label_fraction <= 1:
        raise InputError(f"--label-fraction {label_fraction:g}: it must be above 0 and at most 1")
    if "outliers" in tasks and against is None:
        raise InputError("--task outliers: give the other images with --against DATA")
    if Path(out).is_file() or (
        Path(out).is_dir() and any(Path(out).iterdir()) and not (Path(out) / "results.json").is_file()
    ):
        raise InputError(f"--out {out}: exists and holds no evaluation; choose another path")


# -- the images of a task --------------------------------------------------------------------------------------------


def labelled_parts(source: Source, bundle: EncoderBundle, seed: int, fraction: float) -> tuple[Split, Split]:
    """Images with class labels, to train on and to test on.

    Raises:
        InputError: there are no labels; a class in test that train lacks; fewer images than classes.
    """
    found = labelled_indices(source)
    if found is None:
        raise InputError(f"{source.location} has no class labels; expected a folder a class, or a label column")
    loaded = [_load(source, indices, bundle) for indices in found]
    train, test = (Split(images, list(range(len(images)))) for images in loaded)
    if fraction < 1:
        train = train.subset(max(len(np.unique(train.labels)), round(fraction * len(train.indices))), seed)
    lacking = sorted(set(test.labels.tolist()) - set(train.labels.tolist()))
    if lacking:
        names = source.classes or []
        shown = ", ".join(names[k] if k < len(names) else str(k) for k in lacking[:3])
        raise InputError(f"{source.location}: {len(lacking)} classes occur in test and not in train ({shown})")
    return train, test


def _fewer(indices: list[int], fraction: float, seed: int) -> list[int]:
    if fraction == 1:
        return indices
    kept = stratified(np.zeros(len(indices), int), max(1, round(fraction * len(indices))), seed)
    return [indices[k] for k in kept]


def masked_parts(
    source: Source, data: str | Path, bundle: EncoderBundle, ignore_index: int | None, seed: int, fraction: float
) -> tuple[tuple[MaskedSplit, MaskedSplit], list[str]]:
    """Images with masks, to train on and to test on, and the classes by name.

    Raises:
        InputError: there are no masks; all of one part's images lack theirs; more classes than 255.
    """
    masks = masks_of(data, source)
    for note in masks.notes:
        say(f"note: {note}")
    lacking = len(source.entries) - len(masks.names)
    if lacking:
        say(f"{lacking} of {len(source.entries)} images have no mask and are left out")
    train, test = split_indices(source, sorted(masks.names))
    if not train or not test:
        raise InputError(
            f"{data}: masks are needed for train and for test images; there are {len(train)} and {len(test)}"
        )
    train = _fewer(train, fraction, seed)
    ignore = ignore_index if ignore_index is not None else masks.ignore if masks.ignore is not None else IGNORE
    names = list(masks.classes)
    if not names:
        highest = 0
        for index in train:
            mask = masks[index]
            highest = max(highest, int(mask[mask != ignore].max(initial=0)))
        names = [str(k) for k in range(highest + 1)]
    elif ignore == len(names) - 1 and masks.ignore is None:
        names = names[:-1]  # the ignored class may be named too
    if len(names) > VOID:
        raise InputError(f"{data}: masks of {len(names)} classes; segmentation takes up to {VOID}")
    scenes = FullResImages(source, [*train, *test], bundle.encoder.channels, bundle.scaling)
    made = [
        MaskedSplit(scenes, masks, [k for k in indices if k in scenes], len(names), ignore) for indices in (train, test)
    ]
    say(f"masks: {len(made[0])} images to train on, {len(made[1])} to test on, {len(names)} classes")
    return (made[0], made[1]), names


def boxed_parts(
    source: Source, data: str | Path, bundle: EncoderBundle, seed: int, fraction: float
) -> tuple[FullResImages, tuple[CocoAnnotations, list[int]], tuple[CocoAnnotations, list[int]]]:
    """Images with boxes, to train on and to test on; where only one part is annotated, some of it are held out.

    Raises:
        InputError: there are no boxes; images that annotations list are not there.
    """
    by_split = coco_annotations(data, source)
    for note in dict.fromkeys(note for found in by_split.values() for note in found.notes):
        say(f"note: {note}")
    judge = next((split for split in ("test", "val") if split in by_split), None)
    if "train" in by_split and judge is not None:
        parts = [(by_split[split], sorted(by_split[split].images)) for split in ("train", judge)]
    else:
        judge, only = next(iter(by_split.items()))
        parts = [(only, indices) for indices in split_indices(source, sorted(only.images))]
    parts[0] = (parts[0][0], _fewer(parts[0][1], fraction, seed))
    scenes = FullResImages(source, [*parts[0][1], *parts[1][1]], bundle.encoder.channels, bundle.scaling)
    train, test = ((found, [k for k in indices if k in scenes]) for found, indices in parts)
    if not train[1] or not test[1]:
        raise InputError(
            f"{data}: none of the images that annotations/{'train' if not train[1] else judge}.json lists is there"
        )
    say(f"boxes: {len(train[1])} images to train on, {len(test[1])} to test on")
    return scenes, train, test


# -- outliers ----------------------------------------------------------------------------------------------------------


def judge_outliers(
    bundle: EncoderBundle, source: Source, against: str | Path, seed: int, folder: Path
) -> dict[str, Any]:
    """Test images of `source` against all of `against`, by every score there is."""
    train, test = split_indices(source, list(range(len(source.entries))))
    other = open_source(against)
    strange_indices = list(range(len(other.entries)))
    sets = {
        "train": _load(source, train, bundle),
        "usual": _load(source, test, bundle),
        "strange": _load(other, strange_indices, bundle),
    }
    scores: dict[str, dict[str, np.ndarray]] = {}
    groups: list[str] | None = None
    for who, one in {"encoder": bundle, **({"untrained": bundle.random_init(seed)} if bundle.trained else {})}.items():
        stored = {
            name: stored_features(one, images, list(range(len(images))), patches=False) for name, images in sets.items()
        }
        pooled = {name: features.pooled for name, features in stored.items()}
        groups = Split(sets["usual"], []).groups_of(stored["usual"].samples.tolist())
        for how, score in (("kNN distance", neighbour_distance), ("Mahalanobis", mahalanobis)):
            scores[f"{who}, {how}"] = {name: score(pooled["train"], pooled[name]) for name in ("usual", "strange")}
    floor = {
        name: torch.cat([raw_pixels(b.images) for b in eval_batches(images, size=bundle.size)])
        for name, images in sets.items()
    }
    scores["raw pixels, kNN distance"] = {
        name: neighbour_distance(floor["train"], floor[name]) for name in ("usual", "strange")
    }
    own = _own_score(bundle, sets)
    if own is not None:
        scores = {"the method's own score": own, **scores}
    found = {name: separation(pair["usual"], pair["strange"], seed, groups) for name, pair in scores.items()}
    for name, pair in scores.items():
        histogram_picture(
            {"usual": pair["usual"], "strange": pair["strange"]},
            name,
            folder / f"{re.sub('[^A-Za-z]+', '-', name)}.png",
        )
    return {
        "train": len(sets["train"]),
        "test": len(sets["usual"]),
        "against": str(against),
        "strange": len(sets["strange"]),
        "rows": {name: one.numbers() for name, one in found.items()},
        "gains": {
            f"{how}: encoder over untrained": found[f"encoder, {how}"].above(found[f"untrained, {how}"])
            for how in ("kNN distance", "Mahalanobis")
            if f"untrained, {how}" in found
        },
    }


@torch.no_grad()
def _own_score(bundle: EncoderBundle, sets: dict[str, Any]) -> dict[str, np.ndarray] | None:
    """The energy or the restoration error of a trained run; None for an encoder without its method."""
    from underpaint.inference import load_method

    if not bundle.trained or not (Path(bundle.name) / "checkpoints").is_dir():
        return None
    method, standardize, recipe = load_method(bundle.name)
    found = {}
    for name in ("usual", "strange"):
        batches = eval_batches(sets[name], size=recipe.data.image_size, batch_size=64)
        found[name] = torch.cat([method.score(standardize(batch.images)) for batch in batches]).double().numpy()
    return found


# -- results -----------------------------------------------------------------------------------------------------------


def _earlier(folder: Path, described: dict[str, Any]) -> dict[str, Any]:
    """The results that a folder holds already.

    Raises:
        InputError: they are of something else.
    """
    file = folder / "results.json"
    if not file.is_file():
        return {**described, "environment": environment(), "tasks": {}}
    stored = json.loads(file.read_text())
    differ = [name for name, value in described.items() if stored.get(name) != value]
    if differ:
        shown = "; ".join(f"{name} {stored.get(name)} there, {described[name]} here" for name in differ[:3])
        raise InputError(f"--out {folder}: holds another evaluation ({shown}); choose another path")
    return stored


def _write(folder: Path, results: dict[str, Any], found: dict[str, Any]) -> None:
    results["tasks"] |= found
    write_json(folder / "results.json", results)
    write_text(folder / "table.md", "\n".join(table(results, markdown=True)) + "\n")


HEADS = {
    "accuracy": "accuracy, %",
    "miou": "mIoU, %",
    "pixel_accuracy": "pixel accuracy, %",
    "box_ap": "box AP",
    "box_ap50": "box AP50",
    "mask_ap": "mask AP",
    "mask_ap50": "mask AP50",
    "auroc": "AUROC, %",
    "aupr": "AUPR, %",
    "fpr95": "FPR at 95 %, %",
}


def table(results: dict[str, Any], markdown: bool = False) -> list[str]:
    """A block a task: a row an encoder or floor, each number in % with its standard error."""
    lines: list[str] = []
    for task, found in results["tasks"].items():
        rows: dict[str, Any] = found["rows"]
        columns = [name for name in HEADS if any(name in row for row in rows.values())]
        cells = [[f"{task}", *(HEADS[name] for name in columns)]]
        for who, row in rows.items():
            cells.append(
                [who, *(f"{100 * row[n]:.1f} ± {100 * row[f'{n}_error']:.1f}" if n in row else "–" for n in columns)]
            )
        notes = [f"{found['train']} images to train on, {found['test']} to test on"]
        for what, row in found.get("gains", {}).items():
            told = [
                f"{HEADS[n].removesuffix(', %')} {round(100 * row[n], 1) + 0.0:+.1f} ± {100 * row[f'{n}_error']:.1f}"
                for n in columns
            ]
            notes.append(f"{what}, points: {', '.join(told)}")
        if markdown:
            lines += ["| " + " | ".join(cells[0]) + " |", "|" + "---|" * len(cells[0])]
            lines += ["| " + " | ".join(row) + " |" for row in cells[1:]]
            lines += ["", *(f"- {note}" for note in notes), ""]
        else:
            widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
            lines += [
                row[0].ljust(widths[0])
                + "".join(f"  {cell.rjust(width)}" for cell, width in zip(row[1:], widths[1:], strict=True))
                for row in cells
            ]
            lines += [*notes, ""]
    said = results.get("notes", [])
    return lines + ([*(f"- {note}" for note in said), ""] if markdown and said else said)
