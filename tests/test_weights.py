"""Weights of other people's files: made here with the official names and shapes, from networks of timm whose features the
encoder must then have."""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

import underpaint
from underpaint.backbones import create_arguments, from_arguments, init_from, save_encoder
from underpaint.backbones.layouts import network_of
from underpaint.backbones.weights import fill, read_start, read_weights
from underpaint.cli import main
from underpaint.errors import InputError
from underpaint.evaluation.bundle import open_bundle
from underpaint.patches import Standardize

State = dict[str, Tensor]
VIT: dict[str, Any] = {"embed_dim": 64, "depth": 2, "num_heads": 1}
BEIT: dict[str, Any] = {"embed_dim": 64, "depth": 2, "num_heads": 2}
SWIN: dict[str, Any] = {"embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}


def randomised(model: nn.Module) -> Any:
    """With no weight at 0 or 1, where a wrong one would not be seen."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (0.5 if parameter.ndim == 1 else 0))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model.eval()


def of(encoder: Any) -> State:
    """The state of an encoder with random weights."""
    return {name: value.clone() for name, value in randomised(encoder.model).state_dict().items()}


def renamed(state: State, *table: tuple[str, str]) -> State:
    made = {}
    for name, value in state.items():
        for found, new in table:
            name = re.sub(found, new, name)
        made[name] = value
    return made


def vit(**more: Any) -> Any:
    return underpaint.encoder("vit_tiny_patch16_224", image_size=32, patch_size=8, **{**VIT, **more}).eval()


def beit(**more: Any) -> Any:
    return underpaint.encoder("beit_base_patch16_224", image_size=32, patch_size=8, **{**BEIT, **more}).eval()


def swin(**more: Any) -> Any:
    return underpaint.encoder("swin_tiny_patch4_window7_224", image_size=32, patch_size=2, **{**SWIN, **more}).eval()


def equal(file: Path, original: Any, fresh: Any, atol: float = 1e-4, size: int = 32) -> Any:
    """That an encoder started from a file has the features of the network that the file was made from."""
    matched, _ = init_from(fresh, str(file))
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(fresh(images).patches, original(images).patches, atol=atol, rtol=1e-3)
    assert not matched.untouched, matched
    return matched


def saved(tmp_path: Path, weights: State, name: str = "official.safetensors", inside: str | None = None) -> Path:
    file = tmp_path / name
    if inside is None and name.endswith(".safetensors"):
        save_file({name: value.contiguous().clone() for name, value in weights.items()}, file)
    else:
        torch.save({inside: weights, "epoch": 3, "args": argparse.Namespace(lr=1.0)} if inside else weights, file)
    return file


def without_scale(state: State) -> State:
    """Queries, keys and values as BEiT's code keeps their biases."""
    made = {}
    for name, value in state.items():
        if name.endswith("attn.qkv.bias"):
            made[name.replace("qkv.bias", "q_bias")], _, made[name.replace("qkv.bias", "v_bias")] = value.chunk(3)
        else:
            made[name] = value
    return made


# -- official files ----------------------------------------------------------------------------------------------------


def test_mae(tmp_path: Path) -> None:
    """Names of facebookresearch/mae, in a checkpoint with its settings."""
    original = vit()
    weights = of(original) | {
        "mask_token": torch.randn(1, 1, 32),
        "decoder_embed.weight": torch.randn(32, 64),
        "decoder_pos_embed": torch.randn(1, 17, 32),
        "decoder_blocks.0.norm1.weight": torch.randn(32),
        "decoder_blocks.0.attn.qkv.weight": torch.randn(96, 32),
        "decoder_norm.weight": torch.randn(32),
        "decoder_pred.weight": torch.randn(192, 32),
    }
    matched = equal(saved(tmp_path, weights, "mae.pth", "model"), original, vit())
    assert matched.start["layout"] == "MAE"
    assert matched.start["file"] == "mae.pth"
    assert len(matched.start["sha256"]) == 64
    assert matched.start["licence"] is None
    assert "decoder: not part of an encoder (6)" in str(matched)
    assert "mask token: not part of an encoder (1)" in str(matched)


def test_simmim_swin(tmp_path: Path) -> None:
    original = swin()
    weights = renamed(
        of(original),
        (r"^layers\.1\.downsample", "layers.0.downsample"),  # at the end of a stage, as in Microsoft's code
        (r"^", "encoder."),
    )
    weights |= {
        "encoder.mask_token": torch.randn(1, 1, 16),
        "encoder.layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.int64),
        "encoder.layers.0.blocks.1.attn_mask": torch.zeros(16, 16, 16),
        "decoder.0.weight": torch.randn(12, 32, 1, 1),
        "decoder.0.bias": torch.randn(12),
    }
    matched = equal(saved(tmp_path, weights, "simmim.pth", "model"), original, swin())
    assert matched.start["layout"] == "SimMIM"
    for said in ("decoder: not part", "relative_position_index: computed (1)", "attn_mask: computed (1)"):
        assert said in str(matched)


def test_swin_v2_as_microsoft_has_it(tmp_path: Path) -> None:
    """Its tables of coordinates are computed, and may be of another window."""

    def made() -> Any:
        arguments = {**SWIN, "depths": [2, 1, 1, 1], "num_heads": [1, 2, 2, 2]}
        return underpaint.encoder("swinv2_tiny_window8_256", image_size=64, **arguments).eval()

    original = made()
    weights = of(original)
    for stage in (1, 2, 3):  # downwards, each from its own
        weights = renamed(weights, (rf"^layers\.{stage}\.downsample", f"layers.{stage - 1}.downsample"))
    weights["layers.0.blocks.0.attn.relative_coords_table"] = torch.zeros(1, 7, 7, 2)
    matched = equal(saved(tmp_path, weights), original, made(), size=64)
    assert "relative_coords_table: computed (1)" in str(matched)


@pytest.mark.parametrize("shared", [True, False])
def test_simmim_vit_and_beit(shared: bool, tmp_path: Path) -> None:
    """A table of relative biases that all blocks share while BEiT and SimMIM pretrain, and one for each afterwards."""
    original = beit()
    state = of(original)
    tables = [name for name in state if name.endswith("relative_position_bias_table")]
    if shared:
        table = state[tables[0]]
        for name in tables:
            original.model.get_parameter(name).data.copy_(table)
            del state[name]
        state["rel_pos_bias.relative_position_bias_table"] = table
        state["rel_pos_bias.relative_position_index"] = torch.zeros(17, 17, dtype=torch.int64)
        state["lm_head.weight"] = torch.randn(12, 64)
    matched = equal(saved(tmp_path, state), original, beit())
    assert matched.start["layout"] == "BEiT"
    if shared:
        state = renamed(state, ("^", "encoder.")) | {"encoder.mask_token": torch.randn(1, 1, 64)}
        matched = equal(saved(tmp_path, state), original, beit())
        assert matched.start["layout"] == "SimMIM"
        assert "relative_position_index: computed (1)" in str(matched)


def test_beit_of_another_window_and_with_a_norm_behind_the_pooling(tmp_path: Path) -> None:
    original = beit()
    state = renamed(of(original), (r"^norm\.", "fc_norm."))
    larger = underpaint.encoder("beit_base_patch16_224", image_size=64, patch_size=8, **BEIT)
    matched, statistics = init_from(larger, str(saved(tmp_path, state)))
    assert not matched.untouched
    assert not matched.left_out
    assert statistics == {"mean": [0.5] * 3, "std": [0.5] * 3}
    model: Any = larger.model
    table = model.blocks[0].attn.relative_position_bias_table
    before = state["blocks.0.attn.relative_position_bias_table"]
    assert torch.equal(table[-3:], before[-3:])  # of the class token
    assert torch.allclose(table[15 * 7 + 7], before[7 * 3 + 3], atol=1e-5)  # of a patch and itself
    assert torch.equal(model.norm.weight, state["fc_norm.weight"])


@pytest.mark.parametrize("scale", [0.1, None])
def test_cae(scale: float | None, tmp_path: Path) -> None:
    """Its LayerScale under another name, or multiplied into what it scales where the encoder has none."""
    original = vit(init_values=0.1)
    state = of(original)
    for name in [name for name in state if name.endswith("attn.qkv.bias")]:  # it has none of the keys
        original.model.get_parameter(name).data[64:128] = 0
    state = without_scale(renamed(of_same(original), (r"ls([12])\.gamma", r"gamma_\1")))
    weights = renamed(state, ("^", "encoder.")) | {
        f"teacher.{name}": torch.randn_like(value) for name, value in state.items()
    }
    weights |= {"mask_token": torch.randn(1, 1, 64), "pretext_neck.head.weight": torch.randn(12, 64)}
    matched = equal(saved(tmp_path, weights), original, vit() if scale is None else vit(init_values=scale))
    assert matched.start["layout"] == "CAE"
    assert "decoder: not part of an encoder (1)" in str(matched)


def of_same(encoder: Any) -> State:
    return {name: value.clone() for name, value in encoder.model.state_dict().items()}


def test_beit_networks_start_from_plain_files_and_the_other_way_round(tmp_path: Path) -> None:
    plain, relative = vit(num_heads=2), beit()
    file = saved(tmp_path, of(plain))
    matched, _ = init_from(relative, str(file))
    assert "pos_embed: not in the encoder (1)" in str(matched)
    assert {name.rpartition(".")[2] for name in matched.untouched} == {"relative_position_bias_table"}
    model: Any = relative.model
    assert torch.equal(model.blocks[1].gamma_2, torch.ones(64))  # the file's network scales nothing
    assert torch.equal(model.blocks[1].attn.v_bias, plain.model.blocks[1].attn.qkv.bias[128:])


def test_localmim_vit_ends_in_the_norm_of_its_last_tap(tmp_path: Path) -> None:
    original = vit()
    weights = renamed(of(original), (r"^norm\.", "norm.3."))
    weights |= {f"norm.{tap}.{end}": torch.randn(64) for tap in range(3) for end in ("weight", "bias")}
    weights |= {
        "decoder.0.embed.weight": torch.randn(32, 64),
        "decoder.3.blocks.0.norm1.weight": torch.randn(32),
        "hog_enc.0.conv.weight": torch.randn(2, 1, 3, 3),
    }
    matched = equal(saved(tmp_path, weights, "localmim.pth", "model"), original, vit())
    assert matched.start["layout"] == "LocalMIM"
    assert "HOG: of the method's target (1)" in str(matched)


def merged_by_rows(model: Any, images: Tensor, norm: State, reduction: Tensor) -> Tensor:
    """A Swin of two stages whose merging takes in neighbours row by row, written out."""
    first = model.layers[0](model.patch_embed(images))
    batch, rows, columns, width = first.shape
    blocks = first.view(batch, rows // 2, 2, columns // 2, 2, width)
    four = torch.cat([blocks[:, :, down, :, right] for down in (0, 1) for right in (0, 1)], dim=-1)
    four = functional.layer_norm(four, (4 * width,), norm["weight"], norm["bias"])
    merged = functional.linear(four, reduction)
    return model.norm(model.layers[1].blocks(merged)).flatten(1, 2)


def test_localmim_swin_merges_neighbours_in_its_own_order(tmp_path: Path) -> None:
    source = swin()
    state = of(source)
    weights = renamed(state, (r"^layers\.1\.downsample", "layers.0.downsample"), (r"^norm\.", "norm.3."))
    weights |= {f"norm.{tap}.{end}": torch.randn(32) for tap in range(3) for end in ("weight", "bias")}
    weights["hog_enc.0.conv.weight"] = torch.randn(2, 1, 3, 3)
    fresh = swin()
    matched, _ = init_from(fresh, str(saved(tmp_path, weights)))
    assert not matched.untouched
    assert matched.start["layout"] == "LocalMIM"
    images = torch.randn(2, 3, 32, 32)
    norm = {end: state[f"layers.1.downsample.norm.{end}"] for end in ("weight", "bias")}
    with torch.no_grad():
        expected = merged_by_rows(source.model, images, norm, state["layers.1.downsample.reduction.weight"])
        torch.testing.assert_close(fresh(images).patches, expected, atol=1e-4, rtol=1e-3)
        assert not torch.allclose(source(images).patches, expected, atol=0.1)  # as it would be without


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("chunked", [False, True])
def test_dinov2(registers: int, chunked: bool, tmp_path: Path) -> None:
    """The position of its class token is the token's own where timm's network has registers."""
    more = {"reg_tokens": registers, "no_embed_class": True} if registers else {}
    original = vit(init_values=1e-5, **more)
    weights = renamed(of(original), ("^reg_token$", "register_tokens"))
    if registers:
        weights["pos_embed"] = torch.cat([torch.randn(1, 1, 64), weights["pos_embed"]], dim=1)
        weights["cls_token"] -= weights["pos_embed"][:, :1]
    if chunked:
        weights = renamed(weights, (r"^blocks\.(\d)", r"blocks.\1.\1"))
    weights["mask_token"] = torch.randn(1, 64)
    matched = equal(saved(tmp_path, weights, "dinov2.pth"), original, vit(init_values=1e-5, **more))
    assert matched.start["layout"] == ("DINOv2" if registers or chunked else None)


def dinov3(**more: Any) -> Any:
    return underpaint.encoder("vit_small_patch16_dinov3", image_size=32, patch_size=8, **VIT, **more).eval()


@pytest.mark.parametrize("bias", [False, True])
def test_dinov3(bias: bool, tmp_path: Path) -> None:
    original = dinov3(qkv_bias=bias)
    state = of(original)
    weights = renamed(state, ("^reg_token$", "storage_tokens"), (r"gamma_([12])$", r"ls\1.gamma"))
    for block in range(2):
        q, v = (weights.pop(f"blocks.{block}.attn.{each}_bias", torch.zeros(64)) for each in "qv")
        weights[f"blocks.{block}.attn.qkv.bias"] = torch.cat([q, torch.zeros(64), v])
        weights[f"blocks.{block}.attn.qkv.bias_mask"] = torch.ones(192)
    weights |= {"mask_token": torch.randn(1, 64), "rope_embed.periods": torch.randn(16)}
    matched = equal(saved(tmp_path, weights, "dinov3.pth"), original, dinov3(qkv_bias=bias))
    assert matched.start["layout"] == "DINOv3"
    assert "bias_mask: multiplied into the bias (2)" in str(matched)
    assert ("bias of queries and values: all zero (2)" in str(matched)) == (not bias)


RESNET: dict[str, Any] = {"channels": [8, 8, 16, 24], "layers": [1, 1, 1, 1]}


def resnet(channels: int = 3) -> Any:
    return underpaint.encoder("resnet18", image_size=64, in_chans=channels, **RESNET).eval()


@pytest.mark.parametrize("prefix", ["", "sparse_encoder.sp_cnn."])
def test_spark_resnet(prefix: str, tmp_path: Path) -> None:
    original = resnet()
    weights = renamed(of(original), ("^", prefix))
    if prefix:
        weights |= {"densify_projs.0.weight": torch.randn(8, 24, 1, 1), "imn_m": torch.zeros(1, 3, 1, 1)}
    matched = equal(saved(tmp_path, weights, "spark.pth", "module"), original, resnet(), size=64)
    assert matched.start["layout"] == ("SparK" if prefix else None)


CONVNEXT: dict[str, Any] = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 24]}


