"""Checks that take long: `make test-slow`; their last result is in docs/log.md."""

import shutil
from pathlib import Path

import pytest
import torch
from asking import pretrain
from test_methods import photographs, small

from underpaint.draws import Draws
from underpaint.methods import METHODS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here")
def test_inductor_equals_eager(name: str) -> None:
    method, images = small(name), photographs()
    mask = method.sample(4, 16, 16, Draws.of(0, 4))
    method(images, mask).loss.backward()
    eager = {key: p.grad.clone() for key, p in method.named_parameters() if p.grad is not None}
    method.zero_grad()
    torch.compile(method, fullgraph=True)(images, mask).loss.backward()
    for key, parameter in method.named_parameters():
        if key in eager:
            torch.testing.assert_close(parameter.grad, eager[key], rtol=1e-3, atol=1e-6)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here")
def test_a_compiled_run_resumes(pictures: Path, tmp_path: Path) -> None:
    settings = {"encoder.embed_dim": 32, "encoder.depth": 2, "encoder.num_heads": 2, "run.compile": "on"}
    run = pretrain(
        *(pictures, tmp_path / "run"),
        encoder="vit_tiny_patch16_224",
        image_size=16,
        patch_size=4,
        batch_size=16,
        steps=3,
        settings=settings,
        method="mae",
    )
    assert run.recipe().measured["compile"] is True
    pretrain(pictures, run.path, steps=5)
    assert run.lines("metrics.jsonl")[-1]["step"] == 5
