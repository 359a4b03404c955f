"""The report page and its verdict, on made runs whose truth is known."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw

from underpaint.cli import main
from underpaint.errors import InputError
from underpaint.recipes.recipe import checked, plain
from underpaint.report import Verdict, is_falling, verdict, write_report
from underpaint.report.figures.plots import Line as Curve
from underpaint.report.figures.plots import line_plot, number_text, thin
from underpaint.report.page import TEMPLATES
from underpaint.report.results import Gain, Result, Row, Value, of_comparison, of_evaluation, of_run
from underpaint.report.run import run_text
from underpaint.report.tables import Line, Table, markdown, summary, table, terminal
from underpaint.report.words import figure_text

ONE_RUN = "one run; error of the test images alone"
VOID = {"meta", "link", "img", "input", "br", "hr"}
RECIPE = yaml.safe_dump(
    plain(
        checked(
            {
                "method": {"name": "mae", "mask_ratio": 0.75},
                "encoder": {"name": "vit_tiny_patch16_224"},
                "data": {"path": 'made/<images> & "more"'},
                "optimiser": {"lr": 1.5e-4},
            }
        )
    ),
    sort_keys=False,
)


def made_metrics(
    losses: list[float],
    *,
    rate: float = 1.5e-4,
    gradient: float = 1.0,
    data_wait: float = 0.05,
    baseline: float | None = 1.0,
    probes: dict[int, dict[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """The log of a run whose losses are given, one each ten steps, after a line for the untrained encoder."""
    probes = probes or {}
    generator = np.random.default_rng(0)
    lines: list[dict[str, Any]] = [{"step": 0, "images": 0, "seconds": 0.0, "loss": None}]
    for position, loss in enumerate(losses, start=1):
        terms = {"pixels": loss if math.isfinite(loss) else None}
        lines.append(
            {
                "step": 10 * position,
                "images": 640 * position,
                "seconds": 4.2 * position,
                "loss": loss if math.isfinite(loss) else None,
                "terms": terms if baseline is None else {**terms, "baseline": baseline},
                "lr": rate * min(1.0, position / 10),
                "gradient_norm": gradient * float(generator.uniform(0.8, 1.2)),
                "images_per_second": 150 + float(generator.normal(0, 5)),
                "data_wait": min(1.0, max(0.0, data_wait + float(generator.normal(0, 0.02)))),
            }
        )
    for position, probe in probes.items():
        lines[position]["probe"] = probe
    return lines


def falling_losses(count: int = 100, end: float = 0.4) -> list[float]:
    """Losses that start above 1, fall quickly, then slowly, to `end`."""
    generator = np.random.default_rng(1)
    curve = end + (1.2 - end) * np.exp(-np.arange(count) / (count / 6))
    return (curve + generator.normal(0, 0.01, count)).tolist()


def flat_losses(count: int = 100, level: float = 1.3) -> list[float]:
    """Losses of a model that does not change, on batches that differ."""
    return np.random.default_rng(2).normal(level, 0.02, count).tolist()


def made_probe(linear: float, rank: float = 40.0) -> dict[str, float]:
    """What a probe during training logs."""
    return {
        "linear": linear,
        "linear_error": 0.012,
        "attentive": linear + 0.05,
        "attentive_error": 0.012,
        "knn": linear - 0.1,
        "knn_error": 0.013,
        "rank": rank,
    }


def made_final(linear: float, untrained: float, error: float = 0.009) -> dict[str, Any]:
    """What the probes at the end of a run write."""

    def three(base: float) -> dict[str, Any]:
        shifts = {"linear": 0.0, "attentive": 0.05, "knn": -0.1}
        return {
            name: {"accuracy": base + shift, "standard_error": 0.012, "chosen": 1e-3} for name, shift in shifts.items()
        }

    return {
        "train": 5000,
        "test": 1250,
        "classes": 13,
        "chance": 1 / 13,
        "encoder": three(linear),
        "untrained": three(untrained),
        "raw_pixels": {
            name: {"accuracy": value, "standard_error": 0.013} for name, value in (("linear", 0.37), ("knn", 0.36))
        },
        "hog": {
            name: {"accuracy": value, "standard_error": 0.013} for name, value in (("linear", 0.45), ("knn", 0.41))
        },
        "majority": {"accuracy": 0.09, "standard_error": 0.008},
        "restoration": {"images": 18, "test_part": True, "mask": {"error": 0.812, "standard_error": 0.004}},
        "gain": {
            name: {"difference": linear - untrained, "standard_error": error} for name in ("linear", "attentive", "knn")
        },
    }


def make_run(
    folder: Path,
    metrics: list[dict[str, Any]],
    *,
    probes: dict[str, Any] | None = None,
    pictures: int = 0,
    size: tuple[int, int] = (960, 420),
    skipped: int = 0,
    environment: dict[str, Any] | None = None,
    recipe: str = RECIPE,
) -> Path:
    """A run folder with these files in it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(recipe)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    if probes is not None:
        (folder / "probes.json").write_text(json.dumps(probes))
    if skipped:
        lines = [{"path": f"bad/<b>{n}</b>.jpg", "reason": "cut header & more"} for n in range(skipped)]
        (folder / "skipped.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if environment is not None:
        (folder / "environment.json").write_text(json.dumps(environment))
    for position in range(pictures):
        (folder / "pictures").mkdir(exist_ok=True)
        made_picture(size, position).save(folder / "pictures" / f"restore-{100 * position:08d}.png")
    return folder


def made_picture(size: tuple[int, int], seed: int) -> Image.Image:
    """Noise, which no format makes small, under captions."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0, size[0], 18), fill="white")
    for column, caption in enumerate(("original", "corrupted", "restored")):
        draw.text((column * size[0] // 3 + 4, 3), f"{caption} {seed}", fill="black")
    return picture


def learning_run(folder: Path) -> Path:
    """A run that learns, with everything a run folder may hold."""
    probes = {0: made_probe(0.40), 30: made_probe(0.43, 44), 60: made_probe(0.45, 50), 100: made_probe(0.461, 52)}
    return make_run(
        folder,
        made_metrics(falling_losses(), probes=probes),
        probes=made_final(0.461, 0.40),
        pictures=5,
        skipped=60,
        environment={"python": "3.11.2", "command": "underpaint pretrain <data>", "threads": 2},
    )


class Balance(HTMLParser):
    """Checks that tags close in the order they opened, and collects what a browser would fetch or follow."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.names: list[str] = []
        self.frames: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if key in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.addresses.append(value or "")
            if key == "id":
                self.names.append(value or "")
            if key == "class" and "frame" in (value or "").split():
                self.frames.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


def whole(path: Path) -> tuple[str, Balance]:
    """The text of a page, once it has been found whole, self-contained and small."""
    assert path.stat().st_size < 5_000_000
    text = path.read_text(encoding="utf-8").replace("\u00a0", " ")
    page = Balance()
    page.feed(text)
    page.close()
    assert page.open == []
    assert len(page.names) == len(set(page.names))
    for address in page.addresses:
        assert address.startswith(("data:", "#")), address[:80]
    assert not re.search(r"url\((?!#)|@import|fetch\(|XMLHttpRequest", text)
    assert not re.search(r"https?://", text)
    for reference in re.findall(r'(?:href="#|url\(#)([^")]+)', text):
        assert reference in page.names
    return text, page


def test_a_learning_run_makes_the_whole_page(tmp_path):
    run = learning_run(tmp_path / "run <one>")
    path = write_report(run)
    assert path == run / "report.html"
    text, page = whole(path)
    found = verdict(run)
    assert found.word == "learning"
    assert f"The linear probe rose by 6.1 ± 0.9 points over the untrained encoder ({ONE_RUN})." in found.sentence
    assert f"The linear probe rose by 6.1 ± 0.9 points over the untrained encoder ({ONE_RUN})." in text
    assert "<li>The attentive probe rose by 6.1 ± 0.9 points over the untrained encoder.</li>" in text
    assert text.count(ONE_RUN) == 1
    for heading in ("Training", "What the features are worth", "Restorations", "Skipped files", "Recipe"):
        assert f"<h2>{heading}</h2>" in text
    assert '<th scope="col">Hidden cells</th></tr>' in text
    assert '<th scope="row">mae</th><td>0.812 ± 0.004</td>' in text
    assert len(page.frames) == 5
    assert [frame for frame in page.frames if "shown" in frame] == [page.frames[-1]]
    assert text.count("cut header &amp; more") == 50
    assert "60 files could not be read" in text
    assert not list(run.glob("*.partial"))


def test_what_comes_from_files_is_escaped(tmp_path):
    run = learning_run(tmp_path / "run <one>")
    text, _ = whole(write_report(run))
    assert "<h1>run &lt;one&gt;</h1>" in text
    assert "bad/&lt;b&gt;0&lt;/b&gt;.jpg" in text
    assert "made/&lt;images&gt; &amp; &#34;more&#34;" in text
    assert "underpaint pretrain &lt;data&gt;" in text
    assert "<one>" not in text
    assert "<b>0" not in text


def test_a_hostile_recipe_stays_text(tmp_path):
    attack = "method: {name: '</style><script>alert(1)</script>'}\noptimiser: {lr: '<img src=x>'}\n"
    run = make_run(tmp_path / "run", made_metrics(flat_losses()), recipe=attack)
    text, page = whole(write_report(run))
    assert "<script>alert" not in text
    assert "x" not in page.addresses


def test_the_same_run_gives_the_same_bytes(tmp_path):
    run = learning_run(tmp_path / "run")
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_a_learning_rate_of_zero_is_stalled_and_named(tmp_path):
    found = verdict(make_run(tmp_path / "run", made_metrics(flat_losses(), rate=0.0)))
    assert found.word == "stalled"
    assert "learning rate was zero" in found.advice
    assert "--set optimiser.lr=" in found.advice


@pytest.mark.parametrize("seed", range(20))
def test_noise_alone_is_not_taken_for_learning(tmp_path, seed):
    losses = np.random.default_rng(seed).normal(1.0, 0.02, 60).tolist()
    assert verdict(make_run(tmp_path / "run", made_metrics(losses))).word == "stalled"


def test_the_baseline_reached_and_kept_is_stalled(tmp_path):
    losses = [*np.linspace(1.5, 1.0, 30).tolist(), *flat_losses(70, 0.995)]
    found = verdict(make_run(tmp_path / "run", made_metrics(losses)))
    assert found.word == "stalled"
    assert "rate" in found.advice
    assert "--steps" in found.advice


def test_above_the_baseline_and_falling_is_not_learning_yet(tmp_path):
    losses = np.linspace(3.0, 1.5, 100).tolist()
    found = verdict(make_run(tmp_path / "run", made_metrics(losses)))
    assert found.word == "stalled"
    assert "still falling. What says the same of every image loses no more" in found.sentence
    assert "more `--epochs` or `--steps`" in found.advice


@pytest.mark.parametrize("ranks", [(40.0, 1.3), (40.0, 11.0)])
def test_features_of_few_dimensions_are_collapsed(tmp_path, ranks):
    probes = {0: made_probe(0.40, ranks[0]), 100: made_probe(0.39, ranks[1])}
    found = verdict(make_run(tmp_path / "run", made_metrics(falling_losses(), probes=probes)))
    assert found.word == "collapsed"
    assert f"{ranks[1]:.1f} dimensions, from 40.0 before training" in found.sentence


def test_rank_without_labels_is_measured_against_the_dimensions(tmp_path):
    probes = {"rank": {"encoder": 8.0, "untrained": 20.0, "dim": 192}}
    run = make_run(tmp_path / "run", made_metrics(falling_losses()), probes=probes)
    assert verdict(run).word == "collapsed"
    run = make_run(tmp_path / "run", made_metrics(falling_losses()), probes={"rank": {**probes["rank"], "dim": 64}})
    assert verdict(run).word == "learning"
    assert "8.0 of 64 dimensions" in whole(write_report(run))[0]


def test_a_rank_that_fell_and_is_not_low_is_told_apart(tmp_path):
    for rank, told in ((37.7, "far less of an image"), (10.0, "hardly tells images apart")):
        probes = {"rank": {"encoder": rank, "untrained": 120.2, "dim": 256}}
        found = verdict(make_run(tmp_path / str(rank), made_metrics(falling_losses()), probes=probes))
        assert found.word == "collapsed"
        assert told in found.sentence


def test_a_rank_that_was_as_low_before_training_is_no_collapse(tmp_path):
    probes = {0: made_probe(0.40, 1.9), 100: made_probe(0.40, 1.8)}
    assert verdict(make_run(tmp_path / "run", made_metrics(falling_losses(), probes=probes))).word == "learning"


def test_a_probe_that_rose_is_no_collapse(tmp_path):
    probes = {0: made_probe(0.40, 40), 100: made_probe(0.60, 9)}
    assert verdict(make_run(tmp_path / "run", made_metrics(falling_losses(), probes=probes))).word == "learning"


def test_a_still_loss_without_gradient_is_collapsed(tmp_path):
    found = verdict(make_run(tmp_path / "run", made_metrics([0.7] * 50, gradient=0.0)))
    assert found.word == "collapsed"
    assert "gradient is zero" in found.sentence


def test_waiting_for_data_is_starved(tmp_path):
    run = make_run(tmp_path / "run", made_metrics(falling_losses(), data_wait=0.71))
    found = verdict(run)
    assert found.word == "starved"
    assert "71%" in found.sentence
    assert "--workers" in found.advice
    assert "Starved of data" in whole(write_report(run))[0]


@pytest.mark.parametrize("lost", [1, 30, 100])
def test_a_loss_that_is_not_finite_is_said(tmp_path, lost):
    losses = [*falling_losses()[: 100 - lost], *[math.nan] * lost]
    run = make_run(tmp_path / "run", made_metrics(losses))
    found = verdict(run)
    assert found.word == "stalled"
    assert f"not finite in {lost} of 100 log lines" in found.sentence
    assert "bf16" in found.advice
    whole(write_report(run))


def test_one_skipped_step_is_forgiven(tmp_path):
    losses = falling_losses()
    losses[50] = losses[90] = math.nan
    assert verdict(make_run(tmp_path / "run", made_metrics(losses))).word == "learning"


@pytest.mark.parametrize("content", ["", "\n", '{"step": 0, "loss": null, "probe": {"linear": 0.4}}\n', "[1]\n{cut"])
def test_nothing_logged_is_said(tmp_path, content):
    run = make_run(tmp_path / "run", [])
    (run / "metrics.jsonl").write_text(content)
    found = verdict(run)
    assert found.word == "stalled"
    assert "No training step was logged" in found.sentence
    whole(write_report(run))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_short_run_says_that_it_is_short(tmp_path, count):
    run = make_run(tmp_path / "run", made_metrics(falling_losses(count)))
    assert f"Only {count} log line" in verdict(run).sentence
    whole(write_report(run))


def test_no_baseline_is_judged_against_the_beginning(tmp_path):
    found = verdict(make_run(tmp_path / "run", made_metrics(falling_losses(), baseline=None)))
    assert found.word == "learning"
    assert "where it began" in found.sentence
    assert verdict(make_run(tmp_path / "flat", made_metrics(flat_losses(), baseline=None))).word == "stalled"


def test_losses_below_zero_are_judged_too(tmp_path):
    losses = [value - 5 for value in falling_losses()]
    found = verdict(make_run(tmp_path / "run", made_metrics(losses, baseline=-4.0)))
    assert found.word == "learning"
    assert "against −4.00 for its trivial baseline" in found.sentence


@pytest.mark.parametrize(
    ("difference", "error", "said"),
    [
        (0.061, 0.009, "The linear probe rose by 6.1 ± 0.9 points over the untrained encoder"),
        (0.015, 0.009, "Pretraining did not measurably help the linear probe (+1.5 ± 0.9 points"),
        (-0.015, 0.009, "Pretraining did not measurably help the linear probe (−1.5 ± 0.9 points"),
        (-0.05, 0.009, "The linear probe fell by 5.0 ± 0.9 points below the untrained encoder"),
        (0.0, 0.0, "so nothing can be said"),
    ],
)
def test_a_gain_is_claimed_only_above_two_standard_errors(tmp_path, difference, error, said):
    probes = made_final(0.4 + difference, 0.4, error)
    probes["gain"]["linear"] = {"difference": difference, "standard_error": error}
    metrics = [{"step": 10 * n, "loss": 1.0 - 0.01 * n} for n in range(20)]
    run = make_run(tmp_path / "run", metrics, probes=probes)
    assert said in verdict(run).sentence
    assert said in whole(write_report(run))[0]
    if difference < 2 * error:
        assert "--init timm:" in verdict(run).advice


@pytest.mark.parametrize(
    ("difference", "losses", "headline", "said"),
    [
        (0.061, None, "Use it", "Under the linear probe it is better than the start."),
        (0.015, None, "Keep the weights you started from", "Nothing measurable was gained over the start."),
        (-0.05, None, "Keep the weights you started from", "Under the linear probe it is worse than the start."),
        (0.015, 0.01, "Keep the weights you started from", "Its loss was still falling, so more may come of it."),
    ],
)
def test_of_weights_that_a_run_went_on_from_is_said_whether_to_keep_them(tmp_path, difference, losses, headline, said):
    """The same numbers from random weights are one to leave, or to train longer."""
    settled = [1.0 - 0.05 * min(n, 10) for n in range(20)] if losses is None else [1 - losses * n for n in range(20)]
    metrics = made_metrics(settled, probes={0: made_probe(0.46), 20: made_probe(0.46 + difference)})
    final = made_final(0.46 + difference, 0.46)
    recipe = RECIPE.replace("init: null", "init: timm:vit_tiny_patch16_224")
    on = make_run(tmp_path / "on", metrics, probes=final, recipe=recipe)
    lines = run_text(on)
    told = next(line for line in lines if line.startswith(f"{headline}. "))
    assert said in told
    assert ("timm:vit_tiny_patch16_224" in told) == (headline != "Use it")
    assert "The start is timm:vit_tiny_patch16_224." in lines
    page = whole(write_report(on))[0]
    assert f'<strong class="word">{headline}</strong>' in page
    assert "gain over start" in page
    assert "untrained" not in page.split("<h2>Recipe</h2>")[0].split("</style>")[-1]
    other = make_run(tmp_path / "other", metrics, probes=final)
    assert not any("Keep the weights" in line or "start" in line for line in run_text(other))


def test_without_final_probes_those_of_the_run_are_used(tmp_path):
    probes = {0: made_probe(0.40), 100: made_probe(0.50)}
    found = verdict(make_run(tmp_path / "run", made_metrics(falling_losses(), probes=probes)))
    assert "rose by 10.0 ± 1.7 points" in found.sentence  # 1.2 twice, in quadrature


def test_without_labels_labels_are_advised(tmp_path):
    found = verdict(make_run(tmp_path / "run", made_metrics(falling_losses())))
    assert "what the features are worth is not known" in found.sentence
    assert "--labels" in found.advice


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("recipe.yaml", "method: [unclosed"),
        ("recipe.yaml", "just text"),
        ("recipe.yaml", "method: mae\nencoder: null\ndata: 3"),
        ("probes.json", "{cut"),
        ("probes.json", '{"encoder": 3, "gain": {"linear": null}, "chance": "x", "classes": null}'),
        ("probes.json", '{"encoder": {"linear": 0.5}, "untrained": {"linear": 0.4}}'),
        ("skipped.jsonl", '{"reason": 3}\n{"path": null}\n'),
        ("environment.json", '{"a": {"b": [1, null]}, "c": 2.5}'),
        ("environment.json", "[]"),
        ("pictures/restore-00000300.png", "not a picture"),
        ("pictures/restore-last.png", "not a picture"),
        ("metrics.jsonl", '{"step": "x", "loss": true, "terms": 3, "probe": [], "lr": null}\n'),
        ("skipped.jsonl", '{"path": "\\ud800.jpg", "reason": "\\udcff"}\n'),
        ("metrics.jsonl", '{"step": 1, "loss": 1e308, "terms": {"a$b": 1, "$c": 2}}\n{"step": 2, "loss": 1e39}\n'),
        ("metrics.jsonl", '{"step": 1' + "0" * 400 + ', "loss": 1' + "0" * 400 + "}\n"),
        ("metrics.jsonl", '{"step": 5, "loss": NaN, "terms": {"baseline": Infinity}}\n{"step": 6, "lo'),
    ],
)
def test_a_damaged_file_does_not_cost_the_page(tmp_path, name, content):
    metrics = [{"step": 10 * n, "loss": 1.0 - 0.01 * n} for n in range(20)]  # one plot: drawing is what takes time
    run = make_run(tmp_path / "run", metrics, probes=made_final(0.5, 0.4), pictures=2, size=(64, 48), skipped=2)
    (run / name).write_text(content)
    whole(write_report(run))