def convnext(name: str = "convnextv2_atto") -> Any:
    return underpaint.encoder(name, image_size=32, **CONVNEXT).eval()


def as_facebook(state: State, convolutions: bool) -> State:
    """A ConvNeXt of timm's under the names of Facebook's code, whose MLPs are linear layers."""
    named = renamed(
        state,
        (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
        (r"\.blocks\.", "."),
        (r"conv_dw", "dwconv"),
        (r"mlp\.fc", "pwconv"),
        (r"mlp\.grn\.weight", "grn.gamma"),
        (r"mlp\.grn\.bias", "grn.beta"),
        (r"^head\.norm", "norm"),
    )
    return {
        name: value.view(1, 1, 1, -1)
        if ".grn." in name
        else value.flatten(1)
        if "pwconv" in name and value.ndim == 4
        else value
        for name, value in named.items()
    }


@pytest.mark.parametrize("name", ["convnext_atto", "convnextv2_atto"])
def test_convnext(name: str, tmp_path: Path) -> None:
    original = convnext(name)
    weights = as_facebook(of(original), False) | {"head.weight": torch.randn(5, 24), "head.bias": torch.randn(5)}
    matched = equal(saved(tmp_path, weights, "convnext.pth", "model"), original, convnext(name))
    assert matched.start["layout"] == ("ConvNeXt V2" if "v2" in name else "ConvNeXt")


def test_fcmae(tmp_path: Path) -> None:
    """Sparse layers, whose kernels are [places, in, out]; the norm behind the pooling is not trained."""
    original = convnext()
    weights: State = {}
    for name, value in as_facebook(of(original), True).items():
        if name.startswith("norm."):
            continue
        if name.startswith(("stages", "downsample_layers")) and value.ndim == 4 and "grn" not in name:
            stem = name.startswith("downsample_layers.0")
            kernel = value.transpose(3, 2).flatten(2).permute(2, 1, 0)
            weights["encoder." + name.replace("weight", "weight" if stem else "kernel")] = (
                value if stem else kernel.squeeze(1)
            )
        elif "pwconv" in name:
            weights["encoder." + name.replace("pwconv1.", "pwconv1.linear.").replace("pwconv2.", "pwconv2.linear.")] = (
                value
            )
        elif ".norm." in name or re.match(r"downsample_layers\.[123]\.0\.", name):
            head, _, end = name.rpartition(".")
            weights[f"encoder.{head}.ln.{end}"] = value
        else:
            weights["encoder." + name] = value.view(1, -1) if name.endswith("bias") else value
    weights |= {
        "mask_token": torch.randn(1, 8, 1, 1),
        "proj.weight": torch.randn(8, 24, 1, 1),
        "pred.weight": torch.randn(4, 8),
    }
    fresh = convnext()
    matched, _ = init_from(fresh, str(saved(tmp_path, weights)))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(fresh(images).patches, original(images).patches, atol=1e-4, rtol=1e-3)
    assert set(matched.untouched) == {"head.norm.weight", "head.norm.bias"}


# -- folders of Hugging Face -------------------------------------------------------------------------------------------


def split(state: State, to: str, keys: bool = True) -> State:
    """With queries, keys and values each for itself."""
    made = {}
    for name, value in state.items():
        if ".attn.qkv." in name:
            for each, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                if keys or each != "key" or name.endswith("weight"):
                    made[name.replace("attn.qkv", to.format(each))] = part
        else:
            made[name] = value
    return made


BLOCKS = (
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^reg_token$", "embeddings.register_tokens"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"^norm\.", "layernorm."),
)
OLD = (
    (r"norm1", "layernorm_before"),
    (r"norm2", "layernorm_after"),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
)


def folder_of(tmp_path: Path, weights: State, config: dict[str, Any], processor: bool = True) -> Path:
    folder = tmp_path / "hub"
    folder.mkdir()
    saved(folder, weights, "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags:\n- vision\n---\n# A model\n")
    if processor:
        said = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
        (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return folder


def hub_vit() -> tuple[Any, State, Callable[[], Any]]:
    original = vit()
    state = split(of(original), "attention.attention.{}")
    return original, renamed(renamed(state, *BLOCKS, *OLD), ("^", "vit.")), vit


def hub_dinov2() -> tuple[Any, State, Callable[[], Any]]:
    original = vit(init_values=1e-5)
    state = split(of(original), "attention.attention.{}")
    state = renamed(state, *BLOCKS, (r"ls([12])\.gamma", r"layer_scale\1.lambda1"))
    return original, state | {"embeddings.mask_token": torch.randn(1, 64)}, lambda: vit(init_values=1e-5)


def hub_dinov3() -> tuple[Any, State, Callable[[], Any]]:
    original = dinov3()
    state = split(of(original), "attention.{}_proj")
    state = renamed(
        state,
        (r"(query|key|value)_proj", lambda match: f"{match.group(1)[0]}_proj"),  # pyright: ignore[reportArgumentType]
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings."),
        (r"^(cls|reg)_token$", r"embeddings.\1_token"),
        (r"embeddings\.reg_token", "embeddings.register_tokens"),
        (r"^blocks\.", "layer."),
        (r"\.attn\.proj\.", ".attention.o_proj."),
        (r"gamma_([12])$", r"layer_scale\1.lambda1"),
        (r"mlp\.fc1", "mlp.up_proj"),
        (r"mlp\.fc2", "mlp.down_proj"),
    )
    return original, state, dinov3


def hub_beit() -> tuple[Any, State, Callable[[], Any]]:
    original = beit()
    state = of(original)
    for block in range(2):
        for each, name in (("q", "query"), ("v", "value")):
            state[f"blocks.{block}.attention.attention.{name}.bias"] = state.pop(f"blocks.{block}.attn.{each}_bias")
    state = renamed(
        split(state, "attention.attention.{}"),
        *BLOCKS,
        *OLD,
        (r"\.attn\.relative", ".attention.attention.relative_position_bias.relative"),
        (r"gamma_([12])$", r"lambda_\1"),
        (r"^layernorm\.", "pooler.layernorm."),
        ("^", "beit."),
    )
    return original, state, beit


def hub_swin() -> tuple[Any, State, Callable[[], Any]]:
    original = swin()
    state = renamed(
        split(of(original), "attention.self.{}"),
        (r"^layers\.1\.downsample", "encoder.layers.0.downsample"),
        (r"^layers", "encoder.layers"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^patch_embed\.norm\.", "embeddings.norm."),
        (r"blocks\.(\d)\.attn\.relative", r"blocks.\1.attention.self.relative"),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        *OLD,
        (r"^norm\.", "layernorm."),
        ("^", "swin."),
    )
    return original, state, swin


def hub_convnext() -> tuple[Any, State, Callable[[], Any]]:
    original = convnext()
    state = as_facebook(of(original), False)
    state = renamed(
        state,
        (r"^norm\.", "layernorm."),
        (r"^downsample_layers\.0\.0\.", "embeddings.patch_embeddings."),
        (r"^downsample_layers\.0\.1\.", "embeddings.layernorm."),
        (r"^downsample_layers\.(\d)\.(\d)", r"encoder.stages.\1.downsampling_layer.\2"),
        (r"^stages\.(\d)\.(\d)\.", r"encoder.stages.\1.layers.\2."),
        (r"\.norm\.", ".layernorm."),
        (r"grn\.gamma", "grn.weight"),
        (r"grn\.beta", "grn.bias"),
        ("^", "convnextv2."),
    )
    return original, state, convnext


def hub_resnet() -> tuple[Any, State, Callable[[], Any]]:
    original = resnet()
    kinds = {"conv": "convolution", "bn": "normalization"}
    state = renamed(
        of(original),
        (r"^conv1\.", "embedder.embedder.convolution."),
        (r"^bn1\.", "embedder.embedder.normalization."),
        (r"^layer(\d)\.(\d)", lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}"),  # pyright: ignore[reportArgumentType]
        (r"\.(conv|bn)(\d)\.", lambda m: f".layer.{int(m[2]) - 1}.{kinds[m[1]]}."),  # pyright: ignore[reportArgumentType]
        (r"downsample\.0\.", "shortcut.convolution."),
        (r"downsample\.1\.", "shortcut.normalization."),
        ("^", "resnet."),
    )
    return original, state, resnet


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        (hub_vit, "vit"),
        (hub_dinov2, "dinov2"),
        (hub_dinov3, "dinov3_vit"),
        (hub_beit, "beit"),
        (hub_swin, "swin"),
        (hub_convnext, "convnextv2"),
        (hub_resnet, "resnet"),
    ],
)
def test_transformers_folders(
    made: Callable[[], tuple[Any, State, Callable[[], Any]]], kind: str, tmp_path: Path
) -> None:
    original, weights, fresh = made()
    folder = folder_of(tmp_path, weights, {"model_type": kind})
    encoder = fresh()
    matched = equal(folder, original, encoder, size=64 if kind == "resnet" else 32)
    assert matched.start["licence"] == "apache-2.0"
    assert matched.start["layout"] == "transformers"
    assert matched.start["name"] == kind
    _, statistics = init_from(encoder, str(folder))
    assert statistics == {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


def test_timms_own_folders(tmp_path: Path) -> None:
    original = vit()
    config = {
        "architecture": "vit_tiny_patch16_224",
        "model_args": {**VIT, "patch_size": 8},
        "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": [3, 32, 32], "license": "mit"},
    }
    folder = folder_of(tmp_path, of(original), config, processor=False)
    assert equal(folder, original, vit()).start["licence"] == "mit"
    bundle = open_bundle(str(folder))
    assert bundle.size == (32, 32)
    assert bundle.standardize.std.flatten().tolist() == [0.25] * 3
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        device = bundle.standardize.mean.device
        got = bundle.encoder(images.to(device)).pooled.cpu()
        torch.testing.assert_close(got, original(images).pooled, atol=1e-3, rtol=1e-3)


# -- adapting ----------------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize(("theirs", "ours"), [(3, 6), (3, 1), (1, 3), (4, 1), (2, 4)])
def test_first_layers_of_any_network_take_other_channels(theirs: int, ours: int) -> None:
    """Channels that are all equal give what they gave."""
    source, target = resnet(theirs), resnet(ours)
    matched = fill(target.model, of(source))
    assert matched.adapted == ["conv1.weight"]
    assert not matched.left_out
    grey = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        expected = source(grey.expand(-1, theirs, -1, -1)).pooled
        torch.testing.assert_close(target(grey.expand(-1, ours, -1, -1)).pooled, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.quick
@pytest.mark.parametrize(("theirs", "ours"), [(3, 4), (4, 3)])
def test_channels_that_are_more_or_fewer_weigh_as_much(theirs: int, ours: int) -> None:
    source, target = resnet(theirs), resnet(ours)
    state = of(source)
    fill(target.model, state)
    taken = target.model.conv1.weight * (ours / theirs)
    for channel in range(ours):
        torch.testing.assert_close(taken[:, channel], state["conv1.weight"][:, channel % theirs])


@pytest.mark.quick
def test_positions_of_a_rectangle_are_known_for_what_they_are(tmp_path: Path) -> None:
    """As many positions, but of another grid: those of a run say which."""
    wide = underpaint.encoder("vit_tiny_patch16_224", image_size=(16, 64), patch_size=8, **VIT)
    model: Any = wide.model
    model.pos_embed.data[0, 1:] = torch.arange(8.0).repeat(2)[:, None]  # the column
    square: Any = vit()
    matched = fill(square.model, of_same(wide), (2, 8))
    assert "pos_embed" in matched.adapted
    columns = square.model.pos_embed[0, 1:, 0].view(4, 4)
    assert torch.allclose(columns[0], columns[3], atol=1e-4)
    assert columns[0, 0] < columns[0, 1] < columns[0, 2]


# -- which network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_224",
        "vit_small_patch14_dinov2",
        "vit_huge_patch14_224",
        "beit_large_patch16_224",
        "vit_small_patch16_dinov3",
        "swin_base_patch4_window7_224",
        "convnext_small",
        "convnextv2_nano",
        "resnet50",
        "resnet34",
        "vit_base_patch16_clip_224",
        "deit3_small_patch16_224",
    ],
)
def test_networks_are_told_by_names_and_shapes(name: str) -> None:
    """What is told makes a network with exactly these weights."""
    with torch.device("meta"):
        state = timm.create_model(name, num_classes=0).state_dict()
    found = network_of(state)
    assert found is not None
    if not re.search("dinov2|clip|deit3", name):
        assert found["name"] == name
    settings = {key: value for key, value in found.items() if key not in ("name", "image_size", "patch_size")}
    sized = {"img_size": found["image_size"], "patch_size": found["patch_size"]} if "patch_size" in found else {}
    with torch.device("meta"):
        made = timm.create_model(found["name"], num_classes=0, **settings, **sized).state_dict()
    assert {name: value.shape for name, value in made.items()} == {name: value.shape for name, value in state.items()}


