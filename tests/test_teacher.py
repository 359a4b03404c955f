"""A method with a moving-average teacher, written as a user would write one, trained by the real loop.

Its target is the mean of the last blocks' outputs of a teacher that sees the whole image (after data2vec, Baevski et al.,
arXiv 2202.03555); the teacher is the moving average of the encoder.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from asking import pretrain
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from underpaint.backbones import TokenBackbone
from underpaint.blocks import replaced
from underpaint.masking import Mask
from underpaint.methods import METHODS, Objective
from underpaint.methods.masked import MaskedMethod
from underpaint.patches import take
from underpaint.train.run_folder import Run


class Teacher(MaskedMethod):
    """Say what a teacher makes of the hidden patches.

    Args:
        ema_decay: how much of itself the teacher keeps in a step.
        layers: last blocks whose outputs are averaged.
    """

    encoder: TokenBackbone
    mask_ratio: float = 0.6
    ema_decay: float = 0.9
    layers: int = 2

    # what the tests do to a run: the step whose loss is not finite, and the call at which it dies
    spoiled: ClassVar[int] = -1
    dies: ClassVar[int] = -1
    moved: ClassVar[list[tuple[float, bool]]] = []

    def __post_init__(self) -> None:
        self.hide(self.encoder.patch_size, self.encoder.image_size)
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)
        self.mask_token = nn.Parameter(torch.zeros(self.encoder.dim))
        self.head = nn.Linear(self.encoder.dim, self.encoder.dim)

    def predict(self, images: Float[Tensor, "b c height width"], mask: Mask) -> Float[Tensor, "b h d"]:
        tokens = replaced(self.encoder.embed(images), mask.hidden, self.mask_token)
        return take(self.head(self.encoder.encode(tokens).tokens), mask.hidden)

    @torch.no_grad()
    def targets(self, images: Float[Tensor, "b c height width"], mask: Mask) -> Float[Tensor, "b h d"]:
        last = range(self.encoder.depth - self.layers, self.encoder.depth)
        outputs = self.teacher.encode(self.teacher.embed(images), taps=list(last)).taps
        return take(torch.stack([functional.layer_norm(x, x.shape[-1:]) for x in outputs]).mean(0), mask.hidden)

    def forward(self, images: Float[Tensor, "b c height width"], noise: Mask | None = None) -> Objective:
        mask = self.sample_for(images) if noise is None else noise
        target = self.targets(images, mask)
        loss = functional.smooth_l1_loss(self.predict(images, mask), target)
        if len(Teacher.moved) == Teacher.spoiled:
            loss = loss * torch.nan
        return Objective(loss, {"baseline": functional.smooth_l1_loss(self.trivial(target), target)})

    @torch.no_grad()
    def after_step(self, progress: float, taken: Float[Tensor, ""]) -> None:
        if len(Teacher.moved) == Teacher.dies:
            raise KeyError("killed")
        before = [weight.clone() for weight in self.teacher.parameters()]
        for kept, weight in zip(self.teacher.parameters(), self.encoder.parameters(), strict=True):
            kept.lerp_(weight, (1 - self.ema_decay) * taken)
        still = all(torch.equal(a, b) for a, b in zip(before, self.teacher.parameters(), strict=True))
        Teacher.moved.append((float(taken), not still))


@pytest.fixture
def teacher(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Teacher]]:
    monkeypatch.setitem(METHODS, "teacher", Teacher)
    Teacher.moved, Teacher.spoiled, Teacher.dies = [], -1, -1
    yield Teacher
    Teacher.moved, Teacher.spoiled, Teacher.dies = [], -1, -1


def trained(pictures: Path, out: Path) -> Run:
    vit = {"embed_dim": 32, "depth": 3, "num_heads": 2}
    return pretrain(
        *(pictures, out),
        method="teacher",
        image_size=16,
        patch_size=4,
        batch_size=16,
        steps=9,
        checkpoint_every=3,
        settings={f"encoder.{key}": value for key, value in vit.items()} | {"run.compile": "off", "optimiser.lr": 1e-2},
    )


def weights(run: Run) -> dict[str, Tensor]:
    found = run.load()
    assert found is not None
    return {name: value for name, value in found[0].items() if name.startswith("method.")}


def test_the_loop_trains_a_method_with_a_teacher_and_a_killed_run_goes_on_as_if_nothing_had_been(
    pictures: Path, tmp_path: Path, teacher: Any
) -> None:
    whole = trained(pictures, tmp_path / "whole")
    state = weights(whole)
    assert len(teacher.moved) == 9
    student = state["method.encoder.model.blocks.0.mlp.fc1.weight"]
    slow = state["method.teacher.model.blocks.0.mlp.fc1.weight"]  # it is part of the checkpoint
    assert not torch.equal(slow, student)
    teacher.moved, teacher.dies = [], 5
    with pytest.raises(KeyError, match="killed"):
        trained(pictures, tmp_path / "killed")
    teacher.moved, teacher.dies = [], -1
    again = weights(trained(pictures, tmp_path / "killed"))
    assert 0 < len(teacher.moved) < 9  # it went on from a checkpoint
    assert state.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in state.items())


def test_a_teacher_does_not_follow_a_step_that_was_not_taken(pictures: Path, tmp_path: Path, teacher: Any) -> None:
    teacher.spoiled = 4
    trained(pictures, tmp_path / "run")
    # the first step has a rate of 0, so there is nothing to follow yet
    assert teacher.moved == [(1.0, False), *((float(step != 4), step != 4) for step in range(1, 9))]
