"""Several methods under one equal budget on one's own images.

Every method trains the same encoder on the same data for the same wall-clock. The clock of a machine drifts, so no
method has its time in one piece: all take turns, and the first of a round is another one in each round. Each turn is
an ordinary run that goes on from its checkpoint in a process of its own. Then all are judged by the same images,
beside the untrained encoder, what needs no network, and the public weights where there are some.
"""

import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import safe_open
from safetensors.numpy import save_file

from underpaint.backbones import Backbone, load_encoder, standardize_for
from underpaint.comparison.plan import FORMAT, Plan, planned, recipes_of, refuse_other, store
from underpaint.comparison.statistics import Arm, Kind, difference, standing
from underpaint.comparison.verdict import verdict
from underpaint.comparison.worker import turn
from underpaint.config import Recipe
from underpaint.console import say
from underpaint.data import ImageSet
from underpaint.errors import InputError
from underpaint.evaluation.features import Known
from underpaint.evaluation.probes import SHOTS, ProbeSuite, Worth
from underpaint.evaluation.results import Probe
from underpaint.evaluation.visualizations import write_visualizations
from underpaint.files import refuse_inside, replacing, write_json, write_text
from underpaint.inference import load_method
from underpaint.locking import locked
from underpaint.methods import Restores
from underpaint.patches import Standardize
from underpaint.prepare import build, construct, load_data, open_data
from underpaint.recipes.recipe import checked, plain
from underpaint.report import verdict as verdict_of_run
from underpaint.report import write_report
from underpaint.report.figures.pictures import sheet
from underpaint.report.results import BRIEF, of_comparison, tokenizers_of
from underpaint.report.tables import markdown, table, terminal
from underpaint.signals import Interrupted, watched_signals
from underpaint.tokenizers import tokenizer_scaling
from underpaint.train.run_folder import Run, environment

DRAWS = 5  # of the labelled images, where few are used
FLOORS = {"raw_pixels": "raw pixels", "hog": "HOG"}  # what needs no network, by the names of its rows


def compare(
    data: str | Path,
    out: str | Path,
    methods: Sequence[str] | Mapping[str, Recipe],
    minutes: float,
    *,
    seeds: int = 2,
    clock: Callable[[], float] | None = None,
) -> dict[str, Any]:
    """Compare methods on the images in `data`; where `out` holds this comparison, go on with it.

    Args:
        data: as for `pretrain`.
        out: a folder for the runs, `compare.json` and `report.html`.
        methods: recipes by the name of their row, which differ in `method` and `optimiser` only; or names of methods,
            of shipped recipes, or of YAML files, as `recipes_of` makes recipes of them.
        minutes: of training each method has with each seed.
        seeds: how often each method is trained.
        clock: seconds, to time training by in place of the machine's clock, which makes a comparison repeatable; turns
            are then taken in this process, where alone it can be read.

    Returns:
        What `compare.json` holds.

    Raises:
        InputError: settings or data that cannot be used; no method that can take part.
        Interrupted: Ctrl-C or SIGTERM; the same call goes on.
    """
    folder = Path(out)
    recipes = methods if isinstance(methods, Mapping) else recipes_of(methods)
    plan = planned(str(data), recipes, float(minutes), seeds)
    refuse_inside(out, data, next(iter(plan.recipes.values())).data.labels)
    refuse_other(folder)
    with locked(folder):
        images, judge = _images(plan)
        store(folder, plan)
        arms = len(plan.recipes)
        say(
            f"{arms} methods x {seeds} seeds x {minutes:g} minutes: {arms * seeds * minutes:g} minutes of training, "
            "then the judging"
        )
        try:
            for seed in plan.seeds:
                for round_ in range(plan.rounds):
                    names = list(plan.recipes)
                    for k in range(len(names)):
                        name = names[(k + round_) % len(names)]
                        if name not in plan.left_out:
                            _turn(folder, plan, name, seed, round_, clock)
                    if all(name in plan.left_out for name in names):
                        raise InputError(f"no method got through: {'; '.join(plan.left_out.values())}")
            found = Judging(folder, plan, images, judge).all()
        except Interrupted as interruption:
            interruption.kept = f"what was trained and judged is kept in {folder}"
            raise
        result = _result(plan, judge, folder, found)
        write_json(folder / "compare.json", result, indent=1)
        page = write_report(folder)
        rows = table(of_comparison(result), BRIEF)
        write_text(folder / "table.md", "\n".join(markdown(rows)) + "\n")
        for line in [*terminal(rows), *result.get("notes", []), *result["verdict"]]:
            say(line)
        say(f"done: {folder / 'compare.json'}, {page}")
        return result