@pytest.mark.quick
def test_networks_that_are_not_known_are_not_guessed() -> None:
    for name in ("hiera_tiny_224", "eva02_tiny_patch14_224", "efficientnet_b0"):
        with torch.device("meta"):
            assert network_of(timm.create_model(name, num_classes=0).state_dict()) is None


def test_the_teacher_is_taken_of_two(tmp_path: Path) -> None:
    """As DINO's checkpoints have them, with heads of their own."""
    original = vit()
    state = of(original)
    weights = renamed(state, ("^", "student.backbone.")) | renamed(state, ("^", "teacher.backbone."))
    weights = {
        name: torch.randn_like(value) if name.startswith("student") else value for name, value in weights.items()
    }
    weights["teacher.dino_head.mlp.0.weight"] = torch.randn(4, 64)
    matched = equal(saved(tmp_path, weights), original, vit())
    assert "head of pretraining: not part of an encoder (1)" in str(matched)


# -- errors ------------------------------------------------------------------------------------------------------------


class Foreign:
    """A class that a file needs and that is not known."""


@pytest.mark.quick
def test_what_a_file_is_of_is_said_where_it_does_not_fit(tmp_path: Path) -> None:
    file = saved(tmp_path, of(vit()) | {"decoder_pred.weight": torch.randn(2, 2)})
    other = underpaint.encoder("vit_tiny_patch16_224", image_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2)
    message = r"nothing matched; it looks like MAE's, and is for --encoder vit_base_patch16_224 --patch-size 8 "
    with pytest.raises(InputError, match=message + r"--set encoder.embed_dim=64 --set encoder.depth=2"):
        init_from(other, str(file))
    with pytest.raises(InputError, match=r"nothing matched; it looks like MAE's"):
        init_from(resnet(), str(file))
    deeper = vit(depth=8)
    with pytest.raises(InputError, match=r"only 2\d % of the encoder's numbers are in it; .*--set encoder.depth=2"):
        init_from(deeper, str(file))
    with pytest.raises(InputError, match=r"which network it is of cannot be told .*\(a, b\.c"):
        open_bundle(str(saved(tmp_path, {"a": torch.zeros(2), "b.c": torch.zeros(3)}, "odd.safetensors")))


