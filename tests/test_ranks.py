"""Several processes of one run: the gradients of one, the end of all, and other numbers of them. (gloo, on a CPU)"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranked
import torch
from conftest import write_pictures
from forked import CommandLine, srun, torchrun
from test_command_line import CHOICES, FAMILIES, IN_PARTS, ON_ALL, TAKES
from test_train import metrics, words

from underpaint.cli import main
from underpaint.methods import METHODS
from underpaint.methods.method import freeze_unreached
from underpaint.prepare import construct
from underpaint.recipes.recipe import checked
from underpaint.train.run_folder import Run

ONE = ["--encoder", "vit_tiny_patch16_224", "--image-size", "16", "--patch-size", "4", "--batch-size", "16"]
for setting in ("encoder.embed_dim=32", "encoder.depth=2", "encoder.num_heads=2", "run.log_every=1"):
    ONE += ["--set", setting]
STEPS = 9


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 pictures without labels."""
    return write_pictures(tmp_path_factory.mktemp("plain"), 48, classes=1, size=16)


def run(out: Path, data: Path, method: str = "mae", *more: Any) -> list[Any]:
    given = [f"{key}={value}" for key, value in words(method, data).items()]
    settings = [part for each in given for part in ("--set", each)]
    length = ["--steps", STEPS, "--checkpoint-every", 2, "--probe-every", 1000]
    return ["pretrain", data, "--out", out, "--method", method, *ONE, *length, *settings, *more]


# --- gradients ----------------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_one_process(server: CommandLine, tmp_path: Path) -> None:
    """Of every method, and of those whose loss comes in parts; with the batch of a process at once and in two parts."""
    done = server(tmp_path / "apart", function="ranked:gradients_of_one", processes=2)
    assert done.status == 0, done.errors
    apart = [json.loads((tmp_path / f"apart-{rank}").read_text()) for rank in range(2)]
    assert {name for name, _ in ranked.OPTIONS} == set(METHODS)
    assert len(apart[0]) == 2 * len(ranked.OPTIONS)
    for found in apart:
        for case, value in found.items():
            # finite differences take a thousandth of a step, which float32 knows to four digits
            assert value < (2e-3 if "difference" in case else 2e-5), case


def test_batch_norms_have_the_mean_of_what_the_processes_saw(server: CommandLine, tmp_path: Path) -> None:
    done = server(tmp_path / "weights", function="ranked:statistics_of_batch_norms", processes=2)
    assert done.status == 0, done.errors
    one, other = ((tmp_path / f"weights-{rank}").read_text() for rank in range(2))
    assert one == other


# weights that no loss reaches
STILL = {("energy", "convnext"): {"encoder.model.stages.3.blocks.0.mlp.fc2.bias"}}  # a constant of the energy


def pairs() -> list[tuple[str, str, str]]:
    """Every method on every family that it is shown on, with each choice that changes its loss."""
    found = []
    for method, families in TAKES.items():
        for family in families:
            for place, choice in enumerate(CHOICES[method]):
                if family != "vit" and place and (method, choice) not in ON_ALL:
                    continue
                if choice != "parts" or family in IN_PARTS:
                    found.append((method, family, choice))
    return found


def built(method: str, family: str, choice: str, **run: Any) -> Any:
    """As a run has it before its first step."""
    name, cuts = FAMILIES[family]
    settings: dict[str, Any] = {"method": {"name": method}, "encoder": {"name": name}, "run": run}
    settings["data"] = {"image_size": (32, 32)}
    for each in (*cuts, *CHOICES[method][choice]):
        path, _, value = each.partition("=")
        section, _, key = path.partition(".")
        try:
            settings[section][key] = json.loads(value)
        except ValueError:
            settings[section][key] = value
    made: Any = construct(checked(settings)).method
    for own in (made, getattr(made, "generator", None)):
        tokenizer: Any = getattr(own, "tokenizer", None)
        if hasattr(tokenizer, "ready"):
            if hasattr(tokenizer, "fit"):
                tokenizer.fit(torch.rand(512, 3 * tokenizer.stride**2), 0)
            tokenizer.ready = True
    return made