@pytest.mark.parametrize("kept", ["recipe.yaml", "metrics.jsonl"])
def test_any_one_file_is_enough_for_a_page(tmp_path, kept):
    run = make_run(tmp_path / "run", made_metrics(falling_losses()))
    for path in run.iterdir():
        if path.name != kept:
            path.unlink()
    whole(write_report(run))


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="no run folder"):
        write_report(tmp_path / "absent")
    with pytest.raises(InputError, match=r"neither recipe.yaml nor metrics.jsonl"):
        verdict(tmp_path)


def test_many_steps_and_large_pictures_stay_under_five_megabytes(tmp_path):
    losses = falling_losses(20_000)
    run = make_run(tmp_path / "run", made_metrics(losses), pictures=15, size=(700, 500), skipped=3)
    (run / "recipe.yaml").write_text(RECIPE + "# long\n" * 100_000)
    _, page = whole(write_report(run))
    assert len(page.frames) == 12


def test_a_plot_is_text_of_its_own_names():
    line = Curve("one", [0, 1, 2], [1.0, math.nan, 3.0], [0.1, math.nan, 0.2])
    first = line_plot([line], x_label="step", y_label="<y>", title="A & B", baseline=Curve("none", [0], [2.0], [0.1]))
    second = line_plot([line], x_label="step", y_label="<y>", title="C")
    assert first.startswith('<svg class="plot" role="img" viewBox=')
    assert 'aria-label="A &amp; B"' in first
    assert "currentColor" in first
    assert "#010203" not in first
    assert "xmlns" not in first
    assert "font-family" not in first
    assert "DejaVu" not in first
    assert "&lt;y&gt;" in first

    def names(svg: str) -> set[str]:
        return set(re.findall(r'id="([^"]+)"', svg))

    assert not names(first) & names(second)


