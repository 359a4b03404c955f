"""Networks with feature maps of which part is hidden: nothing of it reaches what is visible, and it is not counted."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import underpaint
from underpaint.backbones.maps import MapBackbone, tell_once
from underpaint.backbones.visible import VisibleOnly
from underpaint.draws import Draws
from underpaint.masking import hidden_map
from underpaint.methods import MAE, BEiT, LocalMIM, SimMIM
from underpaint.methods.method import Method

NETS: dict[str, dict[str, Any]] = {
    "resnet18": {"channels": [8, 16, 16, 32], "in_chans": 3},
    "resnetv2_50": {"channels": [8, 16, 16, 32], "layers": [1, 1, 1, 1], "in_chans": 3},
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 32]},
    "convnextv2_atto": {"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 32]},
    "efficientnet_b0": {},
    "regnety_002": {},
    "mobilenetv4_conv_small": {},
}
SIZE = 128  # pixels: 4 x 4 places of 32


def net(name: str, size: int = SIZE) -> MapBackbone:
    torch.manual_seed(0)
    made = underpaint.encoder(name, image_size=size, **NETS.get(name, {}))
    assert isinstance(made, MapBackbone)
    return made


def test_a_mode_is_masking_after_each_convolution_by_hand() -> None:
    """The reference has SparK's order: every output of a convolution, and of a norm, times the mask of its stride."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.second, self.groups = nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.GroupNorm(2, 8)

        def forward(self, images: Tensor) -> Tensor:
            pooled = F.relu(self.norm(self.first(images)))
            return self.groups(self.second(F.max_pool2d(pooled, 3, 1, 1)))

    torch.manual_seed(0)
    model, images = Net().double(), torch.randn(4, 3, 8, 8).double()
    visible = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 1, 1]]).double().view(4, 1, 2, 2)
    fine, coarse = (visible.repeat_interleave(n, 2).repeat_interleave(n, 3) for n in (4, 2))

    def normed(maps: Tensor, mask: Tensor, dims: tuple[int, ...], weight: Tensor, bias: Tensor) -> Tensor:
        count = mask.expand_as(maps).sum(dims, keepdim=True)
        mean = (maps * mask).sum(dims, keepdim=True) / count
        variance = ((maps - mean).square() * mask).sum(dims, keepdim=True) / count
        return (maps - mean) / (variance + 1e-5).sqrt() * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)

    maps = model.first(images * fine) * fine
    maps = F.relu(normed(maps, fine, (0, 2, 3), model.norm.weight, model.norm.bias)) * fine
    maps = model.second(F.max_pool2d(maps, 3, 1, 1) * fine) * coarse
    halves = [
        normed(half, coarse, (1, 2, 3), model.groups.weight[at : at + 4], model.groups.bias[at : at + 4])
        for at, half in ((0, maps[:, :4]), (4, maps[:, 4:]))
    ]
    with VisibleOnly(visible):
        made = model(images)
    torch.testing.assert_close(made * coarse, torch.cat(halves, 1) * coarse)
    variance = (model.first(images * fine).square() * fine).sum((0, 2, 3)) / fine.sum()  # a tenth of the way from 1
    mean = (model.first(images * fine) * fine).sum((0, 2, 3)) / fine.sum()
    torch.testing.assert_close(model.norm.running_mean, 0.1 * mean)
    unbiased = (variance - mean.square()) * fine.sum() / (fine.sum() - 1)
    torch.testing.assert_close(model.norm.running_var, 0.9 + 0.1 * unbiased)