@pytest.mark.parametrize(("method", "family", "choice"), pairs())
def test_every_weight_that_is_trained_has_a_gradient(method: str, family: str, choice: str) -> None:
    made = built(method, family, choice)
    assert set(freeze_unreached(made, 3, (32, 32))) == STILL.get((method, family), set())
    made.train()
    for objective in made.parts(torch.randn(2, 3, 32, 32)):
        objective.loss.backward()
    for name, parameter in made.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


# --- less memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "family", "choice"), [pair for pair in pairs() if "energy" not in pair[0]])
def test_recomputing_changes_no_gradient(method: str, family: str, choice: str) -> None:
    if method in ("mae", "localmim") and family in ("resnet", "convnext", "regnet"):
        with pytest.raises(Exception, match=f"^method {method}: run.recompute: this encoder keeps hidden places empty"):
            built(method, family, choice, recompute=True)
        return
    found, kept = [], []
    for recompute in (False, True):
        torch.manual_seed(1)
        made, held = built(method, family, choice, recompute=recompute), [0]

        def keep(tensor: torch.Tensor, held: list[int] = held) -> torch.Tensor:
            held[0] += tensor.numel() * (not isinstance(tensor, torch.nn.Parameter))
            return tensor

        torch.manual_seed(2)
        images, noise = torch.randn(4, 3, 32, 32), made.sample(4, 32, 32)
        for objective in made.parts(images, noise):
            objective.loss.backward()
        found.append({name: each.grad for name, each in made.named_parameters() if each.grad is not None})
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            made(images, noise)
        kept.append(held[0])
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-7)
    assert kept[1] < kept[0]


def test_recomputing_is_refused_where_the_gradient_is_inside(plain: Path, tmp_path: Path, capsys: Any) -> None:
    command = run(tmp_path / "run", plain, "energy", "--set", "run.recompute=true")
    assert main([str(each) for each in command]) == 2
    assert "run.recompute: the gradient inside the energy cannot be computed again" in capsys.readouterr().err


def test_a_run_may_recompute_from_here_on(plain: Path, tmp_path: Path, server: CommandLine) -> None:
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    assert server(*run(whole, plain)).status == 0
    assert server(*run(changed, plain), die=("term", 4)).status == 143
    done = server(*run(changed, plain, "mae", "--set", "run.recompute=true"))
    assert done.status == 0, done.error
    assert Run(changed).recipe().measured["recompute"] is True
    same_losses(changed, whole)


# --- other numbers of processes -------------------------------------------------------------------------------------------


def same_losses(ours: Path, theirs: Path) -> None:
    """The losses of one process at the same batch, to 3e-4 (rounding, which AdamW enlarges where a gradient is all rounding),
    in the first step to 1e-5."""
    for one, other in zip(metrics(ours), metrics(theirs), strict=True):
        if other["loss"] is not None:
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-5 if one["step"] == 1 else 3e-4), one["step"]
            assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4 if one["step"] == 1 else 3e-3)


def fewer_and_fewer(server: CommandLine, data: Path, folder: Path, method: str, *more: Any) -> None:
    """Four processes, of which the last is told to end; two, of which the second is; then one: beside one all along."""
    whole, out = folder / "whole", folder / "run"
    done = server(*run(whole, data, method, *more))
    assert done.status == 0, done.error
    for processes, parts in ((4, 1), (2, 2)):
        told = server(*run(out, data, method, *more), processes=processes, die=("term", 3), dies=processes - 1)
        assert told.statuses == (143,) * processes, told.errors
        assert "Traceback" not in "".join(told.errors)
        assert Run(out).recipe().measured["accumulation"] == parts
        assert Run(out).recipe().measured["processes"] == processes
    steps = [json.loads((one / "state.json").read_text())["step"] for one in Run(out).checkpoints()]
    assert steps[-1] == 8  # told in the third step, all end with the fourth, twice
    last = server(*run(out, data, method, *more))
    assert last.status == 0, last.error
    assert Run(out).recipe().measured["accumulation"] == 4
    assert f"going on from step 8 of {STEPS}" in last.out
    assert "in 4 parts of 4" in last.out
    same_losses(out, whole)


def test_four_processes_then_two_then_one(plain: Path, tmp_path: Path, server: CommandLine) -> None:
    fewer_and_fewer(server, plain, tmp_path, "localmim", "--set", "method.stop_gradient=true")


