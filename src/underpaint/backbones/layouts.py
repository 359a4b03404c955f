"""The names that weights have in other people's files, as timm's names; and which network such a file is of.

What a file calls its weights is its layout. Those of the methods' official code (MAE 2111.06377, SimMIM 2111.09886, BEiT
2106.08254, CAE 2202.03026, LocalMIM 2303.05251, DINOv2 2304.07193, DINOv3 2508.10104, SparK 2301.03580, ConvNeXt V2
2301.00808) and of Hugging Face's transformers are known here. What timm can rename itself (`checkpoint_filter_fn` of each of
its families) is left to it.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from underpaint.errors import InputError

Weights = dict[str, Tensor]
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
HALVES = {"mean": [0.5] * 3, "std": [0.5] * 3}

# names by which a layout is told, the first that has one of them; the statistics that its official code standardises with
LAYOUTS: tuple[tuple[str, str, dict[str, list[float]]], ...] = (
    ("LocalMIM", r"(^|\.)(hog_enc\.\d|norm\.3\.weight)", IMAGENET),
    ("CAE", r"(^|\.)(pretext_neck|regressor_and_decoder|alignment_encoder)\.", IMAGENET),
    ("MAE", r"(^|\.)decoder_(pred|embed)\.weight$", IMAGENET),
    ("SparK", r"(^|\.)(sparse_encoder|densify_projs)\.", IMAGENET),
    ("SimMIM", r"(^|\.)encoder\.mask_token$", IMAGENET),
    ("DINOv3", r"(^|\.)storage_tokens$", IMAGENET),
    ("transformers", r"(^|\.)(embeddings\.patch_embeddings|embedder\.embedder)\.", IMAGENET),
    ("DINOv2", r"(^|\.)(register_tokens$|blocks\.\d+\.\d+\.norm1)", IMAGENET),
    ("ConvNeXt V2", r"\.grn\.(gamma|beta)$", IMAGENET),
    ("ConvNeXt", r"(^|\.)downsample_layers\.", IMAGENET),
    ("BEiT", r"(^|\.)blocks\.0\.attn\.q_bias$", HALVES),
    ("Swin", r"(^|\.)layers\.0\.downsample\.", IMAGENET),
)

# what stands in files beside an encoder, and why it is left there
BESIDE: tuple[tuple[str, str, str], ...] = (
    (r"relative_position_index$", "relative_position_index", "computed"),
    (r"relative_coords_table$", "relative_coords_table", "computed"),
    (r"attn_mask$", "attn_mask", "computed"),
    (r"(rope\w*\.(periods|freqs)|\.inv_freq)$", "frequencies of positions", "computed"),
    (r"bias_mask$", "bias_mask", "multiplied into the bias"),
    (r"(^|\.)mask_tokens?(\.\d+)?$", "mask token", "not part of an encoder"),
    (
        r"(^|\.)(decoder\w*|dense_decoder|densify_\w+|pretext_neck|regressor\w*|encoder_to_decoder\w*|alignment_encoder)\.",
        "decoder",
        "not part of an encoder",
    ),
    (r"(^|\.)decoder_pos_embed$", "decoder", "not part of an encoder"),
    (r"(^|\.)hog_enc\.", "HOG", "of the method's target"),
    (r"^(imn_[ms]|norm_black)$", "statistics of images", "of the method's target"),
    (r"(^|\.)(lm_head|pred|dino_head|ibot_head|projectors?)\.", "head of pretraining", "not part of an encoder"),
    (r"(^|\.)(head|head_dist|classifier|fc)\.((fc|l)\.)?(weight|bias)$", "head", "not used"),
    (r"(^|\.)(local_)?cls_norm\.", "norm of the class token", "not part of an encoder"),
    (r"(^|\.)num_batches_tracked$", "num_batches_tracked", "computed"),
)

# names at which the network of a file begins; what stands in front of them is a prefix
BEGINNINGS = re.compile(
    r"(?:^|^(.*?\.))(?:patch_embed\.proj\.weight|patch_embed\.projection\.weight|downsample_layers\.0\.0\.(?:weight|kernel)"
    r"|embeddings\.patch_embeddings\.(?:projection\.)?weight|embedder\.embedder\.convolution\.weight|conv1\.weight"
    r"|stem\.0\.weight|initial_conv\.0\.weight)$"
)


def layout_of(names: Mapping[str, Any]) -> str | None:
    """Which layout these names are of; None for one that is not known, and for timm's own."""
    return next((kind for kind, found, _ in LAYOUTS if any(re.search(found, name) for name in names)), None)


