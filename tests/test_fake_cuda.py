"""What a GPU would see of every method, without one (`fake_cuda`): no host reads, one device, losses in full precision."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_cuda import CUDA, move, moved, on_gpu
from test_families import backbones  # noqa: F401  (a fixture)
from test_methods import small
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._pytree import tree_leaves

import underpaint
from underpaint.errors import InputError
from underpaint.evaluation.attentive import AttentiveHead
from underpaint.evaluation.detect import AnchorConfig, detector
from underpaint.evaluation.frozen import Headed, LinearHead
from underpaint.evaluation.segment import LinearSegmenter, UperNet
from underpaint.evaluation.settings import DetectConfig
from underpaint.methods import METHODS
from underpaint.tokenizers import ConvTokenizer, DallE, KMeansPatches

pytestmark = pytest.mark.unhooked  # fakes are no tensors to the shape-checking hook
SIZE, BATCH = 64, 4
# one family of each kind of adapter; the others are in the slow test
FEW = ("ViT", "DINOv3", "NaFlexViT", "Swin", "SwinV2", "Hiera", "ResNet", "ConvNeXt V2", "PVTv2")
# sums over many numbers, in which the 8 bits of bfloat16 would drown a loss
SUMS = ("mean", "sum", "var", "_softmax", "_log_softmax", "native_layer_norm", "mse_loss", "smooth_l1_loss", "prod")
REDUCED = ("mm", "addmm", "bmm", "convolution", "_scaled_dot_product_flash_attention", "linear")
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("energy", {"corruption": "mixture", "mask_patch_size": 4}),
    ("energy", {"steps": 2, "gradient": "difference"}),
    ("energy", {"readout": "square"}),
    ("localmim", {"stop_gradient": True, "target": "pixels"}),
    ("mae", {"target": "hog"}),
    ("simmim", {"mask": "block"}),
    ("cim", {"objective": "detect"}),
    ("cim", {"sampler": "unigram", "paste": True}),
]
each_method = pytest.mark.parametrize("name", sorted(METHODS))


def look(method: Any, size: int = SIZE) -> tuple[list[Any], Any]:
    """What a step of a method gives on a GPU with bfloat16, part by part, and what was made on the way."""
    given = (torch.randn(BATCH, 3, size, size), method.sample(BATCH, size, size))
    assert all(not leaf.is_floating_point() or leaf.dtype == torch.float32 for leaf in tree_leaves(given))
    mode = FakeTensorMode()
    move(mode, method.train())
    images, noise = moved(mode, given)
    with on_gpu(mode) as seen:
        return list(method.parts(images, noise)), seen


def check(found: list[Any]) -> None:
    for made in found:
        assert made.loss.dtype == torch.float32
        for name, value in {"loss": made.loss, **made.terms, **made.weights}.items():
            assert value.device == CUDA, name
            assert value.dtype not in (torch.bfloat16, torch.float16), name


def built(backbones: Any, family: str, name: str) -> Any:  # noqa: F811
    """A method on a small encoder of a family; None where it does not serve."""
    try:
        return backbones.built(family, name, torch.rand(48, 3, SIZE, SIZE))
    except (InputError, TypeError, ValueError):
        return None


@each_method
@pytest.mark.parametrize("family", FEW)
def test_a_step_stays_on_the_gpu(name: str, family: str, backbones: Any) -> None:  # noqa: F811
    method = built(backbones, family, name)
    if method is None:
        pytest.skip(f"{name} does not serve {family}")
    found, seen = look(method)
    check(found)
    assert torch.bfloat16 in seen.dtypes(*REDUCED)  # it was really reduced


@pytest.mark.slow
@each_method
def test_a_step_stays_on_the_gpu_with_every_family(name: str, backbones: Any) -> None:  # noqa: F811
    served = 0
    for family in backbones.FAMILIES:
        if family not in FEW and (method := built(backbones, family, name)) is not None:
            check(look(method)[0])
            served += 1
    assert served


@each_method
def test_sums_are_in_full_precision(name: str) -> None:
    _, seen = look(small(name), 16)
    assert torch.bfloat16 not in seen.dtypes(*SUMS), [key for key in seen.counts if key[0] in SUMS]


@pytest.mark.parametrize(("name", "settings"), OPTIONS)
def test_an_option_stays_on_the_gpu(name: str, settings: dict[str, Any]) -> None:
    check(look(small(name, **settings), 16)[0])


# --- tokenizers and heads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: KMeansPatches(16, 8),
        lambda: ConvTokenizer("fsq", 64, 8, dim=16, blocks=1),
        lambda: ConvTokenizer("vq", 64, 8, dim=16, blocks=1),
        lambda: DallE(2, width=16, codebook_size=32),
    ],
    ids=["kmeans", "fsq", "vq", "dalle"],
)
def test_words_are_found_and_spoken_on_the_gpu(make: Callable[[], Any]) -> None:
    mode, tokenizer = FakeTensorMode(), make().eval()
    tokenizer.ready = True
    move(mode, tokenizer)
    images = moved(mode, torch.rand(BATCH, 3, SIZE, SIZE))
    with on_gpu(mode), torch.no_grad():
        words = tokenizer.encode(images)
        spoken = tokenizer.decode(words, tokenizer.grid(SIZE, SIZE))
    assert (words.device, words.dtype) == (CUDA, torch.int64)
    assert spoken.shape == images.shape


HEADS: dict[str, Callable[[Any], nn.Module]] = {
    "linear": lambda encoder: Headed(encoder, LinearHead(encoder.dim, 5), False),
    "attentive": lambda encoder: Headed(encoder, AttentiveHead.untrained(encoder.dim, 5), True),
    "segment": lambda encoder: LinearSegmenter(encoder, 5),
    "upernet": lambda encoder: UperNet(encoder, 5, 32),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["ViT", "DINOv3", "Swin", "Hiera", "ResNet", "ConvNeXt V2"])
def test_a_head_stays_on_the_gpu(head: str, family: str, backbones: Any) -> None:  # noqa: F811
    name, settings = backbones.FAMILIES[family]
    network, mode = HEADS[head](underpaint.encoder(name, image_size=SIZE, **settings)), FakeTensorMode()
    move(mode, network.train())
    with on_gpu(mode):
        found = network(moved(mode, torch.randn(BATCH, 3, SIZE, SIZE)))
    assert found.device == CUDA
    assert found.shape[:2] == (BATCH, 5)


@pytest.mark.parametrize("family", ["ViT", "Swin", "ResNet"])
def test_the_levels_of_a_detector_stay_on_the_gpu(family: str, backbones: Any) -> None:  # noqa: F811
    """The rest of it is torchvision's, which reads from the device how many boxes there are."""
    name, settings = backbones.FAMILIES[family]
    encoder = underpaint.encoder(name, image_size=SIZE, **settings)
    sizes = AnchorConfig(((8,), (16,), (32,)), 10, 4)
    network, mode = detector(encoder, (SIZE, SIZE), 3, True, sizes, DetectConfig()), FakeTensorMode()
    move(mode, network.train())
    with on_gpu(mode):
        levels = network.backbone(moved(mode, torch.randn(BATCH, 3, SIZE, SIZE)))
    assert len(levels) == 3
    assert all(level.device == CUDA for level in levels.values())


# --- that something would be seen ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "read", [lambda x: x.sum().item(), lambda x: bool(x.sum() > 0), lambda x: x[x > 0], lambda x: x.tolist()]
)
def test_a_host_read_would_be_seen(read: Callable[[Tensor], Any]) -> None:
    mode = FakeTensorMode()
    given = moved(mode, torch.ones(2))
    with on_gpu(mode), pytest.raises((DataDependentOutputException, RuntimeError)):
        read(given)


def test_a_mix_of_devices_would_be_seen() -> None:
    mode = FakeTensorMode()
    given = moved(mode, torch.ones(2))
    with on_gpu(mode), pytest.raises(RuntimeError, match="device"):
        given + torch.ones(2)


def test_a_loss_in_half_precision_would_be_seen() -> None:
    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).square().mean()

    mode = FakeTensorMode()
    with on_gpu(mode) as seen:
        move(mode, Careless())(moved(mode, torch.ones(2, 4)))
    assert torch.bfloat16 in seen.dtypes(*SUMS)
