"""Going on from weights: what stays as it was, what is pulled back, and at which rates the rest moves."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import write_pictures
from forked import CommandLine
from lightning_fabric import Fabric
from safetensors.torch import load_file, save_file
from test_methods import photographs, small
from torch import Tensor

import underpaint
from underpaint.data import Batch
from underpaint.methods.method import freeze, layers_of
from underpaint.patches import Standardize
from underpaint.prepare import stepper_for
from underpaint.recipes.recipe import checked
from underpaint.train.stepper import Stepper

TINY = ("encoder.embed_dim=32", "encoder.depth=4", "encoder.num_heads=2")
FREEZE, STEPS = 2, 3


def stepper(**optimiser: Any) -> Stepper:
    """Of a small MAE, at a rate of 0.01 where nothing else is said."""
    recipe = checked({"method": {"name": "mae"}, "optimiser": {"batch_size": 4, "lr": 0.01 * 64, **optimiser}})
    recipe.measured["precision"] = "32"
    return stepper_for(Fabric(accelerator="cpu"), recipe, small("mae"), Standardize([0.0] * 3, [1.0] * 3))


def moved(steps: int = 1, **optimiser: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of the encoder before and after some steps."""
    current, images = stepper(**optimiser), photographs(4)
    before = {name: value.clone() for name, value in current.task.state_dict().items()}
    for step in range(steps):
        current.step(Batch(images, [0, 1, 2, 3]), step, 1.0)
    return before, current.task.state_dict()


def distance(one: dict[str, Tensor], other: dict[str, Tensor], start: str = "encoder.") -> float:
    return sum(float((one[name] - other[name]).square().sum()) for name in one if name.startswith(start)) ** 0.5


@pytest.mark.quick
def test_each_layer_has_its_rate() -> None:
    """The whole above the encoder; a block 0.5 times what the one above it has, the patches the least."""
    current = stepper(layer_decay=0.5, weight_decay=0.1)
    names = {parameter: name for name, parameter in current.task.named_parameters()}
    found = {}
    for group in current.optimiser.param_groups:
        for parameter in group["params"]:
            name = names[parameter]
            found[name] = group["lr"]
            bare = parameter.dim() <= 1 or name.endswith(("_token", "pos_embed"))
            assert group["weight_decay"] == (0.0 if bare else 0.1), name
    assert {name for p, name in names.items() if p.requires_grad} == set(found)
    wanted = {"patch_embed": 0.125, "blocks.0.": 0.25, "blocks.1.": 0.5, "model.norm": 0.5, "decoder": 1.0}
    for part, share in wanted.items():
        rates = {rate for name, rate in found.items() if part in name and (part == "decoder" or "encoder" in name)}
        assert sorted(rates) == pytest.approx([0.01 * share]), part
    assert current.peaks[0] == pytest.approx(0.01)  # which the metrics show


@pytest.mark.quick
def test_a_pull_moves_each_weight_its_share_of_the_way_back_after_the_step() -> None:
    """As AdamW's own decay does: the rate times `pull`, outside of the gradient; the encoder alone, without decay to 0."""
    start, free = moved(weight_decay=0.0)
    same, pulled = moved(weight_decay=0.3, pull=40.0)
    for name, value in free.items():
        assert torch.equal(start[name], same[name])
        if name.startswith("encoder."):
            torch.testing.assert_close(pulled[name], value.lerp(start[name], 0.01 * 40.0), rtol=1e-5, atol=1e-7)
    name = "decoder.blocks.0.attn.qkv.weight"
    assert not torch.equal(pulled[name], free[name])  # decay to 0 is for what has no start


def test_the_larger_the_pull_the_nearer_to_the_start() -> None:
    far = [distance(*moved(6, pull=pull)) for pull in (0.0, 20.0, 80.0)]
    assert far[0] > 1.5 * far[1] > 2 * far[2] > 0
    before, after = moved(6, pull=1e6)  # never beyond
    assert distance(before, after) == 0
    assert distance(before, after, "decoder") > 0


@pytest.mark.quick
def test_a_step_that_is_left_out_pulls_nothing() -> None:
    current = stepper(pull=40.0)
    current.step(Batch(photographs(4), [0, 1, 2, 3]), 0, 1.0)
    before = {name: value.clone() for name, value in current.task.state_dict().items()}
    _, bad = current.step(Batch(photographs(4) * float("nan"), [0, 1, 2, 3]), 1, 1.0)
    assert bad == 1
    assert all(torch.equal(value, before[name]) for name, value in current.task.state_dict().items())


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "settings", "blocks", "kept"),
    [
        ("vit_tiny_patch16_224", {"image_size": 32, "embed_dim": 32, "depth": 3, "num_heads": 2}, 1, "blocks.1"),
        ("resnet10t", {"channels": [8, 8, 16, 16]}, 2, "layer3"),
    ],
)
def test_the_first_blocks_and_what_is_below_them_are_frozen(
    name: str, settings: dict[str, Any], blocks: int, kept: str
) -> None:
    encoder: Any = underpaint.encoder(name, **settings)
    freeze(encoder, blocks)
    layers = layers_of(encoder)
    trained = {key for key, p in encoder.model.named_parameters() if p.requires_grad}
    assert trained == {key for key, p in encoder.model.named_parameters() if layers[p] > blocks}
    assert min(trained).startswith(kept)
    most = max(layers.values()) - 1
    with pytest.raises(ValueError, match=f"freeze: 99; it must be at most {most}"):
        freeze(encoder, 99)