def statistics_of(layout: str | None) -> dict[str, Any] | None:
    """Mean and deviation that the official code of a layout standardises images in [0, 1] with."""
    found = next((statistics for kind, _, statistics in LAYOUTS if kind == layout), None)
    return None if found is None else {name: list(values) for name, values in found.items()}


def beside(name: str) -> tuple[str, str] | None:
    """What a name of a file is part of, and why it is not taken; None of what an encoder has."""
    return next(((group, why) for found, group, why in BESIDE if re.search(found, name)), None)


def prefixes(names: Mapping[str, Any]) -> list[str]:
    """What stands in front of an encoder's names in a file, the likeliest first: a network that was only trained with
    (a student of DINO, CAE's teacher) comes last."""
    found = {match.group(1) or "" for name in names if (match := BEGINNINGS.match(name))} | {""}
    encoder = any("encoder." in prefix for prefix in found)

    def rank(prefix: str) -> tuple[bool, bool, bool, int]:
        return prefix == "" and len(found) > 1, "student" in prefix, encoder and "teacher" in prefix, len(prefix)

    return sorted(found, key=rank)


def without(weights: Mapping[str, Tensor], prefix: str) -> Weights:
    """The weights whose names begin so, without that."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


# -- as timm calls them ------------------------------------------------------------------------------------------------

TRANSFORMERS = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.(position_embeddings)$", "pos_embed"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.layers\.(\d+)\.(blocks|downsample)\.", r"layers.\1.\2."),
    (r"^(encoder\.)?layer\.(\d+)\.", r"blocks.\2."),
    (r"\.attention\.(attention|self)\.", ".attn."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1_proj."),
    (r"\.attn\.query\.", ".attn.q_proj."),
    (r"\.attn\.key\.", ".attn.k_proj."),
    (r"\.attn\.value\.", ".attn.v_proj."),
    (r"\.attn\.relative_position_bias\.", ".attn."),
    (r"\.attn\.continuous_position_bias_mlp\.", ".attn.cpb_mlp."),
    (r"^encoder\.relative_position_bias\.", "rel_pos_bias."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.lambda_([12])$", r".gamma_\1"),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
    (r"^layernorm\.", "norm."),
    (r"^pooler\.layernorm\.", "fc_norm."),
)
TRANSFORMERS_CONVNEXT = (
    (r"^embeddings\.patch_embeddings\.", "downsample_layers.0.0."),
    (r"^embeddings\.layernorm\.", "downsample_layers.0.1."),
    (r"^encoder\.stages\.(\d+)\.downsampling_layer\.", r"downsample_layers.\1."),
    (r"^encoder\.stages\.(\d+)\.layers\.", r"stages.\1."),
    (r"\.grn\.weight$", ".grn.gamma"),
    (r"\.grn\.bias$", ".grn.beta"),
    (r"\.layernorm\.", ".norm."),
    (r"\.layer_scale_parameter$", ".gamma"),
    (r"^layernorm\.", "norm."),
)
# rows of pixels come in timm's order of a ResNet's convolutions: from 1
TRANSFORMERS_RESNET = re.compile(
    r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.(?:layer\.(\d+)|shortcut)\.(convolution|normalization)\.(.+)$"
)


def as_timm(weights: Weights) -> Weights:
    """Weights of a known layout, without their prefix, under timm's names, or those that timm's filters take."""
    names = weights.keys()
    if any(name.startswith("embedder.embedder.") for name in names):
        return {_resnet_name(name): value for name, value in weights.items()}
    if "embeddings.patch_embeddings.weight" in names and any(".dwconv." in name for name in names):
        return {_renamed(name, TRANSFORMERS_CONVNEXT): value for name, value in weights.items()}
    if any(name.startswith("embeddings.patch_embeddings.") for name in names):
        gated = any(".gate_proj." in name for name in names)
        up = ((r"\.mlp\.up_proj\.", ".mlp.fc1_x." if gated else ".mlp.fc1."),)
        weights = {_renamed(name, TRANSFORMERS + up): value for name, value in weights.items()}
    elif any(name.endswith(".kernel") for name in names):
        weights = _dense(weights)
    elif "norm.0.weight" in names and any(re.match(r"(blocks|layers)\.0\.", name) for name in names):
        weights = _localmim(weights)
    return {_dino_name(name): value for name, value in weights.items()}


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for found, new in table:
        name = re.sub(found, new, name)
    return name


def _resnet_name(name: str) -> str:
    name = name.replace("embedder.embedder.convolution.", "conv1.").replace("embedder.embedder.normalization.", "bn1.")
    if (match := TRANSFORMERS_RESNET.match(name)) is None:
        return name
    stage, layer, number, kind, rest = match.groups()
    if number is None:
        part = f"downsample.{0 if kind == 'convolution' else 1}"
    else:
        part = f"{'conv' if kind == 'convolution' else 'bn'}{int(number) + 1}"
    return f"layer{int(stage) + 1}.{layer}.{part}.{rest}"


def _dino_name(name: str) -> str:
    """DINOv2's chunks of blocks count on from chunk to chunk, so that the second number is that of the block."""
    name = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)
    return {"register_tokens": "reg_token"}.get(name, name)