@pytest.mark.quick
def test_folders_and_files_that_cannot_be_read_say_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(InputError, match=r"neither model\.safetensors nor pytorch_model.bin"):
        init_from(vit(), str(tmp_path))
    torch.save({"model": {"a": torch.zeros(2)}, "config": Foreign()}, tmp_path / "more.pth")
    with pytest.raises(InputError, match=r"more than tensors \(.*Foreign\), .*save its state dict alone: torch\.save"):
        read_weights(tmp_path / "more.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no such file; give timm:NAME, a run folder, a Hugging Face folder"):
        init_from(vit(), str(tmp_path / "empty"))


# -- by commands -------------------------------------------------------------------------------------------------------


def photographs(folder: Path, count: int = 24, classes: int = 1) -> Path:
    """Small pictures, dark and bright in turn; in two classes, or in one, which nothing is judged by."""
    rng = np.random.default_rng(0)
    for number in range(count):
        place = folder / f"class{number % classes}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 128, (32, 32, 3)) + 127 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number:02d}.png")
    return folder


def pretrained(data: Path, out: Path, start: Path | None, *more: str) -> dict[str, Any]:
    """What `encoder.json` says after a step from `start`."""
    size = ["--image-size", "32", "--batch-size", "4", "--steps", "1", "--method", "mae", "--set", "run.compile=off"]
    from_start = [] if start is None else ["--init", str(start)]
    assert main(["pretrain", str(data), "--out", str(out), *size, *from_start, *more]) == 0
    return json.loads((out / "encoder.json").read_text())


