"""Comparisons: what may be claimed, what is said, and whole ones on small images."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from asking import compare, pretrain
from scipy import stats

from underpaint.comparison.run import Found, Judging, arms_of, load_worth, save_worth
from underpaint.comparison.statistics import Arm, Difference, Part, difference, standing
from underpaint.comparison.verdict import order, verdict
from underpaint.errors import InputError
from underpaint.evaluation.probes import Worth
from underpaint.evaluation.results import Probe
from underpaint.report import write_report
from underpaint.report.comparison import advised, tokenizer_text, training_text
from underpaint.report.results import tokenizers_of
from underpaint.train.run_folder import Run

PROBES = ("linear", "few_linear")


def made_arm(
    name: str,
    accuracy: float,
    rng: np.random.Generator,
    *,
    kind: Any = "method",
    seeds: int = 2,
    images: int = 4_000,
    seed_deviation: float = 0.004,
    hard: np.ndarray | None = None,
) -> Arm:
    """Hits whose expectation is `accuracy`: test images differ in how hard they are, seeds in how good they are."""
    hard = rng.normal(size=images) if hard is None else hard
    hits = {}
    for probe, draws in (("linear", 1), ("few_linear", 5)):
        level = accuracy + seed_deviation * rng.normal(size=(seeds, 1, 1)) * (kind != "floor")
        chance = np.clip(level + 0.15 * hard, 0, 1)
        hits[probe] = (rng.random((seeds, draws, len(hard))) < chance).astype(float)
    return Arm(name, kind, hits, [20.0] * seeds, kind != "floor")


def said_of(arms: list[Arm], **other: Any) -> list[str]:
    given: dict[str, Any] = {"minutes": 8.0, "shots": 10, "troubled": {}, "left_out": {}}
    return verdict(arms, **given | other)


# --- what may be claimed --------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("seeds", [2, 4])
def test_equal_methods_are_told_apart_in_about_one_of_twenty_comparisons(seeds: int) -> None:
    wrong = 0
    for trial in range(400):
        rng = np.random.default_rng(trial)
        hard = rng.normal(size=1_000)
        arms = [made_arm(name, 0.5, rng, seeds=seeds, seed_deviation=0.02, hard=hard) for name in "abc"]
        wrong += difference(arms[0], arms[1], "linear").beyond()
    # binomial: 400 at 0.05 gives 20 +- 4.4; the errors are rather too large than too small
    assert wrong <= 33


@pytest.mark.quick
def test_a_real_difference_is_found_and_has_its_size() -> None:
    found = []
    for trial in range(50):
        rng = np.random.default_rng(trial)
        hard = rng.normal(size=4_000)
        arms = [made_arm("a", 0.55, rng, hard=hard, seeds=3), made_arm("b", 0.5, rng, hard=hard, seeds=3)]
        found.append(difference(arms[0], arms[1], "linear"))
    assert np.mean([gap.value for gap in found]) == pytest.approx(0.05, abs=0.005)
    assert np.mean([gap.beyond() for gap in found]) > 0.9
    # what the error says is what the differences do
    assert np.std([gap.value for gap in found]) == pytest.approx(np.mean([gap.error for gap in found]), rel=0.35)


@pytest.mark.quick
def test_pairing_makes_the_error_of_a_difference_smaller_than_that_of_two_arms() -> None:
    rng = np.random.default_rng(0)
    hits = (rng.random((1, 1, 2_000)) < 0.5).astype(float)
    other = hits.copy()
    other[..., :20] = 1 - other[..., :20]
    a, b = (Arm(name, "method", {"linear": x}, [1.0]) for name, x in (("a", hits), ("b", other)))
    apart = np.hypot(standing(a, "linear")[1], standing(b, "linear")[1])
    assert difference(a, b, "linear").error < apart / 5
    same = difference(a, a, "linear")
    assert same.value == 0
    assert not same.beyond()


@pytest.mark.quick
def test_many_claims_need_more_than_one() -> None:
    gap = Difference(0.022, (Part(0.01**2, 50.0),))
    assert gap.beyond(1)
    assert not gap.beyond(10)


# --- simulations: what is claimed where all are equal, and where they are not ---------------------------------------

TRIALS = 400


def alike(
    rng: np.random.Generator,
    deviations: tuple[float, ...],
    seeds: int,
    images: int,
    *,
    lead: float = 0.0,
    groups: int = 0,
    kind: Any = "method",
) -> list[Arm]:
    """Methods of one true accuracy (the first is `lead` above, the others unless they are 10 points below), one seed
    deviation each; images differ in how hard they are for all, and for each method. With `groups` that is so of groups."""
    whose = np.arange(images) % groups if groups else np.arange(images)
    shared, arms = rng.normal(size=whose.max() + 1)[whose], []
    for number, deviation in enumerate(deviations):
        own = rng.normal(size=whose.max() + 1)[whose]
        level = 0.5 + lead * (number == 0) - 0.1 * (lead > 0 and deviation > 0.02)
        chance = level + 0.2 * shared + 0.1 * own + deviation * rng.normal(size=(seeds, 1, 1))
        hits = (rng.random((seeds, 1, images)) < chance).astype(float)
        given: dict[str, Any] = {"groups": {"linear": whose}} if groups else {}
        arms.append(Arm("abcdef"[number], kind, {"linear": hits}, [20.0] * seeds, **given))
    return arms


def claimed(said: list[str]) -> list[str]:
    """What is said to be above, better, worse or below, without a `not`."""
    return re.findall(r"(?:(?<!not )measurably (?:above|better|worse|below)|but is above) ([^;]*)", " ".join(said))


@pytest.mark.parametrize(
    ("deviations", "seeds", "images", "groups"),
    [
        ((0.005, 0.005, 0.005, 0.05), 2, 2_000, 0),  # one unstable method
        ((0.005, 0.005, 0.005, 0.05), 3, 2_000, 0),
        ((0.005, 0.05), 2, 2_000, 0),
        ((0.007,) * 5, 3, 2_000, 0),  # the leader named after looking
        ((0.007,) * 5, 2, 2_000, 0),
        ((0.005,) * 3, 3, 40, 0),  # few test images
        ((0.005,) * 3, 3, 80, 0),
        ((0.005,) * 3, 3, 2_000, 20),  # images of 20 patients
    ],
)
def test_of_equal_methods_one_is_called_better_in_at_most_one_of_twenty_comparisons(
    deviations: tuple[float, ...], seeds: int, images: int, groups: int
) -> None:
    wrong = 0
    for trial in range(TRIALS):
        arms = alike(np.random.default_rng(trial), deviations, seeds, images, groups=groups)
        wrong += bool(claimed(said_of(arms)))
    # binomial: 400 at 0.05 gives 20 +- 4.4, and more than 27 of them once in twenty times
    assert wrong <= 27


@pytest.mark.quick
def test_from_one_seed_nothing_is_claimed() -> None:
    for trial in range(100):
        rng = np.random.default_rng(trial)
        arms = alike(rng, (0.01, 0.01, 0.01), 1, 2_000) + alike(rng, (0.01,), 1, 2_000, kind="start")
        assert not claimed(said_of(arms))


@pytest.mark.parametrize(("deviation", "least"), [(0.003, 0.87), (0.005, 0.75)])
def test_two_points_between_stable_methods_are_seen_beside_an_unstable_one(deviation: float, least: float) -> None:
    seen = []
    for trial in range(100):
        arms = alike(np.random.default_rng(trial), (deviation, deviation, 0.05), 5, 10_000, lead=0.02)
        seen.append(any("b (" in words for words in claimed(said_of(arms))))
    assert np.mean(seen) >= least


@pytest.mark.quick
def test_parts_of_an_error_are_those_of_scipy() -> None:
    a, b = alike(np.random.default_rng(0), (0.01, 0.05), 4, 60)
    b = Arm("b", "method", {"linear": b.hits["linear"][:3]}, [1.0])
    images, _, seeds = difference(a, b, "linear").parts
    welch: Any = stats.ttest_ind(*(arm.hits["linear"].mean(axis=(1, 2)) for arm in (a, b)), equal_var=False)
    gap = a.accuracy("linear") - b.accuracy("linear")
    assert gap / np.sqrt(seeds.variance) == pytest.approx(welch.statistic)
    assert seeds.freedom == pytest.approx(welch.df)
    paired: Any = stats.ttest_rel(*(arm.hits["linear"].mean(axis=(0, 1)) for arm in (a, b)))
    assert gap / np.sqrt(images.variance) == pytest.approx(paired.statistic)
    assert images.freedom == paired.df == 59
    one = alike(np.random.default_rng(0), (0.01, 0.01), 1, 60)
    assert difference(one[0], one[1], "linear").freedom == 0


@pytest.mark.quick
def test_images_of_a_group_count_as_one() -> None:
    a, b = alike(np.random.default_rng(0), (0.01, 0.01), 2, 400, groups=20)
    images = difference(a, b, "linear").parts[0]
    by_group = (a.hits["linear"] - b.hits["linear"]).mean(axis=(0, 1)).reshape(20, 20).mean(0)  # groups are alternating
    assert np.sqrt(images.variance) == pytest.approx(stats.sem(by_group))
    assert images.freedom == 19
    whole = Arm("a", "method", a.hits, [1.0], groups={"linear": np.zeros(400, int)})
    assert not difference(whole, b, "linear").beyond()  # of one patient nothing is known


@pytest.mark.quick
def test_groups_are_kept_with_the_hits_and_older_files_are_read(tmp_path: Path) -> None:
    hits = np.random.default_rng(0).random(30) < 0.5
    groups = [f"patient {k % 5}" for k in range(30)]
    for name, given in (("new", groups), ("old", None)):
        save_worth(Worth({"linear": [Probe.of(hits, {"C": 1.0}, groups=given)]}, 3.0), tmp_path / name)
    new, old = (load_worth(tmp_path / name) for name in ("new", "old"))
    assert (new.probes["linear"][0].groups == np.arange(30) % 5).all()
    assert old.probes["linear"][0].groups is None
    means = np.array([hits[k::5].mean() for k in range(5)])
    assert new.probes["linear"][0].standard_error == pytest.approx(stats.sem(means))
    (arm,) = arms_of(Found({"mae": [new]}, {"mae": ("method", True)}))
    assert (arm.groups["linear"] == np.arange(30) % 5).all()


# --- what is said ---------------------------------------------------------------------------------------------------


def made_arms(*accuracies: float, start: float = 0.40, hog: float = 0.45, seeds: int = 3) -> list[Arm]:
    rng = np.random.default_rng(0)
    hard = rng.normal(size=6_000)
    arms = [made_arm(f"m{k}", value, rng, hard=hard, seeds=seeds) for k, value in enumerate(accuracies)]
    arms.append(made_arm("untrained encoder", start, rng, hard=hard, seeds=seeds, kind="start"))
    return [*arms, made_arm("HOG", hog, rng, hard=hard, seeds=1, kind="floor")]


@pytest.mark.quick
def test_the_better_method_is_named_with_its_lead() -> None:
    said = said_of(made_arms(0.55, 0.47))
    assert said[0] == "Take m0."
    assert "m0 has the best linear probe" in said[1]
    assert "measurably above m1" in said[1]
    assert "measurably better: m0" in said[2]
    assert any("m0 has the best linear probe with 10 labels a class" in sentence for sentence in said)


@pytest.mark.quick
def test_equal_methods_are_not_ranked() -> None:
    said = said_of(made_arms(0.55, 0.55))
    assert said[0].startswith("Take m")
    assert "cannot be told apart" in said[0]
    assert "without any network" not in said[0]
    assert "is not measurably above" in said[1]


@pytest.mark.quick
def test_where_nothing_helps_none_is_advised() -> None:
    said = said_of(made_arms(0.40, 0.401))
    assert said[0].startswith("Take none of them: no method measurably beats the untrained encoder")
    assert "not measurably different" in said[2]


@pytest.mark.quick
def test_a_method_below_hog_is_said_to_be() -> None:
    said = " ".join(said_of(made_arms(0.55, 0.42)))
    assert said.startswith("Take m0.")
    behind = said_of(made_arms(0.55, 0.42, hog=0.60))[0]
    assert behind == "Take m0; but a linear probe does measurably better on HOG, without any network."
    assert "HOG, without a network" in said
    assert "measurably below m0; measurably above m1" in said


@pytest.mark.quick
def test_one_seed_is_said_to_be_one() -> None:
    said = said_of(made_arms(0.55, 0.45, seeds=1))
    assert said[0].startswith("m0 has the highest number, but each method was trained once, and one seed cannot tell")
    assert "measurabl" not in " ".join(said)
    assert "Linear probe: m0 54.7 ± 0.6 %, m1 46.5 ± 0.6 %" in said[1]
    assert "Against HOG, without a network: m0 +" in " ".join(said)
    assert not any("trained once" in sentence for sentence in said_of(made_arms(0.55, 0.45)))
    assert any("Two seeds of a method" in sentence for sentence in said_of(made_arms(0.55, 0.45, seeds=2)))


@pytest.mark.quick
def test_without_labels_no_method_is_called_better() -> None:
    arms = [Arm("a", "method", {}, [20.0]), Arm("untrained encoder", "start", {}, [9.0])]
    (said,) = said_of(arms)
    assert said.startswith("Without labels it cannot be said")
    assert "--labels" in said


@pytest.mark.quick
def test_what_went_wrong_is_said_too() -> None:
    said = said_of(made_arms(0.55, 0.45), troubled={"m1": "stalled"}, left_out={"mae": "needs a plain ViT"})
    assert "The run of m1 is stalled: its own page says why." in said
    assert "mae was left out: needs a plain ViT" in said


@pytest.mark.quick
@pytest.mark.parametrize(
    ("accuracies", "collapsed", "said"),
    [
        ((0.55, 0.55), ["m0"], "Take m1, not m0, whose run collapsed."),
        ((0.55, 0.547), ["m1"], "Take m0, not m1, whose run collapsed."),
        ((0.55, 0.42), ["m1"], "Take m0, not m1, whose run collapsed."),
        (
            (0.55, 0.42),
            ["m0"],
            "Take none of them: no method measurably beats the untrained encoder, and",
        ),
        ((0.55, 0.55, 0.42), ["m1", "m2"], "Take m0, not m1 or m2, whose runs collapsed."),
        ((0.55, 0.54), ["m0", "m1"], "Take none of them: the runs of m0 and m1 collapsed."),
    ],
)
def test_a_collapsed_method_is_named_first_and_never_advised(
    accuracies: tuple[float, ...], collapsed: list[str], said: str
) -> None:
    first, *others = said_of(made_arms(*accuracies, start=0.42), troubled=dict.fromkeys(collapsed, "collapsed"))
    assert first.startswith(said)
    assert "cannot be told" not in first
    for name in collapsed:
        assert f"The run of {name} is collapsed: its own page says why." in others


@pytest.mark.quick
@pytest.mark.parametrize(
    ("sentence", "names"),
    [
        ("Take m0.", ["m0"]),
        ("Take v1.5; but a linear probe does measurably better on HOG, without any network.", ["v1.5"]),
        ("Take m0, though it cannot be told from m1 and m2.", ["m0"]),
        ("Take m0, m1 or m2, which cannot be told apart, not m3, whose run collapsed.", ["m0", "m1", "m2"]),
        ("Take none of them: no method measurably beats the untrained encoder. More may change that.", []),
        ("Without labels it cannot be said which encoder is better.", []),
    ],
)
def test_the_page_shows_in_bold_what_the_verdict_advises(sentence: str, names: list[str]) -> None:
    assert advised(sentence) == names


@pytest.mark.quick
def test_of_one_seed_a_collapse_is_named_beside_the_highest_number() -> None:
    said = said_of(made_arms(0.55, 0.45, seeds=1), troubled={"m1": "collapsed"})
    assert said[0].endswith("`--seeds 3` or more can. The run of m1 collapsed.")


@pytest.mark.quick
def test_public_weights_are_the_bar_where_they_are_better_than_random_ones() -> None:
    rng = np.random.default_rng(0)
    arms = made_arms(0.55)
    hard = rng.normal(size=6_000)
    arms = [made_arm(a.name, a.accuracy("linear"), rng, hard=hard, kind=a.kind) for a in arms[:2]]
    arms.append(made_arm("public weights", 0.65, rng, hard=hard, kind="start", seeds=1))
    said = said_of(arms)
    assert said[0].startswith("Take none of them: no method measurably beats the public weights")
    assert order(arms[:1], "linear") == (arms[0], [], [])


@pytest.mark.quick
def test_minutes_that_differ_are_named() -> None:
    arms = made_arms(0.55, 0.47)
    level: dict[str, Any] = {"m0": [8.1, 8.0], "m1": [7.9, 8.0]}
    assert any("8 minutes of training each" in sentence for sentence in said_of(arms, spent=level))
    (unequal,) = [s for s in said_of(arms, spent={"m0": [7.5, 7.6], "m1": [8.0, 8.0]}) if "more can change" in s]
    assert "m0 had 7.5 to 7.6 minutes, m1 had 8.0 minutes" in unequal
    assert "each" not in unequal
    (short,) = [s for s in said_of(arms, spent={"m0": [3.4], "m1": [3.4]}) if "more can change" in s]
    assert "m0 had 3.4 minutes" in short  # not the 8 that were planned
    assert training_text(8.0, [7.55, 8.0, math.nan]) == "7.5 to 8.0 min, of 8 planned"
    assert training_text(8.0, [8.1, math.nan]) == "8 min each"


@pytest.mark.quick
@pytest.mark.parametrize(
    ("found", "cell", "said"),
    [
        ([{"made": True, "seconds": 34.2}], "34 s", "m0 made its tokenizer in 34 s, which comes on top"),
        ([{"made": True, "seconds": 34.0}, {"made": True, "seconds": 39.0}], "34 s to 39 s", "in 34 s to 39 s, which"),
        ([{"made": False, "seconds": 1200.0}] * 2, "given, made elsewhere in 20 min 0 s", "elsewhere in 20 min 0 s,"),
        ([{"made": False, "seconds": None}], "given, made elsewhere", "in a time that its file does not tell"),
    ],
)
def test_the_time_of_a_tokenizer_is_that_of_making_it(found: Any, cell: str, said: str) -> None:
    tokenizers = tokenizers_of(found)
    assert tokenizer_text(tokenizers) == cell
    assert any(said in sentence for sentence in said_of(made_arms(0.55, 0.47), tokenizers={"m0": tokenizers}))


@pytest.mark.quick
def test_nothing_is_said_of_a_tokenizer_that_a_comparison_does_not_tell_of() -> None:
    assert tokenizer_text(tokenizers_of(None)) == "–"
    assert tokenizer_text(tokenizers_of([])) == "none"


# --- turns ----------------------------------------------------------------------------------------------------------

TINY = {
    "encoder.embed_dim": 32,
    "encoder.depth": 2,
    "encoder.num_heads": 2,
    "data.crop_scale": [0.5, 1.0],
}


def test_a_run_in_turns_makes_the_steps_of_one_in_a_piece(pictures: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"recipe": "mae-tiny-32", "patch_size": 8, "batch_size": 16, "steps": 12}
    pretrain(pictures, tmp_path / "whole", settings=TINY, **settings)
    for stop_at in (0.0, 0.0, float("inf")):
        pretrain(pictures, tmp_path / "turns", settings=TINY, stop_at=stop_at, **settings)
    whole, turns = (Run(tmp_path / name) for name in ("whole", "turns"))
    steps = [line["step"] for line in turns.lines("metrics.jsonl") if line.get("probe")]
    assert steps[:3] == [0, 1, 2]
    assert steps[-1] == 12
    assert (whole.path / "encoder.safetensors").read_bytes() == (turns.path / "encoder.safetensors").read_bytes()
    assert not (turns.path / "probes.json").exists()  # whoever lets it take turns judges it


def machine(pace: Callable[[float], float]) -> Callable[[], float]:
    """A clock that moves on by `pace(seconds so far)` whenever it is read: a machine whose speed is known. The loop reads
    it four times a step, of which three count."""
    now = 0.0

    def read() -> float:
        nonlocal now
        now += pace(now)
        return now

    return read


# seconds a reading: busy while the first steps are timed; as fast as can be then, and slow in the last turn
BUSY_FIRST: Callable[[float], float] = lambda now: 2.0 if now < 26 else 0.2  # noqa: E731
BUSY_LAST: Callable[[float], float] = lambda now: 0.1 if now < 26 else 1.0  # noqa: E731


@pytest.mark.parametrize(("pace", "a_step"), [(BUSY_FIRST, 0.6), (BUSY_LAST, 3.0)])
def test_a_run_in_turns_has_its_time_and_its_schedule_whatever_was_timed_first(
    pace: Any, a_step: float, pictures: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "recipe": "mae-tiny-32",
        "patch_size": 8,
        "batch_size": 16,
        "minutes": 0.4,
        "probe_every": 10**9,
    }
    clock = machine(pace)
    for stop_at in (8.0, 16.0, float("inf")):
        run = pretrain(pictures, tmp_path / "run", settings=TINY, stop_at=stop_at, clock=clock, **settings)
        reached = run.lines("metrics.jsonl")[-1]["seconds"]
        assert min(stop_at, 24.0) <= reached <= min(stop_at, 24.0) + 1.5 * a_step
    recipe, lines = run.recipe(), run.lines("metrics.jsonl")
    assert recipe.measured["steps"] == lines[-1]["step"]
    assert lines[-1]["lr"] == 0
    peak, warmup = recipe.optimiser.lr * 16 / 256, recipe.optimiser.warmup
    for line in lines:  # the cosine of 24 seconds, by the clock
        share = min(1.0, line["seconds"] / 24)
        cosine = (1 + math.cos(math.pi * (share - warmup) / (1 - warmup))) / 2
        wanted = peak * (share / warmup if share < warmup else cosine)
        assert line["lr"] == pytest.approx(wanted, abs=peak * 2.5 * a_step / 24 / min(1.0, 5 * warmup))


def test_turns_cut_in_other_places_make_the_same_run(pictures: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "recipe": "mae-tiny-32",
        "patch_size": 8,
        "batch_size": 16,
        "minutes": 0.2,
        "probe_every": 10**9,
    }
    made = []
    for pauses in ((6.0, float("inf")), (2.0, 3.0, 8.0, 12.0)):
        out = tmp_path / f"{len(pauses)}"
        for stop_at in pauses:  # each turn is a process of its own, which starts its clock anew
            run = pretrain(pictures, out, settings=TINY, stop_at=stop_at, clock=machine(lambda now: 0.1), **settings)
        made.append((run.path / "encoder.safetensors").read_bytes())
        assert run.lines("metrics.jsonl")[-1]["seconds"] == pytest.approx(12.0, abs=0.45)
    assert made[0] == made[1]


# --- whole comparisons ----------------------------------------------------------------------------------------------

EXTRACTED: list[int] = []  # images that a network saw in one pass, while a comparison judged
features_module: Any = import_module("underpaint.evaluation.features")
visualizations_module: Any = import_module("underpaint.evaluation.visualizations")
GIVEN: dict[str, Any] = {
    "methods": ["mae", "energy"],
    "minutes": 0.03,
    "seeds": 1,
    "recipe": "mae-tiny-32",
    "patch_size": 8,
    "batch_size": 16,
    "settings": TINY,
}


@pytest.fixture(scope="module")
def compared(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("comparison") / "which"
    os.environ["UNDERPAINT_CACHE"] = str(folder.parent / "cache")
    plain, judge = features_module.extract, Judging.all

    def counting(encoder: Any, batches: Any, **given: Any) -> Any:
        found = plain(encoder, batches, **given)
        EXTRACTED.append(len(found.pooled) if isinstance(encoder, torch.nn.Module) else 0)
        return found

    def judging(self: Judging) -> Found:
        EXTRACTED.clear()
        return judge(self)

    with pytest.MonkeyPatch.context() as patch:
        for module in (features_module, visualizations_module):
            patch.setattr(module, "extract", counting)
        patch.setattr(Judging, "all", judging)
        # a clock that is read, not one that runs: 0.03 s a step, so this comparison could be repeated
        return folder, compare(pictures, folder, clock=machine(lambda now: 0.01), **GIVEN)


@pytest.mark.xdist_group("compare")
def test_every_encoder_looks_at_the_images_once(compared: tuple[Path, dict[str, Any]]) -> None:
    # the untrained one's patch tokens are not held until all is judged: each run's colours of patches ask for them again
    assert sum(EXTRACTED) == (1 + 2) * 90 + 2 * (72 + 6)


@pytest.mark.xdist_group("compare")
def test_every_row_is_there_and_had_the_same_time(compared: tuple[Path, dict[str, Any]]) -> None:
    folder, result = compared
    names = [row["name"] for row in result["rows"]]
    assert names == ["mae", "energy", "untrained encoder", "raw pixels", "HOG"]
    assert (result["images"], result["test"]) == (72, 18)  # of 90: what judges is not trained on
    assert all(run.recipe().data.all_images is False for run in map(Run, folder.glob("runs/*")))
    assert (result["shots"], result["draws"], result["few_train"]) == (10, 5, 30)
    assert result["shots_overlap"] == pytest.approx(10 / 24, abs=0.12)
    assert "Few labels are 10 a class, drawn 5 times from 72" in (folder / "report.html").read_text()
    for row in result["rows"][:2]:
        assert row["minutes"] == pytest.approx(0.03, abs=0.001)  # a turn ends with a whole step
        assert row["images_per_second"] > 0
        assert row["memory_gib"] > 0
        assert row["tokenizers"] == []
        assert set(row["probes"]) == {"linear", "attentive", "knn", "few_linear", "few_attentive"}
        assert 0 < row["restoration"]["mask"]["error"] < 3
        assert row["restoration"]["mask"]["standard_error"] > 0
        assert len(result["curves"][row["name"]]["minutes"]) == result["rounds"] + 1
        assert (folder / "runs" / f"{row['name']}-0" / "report.html").is_file()
    assert json.loads((folder / "compare.json").read_text())["verdict"] == result["verdict"]
    assert any("0.03 minutes of training each" in sentence for sentence in result["verdict"])
    assert (folder / "table.md").read_text().count("\n") == 2 + len(names) + 1  # and chance


@pytest.mark.xdist_group("compare")
def test_asking_again_trains_nothing_and_says_the_same(compared: tuple[Path, dict[str, Any]], pictures: Path) -> None:
    folder, result = compared
    before = {file: file.stat().st_mtime_ns for file in folder.glob("runs/*/checkpoints/*/state.json")}
    again = compare(pictures, folder, **GIVEN)
    assert {file: file.stat().st_mtime_ns for file in folder.glob("runs/*/checkpoints/*/state.json")} == before
    assert (again["rows"], again["verdict"]) == (result["rows"], result["verdict"])


@pytest.mark.xdist_group("compare")
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"minutes": 0.05}, "minutes: 0.03 there"),
        ({"methods": ["mae"]}, "methods: mae, energy there"),
        ({"batch_size": 8}, "mae: optimiser.batch_size: 16 in the run, 8 now"),
    ],
)
def test_another_comparison_is_not_written_over(
    compared: tuple[Path, dict[str, Any]], pictures: Path, changed: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        compare(pictures, compared[0], **GIVEN | changed)


@pytest.mark.xdist_group("compare")
def test_the_page_holds_table_curves_pictures_and_verdict(compared: tuple[Path, dict[str, Any]]) -> None:
    page = write_report(compared[0]).read_text()
    for heading in (
        "Which method for these images?",
        "The table",
        "How well they restore",
        "On the way",
        "Restorations",
        "Settings of each",
    ):
        assert heading in page
    assert page.count("<svg") == 6
    assert "data:image/png" in page
    assert "http://" not in page
    assert "https://" not in page
    assert len(page) < 5_000_000


def test_a_method_that_cannot_serve_the_encoder_is_reported(pictures: Path, tmp_path: Path) -> None:
    small = {"encoder.layers": [1, 1, 1, 1], "encoder.channels": [32, 32, 64, 64]}
    settings = {"encoder.norm_layer": "groupnorm", **small}
    result = compare(
        pictures,
        tmp_path / "which",
        methods=["cae", "energy"],
        minutes=0.02,
        seeds=1,
        encoder="resnet18",
        image_size=32,
        batch_size=16,
        settings=settings,
        clock=machine(lambda now: 0.01),
    )
    assert result["rows"][0]["name"] == "energy"
    assert "CAE" in result["left_out"]["cae"]  # said by the method, or under test by the checker of types
    assert any(sentence.startswith("cae was left out") for sentence in result["verdict"])


def test_the_time_of_a_tokenizer_is_told_and_not_part_of_the_minutes(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "words.yaml").write_text("method: {name: cae, codebook_size: 32}")
    given: dict[str, Any] = GIVEN | {"methods": [str(tmp_path / "words.yaml")]}
    result = compare(pictures, tmp_path / "which", clock=machine(lambda now: 0.06), **given)
    row = result["rows"][0]
    assert [one["made"] for one in row["tokenizers"]] == [True]
    assert row["tokenizers"][0]["seconds"] > 0
    assert row["minutes"] == pytest.approx(0.03, abs=0.0035)  # a turn ends with a whole step, of 0.18 s
    assert 0 < row["restoration"]["words"]["error"] < 3
    assert "Hidden words" in (tmp_path / "which" / "report.html").read_text()


def test_a_signal_ends_it_after_a_checkpoint_and_the_same_command_goes_on(pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "which"
    command = [sys.executable, "-m", "underpaint.cli", "compare", str(pictures), "--out", str(folder)]
    command += ["--methods", "mae", "--minutes", "0.06", "--seeds", "1", "--recipe", "mae-tiny-32"]
    command += ["--patch-size", "8", "--batch-size", "16"]
    for name, value in TINY.items():
        command += ["--set", f"{name}={value}"]
    environment = {**os.environ, "UNDERPAINT_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    metrics = folder / "runs" / "mae-0" / "metrics.jsonl"
    for _ in range(600):
        if metrics.is_file() and metrics.read_text().count("\n") > 2:
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert "the same command goes on" in said
    reached = Run(folder / "runs" / "mae-0").checkpoints()[-1].name
    assert reached > "step-000000000"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    stored = yaml.safe_load((folder / "compare.yaml").read_text())
    assert stored["seeds"] == [0]
    assert (folder / "report.html").is_file()
    steps = [line["step"] for line in Run(folder / "runs" / "mae-0").lines("metrics.jsonl")]
    assert steps == sorted(set(steps))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"methods": ["dino"]}, "'dino' is no method"),
        ({"methods": []}, "give at least one"),
        ({"methods": ["mae", "mae"]}, "named twice"),
        ({"minutes": 0.0}, "above 0"),
    ],
)
def test_bad_input_is_one_clear_line(pictures: Path, tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        compare(pictures, tmp_path / "which", **GIVEN | changed)
    assert not (tmp_path / "which").exists()
