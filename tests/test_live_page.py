"""The page of a run while it goes on, and the line of `underpaint watch`: of runs that go on, were killed, and ended."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import write_pictures
from forked import CommandLine
from test_report import falling_losses, flat_losses, made_final, made_metrics, made_probe, make_run, whole

from underpaint import pretraining
from underpaint.cli import main
from underpaint.locking import locked
from underpaint.prepare import Session
from underpaint.recipes.recipe import checked
from underpaint.report import watch, write_report
from underpaint.report.figures.plots import Line, line_plot
from underpaint.report.reading import read_lines, read_yaml
from underpaint.report.results import of_run
from underpaint.report.standing import probes_of, standing
from underpaint.report.verdict import Decision, decide, judge
from underpaint.train.devices import make_fabric
from underpaint.train.run_folder import Run

STEPS = 12
COMMAND = [
    *("--method", "mae", "--encoder", "vit_tiny_patch16_224", "--image-size", "16", "--patch-size", "4"),
    *("--batch-size", "8", "--steps", str(STEPS), "--probe-every", "4", "--set", "encoder.embed_dim=32"),
    *("--set", "encoder.depth=1", "--set", "encoder.num_heads=2", "--set", "run.log_every=2"),
]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, server: CommandLine) -> tuple[Path, list[Any]]:
    """A run that was killed in its sixth step, and the command that goes on with it."""
    folder = tmp_path_factory.mktemp("live")
    images = write_pictures(folder / "images", 40, classes=2, size=16)
    command = ["pretrain", images, "--out", folder / "run", *COMMAND]
    assert server(*command, die=("step", 6)).status == -9
    return folder / "run", command


def line_of(run: Path, capsys: Any) -> str:
    assert main(["watch", str(run)]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert said.startswith(f"{run}: ")
    return said[len(f"{run}: ") : -1]


def test_a_page_is_there_while_a_run_goes_on_and_stops_reloading_when_it_ends(
    killed: tuple[Path, list[Any]], server: CommandLine, capsys: Any
) -> None:
    run, command = killed
    text, page = whole(run / "report.html")
    assert 'id="going"' in text
    assert '<noscript><meta http-equiv="refresh" content="20"></noscript>' in text
    assert f"Step 4 of {STEPS}" in text
    assert len(page.frames) == 2  # of the untrained method, and after four steps
    assert re.search(r'data-label="step 4, \d+ s, loss [0-9.]+"', text)
    assert "step 4, " in text[text.index("data-lines") :]  # what a pointer shows
    said = line_of(run, capsys)
    assert re.match(rf"stopped, step 4 of {STEPS} \(33%\) after \d+ s, [0-9,]+ images/s, loss [0-9.]+ \(trivial ", said)
    assert re.search(r"linear probe [0-9.]+ ± [0-9.]+ % \(untrained [0-9.]+\), rank [0-9.]+ \(untrained ", said)
    assert said.endswith("train longer: It stopped before its end.")
    with locked(run):
        said = line_of(run, capsys)
        assert said.startswith(f"step 4 of {STEPS} (33%)")
        assert "; so far: " in said
        assert re.search(r"About \d+ s of training left\.$", said)
        assert 'id="going"' in write_report(run).read_text()
    assert 'id="going"' not in write_report(run).read_text()

    assert server(*command).status == 0
    text, _ = whole(run / "report.html")
    assert 'id="going"' not in text
    assert 'http-equiv="refresh"' not in text
    assert text.count("data-label=") == 1 + STEPS // 4
    assert all(path.stat().st_size < 125_000 for path in (run / "pictures").glob("restore-*"))
    said = line_of(run, capsys)
    assert said.startswith(f"finished, step {STEPS} after ")
    assert "left" not in said
    # what is made longer does not show what it was at its end before
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace(f"steps: {STEPS}", f"steps: {2 * STEPS}"))
    assert line_of(run, capsys).startswith(f"stopped, step {STEPS} of {2 * STEPS}")
    assert "HOG" not in write_report(run).read_text()


def test_who_is_told_to_end_leaves_a_page_that_says_so(
    killed: tuple[Path, list[Any]], server: CommandLine, tmp_path: Path
) -> None:
    ended = server("pretrain", killed[1][1], "--out", tmp_path / "run", *COMMAND, die=("term", 3))
    assert ended.status == 143
    text, _ = whole(tmp_path / "run" / "report.html")
    assert 'id="going"' not in text
    assert "It stopped before its end." in text


def test_a_page_that_cannot_be_made_costs_a_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fails(*_: Any) -> Path:
        raise KeyError("a mistake")

    monkeypatch.setattr(pretraining, "write_report", fails)
    session = object.__new__(Session)
    session.fabric, session.run = make_fabric(checked({"run": {"devices": 1}})), Run(tmp_path)
    pretraining._write_page(session)
    assert "note: report.html could not be written (KeyError: 'a mistake')" in capsys.readouterr().out


def made(tmp_path: Path, losses: list[float], *, steps: int = 1000, final: Any = None, **more: Any) -> Path:
    """A run of so many steps, of which there are ten a loss."""
    recipe = json.dumps({"optimiser": {"lr": 1e-3}, "measured": {"steps": steps}})
    return make_run(tmp_path / "run", made_metrics(losses, **more), probes=final, recipe=recipe)


def decided(run: Path, going: bool = False) -> Decision:
    lines, recipe = read_lines(run / "metrics.jsonl"), read_yaml((run / "recipe.yaml").read_text())
    stands = standing(run, lines, recipe, going)
    result = of_run(probes_of(run, stands), lines)
    return decide(judge(lines, result, recipe), lines, result, stands)


def flattening(count: int = 100) -> list[float]:
    """Losses that have fallen, and fall no more."""
    return [*falling_losses(count // 4), *flat_losses(count - count // 4, 0.4)]


BELOW_HOG = made_final(0.42, 0.30) | {"hog": {"linear": {"accuracy": 0.48, "standard_error": 0.012}}}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("losses", "more", "word", "said"),
    [
        (flattening(), {"final": made_final(0.55, 0.40)}, "use", "Under the linear probe it is better than before"),
        (falling_losses(), {"final": made_final(0.55, 0.40)}, "use", "still falling, so more may come"),
        (flattening(), {"final": BELOW_HOG}, "longer", "not as good as a linear model on HOG"),
        (flattening(), {"final": made_final(0.405, 0.40)}, "leave", "Nothing measurable was gained over the untrained"),
        (falling_losses(), {"final": made_final(0.405, 0.40)}, "longer", "Nothing measurable was gained"),
        (flattening(), {"final": made_final(0.35, 0.40)}, "leave", "worse than before training"),
        (
            flattening(),
            {"final": {"rank": {"encoder": 40.0, "untrained": 50.0, "dim": 64}}},
            "label",
            "labelled images",
        ),
        (flattening(), {"final": {"rank": {"encoder": 1.2, "untrained": 50.0, "dim": 64}}}, "leave", "hardly tell"),
        (flat_losses(), {"final": made_final(0.40, 0.40)}, "leave", "no lower than what constant answers reach"),
        (
            [3 - 0.01 * k for k in range(100)],
            {"final": made_final(0.40, 0.40)},
            "longer",
            "not yet below what constant",
        ),
        ([*falling_losses(60), *[float("nan")] * 40], {"final": made_final(0.40, 0.40)}, "leave", "not finite"),
        (flattening(), {"final": made_final(0.5, 0.40), "data_wait": 0.8}, "longer", "waited for data"),
        (falling_losses(), {"steps": 2000}, "longer", "It stopped before its end."),
        (flat_losses(), {"steps": 2000}, "leave", "no lower than what constant answers reach"),
    ],
)
def test_what_to_do_with_a_run_that_does_not_go_on(
    tmp_path: Path, losses: list[float], more: dict[str, Any], word: str, said: str
) -> None:
    run = made(tmp_path, losses, **more)
    found = decided(run)
    assert (found.word, said in found.sentence) == (word, True), found
    assert found.advice
    text, _ = whole(write_report(run))
    assert f'<section class="verdict {word}"' in text
    assert f'<strong class="word">{found.headline}</strong>' in text
    assert f"{found.headline.lower()}: {found.sentence}" in watch(run)
    evidence = text[text.index("<summary>The evidence</summary>") :]
    assert evidence.index("<p><b>") < evidence.index("</details>")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("losses", "steps", "more", "word"),
    [
        (falling_losses(), 2000, {}, "wait"),
        (flat_losses(), 9000, {}, "wait"),  # an early warm-up
        (flat_losses(), 2000, {}, "stop"),
        ([3 - 0.01 * k for k in range(100)], 2000, {}, "wait"),
        ([*falling_losses(60), *[float("nan")] * 40], 9000, {}, "stop"),
        (falling_losses(), 2000, {"probes": {0: made_probe(0.4, 40.0), 100: made_probe(0.4, 1.2)}}, "stop"),
        (falling_losses(), 2000, {"data_wait": 0.8}, "wait"),
        ([], 2000, {}, "wait"),
    ],
)
def test_what_to_do_with_a_run_that_goes_on(
    tmp_path: Path, losses: list[float], steps: int, more: dict[str, Any], word: str
) -> None:
    run = made(tmp_path, losses, steps=steps, **more)
    found = decided(run, going=True)
    assert found.word == word, found
    assert bool(found.advice) == (word == "stop" or "data_wait" in more)
    text, _ = whole(write_report(run, going=True))
    assert f'<strong class="word">{found.headline}</strong> <span class="note">so far</span>' in text


@pytest.mark.quick
def test_watch_names_the_runs_of_a_comparison_and_what_is_no_run(tmp_path: Path, capsys: Any) -> None:
    assert main(["watch", str(tmp_path / "absent")]) == 2
    assert "no run folder" in capsys.readouterr().err
    made(tmp_path / "which" / "runs", falling_losses())
    assert main(["watch", str(tmp_path / "which")]) == 2
    assert f"watch one of its runs: {tmp_path / 'which' / 'runs' / 'run'}" in capsys.readouterr().err


@pytest.mark.quick
def test_a_page_is_written_in_less_than_half_a_second(tmp_path: Path) -> None:
    """It is written beside each checkpoint; without the checks of tests it takes a twentieth of a second."""
    run = made(tmp_path, falling_losses(200), steps=4000, probes={0: made_probe(0.4), 200: made_probe(0.45)})
    times = []
    for _ in range(3):
        began = time.process_time()
        write_report(run, going=True)
        times.append(time.process_time() - began)
    assert min(times) < 0.5


@pytest.mark.quick
def test_what_a_pointer_shows_of_a_line() -> None:
    loss, base = Line("<loss>", [1, 2, 4], [1.5, float("nan"), 0.5], [0.1, 0.1, 0.05]), Line("it's trivial", [1], [1.0])
    svg = line_plot([loss], x_label="step", y_label="y", title="t", baseline=base, moment=lambda x: f"step {x:.0f}")
    told = json.loads(re.findall(r"data-lines='([^']*)'", svg)[0].replace("&#39;", "'").replace("&lt;", "<"))
    first, second = told["lines"]
    assert (first["name"], first["value"]) == ("<loss>", ["1.5 ± 0.1", "0.5 ± 0.05"])
    assert first["said"] == ["step 1", "step 4"]
    assert (second["name"], second["value"]) == ("it's trivial", ["1"])
    points = re.findall(r"M([0-9.]+) ([0-9.]+)m", svg)  # the markers of the line
    assert [[float(x), float(y)] for x, y in points[-2:]] == [
        list(one) for one in zip(first["x"], first["y"], strict=True)
    ]
    assert first["y"][0] < second["y"][0] < first["y"][1]