def test_where_weights_are_from_is_written_beside_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file, a run from it, and a run from that run: the chain is kept, and no path of any."""
    data = photographs(tmp_path / "private" / "photos")
    (tmp_path / "secret").mkdir()
    original = vit()
    file = saved(tmp_path / "secret", of(original) | {"decoder_pred.weight": torch.randn(4, 4)}, "mae.pth", "model")
    first = pretrained(data, tmp_path / "first", file)  # what network it is of is seen from the file
    said = capsys.readouterr().out
    assert re.search(r"started from .*mae\.pth: \d+ weights taken as they are, 0 adapted; decoder: not part", said)
    assert first["create_model"]["embed_dim"] == 64
    assert first["create_model"]["patch_size"] == 8
    assert first["start"] | {"sha256": ""} == {
        "from": "file",
        "layout": "MAE",
        "file": "mae.pth",
        "sha256": "",
        "licence": None,
    }
    assert first["mean"] == pytest.approx([0.485, 0.456, 0.406])
    trained = first["trained_on"]
    assert trained == {"images": 24, "channels": 3, "source": "folder", "labels": None, "method": "mae"}
    assert set(first["versions"]) == {"underpaint", "timm", "torch"}

    second = pretrained(data, tmp_path / "second", tmp_path / "first")
    assert second["start"]["from"] == "run"
    assert second["start"]["trained_on"] == trained
    assert second["start"]["versions"] == first["versions"]
    assert second["start"]["start"] == first["start"]
    for each in (first, second):
        assert not any(word in json.dumps(each) for word in ("private", "photos", "secret", str(tmp_path)))
    page = (tmp_path / "second" / "report.html").read_text()
    assert "started from" in page
    assert "MAE mae.pth (licence: not known)" in page
    underpaint.load_encoder(tmp_path / "second")


@pytest.mark.quick
def test_encoders_from_random_weights_and_older_ones_say_no_start(tmp_path: Path) -> None:
    arguments = create_arguments("vit_tiny_patch16_224", image_size=(32, 32), patch_size=8, **VIT)
    save_encoder(tmp_path, from_arguments(dict(arguments)), arguments, Standardize([0.5] * 3, [0.25] * 3))
    described = json.loads((tmp_path / "encoder.json").read_text())
    assert described["start"] is None
    for name in ("start", "trained_on", "versions"):  # as it was written before
        del described[name]
    (tmp_path / "encoder.json").write_text(json.dumps(described))
    matched, statistics = init_from(vit(), str(tmp_path))
    assert statistics == {"mean": [0.5] * 3, "std": [0.25] * 3}
    assert matched.start["start"] is None
    assert matched.start["licence"] is None
    assert not matched.untouched
    underpaint.load_encoder(tmp_path)


def test_an_official_file_is_evaluated_as_it_is(tmp_path: Path) -> None:
    data = photographs(tmp_path / "photos", classes=2)
    original = vit()
    file = saved(tmp_path, of(original) | {"decoder_pred.weight": torch.randn(4, 4)}, "mae.pth", "model")
    bundle = open_bundle(str(file))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        got = bundle.encoder(images.to(bundle.standardize.mean.device)).pooled.cpu()
        torch.testing.assert_close(got, original(images).pooled, atol=1e-3, rtol=1e-3)
    assert main(["evaluate", str(file), "--data", str(data), "--task", "knn", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "results.json").is_file()


def test_a_file_that_does_not_fit_ends_a_command_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = photographs(tmp_path / "photos", 4)
    file = saved(tmp_path, of(vit()))
    asked = ["pretrain", str(data), "--out", str(tmp_path / "run"), "--init", str(file), "--encoder", "resnet18"]
    assert main([*asked, "--method", "simmim", "--image-size", "64", "--steps", "1"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    assert "--encoder vit_base_patch16_224 --patch-size 8 --set encoder.embed_dim=64" in error


def test_a_folder_whose_description_makes_no_sense_is_read_by_its_weights(tmp_path: Path) -> None:
    tiny = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=0)
    save_file(tiny.state_dict(), tmp_path / "model.safetensors")
    described = {"model_type": "vit", "hidden_size": "wide", "num_attention_heads": 3, "image_size": [32]}
    (tmp_path / "config.json").write_text(json.dumps(described))
    found = read_start(str(tmp_path))
    assert found.network is not None
    assert found.network["num_heads"] == 3
