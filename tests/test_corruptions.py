"""Each corruption against what it is said to do."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from underpaint.corruptions import add_noise, downsample, gray, mask_cells, shuffle_patches
from underpaint.draws import Draws
from underpaint.masking import random_mask
from underpaint.patches import patchify

pytestmark = pytest.mark.quick


def images(count: int = 3, channels: int = 3, height: int = 16, width: int = 24) -> Tensor:
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(0))


def test_hidden_cells_are_zero_and_the_others_untouched() -> None:
    given = images()
    mask = random_mask(3, (6, 4), 10, Draws.of(1, 3))
    before, after = patchify(given, (4, 4)), patchify(mask_cells(given, mask, (4, 4)), (4, 4))
    for k in range(3):
        assert not after[k, mask.hidden[k]].any()
        assert torch.equal(after[k, mask.visible[k]], before[k, mask.visible[k]])


def test_place_k_shows_patch_order_k() -> None:
    given = images()
    order = torch.rand(3, 24, generator=torch.Generator().manual_seed(1)).argsort(1)
    before, after = patchify(given, (4, 4)), patchify(shuffle_patches(given, order, (4, 4)), (4, 4))
    for k in range(3):
        assert torch.equal(after[k], before[k, order[k]])
    back = shuffle_patches(shuffle_patches(given, order, (4, 4)), order.argsort(1), (4, 4))
    assert torch.equal(back, given)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_downsampling_keeps_flat_and_smooth_images_and_loses_detail(factor: int) -> None:
    flat = torch.full((1, 3, 16, 24), 0.7)
    torch.testing.assert_close(downsample(flat, factor), flat)
    given = images(height=64, width=64)
    lost = downsample(given, factor)
    blocks = patchify(lost, (factor, factor)).unflatten(2, (3, factor * factor))
    assert torch.equal(blocks, blocks[..., :1].expand_as(blocks))  # one value a block
    assert lost.var() < given.var() / factor
    # about the mean of each block, which an antialiased bicubic filter widens
    means = functional.avg_pool2d(given, factor)
    small = lost[..., ::factor, ::factor]
    assert torch.corrcoef(torch.stack([means.flatten(), small.flatten()]))[0, 1] > 0.85


def test_a_factor_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="5 does not divide"):
        downsample(images(), 5)


def test_noise_keeps_the_share_it_says_and_the_variance() -> None:
    given = images(4, 3, 64, 64)
    noise = torch.randn(given.shape, generator=torch.Generator().manual_seed(1))
    kept = torch.tensor([0.0, 0.3, 0.7, 1.0])
    made = add_noise(given, noise, kept)
    assert torch.equal(made[0], noise[0])
    assert torch.equal(made[3], given[3])
    for k in range(4):
        assert made[k].var() == pytest.approx(1.0, abs=0.05)
        correlation = torch.corrcoef(torch.stack([made[k].flatten(), given[k].flatten()]))[0, 1]
        assert correlation == pytest.approx(float(kept[k].sqrt()), abs=0.05)


@pytest.mark.parametrize("channels", [2, 3, 5])
def test_gray_is_one_brightness_in_every_channel(channels: int) -> None:
    given = images(channels=channels)
    made = gray(given)
    assert made.shape == given.shape
    assert torch.equal(made, made[:, :1].expand_as(made))
    torch.testing.assert_close(gray(made), made)  # of what is gray already nothing is lost
    if channels == 3:
        expected = 0.299 * given[:, 0] + 0.587 * given[:, 1] + 0.114 * given[:, 2]
        torch.testing.assert_close(made[:, 0], expected)
