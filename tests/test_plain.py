"""Plain transformers of every kind: equal to timm's own forward, and with part of an image hidden to timm's attention
without those keys; what cannot serve is refused in one line."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import write_pictures
from forked import CommandLine
from safetensors.torch import load_file
from torch import Tensor

import underpaint
from underpaint.backbones import TokenBackbone, create_arguments, from_arguments, load_encoder, save_encoder
from underpaint.backbones.build import create_model
from underpaint.blocks import sincos_positions
from underpaint.errors import InputError
from underpaint.masking import Mask, hidden_map, hide_highest
from underpaint.methods import CAE, CIM, MAE, BEiT, LocalMIM, SimMIM
from underpaint.patches import Standardize, take

HEIGHT, WIDTH, PATCH = 32, 48, 8
GRID = (HEIGHT // PATCH, WIDTH // PATCH)
SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2}
NAFLEX = "naflexvit_base_patch16_gap"
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "eva": ("eva_giant_patch14_224", {"mlp_ratio": 2}),
    "eva02": ("eva02_tiny_patch14_224", {}),
    "eva02-norms": ("eva02_base_patch16_clip_224", {}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "dinov3-swiglu": ("vit_small_plus_patch16_dinov3", {}),
    "perception": ("vit_pe_core_tiny_patch16_384", {}),
    "perception-spatial": ("vit_pe_spatial_tiny_patch16_512", {"use_post_transformer_norm": True}),
    "rope": ("vit_base_patch16_rope_reg1_gap_256", {}),
    "rope-mixed": ("vit_small_patch16_rope_mixed_224", {}),
    "rope-mixed-absolute": ("vit_small_patch16_rope_mixed_ape_224", {}),
    "beit": ("beit_base_patch16_224", {}),
    "beitv2": ("beitv2_base_patch16_224", {}),
    "beit-shared": ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
    "beit-both": ("beit_base_patch16_224", {"use_shared_rel_pos_bias": True, "use_abs_pos_emb": True}),
    "cait": ("cait_xxs24_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "naflex": (NAFLEX, {}),
    "naflex-square": ("naflexvit_base_patch16_par_gap", {}),
    "naflex-factorized": ("naflexvit_base_patch16_parfac_gap", {}),
    "naflex-siglip": ("naflexvit_base_patch16_siglip", {"class_token": True}),
    "naflex-radio": ("naflexvit_base_patch16_radio_v3", {"final_norm": True}),
    "naflex-conv": (NAFLEX, {"embed_proj_type": "conv", "pos_embed_grid_size": [*GRID]}),
    "naflex-channels": (NAFLEX, {"patchify_channels_last": False}),
    "naflex-rope": (NAFLEX, {"rope_type": "axial", "pos_embed": "none"}),
    "naflex-rope-mixed": (NAFLEX, {"rope_type": "mixed", "class_token": True}),
}
FLOAT32 = (
    "dinov3",
    "dinov3-swiglu",
    "naflex-rope",
)  # where timm makes sines in each step, the adapter keeps float32 ones
each = pytest.mark.parametrize("family", FAMILIES)


def near(family: str) -> dict[str, float]:
    bound = 1e-6 if family in FLOAT32 else 1e-9
    return {"atol": bound, "rtol": bound}


def shuffled(encoder: Any) -> None:
    """Weights, positions, biases and frequencies of which none is 0 or 1, since many of timm's starts are."""
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3 if "norm" not in name else 0.1)


def made(family: str) -> Any:
    torch.manual_seed(0)
    name, own = FAMILIES[family]
    encoder: Any = underpaint.encoder(name, image_size=(HEIGHT, WIDTH), patch_size=PATCH, **SMALL, **own)
    assert isinstance(encoder, TokenBackbone)
    shuffled(encoder)
    return encoder.double().eval()


def pixels() -> Tensor:
    return torch.randn(2, 3, HEIGHT, WIDTH, dtype=torch.float64)


def some(hidden: int = 15) -> Mask:
    return hide_highest(torch.rand(2, GRID[0] * GRID[1]), hidden)