def _dense(weights: Weights) -> Weights:
    """FCMAE's sparse layers as dense ones: kernels [places, in, out] or [places, channels], whose places run by columns."""
    made = {}
    for name, value in weights.items():
        if name.endswith(".kernel"):
            side = round(value.shape[0] ** 0.5)
            value = value.unsqueeze(1) if value.ndim == 2 else value  # depth-wise
            value = value.permute(2, 1, 0).unflatten(2, (side, side)).transpose(3, 2).contiguous()
            name = name.removesuffix("kernel") + "weight"
        else:
            name = re.sub(r"\.(ln|linear)\.(weight|bias)$", r".\2", name)
            value = value.reshape(-1) if name.endswith(".bias") else value
        made[name] = value
    return made


def _localmim(weights: Weights) -> Weights:
    """LocalMIM has a norm for each of its taps, of which the last stands behind the last block. Its Swin joins neighbours
    row by row (right, then down) where all others join them column by column, so the second and third quarter of what
    each merging takes in change places."""
    last = max(int(match.group(1)) for name in weights if (match := re.match(r"norm\.(\d+)\.", name)))
    made = {}
    for name, value in weights.items():
        if match := re.match(r"norm\.(\d+)\.(.+)$", name):
            if int(match.group(1)) != last:
                made["decoder.taps." + name] = value
                continue
            name = f"norm.{match.group(2)}"
        elif re.match(r"layers\.\d+\.downsample\.(norm|reduction)\.", name):
            first, second, third, fourth = value.chunk(4, dim=-1)
            value = torch.cat((first, third, second, fourth), dim=-1)
        made[name] = value
    return made


# -- which network -----------------------------------------------------------------------------------------------------