# --- what is to be done ---------------------------------------------------------------------------------------------


def _images(plan: Plan) -> tuple[ImageSet, ProbeSuite]:
    """The images, and what judges by them; methods that cannot be built for them are left out of the plan.

    Raises:
        InputError: no method is left.
    """
    first = next(iter(plan.recipes.values()))
    for each in plan.recipes.values():  # all are to see what a tokenizer that one is given sees
        found = tokenizer_scaling(each.method["tokenizer"]) if each.method.get("tokenizer") else None
        if found is not None:
            first.measured["scaling"] = found.stored()
    for name in list(plan.recipes):
        try:
            construct(plan.recipes[name])
        except InputError as error:
            plan.left_out[name] = str(error)
            del plan.recipes[name]
            say(f"{name} is left out: {error}")
    if not plan.recipes:
        raise InputError(f"no method can take part: {'; '.join(plan.left_out.values())}")
    images, judge = load_data(first, open_data(first, say), say)
    if not images.scaling.plain:
        for each in plan.recipes.values():
            each.measured["scaling"] = images.scaling.stored()
    return images, judge


# --- training in turns ----------------------------------------------------------------------------------------------


def _turn(
    folder: Path,
    plan: Plan,
    name: str,
    seed: int,
    round_: int,
    clock: Callable[[], float] | None,
) -> None:
    """One turn of a method, where it has not had it; a method that fails is left out from then on."""
    run = Run(folder / "runs" / f"{name}-{seed}")
    last = round_ == plan.rounds - 1
    stop_at = math.inf if last else 60 * plan.minutes * (round_ + 1) / plan.rounds
    seconds = _reached(run)
    if seconds >= min(stop_at, 60 * plan.minutes):
        return
    say(
        f"round {round_ + 1} of {plan.rounds}: {name}, seed {seed}, {seconds / 60:.1f} of {plan.minutes:g} minutes done"
    )
    recipe = folder / "recipes" / f"{name}-{seed}.yaml"
    chosen = plain(plan.recipes[name])
    chosen["run"]["seed"] = seed
    write_text(recipe, yaml.safe_dump(chosen, sort_keys=False))
    reason = folder / "reason.txt"
    reason.unlink(missing_ok=True)
    told = {"out": str(run.path), "recipe": str(recipe), "stop_at": str(stop_at), "reason": str(reason)}
    told = {"data": chosen["data"]["path"], **told}
    write_json(folder / "turn.json", told)
    status = _process(folder / "turn.json") if clock is None else turn(told, clock)
    if status > 128:  # the turn met the signal
        raise Interrupted(status - 128)
    if status:
        why = reason.read_text() if reason.is_file() else f"its process ended with status {status}"
        if status == -signal.SIGKILL:
            why = "its process was killed, most likely because memory ran out"
        plan.left_out[name] = why
        say(f"{name} is left out: {why}")


def _process(told: Path) -> int:
    """A turn in a process of its own; returns its exit status. It is told of a signal, and ends with a checkpoint; with the
    next one it is killed, and what it had saved is kept.

    Raises:
        Interrupted: a signal came.
    """
    command = [sys.executable, "-m", "underpaint.comparison.worker", str(told)]
    status, passed = None, False
    # it ends when the pipe does; the terminal's Ctrl-C comes here only
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as process,
        watched_signals() as received,
    ):
        while status is None:
            try:
                status = process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                if received and not passed:
                    process.send_signal(signal.SIGTERM)
                    passed = True
            except Interrupted:
                process.kill()
                raise
    if received:
        raise Interrupted(received[0])
    return status


def _reached(run: Run) -> float:
    """Seconds of training that a run has behind it."""
    found = run.checkpoints() if run.exists else []
    numbers = json.loads((found[-1] / "state.json").read_text()) if found else {"seconds": 0.0}
    return float(numbers.get("passed", numbers["seconds"]))


# --- judging --------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """Everything that was judged, by row and seed."""

    worths: dict[str, list[Worth]]
    kinds: dict[str, tuple[Kind, bool]]  # of row, and whether a seed plays a part in it