@pytest.mark.parametrize("name", NETS)
def test_with_nothing_hidden_a_mode_changes_nothing(name: str) -> None:
    encoder, images = net(name), torch.randn(2, 3, SIZE, SIZE)
    for training in (False, True):
        encoder.train(training)
        torch.manual_seed(1)
        whole = encoder(images).patches
        torch.manual_seed(1)
        with VisibleOnly(torch.ones(2, 1, 4, 4)):
            seen = encoder(images).patches
        torch.testing.assert_close(seen, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("kind", [MAE, LocalMIM, SimMIM, BEiT])
def test_what_is_hidden_does_not_matter(name: str, kind: type[Method[Any]]) -> None:
    settings: dict[str, Any] = {"codebook_size": 8} if kind is BEiT else {}
    method: Any = kind(net(name), **settings)
    images, noise = torch.randn(2, 3, SIZE, SIZE), method.sample(2, SIZE, SIZE, Draws.of(0, 2))
    hidden = hidden_map(noise, (4, 4), (32, 32))
    predict = method.every_tap if kind is LocalMIM else method.predict
    for training in (False, True):
        method.train(training)
        found = []
        for pixels in (images, images + 10 * hidden * torch.randn_like(images)):
            torch.manual_seed(1)
            made = predict(pixels, noise)
            found.append(torch.cat([one.flatten() for one in made]) if kind is LocalMIM else made)
        assert torch.equal(*found)
        assert found[0].std() > 0


@pytest.mark.parametrize("name", NETS)
def test_convolutional_nets_are_served_soundly(name: str) -> None:
    assert MAE(net(name)).walk.sound


@pytest.mark.parametrize(
    "name", ["caformer_s18", "coatnet_pico_rw_224", "edgenext_xx_small", "fastvit_sa12", "gmlp_s16_224", "pvt_v2_b0"]
)
def test_attention_is_found_to_carry_hidden_places(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """That of EdgeNeXt begins at a millionth, by its LayerScale."""
    encoder: Any = underpaint.encoder(name, image_size=SIZE)
    tell_once.cache_clear()
    assert not MAE(encoder).walk.sound
    assert caplog.text.count("hidden pixels are at the mean of the data") == 1
    MAE(encoder)
    assert caplog.text.count("hidden pixels are at the mean of the data") == 1


def test_squeeze_excitation_takes_the_mean_of_what_is_visible() -> None:
    from timm.layers import SqueezeExcite

    torch.manual_seed(0)
    module, maps = SqueezeExcite(8).double(), torch.randn(2, 8, 4, 4).double()
    visible = torch.zeros(2, 1, 4, 4).double()
    visible[:, :, :2] = 1
    with VisibleOnly(visible):
        made = module(maps)
    torch.testing.assert_close(made[:, :, :2], module(maps[:, :, :2]))


def test_a_mode_finds_what_is_not_sound() -> None:
    from underpaint.backbones.visible import soundly

    class Rolled(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return F.conv2d(F.conv2d(images, torch.ones(4, 3, 1, 1)), torch.ones(4, 4, 1, 1)).roll(1, 3)

    class Fine(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return F.conv2d(F.conv2d(images, torch.ones(4, 3, 1, 1)), torch.ones(4, 4, 3, 3), padding=1)

    def maps(model: nn.Module, images: Tensor) -> list[Tensor]:
        return [model(images)]

    assert soundly(Fine(), maps, (3, 4, 4))
    assert not soundly(Rolled(), maps, (3, 4, 4))


def test_scales_follow_the_stages() -> None:
    method = LocalMIM(net("resnet18"))
    assert method.cells == [8, 16, 32]  # maps of 2 and 4 px have too many places of 128 px to attend to
    assert [layer.grid for layer in method.walk.layers] == [(16, 16), (8, 8), (4, 4)]
    assert LocalMIM(net("resnet18", 64)).cells == [4, 8, 16, 32]


def test_gradients_reach_every_weight_of_a_net() -> None:
    for kind in (MAE, LocalMIM, SimMIM):
        method: Any = kind(net("convnextv2_atto"))
        method(torch.randn(2, 3, SIZE, SIZE)).loss.backward()
        left = [n for n, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
        assert not [name for name in left if "grn" not in name], left  # GRN starts as nothing


def test_an_image_of_part_of_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match="do not divide an image of 80x80"):
        MAE(net("resnet18", 80))


def test_parts_between_taps_need_an_encoder_that_runs_in_parts() -> None:
    with pytest.raises(ValueError, match="layer by layer"):
        LocalMIM(net("resnet18"), stop_gradient=True)
