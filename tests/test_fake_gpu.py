"""Forwards on a GPU that is not there: fake tensors, which have shapes, dtypes and a device, and no numbers.

They show what a step would do on one: reading a number, or mixing devices, is an error; and each number's dtype under the
autocast of CUDA, whose lists of operations are others than a CPU's. Backward needs a real device, and so does what takes a
gradient inside its forward (the energy methods).
"""

from typing import Any

import pytest
import torch
from test_computing import Watching, halves
from test_host_reads import NoWaiting
from tiny import SERVED, drawn, made, photographs
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import underpaint
from underpaint import computing
from underpaint.computing import autocast, output
from underpaint.evaluation.detect import FPN
from underpaint.evaluation.frozen import Headed, LinearHead
from underpaint.evaluation.segment import LinearSegmenter, UperNet
from underpaint.masking import each_tensor
from underpaint.tokenizers import ConvTokenizer, DallE, KMeansPatches

FORWARD = [(name, kind) for name, kind in SERVED if "energy" not in name]
FAMILIES: dict[str, dict[str, Any]] = {
    "vit": {"name": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "beit": {"name": "beit_base_patch16_224", "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "rotary": {"name": "vit_small_patch16_dinov3", "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "swin": {
        "name": "swin_tiny_patch4_window7_224",
        "patch_size": 2,
        "embed_dim": 16,
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 2, 4, 8),
    },
    "swinv2": {
        "name": "swinv2_tiny_window8_256",
        "patch_size": 2,
        "embed_dim": 16,
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 2, 4, 8),
    },
    "hiera": {"name": "hiera_tiny_224", "patch_size": 2, "embed_dim": 16, "stages": (1, 1, 1, 1)},
    "resnet": {"name": "resnet10t", "output_stride": 8, "channels": (16, 16, 32, 32), "stem_width": 8},
    "convnext": {
        "name": "convnext_atto",
        "output_stride": 8,
        "depths": (1, 1, 1, 1),
        "dims": (16, 16, 32, 32),
    },
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    """torch takes it that there is one that has bfloat16."""
    if torch.cuda.is_available():
        pytest.skip("there is a real one")
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    return FakeTensorMode()


def moved(value: Tensor, mode: FakeTensorMode) -> Tensor:
    plain = value.detach()
    with mode:
        return mode.from_tensor(plain).to("cuda")


def there(module: Any, mode: FakeTensorMode) -> Any:
    """A module with all of its weights on the fake GPU."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = nn.Parameter(moved(value, mode), value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = moved(value, mode)
    return module


@pytest.mark.parametrize(("name", "kind"), FORWARD)
def test_a_method_computes_on_a_gpu_in_bfloat16_and_says_float32(name: str, kind: str, gpu: FakeTensorMode) -> None:
    method, images = made(name, kind), photographs()
    noise = each_tensor(drawn(method, images), lambda value: moved(value, gpu))
    method, images = there(method, gpu), moved(images, gpu)
    with gpu, Watching() as watching, NoWaiting(), autocast(images.device):
        objective = method(images, noise)
    assert watching.count > 10
    for value in (objective.loss, *objective.terms.values(), *objective.weights.values()):
        assert value.device.type == "cuda"
        assert value.dtype == torch.float32


@pytest.mark.parametrize("family", list(FAMILIES))
def test_an_encoder_and_the_heads_on_it(family: str, gpu: FakeTensorMode) -> None:
    def encoder() -> Any:
        return underpaint.encoder(**FAMILIES[family], image_size=32)

    images = moved(photographs(2), gpu)
    own = there(encoder(), gpu)
    with gpu, Watching() as watching, NoWaiting(), autocast(images.device):
        found = own(images)
    assert watching.count > 2
    assert found.pooled.dtype == torch.float32
    heads = {
        "linear": lambda: Headed(encoder(), LinearHead(encoder().dim, 3), False),
        "segmenter": lambda: LinearSegmenter(encoder(), 3),
        "upernet": lambda: UperNet(encoder(), 3, 16, 2),
    }
    for make in heads.values():
        network = there(make(), gpu).eval()
        with gpu, NoWaiting():
            assert not halves(output(network, images))
    pyramid = there(FPN(encoder(), 16, 2, 3), gpu)
    with gpu, Watching() as watching, NoWaiting():
        maps = pyramid(images)
    assert watching.count > 2
    assert not halves(maps)


# vector quantisation asks in each call whether its codebook was begun: vector-quantize-pytorch's own, which reads a number
@pytest.mark.parametrize("kind", ["fsq", "kmeans", "dalle"])
def test_a_tokenizer_says_words_in_float32_and_trains_in_bfloat16(kind: str, gpu: FakeTensorMode) -> None:
    make = {
        "kmeans": lambda: KMeansPatches(16, 8),
        "dalle": lambda: DallE(width=8, codebook_size=32),
        "fsq": lambda: ConvTokenizer("fsq", 64, 8, dim=16, blocks=1),
    }[kind]
    tokenizer = make()
    images = moved(torch.rand(2, 3, 32, 32), gpu)
    if kind == "fsq":
        trained = there(make(), gpu)
        with gpu, Watching() as watching, autocast(images.device):
            loss = trained(images).loss
        assert watching.count > 4
        assert loss.dtype == torch.float32
    tokenizer = there(tokenizer, gpu).eval()
    with gpu, NoWaiting(), torch.no_grad():
        words = tokenizer.encode(images)
        pictures = tokenizer.decode(words, tokenizer.grid(32, 32))
    assert pictures.shape == images.shape
    assert not halves(pictures)


def test_the_best_precision_of_the_fake_gpu_is_bfloat16(gpu: FakeTensorMode) -> None:
    assert computing.best_precision(torch.device("cuda")) == "bf16"
    assert computing.best_precision(torch.device("cpu")) == "32"
