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
from underpaint.draws import Draws
from underpaint.errors import InputError
from underpaint.evaluation.bundle import open_bundle
from underpaint.evaluation.finetune import classifier
from underpaint.masking import Mask, hidden_map, hide_highest
from underpaint.methods import CAE, MAE, BEiT, LocalMIM, SimMIM
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
    "perception-spatial": ("vit_pe_spatial_tiny_patch16_512", {}),
    "rope": ("vit_base_patch16_rope_reg1_gap_256", {}),
    "rope-mixed": ("vit_small_patch16_rope_mixed_224", {}),
    "rope-mixed-absolute": ("vit_small_patch16_rope_mixed_ape_224", {}),
    "beit": ("beit_base_patch16_224", {}),
    "beitv2": ("beitv2_base_patch16_224", {}),
    "beit-shared": ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
    "beit-both": ("beit_base_patch16_224", {"use_shared_rel_pos_bias": True, "use_abs_pos_emb": True}),
    "cait": ("cait_xxs24_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "radio": ("vit_base_patch16_radio_v3", {}),
    "naflex": (NAFLEX, {}),
    "naflex-square": ("naflexvit_base_patch16_par_gap", {}),
    "naflex-factorized": ("naflexvit_base_patch16_parfac_gap", {}),
    "naflex-siglip": ("naflexvit_base_patch16_siglip", {"class_token": True}),
    "naflex-radio": ("naflexvit_base_patch16_radio_v3", {}),
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


def near(family: str) -> dict[str, Any]:
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
    if family != "distilled":  # whose heads read two tokens
        torch.testing.assert_close(encoder(images).pooled, encoder.model(images), **near(family))
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
    images, noise = pixels(), method.sample(2, HEIGHT, WIDTH, Draws.of(0, 2))
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


# --- NaFlexViT ------------------------------------------------------------------------------------------------------------


def test_naflex_starts_from_sincos_read_at_its_own_grid() -> None:
    exact: Any = underpaint.encoder(
        NAFLEX, image_size=(HEIGHT, WIDTH), patch_size=PATCH, pos_embed_grid_size=[*GRID], **SMALL
    )
    torch.testing.assert_close(exact.positions(), sincos_positions(GRID, 32))
    for name in (NAFLEX, "naflexvit_base_patch16_par_gap", "naflexvit_base_patch16_parfac_gap"):
        encoder: Any = underpaint.encoder(name, image_size=(HEIGHT, WIDTH), patch_size=PATCH, **SMALL)
        assert (encoder.positions() - sincos_positions(GRID, 32)).abs().mean() < 0.02


def test_naflex_is_loaded_at_any_size_by_us_and_by_timm_alone(tmp_path: Path) -> None:
    arguments = create_arguments(NAFLEX, image_size=(HEIGHT, WIDTH), patch_size=PATCH, embed_proj_type="conv", **SMALL)
    encoder: Any = from_arguments(arguments)
    shuffled(encoder)
    save_encoder(tmp_path, encoder.eval(), arguments, Standardize([0.5] * 3, [0.25] * 3))
    images = pixels().float()
    loaded: Any = load_encoder(tmp_path)
    assert loaded.image_size == (HEIGHT, WIDTH)
    assert torch.equal(loaded(images).patches, encoder(images).patches)
    alone: Any = timm.create_model(**arguments).eval()
    alone.load_state_dict(load_file(tmp_path / "encoder.safetensors"), strict=True)
    torch.testing.assert_close(loaded(images).pooled, alone(images))
    larger: Any = from_arguments(arguments | {"img_size": [64, 64]}).eval()
    larger.model.load_state_dict(encoder.model.state_dict(), strict=True)
    many = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(larger(many).pooled, alone(many))


def test_positions_of_naflex_are_fixed_and_not_decayed() -> None:
    name = "naflexvit_base_patch16_parfac_gap"
    made: Any = underpaint.encoder(name, image_size=32, patch_size=PATCH, rope_type="mixed", **SMALL)
    method = MAE(made)
    free, decayed = method.param_groups(1e-3, 0.05)
    assert (free["weight_decay"], decayed["weight_decay"]) == (0, 0.05)
    kept: Any = free["params"]
    for one in (made.model.embeds.pos_embed_y, made.model.embeds.pos_embed_x, made.model.rope.freqs):
        assert any(one is other for other in kept)
    made.fix_positions()
    assert not made.model.embeds.pos_embed_y.requires_grad


def test_arguments_of_naflex_are_those_of_its_configuration() -> None:
    encoder: Any = underpaint.encoder(
        NAFLEX, image_size=32, patch_size=8, rope_type="dinov3", class_token=True, **SMALL
    )
    assert encoder.model.rope is not None
    assert encoder.class_token
    with pytest.raises(InputError, match=r"'rope_kind' is no part of naflexvit.*rope_type"):
        create_model({"model_name": NAFLEX, "rope_kind": "axial"})
    with pytest.raises(InputError, match="cannot build"):
        create_model({"model_name": NAFLEX, "rope_type": "none of these", **SMALL})


# --- the other methods ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["beit-both", "cait", "distilled", "naflex", "naflex-rope-mixed", "rope-mixed"])
def test_energy_trains_them(family: str) -> None:
    method: Any = underpaint.Energy(made(family).float().train(), corruption="mixture")
    method(pixels().float()).loss.backward()
    left = [n for n, p in method.encoder.named_parameters() if p.requires_grad and p.grad is not None and p.grad.any()]
    assert len(left) > 10


# of networks whose tokens are made by convolutions, or whose attention knows no masks: maps, hidden pixels at the mean
MAPS: dict[str, tuple[str, dict[str, Any], int]] = {
    "hybrid": ("vit_tiny_r_s16_p8_224", SMALL, 128),
    "hybrid-convolutions": ("vit_base_mci_224", {"depth": 2}, 64),
    "sam": ("samvit_base_patch16", {**SMALL, "depth": 4, "global_attn_indexes": [3]}, 64),
    "relative": ("vit_relpos_small_patch16_224", SMALL, 64),
}


@pytest.mark.parametrize("family", MAPS)
@pytest.mark.parametrize("kind", [MAE, SimMIM, LocalMIM])
def test_transformers_without_patches_to_hide_are_served_by_their_maps(family: str, kind: Any) -> None:
    name, own, size = MAPS[family]
    torch.manual_seed(0)
    method: Any = kind(underpaint.encoder(name, image_size=size, **own))
    assert not isinstance(method.encoder, TokenBackbone)
    images = torch.randn(2, 3, size, size)
    noise = method.sample(2, size, size, Draws.of(0, 2))
    found = method(images, noise)
    found.loss.backward()
    assert found.loss.isfinite()
    trained = method.encoder.model.blocks[0].attn.qkv.weight.grad
    assert trained is not None
    assert trained.any()
    grid = method.masking.grid(size, size)
    hidden = hidden_map(noise, grid, (size // grid[0], size // grid[1]))
    changed = images + 10 * hidden * torch.randn_like(images)
    method.eval()
    assert torch.equal(predictions(method, images, noise), predictions(method, changed, noise))
    if kind is not SimMIM:  # attention is seen to carry what is computed of hidden places
        assert not method.walk.sound


@pytest.mark.parametrize("family", ["distilled", "cait", "naflex", "sam", "relative"])
def test_a_head_is_trained_on_them(family: str, tmp_path: Path) -> None:
    if family in MAPS:
        name, own, side = MAPS[family]
        size, patch = (side, side), {}
    else:
        (name, own), size, patch = FAMILIES[family], (HEIGHT, WIDTH), {"patch_size": PATCH, **SMALL}
    arguments = create_arguments(name, image_size=size, **patch, **own)
    encoder = from_arguments(arguments, size)
    shuffled(encoder.eval())
    save_encoder(tmp_path, encoder, arguments, Standardize([0.5] * 3, [0.25] * 3))
    network: Any = classifier(open_bundle(str(tmp_path), image_size=size), 5, drop_path=0.0, head_scale=0.5).eval()
    batch = torch.randn(2, 3, *size)
    logits = network(batch)
    if family != "distilled":  # whose heads read two tokens
        head = getattr(network.get_classifier(), "fc", network.get_classifier())
        torch.testing.assert_close(logits, head(encoder(batch).pooled), atol=1e-4, rtol=1e-4)
    logits[:, 0].sum().backward()
    assert all(
        head.weight.grad.any()
        for name, head in network.named_modules()
        if name in ("head", "head_dist", "head.fc") and hasattr(head, "weight")
    )


# --- what cannot serve ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("plain") / "images", 12)


def told(images: Path, *more: Any) -> tuple[Any, ...]:
    return ("pretrain", images, "--steps", 2, "--batch-size", 4, "--workers", 0, "--seed", 1, *more)


TINY = [word for name, value in SMALL.items() for word in ("--set", f"encoder.{name}={value}")]
REFUSED: dict[str, tuple[list[Any], str]] = {
    "patch-14-cim": (
        ["--method", "cim", "--encoder", "vit_small_patch14_dinov2", "--image-size", 56, "--patch-size", 14, *TINY],
        "method cim: words of 14 px: the tokenizer that a run trains has words of 2, 4, 8, 16, 32 px; such a --patch-size "
        "serves, or --set method.stride=2",
    ),
    "image-of-part-of-a-patch": (
        ["--method", "mae", "--encoder", "vit_tiny_patch16_224", "--image-size", 40, "--patch-size", 16],
        "patch_size: 16 px does not divide an image of 40x40; such patch sizes do: 2, 4, 5, 8, 10, 20, 40",
    ),
    "hybrid-patch": (
        ["--method", "mae", "--encoder", "vit_tiny_r_s16_p8_224", "--image-size", 64, "--patch-size", 8],
        "patch_size: 'vit_tiny_r_s16_p8_224' makes its tokens by convolutions; leave --patch-size away",
    ),
    "hybrid-cae": (
        ["--method", "cae", "--encoder", "vit_tiny_r_s16_p8_224", "--image-size", 64, *TINY],
        "method cae: CAE needs a plain transformer, whose output for hidden patches alone is the alignment target; "
        "MapBackbone makes none of places that it sees apart from their surroundings",
    ),
    "no-final-norm": (
        ["--method", "mae", "--encoder", NAFLEX, "--image-size", 32, *TINY, "--set", "encoder.final_norm=false"],
        f"encoder: '{NAFLEX}' cannot be used: this transformer lacks a final norm behind its blocks",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_serve_is_refused_in_one_line(case: str, server: CommandLine, images: Path, tmp_path: Path) -> None:
    flags, said = REFUSED[case]
    ended = server(*told(images, *flags), "--out", tmp_path / "run")
    assert ended.status == 2, ended.error
    assert [line for line in ended.error.splitlines() if line.startswith("underpaint: ")] == ended.error.splitlines()[
        -1:
    ]
    assert ended.error.splitlines()[-1] == f"underpaint: {said}"
    assert not (tmp_path / "run").exists()


def test_an_image_that_the_patch_does_not_divide_is_said_where_no_name_says_the_patch() -> None:
    with pytest.raises(InputError, match="image of 40x40 px is no whole number of patches of 16x16 px"):
        underpaint.encoder("test_vit", image_size=40)


def test_naflex_is_pretrained_by_a_command_and_loaded_by_timm(
    server: CommandLine, images: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ended = server(
        *told(images, "--method", "mae", "--encoder", NAFLEX, "--image-size", 32, "--patch-size", 8, *TINY),
        "--out",
        run,
    )
    assert ended.status == 0, ended.error
    loaded: Any = load_encoder(run)
    alone: Any = timm.create_model(**underpaint.backbones.describe_encoder(run)["create_model"]).eval()
    alone.load_state_dict(load_file(run / "encoder.safetensors"), strict=True)
    batch = torch.randn(2, 3, 32, 32)
    tokens = alone.forward_features(batch)
    torch.testing.assert_close(loaded(batch).pooled, tokens[:, alone.num_prefix_tokens :].mean(1))