@pytest.mark.parametrize("values", [[], [math.nan], [1.0], [0.0, 0.0], [1e-9, 1e12]])
def test_a_plot_of_little_is_still_a_plot(values):
    svg = line_plot(
        [Curve("one", list(range(len(values))), values)], x_label="x", y_label="y", title="t", from_zero=True
    )
    assert svg.endswith("</svg>")


def test_thinning_keeps_the_mean_and_passes_over_gaps():
    values = [1.0, 3.0] * 500
    values[0] = math.nan
    short = thin(Curve("one", list(range(1000)), values), 100)
    assert len(short.x) == len(short.y) == 100
    assert short.y[1:] == [2.0] * 99
    assert short.x[1] == 14.5


def test_numbers_on_axes_need_no_powers():
    found = [number_text(value) for value in (0.0, 0.00015, 950, 9500, 12_000, 1_500_000, -3.5)]
    assert found == ["0", "0.00015", "950", "9500", "12k", "1.5M", "−3.5"]


def test_falling_needs_more_than_noise():
    assert is_falling(np.linspace(2.0, 1.0, 40))
    assert not is_falling(np.linspace(1.0, 2.0, 40))
    assert not is_falling(np.full(40, 1.0))
    assert not is_falling(np.array([1.0]))


def test_the_verdict_has_three_parts():
    assert Verdict._fields == ("word", "sentence", "advice")


