import math

import pytest
import torch
from torch.nn import functional

from underpaint.blocks import sincos_positions
from underpaint.corruptions import mask_cells
from underpaint.draws import Draws
from underpaint.masking import hidden_count, hidden_map, hide_highest, random_mask
from underpaint.patches import Standardize, patchify, put, standardize, take, unpatchify, weighted_mean

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(("height", "width", "size"), [(8, 8, (4, 4)), (6, 8, (3, 2)), (4, 12, (2, 6))])
def test_unpatchify_undoes_patchify_on_any_shape(height: int, width: int, size: tuple[int, int]) -> None:
    images = torch.randn(2, 5, height, width)
    patches = patchify(images, size)
    assert patches.shape == (2, height * width // (size[0] * size[1]), 5 * size[0] * size[1])
    assert torch.equal(unpatchify(patches, size, (height // size[0], width // size[1])), images)


def test_patches_are_flattened_like_a_convolution() -> None:
    convolution = torch.nn.Conv2d(3, 7, 4, 4).double()
    images = torch.randn(2, 3, 8, 12).double()
    assert convolution.bias is not None
    linear = functional.linear(patchify(images, (4, 4)), convolution.weight.flatten(1), convolution.bias)
    torch.testing.assert_close(linear, convolution(images).flatten(2).transpose(1, 2))


def test_put_undoes_take() -> None:
    tokens = torch.randn(3, 6, 2)
    index = torch.stack([torch.randperm(6)[:4] for _ in range(3)])
    taken = take(tokens, index)
    for row in range(3):
        assert torch.equal(taken[row], tokens[row, index[row]])
    assert torch.equal(put(tokens, index, taken), tokens)
    assert torch.equal(take(put(tokens, index, taken + 1), index), taken + 1)


def test_standardize_gives_mean_0_and_variance_1() -> None:
    patches = standardize(torch.randn(2, 3, 48) * 7 + 3)
    torch.testing.assert_close(patches.mean(-1), torch.zeros(2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(patches.var(-1), torch.ones(2, 3), atol=1e-4, rtol=0)
    assert torch.isfinite(standardize(torch.ones(1, 1, 4))).all()


def test_weighted_mean() -> None:
    values = torch.tensor([1.0, 2.0, 30.0])
    assert weighted_mean(values, torch.tensor([1.0, 1.0, 0.0])) == 1.5
    assert weighted_mean(values, torch.zeros(3)) == 0


def test_standardize_module_goes_there_and_back() -> None:
    images = torch.rand(2, 3, 4, 4)
    module = Standardize([0.4, 0.5, 0.6], [0.1, 0.2, 0.3])
    torch.testing.assert_close(module.inverse(module(images)), images)


def test_masks_hide_exactly_and_cover_everything() -> None:
    mask = random_mask(50, (4, 4), 12, Draws.of(0, 50))
    both = torch.cat([mask.visible, mask.hidden], dim=1).sort(dim=1).values
    assert torch.equal(both, torch.arange(16).expand(50, -1))
    assert mask.hidden.shape == (50, 12)
    counts = torch.zeros(16).scatter_add(0, mask.hidden.flatten(), torch.ones(600))
    assert counts.min() > 20  # every patch gets hidden: expected 37.5, deviation 3.1
    score = torch.tensor([[0.1, 0.9, 0.5]])
    assert hide_highest(score, 2).hidden.tolist() == [[1, 2]]


def test_impossible_ratios_are_refused() -> None:
    for patches, ratio in ((16, 0.0), (16, 1.0), (1, 0.5)):
        with pytest.raises(ValueError, match=r"must lie between|needs at least"):
            hidden_count(patches, ratio)
    # MAE keeps int(196 * 0.25); SimMIM hides ceil(49 * 0.6), and 22 of 36; BEiT 75 of 196; LocalMIM on Swin 37 of 49
    for patches, ratio, hidden in ((196, 0.75, 147), (49, 0.6, 30), (36, 0.6, 22), (196, 0.38, 75), (49, 0.75, 37)):
        assert hidden_count(patches, ratio) == hidden
    assert all(hidden_count(n, 0.6) == n - int(n * 0.4 + 1e-9) for n in range(3, 300))  # no rounding error adds one
    assert hidden_count(4, 0.01) == 1


def test_mask_cells_zeroes_hidden_pixels_and_nothing_else() -> None:
    images = torch.rand(2, 3, 8, 12) + 1
    mask = random_mask(2, (2, 3), 3, Draws.of(1, 2))
    hidden = hidden_map(mask, (2, 3), (4, 4)).expand_as(images)
    corrupted = mask_cells(images, mask, (4, 4))
    assert torch.equal(corrupted[hidden == 0], images[hidden == 0])
    assert (corrupted[hidden == 1] == 0).all()
    assert hidden.mean() == 0.5
    # the place itself: cell k of a row-by-row grid
    flat = patchify(corrupted, (4, 4))
    assert (take(flat, mask.hidden) == 0).all()
    assert (take(flat, mask.visible) > 0).all()


def test_positions_tell_rows_from_columns() -> None:
    positions = sincos_positions((3, 5), 16)
    assert positions.shape == (15, 16)
    assert torch.equal(positions[0, :8], positions[4, :8])  # same row: same first half
    assert torch.equal(positions[0, 8:], positions[5, 8:])  # same column: same second half
    assert len({tuple(row) for row in positions.tolist()}) == 15
    for row, column in ((0, 0), (1, 3), (2, 4)):  # the formula, place by place
        angles = [10000 ** (-i / 4) for i in range(4)]
        wanted = [f(row * w) for f in (math.sin, math.cos) for w in angles]
        wanted += [f(column * w) for f in (math.sin, math.cos) for w in angles]
        assert positions[5 * row + column].tolist() == pytest.approx(wanted, abs=1e-6)
    larger = sincos_positions((4, 7), 16).view(4, 7, 16)  # another size: the same row and column, the same position
    assert torch.equal(larger[:3, :5].flatten(0, 1), positions)
    assert sincos_positions((2, 2), 10).shape == (4, 10)  # widths that four does not divide
