"""Swin on replaced and on visible patches: the same numbers as timm's own blocks give."""

from typing import Any

import pytest
import torch
from torch import Tensor

import underpaint
from underpaint.backbones.swin import MaskPool, PooledMask, Swin, SwinV2
from underpaint.draws import Draws
from underpaint.masking import Mask, Masking, hidden_map, random_mask, refine
from underpaint.methods import MAE, BEiT, LocalMIM, SimMIM
from underpaint.patches import take

V1, V2 = "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"


def swin(image_size: tuple[int, int] = (64, 64), window: int = 4, patch: int = 2, name: str = V1) -> Swin:
    """Three stages; on 64 px grids of 32, 16 and 8 places, units of 8 px."""
    torch.manual_seed(0)
    made: Any = underpaint.encoder(
        name,
        image_size=image_size,
        patch_size=patch,
        window_size=window,
        embed_dim=16,
        depths=(2, 2, 2),
        num_heads=(1, 2, 4),
        drop_path_rate=0.0,
    )
    assert type(made) is (SwinV2 if name == V2 else Swin)
    return made


def at_random(encoder: Swin) -> None:
    """Random relative biases: at timm's start they are too small to matter. In V2 also what starts at 0 (norms, which
    leave a block out, and the biases of queries and values), and the scale of the attention."""
    names = ["relative_position_bias_table"]
    if isinstance(encoder, SwinV2):
        names += ["cpb_mlp", "logit_scale", "q_bias", "v_bias", "norm1", "norm2"]
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if any(part in name for part in names):
                weight.normal_(0, 0.3 if "cpb_mlp" in name else 1)


@pytest.mark.quick
@pytest.mark.parametrize("name", [V1, V2])
def test_a_token_that_is_the_embedding_of_nothing_equals_timm(name: str) -> None:
    """Black images have one embedding everywhere, so a token that equals it replaces nothing."""
    encoder = swin(name=name).eval()
    images = torch.zeros(2, 3, 64, 64)
    mask = Mask(torch.tensor([[0, 1], [5, 7]]), torch.tensor([[2, 9], [0, 1]]))
    tokens = encoder.covered(images, mask, (8, 8), encoder.embed(images)[0, 0])  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(tokens, encoder(images).patches)
    changed = encoder.covered(images, mask, (8, 8), torch.ones(encoder.token_dim))  # pyright: ignore[reportCallIssue]
    assert (changed - tokens).abs().amax() > 0.1
    images = torch.randn(2, 3, 64, 64)
    index = torch.tensor([[3, 9, 700], [5, 6, 1000]])
    torch.testing.assert_close(encoder.embed(images, index), take(encoder.embed(images), index))


def dense(block: Any, x: Tensor, hidden: Tensor) -> Tensor:
    """timm's block on the whole grid [b, rows, columns, d], with hidden places removed as keys.

    Their keys get a value of minus infinity in the mask that timm itself adds to the attention.
    """
    from timm.models.swin_transformer import window_partition

    rows, columns = x.shape[1:3]
    gone = hidden.view(1, rows, columns, 1)
    if any(block.shift_size):
        gone = torch.roll(gone, (-block.shift_size[0], -block.shift_size[1]), (1, 2))
    keys = window_partition(gone.double(), tuple(block.window_size)).flatten(1)  # [windows, area]
    area = keys.shape[1]
    own = torch.eye(area, dtype=torch.bool).unsqueeze(0)  # a hidden query sees itself, or softmax has no key
    removed = torch.where((keys > 0).unsqueeze(1) & ~own, -torch.inf, 0.0).expand(-1, area, -1).double()
    mask = removed if block.attn_mask is None else removed + block.attn_mask * 1e6
    kept, block.attn_mask = block.attn_mask, mask
    try:
        return block(x)
    finally:
        block.attn_mask = kept


@pytest.mark.parametrize("image_size", [(64, 64), (32, 64)])
@pytest.mark.parametrize("window", [4, 8])
@pytest.mark.parametrize("name", [V1, V2])
def test_visible_windows_equal_dense_ones_without_hidden_keys(
    name: str, window: int, image_size: tuple[int, int]
) -> None:
    """At every stage, shifted and not, with different masks in one batch, in float64."""
    encoder = swin(image_size, window, name=name).double().eval()
    at_random(encoder)
    pool = encoder.walk(Masking(0.6, unit=(8, 8)), masks=5)
    noise = PooledMask(torch.tensor([3, 3, 1, 1]), 2)
    rows, columns = image_size[0] // 2, image_size[1] // 2
    whole: Any = torch.randn(4, rows, columns, 16, dtype=torch.float64)
    shifts, before = set(), whole
    for number, stage in enumerate(encoder.stages):
        mask = pool.at_stage(noise, number)
        tokens = take(whole.flatten(1, 2), mask.visible)
        if number:
            tokens = encoder.merge(before, pool, noise, number)
        found = encoder.run_stage(tokens, pool, noise, number)
        if number:  # the grid of this stage: visible units are visible as a whole, so merging keeps them apart
            whole = stage.downsample(whole)
            torch.testing.assert_close(take(whole.flatten(1, 2), mask.visible), tokens)
        parts = []
        for image in range(4):
            hidden = torch.zeros(whole.shape[1] * whole.shape[2], dtype=torch.bool)
            hidden[mask.hidden[image]] = True
            x = whole[image : image + 1]
            for block in stage.blocks:
                shifts.add((number, any(block.shift_size)))
                x = dense(block, x, hidden)
            parts.append(x)
        whole = torch.cat(parts)
        torch.testing.assert_close(found, take(whole.flatten(1, 2), mask.visible))
        before = found
    assert (0, True) in shifts
    assert (0, False) in shifts