@dataclass
class Judging:
    """Judges everything once, or takes up what an earlier call found."""

    folder: Path
    plan: Plan
    images: ImageSet
    suite: ProbeSuite
    found: Found = field(default_factory=lambda: Found({}, {}))

    def judged(self, name: str, seed: int, make: Callable[[], Worth]) -> Worth:
        """From the file of an earlier call, or made now."""
        file = self.folder / "judged" / f"{name.replace(' ', '-')}-{seed}.safetensors"
        if not file.is_file():
            save_worth(make(), file)
        return load_worth(file)

    def all(self) -> Found:
        say("judging: raw pixels, HOG and untrained encoders, then every run ...")
        self.baselines()
        first = next(iter(self.plan.recipes.values()))
        seen: dict[int, list[Known]] = {}
        untrained = [
            self.start("untrained encoder", "untrained", _seeded(first, k, None), seen.setdefault(k, []))
            for k in self.plan.seeds
        ]
        self.found.kinds["untrained encoder"] = ("start", True)
        if first.init:
            self.start("public weights", "public", _seeded(first, 0, first.init), [])
            self.found.kinds["public weights"] = ("start", False)
        for name in self.plan.recipes:
            if name not in self.plan.left_out:
                for seed in self.plan.seeds:
                    # with --init, runs see images standardised as its weights want them
                    self.run(name, seed, untrained[seed], [] if first.init else seen[seed])
                self.found.kinds[name] = ("method", True)
        return self.found

    def baselines(self) -> None:
        """What needs no network."""
        if self.suite.splits is None:
            return
        made: dict[str, Worth] = {}

        def baseline(name: str) -> Worth:
            if not made:
                made.update(self.suite.baselines(DRAWS))
            return made[name]

        for name, title in FLOORS.items():
            self.found.worths[title] = [self.judged(name, 0, partial(baseline, name))]
            self.found.kinds[title] = ("floor", False)

    def worth(self, encoder: Backbone, standardize: Standardize, known: list[Known]) -> Worth:
        """All probes of an encoder; what they saw of it is noted in `known`, for pictures."""
        seen = self.suite.see(encoder, standardize)
        known += seen.known(self.suite)
        return self.suite.worth(encoder, standardize, DRAWS, seen)

    def start(self, title: str, name: str, recipe: Recipe, known: list[Known]) -> Backbone:
        """What a method starts from."""
        method, standardize = build(recipe, self.images)
        make = partial(self.worth, method.encoder, standardize, known)
        self.found.worths.setdefault(title, []).append(self.judged(name, recipe.run.seed, make))
        known[:] = [each.without_patches() for each in known]  # held until all runs are judged
        return method.encoder

    def run(self, name: str, seed: int, untrained: Backbone, before: list[Known]) -> None:
        """A method's run, and its page; of the encoder `untrained` is known what was seen `before`."""
        run = Run(self.folder / "runs" / f"{name}-{seed}")
        encoder, standardize = load_encoder(run.path), standardize_for(run.path)
        after: list[Known] = []
        worth = self.judged(f"run-{name}", seed, partial(self.worth, encoder, standardize, after))
        worths = self.found.worths
        worths.setdefault(name, []).append(worth)
        if not (run.path / "pictures" / "looks.json").is_file():  # the last of what is found here
            known = {"encoder": worth, "untrained": worths["untrained encoder"][seed]}
            known |= {key: worths[title][0] for key, title in FLOORS.items() if title in worths}
            restoration = self.suite.restoration(load_method(run.path)[0], standardize)
            run.write_json("probes.json", {"restoration": restoration} | self.suite.summary(known, encoder))
            other = self.suite.recalibrate_bn(untrained, standardize)
            pictures = run.path / "pictures"
            write_visualizations(encoder, other, self.suite, standardize, pictures, known=(after, before))
        write_report(run.path)


def _seeded(recipe: Recipe, seed: int, init: str | None) -> Recipe:
    settings = plain(recipe)
    settings["run"]["seed"], settings["init"] = seed, init
    return checked(settings)


GROUPS = "groups of "  # before the name of a probe


def save_worth(worth: Worth, file: Path) -> None:
    """The single hits of every probe, the groups of the test images, and what the probes chose."""
    hits = {name: np.stack([p.correct for p in probes]).astype(np.uint8) for name, probes in worth.probes.items()}
    chosen = {name: [probe.chosen for probe in probes] for name, probes in worth.probes.items()}
    hits |= {f"{GROUPS}{name}": p[0].groups for name, p in worth.probes.items() if p[0].groups is not None}
    described = {"rank": json.dumps(worth.rank), "chosen": json.dumps(chosen), "counts": json.dumps(worth.counts)}
    with replacing(file) as temporary:
        save_file(hits, temporary, metadata=described)