def features(encoder: Any, images: Tensor, hidden: Tensor | None = None) -> Tensor:
    """timm's tokens of all patches, normed; those at `hidden` are nobody's keys."""
    model, prefix = encoder.model, len(encoder.model.forward_features(images)[0]) - GRID[0] * GRID[1]
    if hidden is None:
        return model.forward_features(images)[:, prefix:]
    open_keys = torch.zeros(len(images), prefix + GRID[0] * GRID[1], dtype=images.dtype)
    keys = open_keys.scatter(1, prefix + hidden, -torch.inf)[:, None, None]
    handles = []
    match type(model).__name__:
        case "Beit":  # the bias of all blocks is added to each block's own
            shared = model.rel_pos_bias
            bias = keys if shared is None else shared() + keys
            for block in model.blocks:
                block.forward = lambda x, shared_rel_pos_bias, run=block.forward: run(x, shared_rel_pos_bias=bias)
        case "Cait":  # heads mix their logits and then their shares, with a bias: keys are removed behind each
            shut = keys[:, :, 0, prefix:].unsqueeze(-1)  # [b, 1, keys, 1] of [b, queries, keys, heads]
            for block in model.blocks:
                handles += [
                    block.attn.proj_l.register_forward_hook(lambda _, __, logits: logits + shut),
                    block.attn.proj_w.register_forward_hook(lambda _, __, shares: shares * shut.exp()),
                ]
        case _:
            mask = keys.expand(-1, -1, keys.shape[-1], -1)
            return model.forward_features(images, attn_mask=mask)[:, prefix:]
    found = model.forward_features(images)[:, prefix:]
    for handle in handles:
        handle.remove()
    for block in model.blocks:
        block.__dict__.pop("forward", None)
    return found


@each
def test_with_nothing_hidden_it_is_timms_own(family: str) -> None:
    encoder, images = made(family), pixels()
    expected = features(encoder, images)
    torch.testing.assert_close(encoder(images).patches, expected, **near(family))
    [last] = encoder.model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
    torch.testing.assert_close(expected.transpose(1, 2).unflatten(2, GRID), last)
    first, second = encoder.model.forward_intermediates(images, intermediates_only=True)
    taps = encoder.encode(encoder.embed(images), taps=(0, 1)).taps
    for tap, raw in zip(taps, (first, second), strict=True):
        torch.testing.assert_close(tap.transpose(1, 2).unflatten(2, GRID), raw, **near(family))


@each
def test_with_patches_hidden_it_is_timms_attention_without_those_keys(family: str) -> None:
    encoder, images, mask = made(family), pixels(), some()
    whole = take(features(encoder, images), mask.visible)
    expected = take(features(encoder, images, mask.hidden), mask.visible)
    assert (expected - whole).abs().mean() > 0.01  # hidden patches do matter
    found = encoder.encode(encoder.embed(images, mask.visible), mask.visible, taps=(0,))
    torch.testing.assert_close(found.tokens, expected, **near(family))
    walk = encoder.walk(MAE(encoder).masking, [0, 1])
    state, tap = encoder.advance(walk, 0, None, images, mask)
    torch.testing.assert_close(tap, found.taps[0])
    torch.testing.assert_close(encoder.advance(walk, 1, state, images, mask)[1], expected, **near(family))


@each
def test_patches_in_any_order_are_the_same_patches(family: str) -> None:
    encoder, images, order = made(family), pixels(), torch.stack([torch.randperm(24), torch.randperm(24)])
    found = encoder.encode(encoder.embed(images, order), order).tokens
    torch.testing.assert_close(found, take(encoder(images).patches, order))
    swapped = encoder.encode(encoder.embed(images, order), order.flip(1)).tokens  # told to be somewhere else
    assert (swapped - found).abs().mean() > 0.01


def predictions(method: Any, images: Tensor, noise: Any) -> Tensor:
    if isinstance(method, LocalMIM):
        return torch.cat([one.flatten() for one in method.every_tap(images, noise)])
    return method.predict(images, noise)


@each
@pytest.mark.parametrize("kind", [MAE, LocalMIM, CAE, BEiT])
def test_predictions_do_not_see_what_is_hidden(family: str, kind: Any) -> None:
    method: Any = kind(made(family), **({"codebook_size": 8} if kind in (CAE, BEiT) else {})).double()
    images, noise = pixels(), method.sample(2, HEIGHT, WIDTH, torch.Generator().manual_seed(0))
    hidden = hidden_map(noise, GRID, (PATCH, PATCH))
    changed = images + 10 * hidden * torch.randn_like(images)
    first = predictions(method, images, noise)
    assert torch.equal(first, predictions(method, changed, noise))
    assert first.std() > 0
    assert not torch.equal(first, predictions(method, images + (1 - hidden), noise))


# what nothing of the loss depends on
UNTRAINED = {"cait": ("cls_token", "blocks_token_only")}


@each
def test_gradients_reach_every_weight(family: str) -> None:
    encoder = made(family).train()
    method = MAE(encoder).double()
    method(pixels()).loss.backward()
    left = [
        name for name, p in encoder.model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert not left
    fixed = [name for name, p in encoder.model.named_parameters() if not p.requires_grad]
    assert all(name.startswith(UNTRAINED.get(family, ())) for name in fixed)
    names: dict[str, Any] = dict(encoder.model.named_parameters())
    if "mixed" in family:
        assert names["rope.freqs"].grad.abs().min() > 0
    if family in ("beit", "beitv2", "beit-both"):
        assert all(names[f"blocks.{n}.attn.relative_position_bias_table"].grad.any() for n in range(2))
    if family in ("beit-shared", "beit-both"):
        assert names["rel_pos_bias.relative_position_bias_table"].grad.any()