@pytest.mark.parametrize("name", [V1, V2])
def test_with_everything_visible_a_walk_is_the_forward_of_timm(name: str) -> None:
    encoder = swin((32, 64), name=name).double().eval()
    at_random(encoder)
    units = torch.arange(4 * 8).unsqueeze(0)
    pool = MaskPool(encoder, Mask(units, units[:, :0]), 1)
    images, state, tokens = torch.randn(2, 3, 32, 64, dtype=torch.float64), None, None
    for number in range(len(pool.layers)):
        state, tokens = encoder.advance(pool, number, state, images, PooledMask(torch.tensor([0, 0]), 1))
    torch.testing.assert_close(tokens, encoder.model.forward_features(images).flatten(1, 2))


@pytest.mark.parametrize("kind", [MAE, LocalMIM, SimMIM, BEiT])
def test_hidden_pixels_do_not_reach_what_v2_says(kind: type[Any]) -> None:
    encoder = swin(name=V2)
    at_random(encoder)
    method: Any = kind(encoder, **({"codebook_size": 8} if kind is BEiT else {}))
    images, noise = torch.randn(2, 3, 64, 64), method.sample(2, 64, 64, Draws.of(0, 2))
    mask = method.mask_at(noise) if hasattr(method, "walk") else noise
    hidden = hidden_map(mask, (8, 8), (8, 8))
    found = []
    for pixels in (images, images + 10 * hidden):
        made = method.every_tap(pixels, noise) if kind is LocalMIM else [method.predict(pixels, noise)]
        found.append(torch.cat([one.flatten() for one in made]))
    assert torch.equal(*found)
    assert found[0].std() > 0
    found[0].square().sum().backward()
    for name, weight in encoder.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().amax() > 0, name


@pytest.mark.quick
def test_hidden_patches_do_not_matter_and_counts_are_exact() -> None:
    encoder = swin().eval()
    pool = encoder.walk(Masking(unit=(8, 8)), masks=9)
    for choice in range(9):
        for stage, side in enumerate((32, 16, 8)):
            mask = pool.at_stage(PooledMask(torch.tensor([choice]), 1), stage)
            assert mask.visible.shape == (1, 16 * 4 ** (2 - stage))
            every = torch.cat([mask.visible, mask.hidden], 1).sort().values
            assert torch.equal(every, torch.arange(side * side).unsqueeze(0))


@pytest.mark.quick
def test_masks_on_finer_grids_cover_the_same_pixels() -> None:
    mask = random_mask(3, (2, 3), 4, Draws.of(0, 3))
    finer = refine(mask, (2, 3), 2)
    for image in range(3):
        coarse, fine = torch.zeros(2, 3), torch.zeros(4, 6)
        coarse.view(-1)[mask.hidden[image]] = 1
        fine.view(-1)[finer.hidden[image]] = 1
        assert torch.equal(fine, coarse.repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert isinstance(finer, Mask)


@pytest.mark.quick
def test_rows_of_pooled_masks_keep_whole_groups() -> None:
    noise = PooledMask(torch.tensor([5, 5, 7, 7, 9, 9]), 3)
    assert noise.rows(slice(2, 6)).groups == 2
    assert noise.rows(slice(2, 3)).groups == 1
    assert noise.rows(slice(1, 5)).groups == 4  # 5, 7, 7, 9
    assert noise.rows(slice(1, 4)).choice.tolist() == [5, 7, 7]
    assert noise.rows(slice(0, 1)).repeat(4).choice.tolist() == [5] * 4


@pytest.mark.quick
def test_sizes_that_are_no_whole_units_are_refused() -> None:
    with pytest.raises(ValueError, match="no whole number of units of 16 px"):
        swin((64, 72), patch=4).walk(Masking(unit=(16, 16)))


@pytest.mark.quick
def test_every_weight_has_one_name() -> None:
    """Two names for one tensor cannot be written to a checkpoint."""
    places = [value.data_ptr() for value in swin().state_dict().values() if value.numel()]
    assert len(places) == len(set(places))