def test_a_learning_rate_of_zero_is_told_from_a_collapse(tmp_path):
    found = verdict(make_run(tmp_path / "run", made_metrics([1.3] * 50, rate=0.0, gradient=0.0)))
    assert found.word == "stalled"
    assert "learning rate was zero" in found.advice


LOOKS = {
    "images": 2000,
    "queries": 500,
    "neighbours": 5,
    "same_label": {
        "pretrained": 0.412,
        "pretrained_error": 0.009,
        "untrained": 0.301,
        "untrained_error": 0.008,
        "difference": 0.111,
        "difference_error": 0.01,
        "chance": 0.1,
    },
}


def looks_run(folder: Path, looks: Any, size: tuple[int, int] = (300, 200)) -> Path:
    """A run with the pictures of what its features see."""
    metrics = [{"step": 10 * n, "loss": 1.0 - 0.01 * n} for n in range(20)]
    run = make_run(folder, metrics, pictures=2, size=(64, 48))
    for position, name in enumerate(("features", "neighbours", "map")):
        made_picture(size, position).save(run / "pictures" / f"{name}.png")
    (run / "pictures" / "looks.json").write_text(looks if isinstance(looks, str) else json.dumps(looks))
    return run


def test_what_the_features_see_is_shown_with_its_numbers(tmp_path):
    text, _ = whole(write_report(looks_run(tmp_path / "run", LOOKS)))
    section = text[text.index('<section id="looks">') :]
    section = section[: section.index("</section>")]
    assert text.index("<h2>Restorations</h2>") < text.index("<h2>What the features see</h2>")
    assert section.count("<figure") == section.count("<figcaption>") == section.count('class="scroll"') == 3
    assert len(re.findall(r'alt="[^"]{20,}"', section)) == 3
    assert (
        "Of the five nearest neighbours, 41.2 ± 0.9 % share the query's label; 30.1 ± 0.8 % before training; "
        "10.0 % by chance (500 queries)."
    ) in section.replace("&#39;", "'")
    assert "Training changed it by +11.1 ± 1.0 points." in section
    assert "green bar" in section