@pytest.fixture(scope="module")
def start(server: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps; beside it, the images of another one."""
    folder = tmp_path_factory.mktemp("continue")
    arguments: list[Any] = [
        "--encoder",
        "vit_tiny_patch16_224",
        "--patch-size",
        8,
        "--image-size",
        32,
        "--steps",
        STEPS,
    ]
    for setting in (*TINY, "optimiser.lr=0.02"):
        arguments += ["--set", setting]
    first = write_pictures(folder / "first" / "images", 16, classes=1)
    ended = server("pretrain", first, "--out", folder / "start", "--method", "mae", "--batch-size", 8, *arguments)
    assert ended.status == 0, ended.error
    write_pictures(folder / "images", 16, classes=1, seed=1)
    return folder / "start"


def going_on(start: Path, out: Path, *more: Any) -> list[Any]:
    length = ("--steps", STEPS, "--batch-size", 8, "--checkpoint-every", 1, "--lr", 0.2)
    return [
        "pretrain",
        start.with_name("images"),
        "--out",
        out,
        "--recipe",
        "continue",
        "--init",
        start,
        *length,
        *more,
    ]


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "encoder.safetensors")


def test_going_on_keeps_what_is_frozen_and_ends_the_same_when_it_was_killed(
    server: CommandLine, start: Path, tmp_path: Path
) -> None:
    more = ("--set", f"optimiser.freeze={FREEZE}", "--set", "optimiser.pull=20", "--set", "run.log_every=1")
    ended = server(*going_on(start, tmp_path / "whole", *more))
    assert ended.status == 0, ended.error
    assert "plan for 16 images" in ended.out
    recipe = yaml.safe_load((tmp_path / "whole" / "recipe.yaml").read_text())
    assert recipe["encoder"]["embed_dim"] == 32  # the start's own
    assert recipe["encoder"]["patch_size"] == 8
    assert recipe["data"]["image_size"] == [32, 32]
    assert recipe["encoder"]["drop_path_rate"] == 0.1
    assert (recipe["optimiser"]["warmup"], recipe["optimiser"]["layer_decay"]) == (0.15, 0.75)
    first, last = weights(start), weights(tmp_path / "whole")
    fixed = {
        name for name in first if name.startswith(("patch_embed", "pos_embed", "cls_token", "blocks.0.", "blocks.1."))
    }
    assert len(fixed) > 20
    assert all(torch.equal(first[name], last[name]) for name in fixed)
    assert not any(torch.equal(first[name], last[name]) for name in first if name.startswith("blocks.3.mlp"))

    killed = going_on(start, tmp_path / "killed", *more)
    assert server(*killed, die=("step", 2)).status == -9
    again = server(*killed)
    assert again.status == 0, again.error
    assert "going on from step 1 of 3" in again.out + again.error
    assert all(torch.equal(value, last[name]) for name, value in weights(tmp_path / "killed").items())
    # what it is pulled to is read again, and has to be what it was
    for run, other in (
        (tmp_path / "whole", {**first, "norm.bias": first["norm.bias"] + 1}),
        (tmp_path / "killed", first),
    ):
        save_file(other, start / "encoder.safetensors")
        ended = server(*going_on(start, run, *more))
        if run.name == "whole":
            assert ended.status == 2
            assert "these are other weights than those that the run is pulled to" in ended.error.splitlines()[-1]
    assert ended.status == 0, ended.error
    lines = [json.loads(line) for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--set", "optimiser.freeze=5"), "optimiser.freeze: 5; it must be at most 3 for this encoder"),
        (("--set", "optimiser.layer_decay=0"), "optimiser.layer_decay: 0; it must be above 0 and at most 1"),
        (("--set", "optimiser.pull=-1"), "optimiser.pull: -1; it must be at least 0"),
    ],
)
def test_what_cannot_be_is_one_line(
    more: tuple[str, ...], said: str, server: CommandLine, start: Path, tmp_path: Path
) -> None:
    ended = server(*going_on(start, tmp_path / "run", *more))
    assert ended.status == 2
    assert said in ended.error.splitlines()[-1]


def test_without_weights_there_is_nothing_to_go_on_from(server: CommandLine, start: Path, tmp_path: Path) -> None:
    ended = server("pretrain", start.with_name("images"), "--out", tmp_path / "run", "--recipe", "continue")
    assert ended.status == 2
    assert ended.error.splitlines()[-1].startswith(
        "underpaint: --recipe continue: goes on from weights; give them, --init"
    )
