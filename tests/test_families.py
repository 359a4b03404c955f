"""Some pairs of benchmarks/backbones.py, which has all of them: they build, train, and let nothing of hidden places through."""

import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# by family: a method, and how its network is kept from hidden places
PAIRS = {
    "DINOv3": ("mae", "visible"),
    "EVA-02": ("beit", "token"),
    "CaiT": ("cae", "visible"),
    "NaFlexViT": ("localmim", "visible"),
    "ResNet": ("beit", "colour"),
    "ConvNeXt V2": ("mae", "empty"),
    "RegNet": ("localmim", "empty"),
    "MobileNetV3": ("simmim", "colour"),
    "PVTv2": ("mae", "input"),
    "EdgeNeXt": ("cim", ""),
}


@pytest.fixture(scope="module")
def backbones() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("backbones", BENCHMARKS / "backbones.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Waves of several colours, directions and lengths: what is hidden can be told from what is not."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="ij")
    a, b, phase = torch.rand(3, 48, 3, 1, 1, generator=generator)
    return 1.4 * torch.sin(12 * (a - 0.5) * y + 12 * (b - 0.5) * x + 6 * phase)


@pytest.mark.parametrize("family", PAIRS)
def test_a_pair_trains_and_does_not_leak(family: str, backbones: Any, images: Tensor) -> None:
    name, hidden = PAIRS[family]
    found = backbones.pair(family, name, images, rate=1e11, steps=8)
    assert "refused" not in found, found
    assert found["leak"] == 0
    assert found["hidden"] == hidden
    assert math.isfinite(found["after"])
    assert found["after"] < found["before"]


def test_a_pair_that_cannot_be_says_why(backbones: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backbones.FAMILIES, "ViTamin", ("vitamin_small_224", {"patch_size": 8}))
    found = backbones.pair("ViTamin", "mae", images, rate=1e11)
    assert found["refused"].startswith("patch_size: 'vitamin_small_224' makes its tokens by convolutions")


def test_a_leak_would_be_seen(backbones: Any, images: Tensor) -> None:
    """The same measure, of a network that is given what should be hidden."""
    method = backbones.built("RegNet", "mae", images)
    whole = method.encoder.advance
    method.encoder.advance = lambda walk, number, state, images, noise: whole(
        walk, number, state if state is not None else tuple(method.encoder._maps(images, walk.taken)), images, noise
    )
    assert backbones.leak(method, images[:2]) > 0.01