def test_a_change_within_its_error_is_not_claimed(tmp_path):
    looks = json.loads(json.dumps(LOOKS))
    looks["same_label"] |= {"difference": -0.012, "difference_error": 0.01}
    text, _ = whole(write_report(looks_run(tmp_path / "run", looks)))
    assert "The change by training is not measurable (−1.2 ± 1.0 points)." in text
    assert "Training changed it" not in text


@pytest.mark.parametrize(
    "looks",
    ["{cut", "[]", '{"images": 3}', '{"same_label": 3}', '{"same_label": {"pretrained": "<b>", "chance": null}}'],
)
def test_looks_without_numbers_are_pictures_alone(tmp_path, looks):
    text, _ = whole(write_report(looks_run(tmp_path / "run", looks)))
    assert "<h2>What the features see</h2>" in text
    assert "by chance" not in text
    assert "green bar" not in text
    assert "<b>" not in text[text.index('id="looks"') :]


def test_some_numbers_are_enough(tmp_path):
    looks = {"same_label": {"pretrained": 0.5, "pretrained_error": None}}
    text, _ = whole(write_report(looks_run(tmp_path / "run", looks)))
    assert "Of the nearest neighbours, 50.0 % share the query" in text
    assert "nan" not in text[text.index('id="looks"') : text.index("<h2>Recipe</h2>")].split("base64,")[0]


