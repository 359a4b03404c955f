"""Networks as transformers' own classes, which need no code of ours: ViT, Swin, Swin V2, ResNet, ConvNeXt and ConvNeXt V2.

Which weights are which was read off both libraries; that the numbers agree is tried at every export.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from underpaint.backbones.layouts import Weights
from underpaint.exporting.subject import Outputs, Subject, Written
from underpaint.exporting.weights import timm_network
from underpaint.reading import one_line

Built = tuple[str, dict[str, Any], Weights]  # the beginning of the classes' names, the settings, weights by their names
SERVED = "ViT (with a class token), Swin, Swin V2, ResNet, ConvNeXt and ConvNeXt V2 have classes there"
INSTEAD = "timm, onnx, torchscript or safetensors"


def write_transformers(subject: Subject, folder: Path) -> Written:
    """`config.json`, `model.safetensors` and, of ordinary colour images, `preprocessor_config.json`."""
    import transformers

    network = timm_network(subject, "transformers")
    family = next((build for kind, build in FAMILIES if type(network) is kind), None)
    if family is None:
        raise subject.refused("transformers", f"{type(network).__name__} is not among its classes: {SERVED}", INSTEAD)
    try:
        name, settings, weights = family(network, subject)
    except Lacking as error:
        raise subject.refused("transformers", f"{error}; {SERVED}", INSTEAD) from error
    if subject.task == "encoder":
        weights = {key: value for key, value in weights.items() if not key.startswith("classifier")}
        kind, chosen = f"{name}Model", {}
    else:
        kind = f"{name}ForImageClassification"
        labels = subject.classes or [subject.names[0]]
        chosen = {"id2label": dict(enumerate(labels)), "label2id": {label: k for k, label in enumerate(labels)}}
        if subject.task == "regression":
            chosen |= {"problem_type": "regression"}
        stem = getattr(transformers, kind).base_model_prefix
        weights = {key if key.startswith("classifier") else f"{stem}.{key}": value for key, value in weights.items()}
    with _quiet(transformers):
        config = getattr(transformers, f"{name}Config")(**settings, **chosen)
        model: Any = getattr(transformers, kind)(config).eval()
        unused = {key: torch.zeros_like(value) for key, value in model.state_dict().items() if _is_unused(key)}
        try:
            model.load_state_dict({**unused, **weights})
        except RuntimeError as error:
            raise subject.refused(
                "transformers",
                f"its {kind} (transformers {transformers.__version__}; 5 or newer is needed) is another network: "
                f"{one_line(error)[:200]}",
                INSTEAD,
            ) from error
        model.save_pretrained(folder)
        notes = _processor(transformers, subject, folder)
        auto: Any = (
            transformers.AutoModel if subject.task == "encoder" else transformers.AutoModelForImageClassification
        )
        made: Any = auto.from_pretrained(folder).eval()
    first = 1 + getattr(config, "num_register_tokens", 0) if name.startswith(("ViT", "Dinov2")) else None

    def read(images: Tensor) -> Outputs:
        found = made(subject.bundle.standardize(images))
        if subject.task != "encoder":
            return {subject.names[0]: found.logits}
        last = found.last_hidden_state
        patches = last.flatten(2).transpose(1, 2) if last.ndim == 4 else last[:, first or 0 :]
        return {"pooled": patches.mean(1), "patches": patches}

    said = {"transformers": transformers.__version__, "class": kind}
    return Written(read, _usage(subject, first, network), said, notes)


class Lacking(Exception):
    """What a network has that no class of transformers has."""


def _is_unused(key: str) -> bool:
    """What a class has and an encoder has not: it is 0, and says so, in place of random numbers."""
    return key.startswith("pooler.dense.") or key.endswith("embeddings.mask_token")


def _processor(transformers: Any, subject: Subject, folder: Path) -> tuple[str, ...]:
    """Resized so that the short side fits, then the centre, as our own; where images are others than 8-bit colour, nothing."""
    if len(subject.mean) != 3 or not subject.scaling.plain:
        return (
            "There is no image processor for images of this kind: bring them to [0, 1] as `encoder.json` of the run says, "
            "subtract the mean and divide by the deviation.",
        )
    height, width = subject.size
    square = height == width
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": height} if square else {"height": height, "width": width},
        do_center_crop=square,
        crop_size={"height": height, "width": width},
        resample=2,  # bilinear
        image_mean=subject.mean,
        image_std=subject.std,
    )
    processor.save_pretrained(folder)
    return (
        () if square else ("The image processor resizes without keeping the aspect, where underpaint cuts the centre.",)
    )


def _usage(subject: Subject, first: int | None, network: Any) -> str:
    auto = "AutoModel" if subject.task == "encoder" else "AutoModelForImageClassification"
    processor = len(subject.mean) == 3 and subject.scaling.plain
    names = f"AutoImageProcessor, {auto}" if processor else auto
    begin = f'from transformers import {names}\n\nmodel = {auto}.from_pretrained("PATH").eval()\n'
    if processor:
        begin += (
            'processor = AutoImageProcessor.from_pretrained("PATH")\nimages = processor(image, return_tensors="pt")\n'
        )
    call = "model(**images)" if processor else "model(images)"
    if subject.task != "encoder":
        return begin + f"{subject.names[0]} = {call}.logits\n"
    if first is not None:
        tokens = "the first is the class token" if first == 1 else f"the first {first} are class and register tokens"
        return begin + f"patches = {call}.last_hidden_state[:, {first}:]  # {tokens}\nfeature = patches.mean(1)\n"
    if isinstance(network, SwinTransformer | SwinTransformerV2):
        return begin + f"patches = {call}.last_hidden_state\nfeature = patches.mean(1)\n"
    return begin + f"map = {call}.last_hidden_state\nfeature = map.mean((2, 3))\n"


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without bars and notes; what was set is put back."""
    logs = transformers.utils.logging
    verbosity, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    try:
        logs.set_verbosity_error()
        logs.disable_progress_bar()
        yield
    finally:
        logs.set_verbosity(verbosity)
        if bars:
            logs.enable_progress_bar()