VITS = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge", 1536: "giant"}
VIT_NAMES = {"huge": "vit_huge_patch14_224", "giant": "vit_giant_patch14_224"}
DEPTHS = {"tiny": 12, "small": 12, "base": 12, "large": 24, "huge": 32, "giant": 40}
DINOV3 = {
    384: "vit_small_patch16_dinov3",
    768: "vit_base_patch16_dinov3",
    1024: "vit_large_patch16_dinov3",
    1280: "vit_huge_plus_patch16_dinov3",
    4096: "vit_7b_patch16_dinov3",
}
RESNETS: dict[tuple[bool, tuple[int, ...]], str] = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (2, 2, 2, 2)): "resnet26",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
    (True, (3, 24, 36, 3)): "resnet200",
}
CONVNEXTS: dict[tuple[int, tuple[int, ...]], str] = {
    (40, (2, 2, 6, 2)): "atto",
    (48, (2, 2, 6, 2)): "femto",
    (64, (2, 2, 6, 2)): "pico",
    (80, (2, 2, 8, 2)): "nano",
    (96, (3, 3, 9, 3)): "tiny",
    (96, (3, 3, 27, 3)): "small",
    (128, (3, 3, 27, 3)): "base",
    (192, (3, 3, 27, 3)): "large",
    (256, (3, 3, 27, 3)): "xlarge",
    (352, (3, 3, 27, 3)): "huge",
}
SWINS: dict[tuple[int, tuple[int, ...]], str] = {
    (96, (2, 2, 6, 2)): "tiny",
    (96, (2, 2, 18, 2)): "small",
    (128, (2, 2, 18, 2)): "base",
    (192, (2, 2, 18, 2)): "large",
}
HEADS = {"tiny": 3, "small": 6, "base": 12, "large": 16, "huge": 16, "giant": 16}
Network = dict[str, Any]


def network_of(weights: Mapping[str, Tensor]) -> Network | None:
    """What `create_arguments` would take to make the network of a file: `name`, `image_size`, `patch_size` and what its name
    does not say of it. By names and shapes; None where they are of no family that is known here.

    The width of an attention's heads cannot be seen: it is 64, or 80 of a ViT-H/14 that is 1280 wide, 88 of a ViT-g/14 that is 1408 wide.
    """
    for prefix in prefixes(weights):
        named = as_timm(without(weights, prefix))
        try:
            found = next((one for look in (_swin, _vit, _convnext, _resnet) if (one := look(named))), None)
        except (KeyError, IndexError, ValueError):  # of a file that lacks some of its names
            found = None
        if found is not None:
            return found
    return None


def told(network: Network) -> str:
    """A network as flags of the command line."""
    rest = {name: value for name, value in network.items() if name not in ("name", "image_size", "patch_size")}
    sets = "".join(f" --set encoder.{name}={str(value).replace(' ', '')}" for name, value in rest.items())
    patch = f" --patch-size {network['patch_size']}" if network.get("patch_size") else ""
    return f"--encoder {network['name']}{patch}{sets}"


def _count(weights: Mapping[str, Any], pattern: str) -> int:
    """How many numbers there are, from 0, at a place of names."""
    return 1 + max((int(match.group(1)) for name in weights if (match := re.match(pattern, name))), default=-1)


def _differing(said: Network, default: Network) -> Network:
    return {name: value for name, value in said.items() if default.get(name) != value}