def test_missing_and_damaged_pictures_of_features_are_passed_over(tmp_path):
    run = looks_run(tmp_path / "run", LOOKS)
    (run / "pictures" / "map.png").unlink()
    (run / "pictures" / "features.png").write_text("not a picture")
    text, _ = whole(write_report(run))
    assert text[text.index('id="looks"') :].count("<figure") == 1
    (run / "pictures" / "neighbours.png").write_bytes(b"")
    text, _ = whole(write_report(run))
    assert "What the features see" not in text


def test_large_pictures_of_all_kinds_stay_under_five_megabytes(tmp_path):
    run = looks_run(tmp_path / "run", LOOKS, size=(900, 800))
    for position in range(12):
        made_picture((700, 500), position).save(run / "pictures" / f"restore-{100 * position:08d}.png")
    text, _ = whole(write_report(run))
    assert text[text.index('id="looks"') :].count("<figure") == 3


# --- evaluations ----------------------------------------------------------------------------------------------------


def numbers(value: float, error: float = 0.012, name: str = "accuracy") -> dict[str, float]:
    return {name: value, f"{name}_error": error}


def made_evaluation(folder: Path) -> Path:
    """What `evaluate` leaves of a probe and of a segmentation."""
    rows = {"encoder": 0.461, "untrained": 0.4, "HOG": 0.45, "majority": 0.09}
    linear = {
        "train": 5000,
        "test": 1250,
        "classes": 2,
        "rows": {name: {**numbers(value), "chosen": {"C": 0.1}} for name, value in rows.items()},
        "gains": {"encoder over untrained": numbers(0.061, 0.009)},
        "by_class": {"<b>cat</b>": 0.5, "dog | wolf": 0.25},
    }
    segment = {
        "train": 16,
        "test": 6,
        "classes": 2,
        "names": ["ground", "disc"],
        "rows": {
            "most frequent class": numbers(0.2, 0.01, "miou"),
            "encoder, linear": {
                **numbers(0.43, 0.03, "miou"),
                **numbers(0.8, 0.02, "pixel_accuracy"),
                "iou": [0.8, None],
            },
        },
        "settings": {"lr": 0.001, "scale": [0.5, 2.0]},
    }
    results = {
        "format": 1,
        "encoder": "runs/<one>",
        "untrained": False,
        "data": "labelled",
        "image_size": [32, 32],
        "label_fraction": 0.1,
        "seed": 0,
        "groups": None,
        "notes": ["3 of the 9 images held out to test on were pretrained on, without their labels."],
        "environment": {"python": "3.11.2"},
        "tasks": {"linear": linear, "segment": segment},
    }
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    for name in ("linear/confusion.png", "segment/linear/segmentations.png", "pictures/features.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        made_picture((200, 100), 0).save(folder / name)
    return folder


def test_an_evaluation_makes_a_page_of_every_task(tmp_path, capsys):
    folder = made_evaluation(tmp_path / "worth")
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    text, _ = whole(folder / "report.html")
    for said in (
        "<h1>What is &lt;one&gt; worth?</h1>",
        "<h2>Linear probe</h2>",
        "5 000 images to fit, 1 250 images to test, 2 classes",
        '<th scope="row">encoder over untrained, points</th><td>+6.1 ± 0.9</td>',
        '<th scope="row">most frequent class</th><td>20.0 ± 1.0</td><td>–</td>',
        '<th scope="row">disc</th><td>–</td>',
        "<h2>Segmentation</h2>",
        "<figcaption>Linear: segmentations</figcaption>",
        "<h2>What the features see</h2>",
        "were pretrained on",
        "10.0 % of each class",
        "C: 0.1",
    ):
        assert said in text.replace("\u202f", " "), said
    assert text.count("<svg") == 2
    assert "<b>cat" not in text
    before = (folder / "report.html").read_bytes()
    assert write_report(folder).read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        '{"tasks": {"linear": 3, "knn": {"rows": [1]}}}',
        '{"tasks": {"linear": {"rows": {"encoder": {"accuracy": null, "accuracy_error": "x"}, "b": 2}, "gains": 3}}}',
        '{"tasks": {"segment": {"rows": {"encoder": {"miou": 0.5, "iou": [0.5]}}, "names": [1, 2, 3]}}, "seed": {}}',
    ],
)
def test_a_damaged_evaluation_is_still_a_page(tmp_path, content):
    folder = made_evaluation(tmp_path / "worth")
    (folder / "results.json").write_text(content)
    whole(write_report(folder))