GRID = [
    *((name, ()) for name in sorted(METHODS)),
    ("cae", ("method.target=pixels",)),
    ("cim", ("method.objective=detect",)),
    ("localmim", ("method.stop_gradient=true", "method.pixel_head=true")),
    ("mae", ("method.target=hog",)),
    ("energy", ("method.corruption=mixture",)),
    ("energy", ("method.steps=3", "method.step_size=0.1")),
    ("energy", ("method.steps=2", "method.gradient=difference")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "settings"), GRID)
def test_any_method_on_four_processes_then_two_then_one(
    method: str, settings: tuple[str, ...], pictures: Path, tmp_path: Path, server: CommandLine
) -> None:
    fewer_and_fewer(server, pictures, tmp_path, method, *(part for each in settings for part in ("--set", each)))


def last_line(text: str) -> str:
    return text.splitlines()[-1]


# --- the end of one is the end of all ---------------------------------------------------------------------------------------


def test_a_process_that_is_killed_ends_all_with_a_line(plain: Path, tmp_path: Path, server: CommandLine) -> None:
    done = server(*run(tmp_path / "run", plain), processes=4, die=("step", 5), dies=1)
    assert done.statuses == (3, -9, 3, 3), done.errors
    for rank in (0, 2, 3):
        assert last_line(done.errors[rank]) == "underpaint: rank 1: ended without a word: it was killed"
    assert Run(tmp_path / "run").load() is not None


def test_a_process_that_fails_tells_the_others_why(plain: Path, tmp_path: Path, server: CommandLine) -> None:
    done = server(*run(tmp_path / "run", plain), processes=2, die=("fails", 5), dies=1)
    assert done.statuses == (3, 1)
    assert last_line(done.errors[0]) == "underpaint: rank 1: ValueError: something is wrong here"
    done = server(*run(tmp_path / "run", plain), processes=2, die=("fails", 2), dies=0)
    assert done.statuses == (1, 3)
    assert last_line(done.errors[1]) == "underpaint: rank 0: ValueError: something is wrong here"


@pytest.mark.parametrize(
    ("how", "statuses", "said"),
    [
        ("works", (0, 0), "Initializing distributed: GLOBAL_RANK: 1, MEMBER: 2/2"),
        ("killed", (-9, 3), "_Ended: rank 0 ended without a word"),
        ("fails", (3, 3), "InputError: nothing here can be used"),
    ],
)
def test_who_waits_for_another_waits_as_long_as_it_lives(
    how: str, statuses: tuple[int, ...], said: str, server: CommandLine
) -> None:
    done = server(how, function="ranked:long_work", processes=2)
    assert done.statuses == statuses, done.errors
    assert last_line(done.errors[1]) == said


def test_torchrun_goes_on_from_the_last_checkpoint(plain: Path, tmp_path: Path, server: CommandLine) -> None:
    """torchrun itself; the second process is killed in its seventh step."""
    out = tmp_path / "run"
    script = str(Path(__file__).with_name("elastic.py"))
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command = [*started, script, *map(str, run(out, plain))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr
    assert re.search(r"going on from step [246] of 9", done.stdout), done.stdout
    whole = tmp_path / "whole"
    assert server(*run(whole, plain), processes=2).status == 0
    assert metrics(out) == metrics(whole)
    ours, theirs = (Run(each).load() for each in (out, whole))
    assert ours is not None
    assert theirs is not None
    assert all(torch.equal(value, theirs[0][key]) for key, value in ours[0].items())


# --- signals --------------------------------------------------------------------------------------------------------------


def test_all_know_a_step_later_what_one_was_told(server: CommandLine, tmp_path: Path) -> None:
    done = server(tmp_path / "heard", function="ranked:agreeing", processes=2)
    assert done.status == 0, done.errors
    one, other = (json.loads((tmp_path / f"heard-{rank}").read_text()) for rank in range(2))
    assert one == other == [[0, 0.0], [0, 0.0], [0, 1.0], [15, 2.0], [15, 3.0], [15, 4.0]]


@pytest.mark.parametrize("works", [True, False])
def test_slurm_queues_a_job_again_after_a_checkpoint(
    works: bool, plain: Path, tmp_path: Path, server: CommandLine
) -> None:
    """Two tasks of srun, of which one gets the signal; what stands for scontrol here notes what it was asked, and when."""
    folder, out = tmp_path / "bin", tmp_path / "run"
    folder.mkdir()
    fake = folder / "scontrol"
    fake.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nls {out}/checkpoints >> {tmp_path}/found\n'
        + ("" if works else 'echo "not allowed" >&2\nexit 1\n')
    )
    fake.chmod(0o755)
    tasks = [{**each, "PATH": f"{folder}:{os.environ['PATH']}"} for each in srun(2)]
    told = server(*run(out, plain), environments=tasks, die=("usr1", 3), dies=1)
    assert told.statuses == (128 + signal.SIGUSR1,) * 2, told.errors
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    assert "step-000000004" in (tmp_path / "found").read_text().split()
    queued = "job 4711 is queued again" if works else "job 4711 could not be queued again (not allowed)"
    said = f"underpaint: interrupted; the checkpoint of step 4 is kept; {queued}: the same command goes on"
    assert last_line(told.errors[0]) == said
    if works:
        done = server(*run(out, plain), environments=[{**each, "PATH": tasks[0]["PATH"]} for each in srun(2)])
        assert done.status == 0, done.errors
        assert f"going on from step 4 of {STEPS}" in done.out