def load_worth(file: Path) -> Worth:
    with safe_open(file, "numpy") as opened:
        described = opened.metadata()
        chosen = json.loads(described["chosen"])
        # a file of an earlier version has no groups
        groups = {k.removeprefix(GROUPS): opened.get_tensor(k) for k in opened.keys() if k.startswith(GROUPS)}  # noqa: SIM118
        probes = {
            name: [
                Probe.of(hits.astype(bool), picked, groups=groups.get(name))
                for hits, picked in zip(opened.get_tensor(name), chosen[name], strict=True)
            ]
            for name in chosen
        }
    return Worth(probes, json.loads(described["rank"]), json.loads(described.get("counts", "{}")))


# --- what was found -------------------------------------------------------------------------------------------------


def arms_of(found: Found) -> list[Arm]:
    """The rows with everything that statistics need, methods first."""
    arms = []
    for name, worths in found.worths.items():
        kind, seeded = found.kinds[name]
        hits = {
            probe: np.stack([np.stack([p.correct for p in worth.probes[probe]]) for worth in worths]).astype(float)
            for probe in worths[0].probes
        }
        groups = {probe: ps[0].groups for probe, ps in worths[0].probes.items() if ps[0].groups is not None}
        arms.append(Arm(name, kind, hits, [worth.rank for worth in worths], seeded, groups))
    places = ("method", "start", "floor")
    return sorted(arms, key=lambda arm: places.index(arm.kind))


def _result(plan: Plan, judge: ProbeSuite, folder: Path, found: Found) -> dict[str, Any]:
    arms = arms_of(found)
    first = next(iter(plan.recipes.values()))
    runs = {
        name: [Run(folder / "runs" / f"{name}-{seed}") for seed in plan.seeds]
        for name in plan.recipes
        if name not in plan.left_out
    }
    words = {name: [verdict_of_run(run.path).word for run in those] for name, those in runs.items()}
    troubled = {
        name: next(word for word in said if word != "learning")
        for name, said in words.items()
        if any(word != "learning" for word in said)
    }
    start = "public weights" if first.init else "untrained encoder"
    result: dict[str, Any] = {
        "format": FORMAT,
        "data": first.data.path,
        "encoder": first.encoder,
        "image_size": list(first.data.image_size),
        "init": first.init,
        "minutes": plan.minutes,
        "seeds": plan.seeds,
        "rounds": plan.rounds,
        "images": len(judge.pool),
        "start": start,
    }
    if judge.splits is not None:
        train, test = judge.full()
        classes = len(np.unique(train.labels))
        result |= {"train": len(train.indices), "test": len(test.indices), "classes": classes, "chance": 1 / classes}
        counts = _fewest(found)
        if few := judge.few(DRAWS).draws:
            result |= {"draws": DRAWS, "few_train": len(few[0].indices), "shots_overlap": judge.few(DRAWS).overlap}
        result |= {**counts, "seen_in_pretraining": judge.seen, "notes": judge.notes(counts, DRAWS)}
    result["verdict"] = verdict(
        arms,
        minutes=plan.minutes,
        shots=SHOTS,
        troubled=troubled,
        left_out=plan.left_out,
        spent={name: [run.lines("metrics.jsonl")[-1]["seconds"] / 60 for run in those] for name, those in runs.items()},
        tokenizers={n: made for n, those in runs.items() if (made := tokenizers_of(_tokenizers(those)))},
    )
    result["rows"] = [_row(arm, arms, start, runs.get(arm.name), words.get(arm.name)) for arm in arms]
    result["left_out"] = plan.left_out
    result["curves"] = {name: _curve(those) for name, those in runs.items()}
    result["environment"] = environment()
    _restorations(judge, runs, folder / "pictures" / "restorations.png")
    return result


def _fewest(found: Found) -> dict[str, int]:
    """Of each count of images, the smallest that any row has."""
    counts: dict[str, int] = {}
    for worth in (worth for worths in found.worths.values() for worth in worths):
        for name, count in worth.counts.items():
            counts[name] = min(count, counts.get(name, count))
    return counts