@pytest.mark.parametrize(
    "damage",
    [
        {"rows": [3, {"name": "mae", "kind": "method", "probes": {"linear": 0.5}, "recipe": 3, "minutes": "x"}]},
        {"curves": {"mae": {"minutes": [0, 1], "probes": {"linear": {"value": [0.1], "error": 3}}}, "b": None}},
        {"verdict": "Take", "seeds": 2, "encoder": None, "image_size": {}, "minutes": None, "notes": 3},
        {"curves": {"mae": {"loss": {"minutes": [0, None], "share": [1.2, "x"]}}}, "environment": []},
    ],
)
def test_a_damaged_comparison_is_still_a_page(tmp_path, damage):
    row = {"name": "mae", "kind": "method", "probes": {"linear": {"accuracy": 0.5, "standard_error": 0.1}}}
    (tmp_path / "compare.json").write_text(json.dumps({"rows": [row], "verdict": ["Take mae."]} | damage))
    whole(write_report(tmp_path))


@pytest.mark.parametrize("content", ["{cut", "[]", '{"rows": []}', '{"rows": {"name": "mae"}}'])
def test_what_is_no_comparison_is_refused(tmp_path, content):
    (tmp_path / "compare.json").write_text(content)
    with pytest.raises(InputError, match="holds no finished comparison"):
        write_report(tmp_path)