def _vit(weights: Mapping[str, Tensor]) -> Network | None:
    depth, projection = _count(weights, r"blocks\.(\d+)\.norm1\."), weights.get("patch_embed.proj.weight")
    if projection is None or not depth or projection.ndim != 4:
        return None
    width, patch = projection.shape[0], projection.shape[2]
    if any(weights[name].shape[-1] != width for name in weights if re.match(r"blocks\.\d+\.norm1\.weight", name)):
        return None  # wider from stage to stage: Hiera's
    table = weights.get(
        "blocks.0.attn.relative_position_bias_table", weights.get("rel_pos_bias.relative_position_bias_table")
    )
    registers = next((weights[name].shape[1] for name in ("storage_tokens", "reg_token") if name in weights), 0)
    rotary = "storage_tokens" in weights or (registers > 0 and "pos_embed" not in weights)
    if any(".mlp.fc1_g." in name or ".attn.inner_attn_ln." in name for name in weights) and not rotary:
        return None  # EVA-02's
    heads = max(1, width // 64)
    if table is not None:
        heads = table.shape[1]
    elif width in (1280, 1408) and patch == 14:
        heads = 16
    kind = VITS.get(width, "base")
    default = {"embed_dim": width if width in VITS else None, "depth": DEPTHS[kind], "num_heads": HEADS[kind]}
    said: Network = {"embed_dim": width, "depth": depth, "num_heads": heads}
    if rotary:
        default = {"embed_dim": width if width in DINOV3 else None, "depth": DEPTHS[kind] if width < 4096 else 40}
        default["num_heads"] = 32 if width == 4096 else width // 64 if width in DINOV3 else 6
        said["num_heads"] = 32 if width == 4096 else heads
        name = DINOV3.get(width, "vit_small_patch16_dinov3")
        if registers != 4:
            said["num_reg_tokens"] = registers
        bias = weights.get("blocks.0.attn.qkv.bias")
        if bias is not None and (bias[:width].any() or bias[-width:].any()):
            said["qkv_bias"] = True
        if (fitting := weights.get("blocks.0.mlp.fc1.weight")) is not None and fitting.shape[0] != 4 * width:
            said["mlp_ratio"] = fitting.shape[0] / width
        return {"name": name, "image_size": (256, 256), "patch_size": patch} | _differing(said, default)
    if table is not None:
        side = (round((table.shape[0] - 3) ** 0.5) + 1) // 2
        kind = "large" if width == 1024 else "base"
        default = {
            "embed_dim": {"large": 1024, "base": 768}[kind],
            "depth": DEPTHS[kind],
            "num_heads": 16 if width == 1024 else 12,
        }
        if "blocks.0.gamma_1" not in weights:
            said["init_values"] = None
        if "pos_embed" in weights:
            said["use_abs_pos_emb"] = True
        found = {"name": f"beit_{kind}_patch16_224", "image_size": (side * patch, side * patch), "patch_size": patch}
        return found | _differing(said, default | {"init_values": 0.1})
    size = (224, 224)
    if (positions := weights.get("pos_embed")) is not None:
        count = positions.shape[-2]
        sides = [round((count - prefix) ** 0.5) for prefix in (1, 0, 1 + registers)]
        fitting = [side for side, prefix in zip(sides, (1, 0, 1 + registers), strict=True) if side**2 == count - prefix]
        size = (fitting[0] * patch, fitting[0] * patch) if fitting else size
        if "cls_token" in weights and fitting and fitting[0] ** 2 == count:
            said["no_embed_class"] = True
    if "norm_pre.weight" in weights:
        said["pre_norm"] = True
    if "cls_token" not in weights:
        said |= {"class_token": False}
    if registers:
        said |= {"reg_tokens": registers, "no_embed_class": True}
    scale = weights.get("blocks.0.ls1.gamma", weights.get("blocks.0.gamma_1"))
    if scale is not None:
        said["init_values"] = 0.1 if "blocks.0.gamma_1" in weights else 1e-5
    inner, outer = weights["blocks.0.mlp.fc1.weight"].shape[0], weights["blocks.0.mlp.fc2.weight"].shape[1]
    if inner == 2 * outer:  # a gated MLP, of which one is known
        if (width, depth) != (1536, 40):
            return None
        name = f"vit_giant_patch14_{'reg4_' if registers else ''}dinov2"
        return {"name": name, "image_size": size, "patch_size": patch}
    if inner != 4 * width:
        said["mlp_ratio"] = inner / width
    name = VIT_NAMES.get(kind, f"vit_{kind}_patch16_224")
    return {"name": name, "image_size": size, "patch_size": patch} | _differing(said, default)


def _swin(weights: Mapping[str, Tensor]) -> Network | None:
    first = "layers.0.blocks.0.attn."
    second = f"{first}logit_scale" in weights
    if not second and f"{first}relative_position_bias_table" not in weights:
        return None
    stages = _count(weights, r"layers\.(\d+)\.blocks\.")
    depths = [_count(weights, rf"layers\.{stage}\.blocks\.(\d+)\.") for stage in range(stages)]
    projection = weights["patch_embed.proj.weight"]
    width, patch = projection.shape[0], projection.shape[2]
    heads = [
        weights[f"layers.{stage}.blocks.0.attn.{'logit_scale' if second else 'relative_position_bias_table'}"].shape[
            0 if second else 1
        ]
        for stage in range(stages)
    ]
    kind = SWINS.get((width, tuple(depths)), "tiny")
    default = {"embed_dim": None, "depths": None, "num_heads": None}
    if (width, tuple(depths)) in SWINS:
        default = {
            "embed_dim": width,
            "depths": depths,
            "num_heads": [width // 32 * 2**stage for stage in range(stages)],
        }
    said: Network = {"embed_dim": width, "depths": depths, "num_heads": heads}
    if second:
        table = weights.get(f"{first}relative_coords_table")  # [1, 2w - 1, 2w - 1, 2]
        window = 8 if table is None else (table.shape[1] + 1) // 2
        name, own, unit = f"swinv2_{kind if kind != 'large' else 'base'}_window8_256", 8, 32
        if kind == "large":
            default = {}
    else:
        window = (round(weights[f"{first}relative_position_bias_table"].shape[0] ** 0.5) + 1) // 2
        name, own, unit = f"swin_{kind}_patch4_window7_224", 7, 32
    side = window * unit * patch // 4
    said["window_size"] = window
    return {"name": name, "image_size": (side, side), "patch_size": patch} | _differing(
        said, default | {"window_size": own}
    )


def _convnext(weights: Mapping[str, Tensor]) -> Network | None:
    stem = next((weights[name] for name in ("downsample_layers.0.0.weight", "stem.0.weight") if name in weights), None)
    if stem is None or not any(re.match(r"stages\.0\.(blocks\.)?0\.(dwconv|conv_dw)\.", name) for name in weights):
        return None
    depths, widths = [], []
    for stage in range(_count(weights, r"stages\.(\d+)\.")):
        depths.append(_count(weights, rf"stages\.{stage}\.(?:blocks\.)?(\d+)\."))
        widths.append(
            next(v.shape[0] for n, v in weights.items() if re.match(rf"stages\.{stage}\..*(dwconv|conv_dw)\.bias", n))
        )
    family = "convnextv2" if any(".grn." in name for name in weights) else "convnext"
    kind = CONVNEXTS.get((widths[0], tuple(depths)))
    if kind is None or widths != [widths[0] * 2**stage for stage in range(len(widths))]:
        return {"name": f"{family}_tiny", "image_size": (224, 224), "depths": depths, "dims": widths}
    return {"name": f"{family}_{kind}", "image_size": (224, 224)}


def _resnet(weights: Mapping[str, Tensor]) -> Network | None:
    if "conv1.weight" not in weights or "layer1.0.conv1.weight" not in weights:
        return None
    depths = tuple(_count(weights, rf"layer{stage}\.(\d+)\.") for stage in range(1, 5))
    deep = "layer1.0.conv3.weight" in weights
    name = RESNETS.get((deep, depths))
    widths = [weights[f"layer{stage}.0.conv1.weight"].shape[0] for stage in range(1, 5)]
    own = {} if widths == [64, 128, 256, 512] else {"channels": widths}
    if name is None:
        return {"name": "resnet50" if deep else "resnet18", "image_size": (224, 224), "layers": list(depths), **own}
    return {"name": name, "image_size": (224, 224), **own}


def require_network(weights: Mapping[str, Tensor], what: str) -> Network:
    """As `network_of`.

    Raises:
        InputError: the network cannot be told; names three of the file's weights.
    """
    found = network_of(weights)
    if found is None:
        raise InputError(
            f"{what}: which network it is of cannot be told from its names ({', '.join(list(weights)[:3])}, ...); "
            "pretrain --encoder NAME --init FILE takes what fits by name"
        )
    return found
