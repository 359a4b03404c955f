"""HOG against a slow reference written with loops, and what must hold of it."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from test_methods import photographs, small
from torch import Tensor
from torch.nn import functional

from underpaint.draws import Draws
from underpaint.targets import Pixels, Target, hog_pyramid, strokes, target_for


def slow_hog(image: np.ndarray, cell: int, bins: int) -> np.ndarray:
    """One image [c, height, width], pixel by pixel, as section 2.3 of the specification says."""
    channels, height, width = image.shape
    found = np.zeros((channels, bins, height // cell, width // cell))
    for c in range(channels):
        padded = np.pad(image[c], 1, mode="reflect")
        for y in range(height):
            for x in range(width):
                around = padded[y : y + 3, x : x + 3]
                weights = np.array([1, 2, 1])  # a reflected border has a difference of exactly 0
                gx = (around[:, 0] * weights).sum() - (around[:, 2] * weights).sum()
                gy = (around[0] * weights).sum() - (around[2] * weights).sum()
                bin_ = math.floor(math.atan2(gx, gy) / math.pi * bins) % bins
                found[c, bin_, y // cell, x // cell] += math.hypot(gx, gy) / cell**2
    length = np.sqrt((found**2).sum(1, keepdims=True))
    return (found / np.maximum(length, 1e-12)).reshape(channels * bins, *found.shape[2:])


@pytest.mark.quick
@pytest.mark.parametrize(("bins", "size"), [(9, (32, 64)), (18, (32, 32))])
def test_equals_the_slow_reference_at_every_scale(bins: int, size: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for cell, level in zip((4, 8, 16, 32), hog_pyramid(images, (4, 8, 16, 32), bins), strict=True):
        for image, found in zip(images.numpy(), level.numpy(), strict=True):
            np.testing.assert_allclose(found, slow_hog(image, cell, bins), atol=1e-10)


@pytest.mark.quick
def test_a_small_table() -> None:
    """Three edges whose histograms can be said without a program: exact but for rounding."""
    ramps = {"to the right": (0, 1), "downwards": (1, 0), "down right": (1, 1)}
    # a ramp that rises to the right has gx < 0, gy = 0: atan2 = -90 degrees, bin floor(-4.5) mod 9 = 4;
    # downwards: gx = 0, gy < 0: 180 degrees, bin 9 mod 9 = 0; down right: atan2(-8, -8) = -135, floor(-6.75) mod 9 = 2
    expected = {"to the right": 4, "downwards": 0, "down right": 2}
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    for name, (down, right) in ramps.items():
        inner = hog_pyramid((down * y + right * x).view(1, 1, 12, 12), [4])[0][0, :, 1, 1]
        assert inner.argmax() == expected[name], name
        torch.testing.assert_close(inner, torch.eye(9)[expected[name]], msg=name)
    # min(x, y) is a ramp downwards above the diagonal and to the right below it. In the middle cell, on each side: 3
    # pixels of 8, and beside the diagonal 3 of (1, 7), whose length is root 50 and whose bin is still the side's; on the
    # diagonal 4 of (4, 4), down right
    side, diagonal = 3 * 8 + 3 * 50**0.5, 4 * 32**0.5
    wanted = torch.zeros(9)
    wanted[[0, 4]], wanted[2] = side, diagonal
    inner = hog_pyramid(torch.minimum(x, y).view(1, 1, 12, 12), [4])[0][0, :, 1, 1]
    torch.testing.assert_close(inner, wanted / wanted.norm())


@pytest.mark.quick
def test_one_pyramid_equals_separate_ones_and_flat_is_zero() -> None:
    images = torch.randn(2, 3, 32, 32)
    together = hog_pyramid(images, (2, 4, 8))
    for cell, level in zip((2, 4, 8), together, strict=True):
        torch.testing.assert_close(level, hog_pyramid(images, [cell])[0])
    assert not hog_pyramid(torch.full((1, 3, 8, 8), 0.7), [4])[0].any()
    # a contrast of a channel does not matter
    torch.testing.assert_close(hog_pyramid(images * 3 + 1, [4])[0], together[1], atol=1e-5, rtol=1e-4)


@pytest.mark.quick
def test_float32_under_autocast() -> None:
    images = torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        level = hog_pyramid(images.bfloat16().float(), [4])[0]
    assert level.dtype == torch.float32
    torch.testing.assert_close(level, hog_pyramid(images.bfloat16().float(), [4])[0])


@pytest.mark.quick
def test_pixels_of_each_cell_are_standardised() -> None:
    for cell, level in zip((4, 8), Pixels()(torch.randn(2, 3, 16, 24), (4, 8)), strict=True):
        assert level.shape == (2, 3 * cell * cell, 16 // cell, 24 // cell)
        torch.testing.assert_close(level.mean(1), torch.zeros(2, 16 // cell, 24 // cell), atol=1e-5, rtol=0)
        torch.testing.assert_close(level.var(1), torch.ones(2, 16 // cell, 24 // cell), atol=1e-3, rtol=0)


@pytest.mark.quick
def test_cells_that_do_not_fit_are_refused() -> None:
    for cells in ([3], [4, 6], [8, 4]):
        with pytest.raises(ValueError, match="do not divide"):
            hog_pyramid(torch.zeros(1, 3, 16, 16), cells)


@pytest.mark.quick
def test_strokes_lie_along_the_edge() -> None:
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    for image, along in (((x > 12).float(), 0), ((y > 12).float(), 1)):  # an upright edge, a level one
        level = hog_pyramid(image.view(1, 1, 24, 24), [8])[0]
        middle = strokes(level, 9, 1, side=9)[0, 0, 9:18, 9:18]
        line = middle.sum(along)
        assert line.argmax() == 4
        assert line.max() > 3 * line.median()


class Cosines(Target):
    """The lowest frequencies of a cell's pixels along each side: a target that no method knows."""

    name = "cosines"
    smallest = 2
    kept = 2  # frequencies

    def width(self, cell: int, channels: int) -> int:
        return channels * self.kept**2

    def __call__(self, images: Tensor, cells: Sequence[int]) -> list[Tensor]:
        return [self.level(images, cell) for cell in cells]

    def level(self, images: Tensor, cell: int) -> Tensor:
        middles = (torch.arange(cell) + 0.5) * math.pi / cell
        waves = torch.cos(torch.arange(self.kept).view(-1, 1) * middles) / cell
        b, channels, height, width = images.shape
        pixels = images.view(b, channels, height // cell, cell, width // cell, cell)
        return torch.einsum("bcrywx,ky,lx->bcklrw", pixels, waves, waves).flatten(1, 3)

    def picture(self, level: Tensor, images: Tensor, times: int) -> Tensor:
        means = level[:, :: self.kept**2]
        return functional.interpolate(means, scale_factor=float(times * images.shape[-1] // level.shape[-1]))


@pytest.mark.parametrize("name", ["mae", "localmim"])
def test_a_target_of_ones_own_is_learned_and_drawn(name: str) -> None:
    method, images = small(name, 32, 32, target=Cosines()), photographs(4, 3, 32, 32)
    noise = method.sample(4, 32, 32, Draws.of(0, 4))
    optimiser = torch.optim.AdamW(method.parameters(), 3e-3, weight_decay=0.0)
    for _ in range(60):
        optimiser.zero_grad()
        method(images, noise).loss.backward()
        optimiser.step()
    objective = method(images, noise)
    assert objective.loss < 0.7 * objective.terms["baseline"]
    assert len({frame.shape for frame in method.restore(images, noise).values()}) == 1


@pytest.mark.quick
def test_a_target_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="target is 'sketch'; it must be one of pixels, hog"):
        target_for("sketch")