def test_what_is_no_evaluation_is_refused(tmp_path):
    folder = made_evaluation(tmp_path / "worth")
    (folder / "results.json").write_text("{cut")
    with pytest.raises(InputError, match="holds no evaluation"):
        write_report(folder)


# --- tables and style -----------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_a_page_a_terminal_and_markdown_show_the_same_numbers(tmp_path):
    (linear, segment) = of_evaluation(json.loads((made_evaluation(tmp_path / "worth") / "results.json").read_text()))
    made = table(linear)
    assert made.heads == ["linear", "Accuracy, %"]
    assert (made.lines[0].name, made.lines[0].cells) == ("encoder", ["46.1 ± 1.2"])
    assert terminal(made)[-1].split("  ")[0] == "encoder over untrained, points"
    assert terminal(made)[-1].endswith("  +6.1 ± 0.9")
    assert markdown(made)[:3] == ["| linear | Accuracy, % |", "| --- | --- |", "| encoder | 46.1 ± 1.2 |"]
    regression = Result(
        "regress",
        [Row("encoder", "own", {"mae": Value(1234.5, 12.5), "years_off": Value(0.00125)})],
        [Gain("encoder over untrained", "encoder", {"mae": Value(-0.5, 0.25)})],
    )
    assert [(line.name, *line.cells) for line in table(regression).lines] == [
        ("encoder", "1234 ± 12", "0.001250"),
        ("encoder over untrained", "−0.50 ± 0.25", "–"),
    ]
    assert table(regression).heads[1:] == ["Mean absolute error", "Years off"]
    said = summary([linear, segment], ["seen [bold]"], terminal)
    assert "16 images to fit, 6 images to test, 2 classes." in said
    assert said[-1] == "seen [bold]"
    wide = terminal(Table(["", *["a head of many words"] * 12], [Line("[red]name", ["12.5 ± 0.5"] * 12, "")]))
    assert wide[0].count("a head of") == 12
    assert wide[1].count("many words") == 12
    assert wide[-1].startswith("[red]name")
    assert wide[-1].count("12.5 ± 0.5") == 12
    assert markdown(Table(["a|b"], []))[0] == r"| a\|b |"


@pytest.mark.quick
def test_a_run_an_evaluation_and_a_comparison_are_read_into_one_form():
    run = of_run(made_final(0.461, 0.40))
    rows = [{"name": "mae", "kind": "method", "probes": {"linear": {"accuracy": 0.461, "standard_error": 0.012}}}]
    rows[0]["gain"] = {"linear": {"difference": 0.061, "standard_error": 0.009}}
    comparison = of_comparison({"rows": rows, "chance": 1 / 13, "train": 5000})
    found = {"rows": {"encoder": numbers(0.461)}, "gains": {"encoder over untrained": numbers(0.061, 0.009)}}
    (evaluation,) = of_evaluation({"tasks": {"linear": found}})
    for result, name, metric in (
        (run, "pretrained", "linear"),
        (comparison, "mae", "linear"),
        (evaluation, "encoder", "accuracy"),
    ):
        assert result.row(name)[metric] == (0.461, 0.012)
        assert result.gain(name, metric) == pytest.approx((0.061, 0.009))
        assert result.row(name).kind == "own"
        assert not result.row("absent")[metric].known
    assert run.row("chance")["knn"].value == comparison.row("chance")["linear"].value == 1 / 13
    assert comparison.counts == {"train": 5000}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        (0.5548, 0.12, "+0.55 ± 0.12"),
        (1.0, 2.9e-6, "+1.000 ± 0.000"),
        (1.23e-4, 1e-5, "+0.000123 ± 0.000010"),
        (-51234.0, 1200.0, "−51234 ± 1200"),
        (0.0, 0.0, "+0 ± 0"),
        (0.0, 0.25, "+0.00 ± 0.25"),
        (12.5, math.nan, "+12.50"),
        (math.nan, 0.1, "–"),
    ],
)
def test_a_number_of_any_size_has_the_figures_that_its_error_lets_stand(value, error, said):
    assert figure_text(value, error, "+") == said


def luminance(colour: str) -> float:
    """Relative luminance of #rgb or #rrggbb (WCAG 2)."""
    digits = "".join(2 * one for one in colour[1:]) if len(colour) == 4 else colour[1:]
    parts = [int(digits[k : k + 2], 16) / 255 for k in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.quick
def test_text_stands_out_in_light_and_in_dark_and_on_paper():
    style = (TEMPLATES / "style.css").read_text()
    shades = [dict(re.findall(r"--(\w+): (#\w+)", block)) for block in re.findall(r":root \{[^}]*\}", style)]
    assert len(shades) == 3
    for shade in shades:
        for ground in ("page", "raised"):
            for name in ("text", "quiet", "good", "bad"):
                low, high = sorted((luminance(shade[ground]), luminance(shade[name])))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (name, ground, shade)