def _row(arm: Arm, arms: Sequence[Arm], start: str, runs: Sequence[Run] | None, words: Sequence[str] | None) -> Any:
    row: dict[str, Any] = {
        "name": arm.name,
        "kind": arm.kind,
        "probes": {
            probe: dict(zip(("accuracy", "standard_error"), standing(arm, probe), strict=True)) for probe in arm.hits
        },
        "seeds": {probe: hits.mean(axis=(1, 2)).tolist() for probe, hits in arm.hits.items()},
        "rank": None if arm.kind == "floor" else float(np.mean(arm.rank)),  # of pixels it says nothing
    }
    before = next(other for other in arms if other.name == start)
    if arm.kind == "method":
        row["gain"] = {}
        for probe in arm.hits:
            gap = difference(arm, before, probe)
            row["gain"][probe] = {"difference": gap.value, "standard_error": gap.error, "freedom": gap.freedom}
    if runs is not None:
        lines = [run.lines("metrics.jsonl") for run in runs]
        recipes = [run.recipe() for run in runs]
        ends = [line[-1] for line in lines]
        row |= {
            "words": words,
            "minutes": float(np.mean([end["seconds"] for end in ends])) / 60,
            "images": float(np.mean([end["images"] for end in ends])),
            "images_per_second": float(np.mean([end["images"] / max(end["seconds"], 1e-9) for end in ends])),
            "memory_gib": max(recipe.measured["memory_gib"] for recipe in recipes),
            "tokenizers": _tokenizers(runs),
            "loss_over_baseline": float(np.mean([_share(line) for line in lines])),
            "restoration": _restoration(runs),
            "recipe": plain(recipes[0]),
        }
    return row


def _tokenizers(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Of each seed whose method predicts words: whether the run made its tokenizer, and the seconds that making it took,
    then or elsewhere, None where its file does not tell."""
    found = [run.recipe().measured.get("tokenizer") for run in runs]
    return [{"made": one["made"], "seconds": one["seconds"]} for one in found if one]


def _restoration(runs: Sequence[Run]) -> dict[str, Any]:
    """By task, the error on held-out images over that of the trivial restoration; means over the seeds."""
    found = [json.loads((run.path / "probes.json").read_text()).get("restoration", {}) for run in runs]
    means = {}
    for task, first in found[0].items():
        if not isinstance(first, dict):
            continue
        errors = [one[task]["error"] for one in found]
        # the same images for all seeds, so their part does not shrink with the seeds
        images = float(np.mean([one[task]["standard_error"] ** 2 for one in found]))
        between = float(np.var(errors, ddof=1)) / len(errors) if len(errors) > 1 else 0.0
        means[task] = {"error": float(np.mean(errors)), "standard_error": math.sqrt(images + between)}
    return means


def _share(lines: Sequence[Mapping[str, Any]]) -> float:
    """Loss over that of a trivial prediction, in the last tenth of a run."""
    trained = [line for line in lines if line["loss"] is not None and line["terms"].get("baseline")]
    late = trained[-max(1, len(trained) // 10) :]
    return float(np.mean([line["loss"] / line["terms"]["baseline"] for line in late])) if late else math.nan


def _curve(runs: Sequence[Run]) -> dict[str, Any]:
    """What the quick probes said on the way, and the loss over its baseline; means over the seeds."""
    looks = [[line for line in run.lines("metrics.jsonl") if line.get("probe")] for run in runs]
    points = min(len(look) for look in looks)
    looks = [look[:points] for look in looks]
    curve: dict[str, Any] = {
        "minutes": np.mean([[line["seconds"] / 60 for line in look] for look in looks], axis=0).tolist(),
        "images": np.mean([[line["images"] for line in look] for look in looks], axis=0).tolist(),
        "probes": {},
    }
    for name in [key for key in looks[0][0]["probe"] if not key.endswith("_error")]:
        values = np.array([[line["probe"][name] for line in look] for look in looks])
        errors = np.array([[line["probe"].get(f"{name}_error", 0.0) for line in look] for look in looks])
        # the same test images for all seeds, so their part does not shrink with the seeds
        between = values.var(axis=0, ddof=1) / len(runs) if len(runs) > 1 else np.zeros(points)
        curve["probes"][name] = {
            "value": values.mean(axis=0).tolist(),
            "error": np.sqrt((errors**2).mean(axis=0) + between).tolist() if errors.any() or len(runs) > 1 else None,
        }
    trained = [line for line in runs[0].lines("metrics.jsonl") if line["loss"] is not None]
    trained = [line for line in trained if line["terms"].get("baseline")]
    curve["loss"] = {
        "minutes": [round(line["seconds"] / 60, 4) for line in trained],
        "share": [round(line["loss"] / line["terms"]["baseline"], 5) for line in trained],
    }
    return curve


def _restorations(judge: ProbeSuite, runs: Mapping[str, Sequence[Run]], path: Path) -> None:
    """The same images restored by every method: a row an image, original first."""
    columns: dict[str, torch.Tensor] = {}
    for name, those in runs.items():
        method, standardize, _ = load_method(those[0].path)
        if not isinstance(method, Restores):
            continue
        images = judge.shown("cpu")
        columns.setdefault("original", images)
        for caption, frame in method.restore(standardize(images)).items():
            if caption != "original":
                columns[f"{name}\n{caption}"] = standardize.inverse(frame)
    if columns:
        sheet(columns, path)