# --- work that is shared ---------------------------------------------------------------------------------------------------


def test_features_are_made_together(pictures: Path, tmp_path: Path, server: CommandLine) -> None:
    done = server(pictures, tmp_path / "done", function="ranked:shared_probe", processes=3)
    assert done.status == 0, done.errors


def test_probes_of_two_processes_are_those_of_one(pictures: Path, tmp_path: Path, server: CommandLine) -> None:
    """Of the untrained encoder, which is the same; and a run of two that is judged in the end leaves all that one leaves."""
    for name, processes in (("one", 1), ("two", 2)):
        done = server(*run(tmp_path / name, pictures, "mae", "--set", "run.probe_every=4"), processes=processes)
        assert done.status == 0, done.errors
    one, two = (json.loads((tmp_path / name / "probes.json").read_text()) for name in ("one", "two"))
    assert one["untrained"] == two["untrained"]
    assert one.keys() == two.keys()
    assert [line.get("probe", {}).keys() for line in metrics(tmp_path / "one")] == [
        line.get("probe", {}).keys() for line in metrics(tmp_path / "two")
    ]
    names = [
        sorted(str(file.relative_to(tmp_path / name)) for file in (tmp_path / name).rglob("*"))
        for name in ("one", "two")
    ]
    assert [name for name in names[0] if not re.search("tfevents|step-", name)] == [
        name for name in names[1] if not re.search("tfevents|step-", name)
    ]


def test_one_process_of_each_machine_goes_first(tmp_path: Path, server: CommandLine) -> None:
    done = server(tmp_path / "turn", function="ranked:turns", environments=torchrun(4, machines=2))
    assert done.status == 0, done.errors
    times = [json.loads((tmp_path / f"turn-{rank}").read_text()) for rank in range(4)]
    for leader, follower in ((0, 1), (2, 3)):
        assert times[follower][0] >= times[leader][1]
    assert times[1][0] < times[2][1]  # which the first machine did not wait for


@pytest.mark.quick
def test_nothing_is_pickled_between_processes() -> None:
    source = Path(__file__).parents[1] / "src" / "underpaint"
    calls = re.compile(r"fabric\.broadcast|(broadcast|gather|scatter)_object|rank_zero_first|pickle\.(load|dump)")
    found = {file.name for file in source.rglob("*.py") if calls.search(file.read_text())}
    assert not found


@pytest.mark.quick
@pytest.mark.parametrize("several", [{"run.devices": 2}, {"run.nodes": 2}, None])
def test_compare_is_refused_under_several_processes(
    several: dict[str, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    write_pictures(tmp_path / "images", 2, size=8)
    for name, value in ({} if several else torchrun(2)[0]).items():
        monkeypatch.setenv(name, value)
    command = [
        "compare",
        str(tmp_path / "images"),
        "--methods",
        "mae",
        "--minutes",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]
    for path, value in (several or {}).items():
        command += ["--set", f"{path}={value}"]
    assert main(command) == 2
    assert "compare: methods take turns on one device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
