"""Hiera on whole images and on visible mask units: the same numbers as timm's own forward gives."""

from typing import Any

import pytest
import torch
from torch import Tensor

import underpaint
from underpaint.backbones.hiera import Hiera
from underpaint.draws import Draws
from underpaint.masking import Mask, Masking, hidden_map
from underpaint.methods import MAE, BEiT, Energy, LocalMIM, SimMIM
from underpaint.patches import take

TINY: dict[str, Any] = {"embed_dim": 16, "stages": (1, 1, 2, 1)}
ABSWIN = "hiera_small_abswin_256"


def hiera(image_size: tuple[int, int] = (64, 96), name: str = "hiera_tiny_224", **settings: Any) -> Hiera:
    """Patches of 2 px and units of 16, where nothing else is said."""
    torch.manual_seed(0)
    made: Any = underpaint.encoder(name, image_size=image_size, **({"patch_size": 2} | TINY | settings))
    assert isinstance(made, Hiera)
    with torch.no_grad():
        for weight in made.final_norm.parameters():
            weight.normal_(1)
    return made


def tokens_of(encoder: Hiera, images: Tensor, mask: Mask) -> list[Tensor]:
    walk, state, found = encoder.walk(Masking(unit=encoder.unit)), None, []
    for number in range(len(walk.layers)):
        state, tokens = encoder.advance(walk, number, state, images, mask)
        found.append(tokens)
    return found


@pytest.mark.parametrize(
    ("name", "settings", "stride"),
    [("hiera_tiny_224", {}, 16), ("hiera_tiny_224", {"patch_size": None}, 32), (ABSWIN, {}, 16)],
)
def test_with_everything_visible_a_walk_is_the_forward_of_timm(
    name: str, settings: dict[str, Any], stride: int
) -> None:
    encoder = hiera(name=name, **settings).double().eval()
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    grid = encoder.grid(64, 96)
    assert (encoder.stride, grid) == (stride, (64 // stride, 96 // stride))
    every = torch.arange(grid[0] * grid[1]).expand(2, -1)
    raw = encoder.model.forward_features(images)
    found = encoder(images)
    torch.testing.assert_close(found.patches, encoder.model.head.norm(raw))
    torch.testing.assert_close(found.pooled, found.patches.mean(1))
    # timm's head: the norm behind the mean
    torch.testing.assert_close(encoder.model(images), encoder.model.head.norm(raw.mean(1)))
    *_, last = tokens_of(encoder, images, Mask(every, every[:, :0]))
    torch.testing.assert_close(last, found.patches)
    for (made, pixels), true in zip(
        encoder.pyramid(images), encoder.model.forward_intermediates(images, intermediates_only=True), strict=True
    ):
        assert made.shape == true.shape
        assert made.shape[2:] == (64 // pixels, 96 // pixels)


@pytest.mark.parametrize("name", ["hiera_tiny_224", ABSWIN])
def test_visible_units_equal_those_of_timm(name: str) -> None:
    """At every stage, with different masks in one batch, and every token where its layer's mask says that it lies."""
    encoder = hiera(name=name).double().eval()
    images = torch.randn(3, 3, 64, 96, dtype=torch.float64)
    walk = encoder.walk(Masking(0.6, unit=encoder.unit))
    assert [layer.grid for layer in walk.layers] == [(16, 24), (8, 12), (4, 6)]  # not 32 x 48 places
    mask = walk.sample(3, 64, 96, Draws.of(0, 3))
    kept = torch.zeros(3, 24, dtype=torch.bool).scatter(1, mask.visible, True)
    _, stages = encoder.model.forward_intermediates(images, mask=kept, indices=[1, 2, 3], output_fmt="NHWC")
    found = tokens_of(encoder, images, mask)
    for number, (tokens, layer) in enumerate(zip(found, walk.layers, strict=True)):
        # timm's are [b, units, rows, columns, d] of each unit
        side, here = encoder.stride // layer.stride, walk.mask(mask, number)
        rows, columns = here.visible // layer.grid[1], here.visible % layer.grid[1]
        units = rows // side * 6 + columns // side
        place = (mask.visible.unsqueeze(2) == units.unsqueeze(1)).long().argmax(1)
        inside = rows % side * side + columns % side
        wanted = take(stages[number].flatten(1, 3), place * side * side + inside)
        last = number + 1 == len(walk.layers)
        torch.testing.assert_close(tokens, encoder.final_norm(wanted) if last else wanted)


@pytest.mark.parametrize("kind", [MAE, LocalMIM, SimMIM, BEiT])
def test_hidden_pixels_do_not_matter(kind: type[Any]) -> None:
    encoder = hiera()
    method: Any = kind(encoder, **({"codebook_size": 8} if kind is BEiT else {}))
    images, noise = torch.randn(2, 3, 64, 96), method.sample(2, 64, 96, Draws.of(0, 2))
    hidden = hidden_map(noise, (4, 6), (16, 16))
    found = []
    for pixels in (images, images + 10 * hidden):
        made = method.every_tap(pixels, noise) if kind is LocalMIM else [method.predict(pixels, noise)]
        found.append(torch.cat([one.flatten() for one in made]))
    assert torch.equal(*found)
    found[0].square().sum().backward()
    for name, weight in encoder.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().amax() > 0, name


@pytest.mark.parametrize("steps", [1, 2])
def test_the_energy_has_a_gradient_in_every_weight(steps: int) -> None:
    encoder = hiera((32, 32))
    method = Energy(encoder, steps=steps, step_size=0.1)
    torch.stack([part.loss for part in method.parts(torch.randn(2, 3, 32, 32))]).sum().backward()
    left = [name for name, weight in encoder.named_parameters() if weight.requires_grad and weight.grad is None]
    assert left == []


@pytest.mark.quick
def test_what_cannot_be_is_one_line() -> None:
    with pytest.raises(underpaint.InputError, match="72x64 px is no whole number of units of 16 px"):
        hiera((72, 64))
    with pytest.raises(ValueError, match="a mask unit of 16 px is no position of the last stage, 8 px"):
        hiera((64, 64), q_pool=2).walk(Masking(unit=(8, 8)))
    assert hiera((64, 64), q_pool=2, mask_unit_size=(4, 4)).walk(Masking(unit=(8, 8))).layers[-1].grid == (8, 8)
    assert hiera((64, 64), q_pool=2)(torch.randn(1, 3, 64, 64)).patches.shape == (1, 64, 128)


def test_hiera_of_sam_2_is_served_by_its_maps() -> None:
    torch.manual_seed(0)
    encoder: Any = underpaint.encoder("sam2_hiera_tiny", image_size=64, embed_dim=16, stages=(1, 1, 2, 1))
    assert encoder(torch.randn(2, 3, 64, 64)).patches.shape == (2, 4, 128)
    method = MAE(encoder)
    method(torch.randn(2, 3, 64, 64)).loss.backward()
    assert all(p.grad is not None for name, p in encoder.named_parameters() if p.requires_grad)