# -- families ----------------------------------------------------------------------------------------------------------


def _vit(network: Any, subject: Subject) -> Built:
    """ViT; with a head DINOv2's class, whose head reads the mean of the patches beside the class token, which here counts
    nothing: that of ViT reads the class token alone. With register tokens DINOv2's class that has some."""
    own, registers, block = network.state_dict(), network.num_reg_tokens, network.blocks[0]
    (height, width), patch = subject.size, network.patch_embed.patch_size[0]
    headed = "head.weight" in own
    if network.cls_token is None:
        raise Lacking("it has no class token")
    if (headed or registers) and height != width:
        raise Lacking("images that are not square, with a head or register tokens")
    own = {name: value for name, value in own.items() if name not in ("head.weight", "head.bias")}
    positions, cls = own.pop("pos_embed"), own.pop("cls_token")
    made: Weights = {}
    tokens = own.pop("reg_token", torch.zeros(1, 0, network.embed_dim))
    if network.no_embed_class:  # class and register tokens have no positions
        positions = torch.cat([torch.zeros_like(cls), positions], 1)
    elif registers:
        tokens = tokens + positions[:, 1 : 1 + registers]
        positions = torch.cat([positions[:, :1], positions[:, 1 + registers :]], 1)
    made |= {"embeddings.cls_token": cls, "embeddings.position_embeddings": positions}
    dino = headed or registers > 0
    settings = {
        "hidden_size": network.embed_dim,
        "num_hidden_layers": len(network.blocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": height if height == width else [height, width],
        "patch_size": patch,
        "num_channels": len(subject.mean),
        "qkv_bias": block.attn.qkv.bias is not None,
        "layer_norm_eps": network.norm.eps,
        "hidden_act": "gelu",
    }
    hidden = block.mlp.fc1.out_features
    if dino:
        if hidden % network.embed_dim:
            raise Lacking("its blocks are no whole number of times wider inside")
        settings["mlp_ratio"] = hidden // network.embed_dim
        table = DINO
        for number in range(len(network.blocks)):
            for which in "12":
                scale = own.pop(f"blocks.{number}.ls{which}.gamma", torch.ones(network.embed_dim))
                made[f"encoder.layer.{number}.layer_scale{which}.lambda1"] = scale
    else:
        settings["intermediate_size"] = hidden
        own, table = _scaled(own), VIT
    made |= {_renamed(name, table): value for name, value in _apart(own).items()}
    if registers:
        made["embeddings.register_tokens"] = tokens
        settings["num_register_tokens"] = registers
    if headed:
        head = network.head
        made["classifier.weight"] = torch.cat([torch.zeros_like(head.weight), head.weight], 1)
        made["classifier.bias"] = head.bias
    return ("Dinov2WithRegisters" if registers else "Dinov2" if dino else "ViT"), settings, made


def _swin(network: Any, subject: Subject) -> Built:
    blocks = [block for layer in network.layers for block in layer.blocks]
    windows = {tuple(block.window_size) for block in blocks}
    if len(windows) > 1 or len(set(next(iter(windows)))) > 1:
        raise Lacking("its windows are not all alike, since a stage is smaller than they are")
    settings = _swin_settings(network, subject) | {"window_size": next(iter(windows))[0]}
    own = {_moved(name): value for name, value in network.state_dict().items() if not name.startswith("head.")}
    made = {_renamed(name, SWIN): value for name, value in _apart(own).items()}
    return "Swin", settings, made | _head(network.head.fc, "classifier")


def _swin_v2(network: Any, subject: Subject) -> Built:
    blocks = [block for layer in network.layers for block in layer.blocks]
    windows = {tuple(block.window_size) for block in blocks}
    if len(windows) > 1 or len(set(next(iter(windows)))) > 1:
        raise Lacking("its windows are not all alike, since a stage is smaller than they are")
    sizes = [max(layer.blocks[0].attn.pretrained_window_size) for layer in network.layers]
    settings = _swin_settings(network, subject) | {
        "window_size": next(iter(windows))[0],
        "pretrained_window_sizes": sizes,
    }
    made: Weights = {}
    for name, value in network.state_dict().items():
        if name.startswith("head."):
            continue
        if name.endswith(".attn.qkv.weight"):
            for which, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                made[_renamed(_moved(name.replace("qkv", which)), SWIN_V2)] = part
        else:
            made[_renamed(_moved(name), SWIN_V2)] = value
    return "Swinv2", settings, made | _head(network.head.fc, "classifier")


def _swin_settings(network: Any, subject: Subject) -> dict[str, Any]:
    block, (height, width) = network.layers[0].blocks[0], subject.size
    return {
        "image_size": height if height == width else [height, width],
        "patch_size": network.patch_embed.patch_size[0],
        "num_channels": len(subject.mean),
        "embed_dim": network.embed_dim,
        "depths": [len(layer.blocks) for layer in network.layers],
        "num_heads": [layer.blocks[0].attn.num_heads for layer in network.layers],
        "mlp_ratio": block.mlp.fc1.out_features / network.embed_dim,
        "drop_path_rate": 0.0,
        "layer_norm_eps": network.norm.eps,
    }


def _resnet(network: Any, subject: Subject) -> Built:
    stages = [network.layer1, network.layer2, network.layer3, network.layer4]
    block = stages[0][0]
    plain = isinstance(network.conv1, torch.nn.Conv2d) and type(block) in (BasicBlock, Bottleneck)
    if not plain:
        raise Lacking("its stem or blocks are no plain ResNet's")
    deep = type(block) is Bottleneck
    settings = {
        "num_channels": len(subject.mean),
        "embedding_size": network.conv1.out_channels,
        "hidden_sizes": [(stage[0].conv3 if deep else stage[0].conv2).out_channels for stage in stages],
        "depths": [len(stage) for stage in stages],
        "layer_type": "bottleneck" if deep else "basic",
        "hidden_act": "relu",
    }
    made = {}
    for name, value in network.state_dict().items():
        if not name.startswith("fc."):
            made[_resnet_name(name)] = value
    return "ResNet", settings, made | _head(network.fc, "classifier.1")


def _resnet_name(name: str) -> str:
    kinds = {"conv": "convolution", "bn": "normalization"}
    if match := re.match(r"(conv|bn)1\.(.+)$", name):
        return f"embedder.embedder.{kinds[match[1]]}.{match[2]}"
    if match := re.match(r"layer(\d)\.(\d+)\.(conv|bn)(\d)\.(.+)$", name):
        stage, layer, kind, number, rest = match.groups()
        return f"encoder.stages.{int(stage) - 1}.layers.{layer}.layer.{int(number) - 1}.{kinds[kind]}.{rest}"
    if match := re.match(r"layer(\d)\.(\d+)\.downsample\.([01])\.(.+)$", name):
        stage, layer, which, rest = match.groups()
        return f"encoder.stages.{int(stage) - 1}.layers.{layer}.shortcut.{list(kinds.values())[int(which)]}.{rest}"
    raise Lacking(f"it has {name.rpartition('.')[0]}, which no plain ResNet has")


def _convnext(network: Any, subject: Subject) -> Built:
    own = network.state_dict()
    second = any(".mlp.grn." in name for name in own)
    gammas = [value for name, value in own.items() if name.endswith(".gamma")]
    settings = {
        "num_channels": len(subject.mean),
        "patch_size": network.stem[0].kernel_size[0],
        "num_stages": len(network.stages),
        "hidden_sizes": [stage.blocks[-1].conv_dw.out_channels for stage in network.stages],
        "depths": [len(stage.blocks) for stage in network.stages],
        "layer_norm_eps": 1e-6,
        "drop_path_rate": 0.0,
        "hidden_act": "gelu",
    }
    if not second:
        settings["layer_scale_init_value"] = 1e-6 if gammas else 0.0
    elif gammas:
        raise Lacking("it has layer scale beside GRN")
    made: Weights = {}
    for name, value in own.items():
        if name.startswith("head.fc."):
            continue
        if ".mlp.fc" in name and value.ndim == 4:
            value = value.flatten(1)  # convolutions of one pixel
        if ".grn." in name:
            value = value.view(1, 1, 1, -1)
        made[_renamed(name, CONVNEXT)] = value
    return ("ConvNextV2" if second else "ConvNext"), settings, made | _head(network.head.fc, "classifier")


FAMILIES: tuple[tuple[type, Callable[[Any, Subject], Built]], ...] = (
    (VisionTransformer, _vit),
    (SwinTransformer, _swin),
    (SwinTransformerV2, _swin_v2),
    (ResNet, _resnet),
    (ConvNeXt, _convnext),
)
Table = tuple[tuple[str, str], ...]
VIT: Table = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.(\d+)\.", r"layers.\1."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.([qkv])\.", r".attention.\1_proj."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"^norm\.", "layernorm."),
)
DINO: Table = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.(\d+)\.", r"encoder.layer.\1."),
    (r"\.attn\.([qkv])\.", r".attention.\1_proj."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"^norm\.", "layernorm."),
)
SWIN: Table = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^patch_embed\.norm\.", "embeddings.norm."),
    (r"^layers\.", "encoder.layers."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.([qkv])\.", r".attention.\1_proj."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.attn\.relative_position_bias_table$", ".attention.relative_position_bias.relative_position_bias_table"),
    (r"^norm\.", "layernorm."),
)
SWIN_V2: Table = (
    *SWIN[:5],
    (r"\.attn\.q_bias$", ".attention.self.query.bias"),
    (r"\.attn\.v_bias$", ".attention.self.value.bias"),
    (r"\.attn\.(query|key|value)\.", r".attention.self.\1."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.logit_scale$", ".attention.self.logit_scale"),
    (r"\.attn\.cpb_mlp\.", ".attention.self.continuous_position_bias_mlp."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"^norm\.", "layernorm."),
)
CONVNEXT: Table = (
    (r"^stem\.0\.", "embeddings.patch_embeddings."),
    (r"^stem\.1\.", "embeddings.layernorm."),
    (r"^stages\.(\d+)\.blocks\.", r"encoder.stages.\1.layers."),
    (r"^stages\.(\d+)\.downsample\.", r"encoder.stages.\1.downsampling_layer."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.norm\.", ".layernorm."),
    (r"\.mlp\.fc1\.", ".pwconv1."),
    (r"\.mlp\.fc2\.", ".pwconv2."),
    (r"\.mlp\.grn\.", ".grn."),
    (r"\.gamma$", ".layer_scale_parameter"),
    (r"^head\.layernorm\.", "layernorm."),
)


def _renamed(name: str, table: Table) -> str:
    for found, new in table:
        name = re.sub(found, new, name)
    return name


def _moved(name: str) -> str:
    """The merging of patches that timm has at the beginning of a stage stands at the end of the one before it there."""
    return re.sub(r"^layers\.(\d+)\.downsample\.", lambda match: f"layers.{int(match[1]) - 1}.downsample.", name)


def _apart(weights: Weights) -> Weights:
    """Queries, keys and values each for itself."""
    made: Weights = {}
    for name, value in weights.items():
        if ".attn.qkv." in name:
            made |= {name.replace("qkv", w): part for w, part in zip("qkv", value.chunk(3), strict=True)}
        else:
            made[name] = value
    return made


def _scaled(weights: Weights) -> Weights:
    """LayerScale multiplied into what it scales."""
    made = dict(weights)
    for name, value in weights.items():
        if match := re.match(r"(blocks\.\d+\.)ls([12])\.gamma$", name):
            stem = match[1] + ("attn.proj." if match[2] == "1" else "mlp.fc2.")
            made[f"{stem}weight"] = made[f"{stem}weight"] * value[:, None]
            made[f"{stem}bias"] = made[f"{stem}bias"] * value
            del made[name]
    return made


def _head(linear: Any, name: str) -> Weights:
    """Of what has one."""
    return {f"{name}.{end}": value for end, value in linear.state_dict().items()}
