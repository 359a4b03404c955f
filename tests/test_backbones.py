from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import DropPath

import underpaint
from underpaint.backbones import TokenBackbone, create_arguments, from_arguments, save_encoder
from underpaint.backbones.weights import fill, init_from, read_weights
from underpaint.errors import InputError
from underpaint.evaluation.bundle import open_bundle
from underpaint.evaluation.finetune import classifier
from underpaint.patches import Standardize

SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 3, "num_heads": 2}


@pytest.mark.quick
@pytest.mark.parametrize(
    "name",
    ["vit_tiny_patch16_224", "vit_small_patch16_224", "deit3_small_patch16_224", "vit_base_patch16_clip_224"],
)
def test_vit_equals_timms_own_forward(name: str) -> None:
    torch.manual_seed(0)
    encoder = underpaint.encoder(name, image_size=(32, 64), patch_size=16, depth=2)
    assert isinstance(encoder, TokenBackbone)
    images = torch.randn(2, 3, 32, 64)
    encoder.eval()  # pyright: ignore[reportAttributeAccessIssue]
    features = encoder(images)
    model: Any = encoder.model
    torch.testing.assert_close(features.patches, model.forward_features(images)[:, model.num_prefix_tokens :])
    torch.testing.assert_close(features.pooled, model(images))


@pytest.mark.quick
def test_registers_and_no_class_position() -> None:
    encoder = underpaint.encoder("vit_tiny_patch16_224", image_size=32, patch_size=8, reg_tokens=3, no_embed_class=True)
    encoder.eval()  # pyright: ignore[reportAttributeAccessIssue]
    images = torch.randn(1, 3, 32, 32)
    model: Any = encoder.model
    torch.testing.assert_close(encoder(images).pooled, model(images))


@pytest.mark.quick
def test_a_subset_with_all_patches_equals_the_whole_in_any_order() -> None:
    encoder: Any = underpaint.encoder("vit_tiny_patch16_224", image_size=16, patch_size=4, **SMALL)
    images = torch.randn(2, 3, 16, 16)
    order = torch.stack([torch.randperm(16), torch.randperm(16)])
    whole = encoder.encode(encoder.embed(images)).tokens
    shuffled = encoder.encode(encoder.embed(images, order), order).tokens
    torch.testing.assert_close(shuffled, whole.gather(1, order[..., None].expand(-1, -1, 32)), atol=1e-5, rtol=1e-4)


@pytest.mark.quick
def test_taps_are_raw_block_outputs_without_prefix() -> None:
    encoder: Any = underpaint.encoder("vit_tiny_patch16_224", image_size=16, patch_size=4, **SMALL)
    encoded = encoder.encode(encoder.embed(torch.randn(2, 3, 16, 16)), taps=(0, 2))
    assert [tuple(t.shape) for t in encoded.taps] == [(2, 16, 32), (2, 16, 32)]
    torch.testing.assert_close(encoder.model.norm(encoded.taps[1]), encoded.tokens)


@pytest.mark.parametrize(
    ("name", "size", "channels"),
    [("resnet18", (64, 96), 5), ("convnext_atto", (64, 64), 1), ("swin_tiny_patch4_window7_224", (224, 224), 3)],
)
def test_map_backbones(name: str, size: tuple[int, int], channels: int) -> None:
    encoder = underpaint.encoder(name, image_size=size, channels=channels)
    encoder.eval()  # pyright: ignore[reportAttributeAccessIssue]
    images = torch.randn(2, channels, *size)
    with torch.no_grad():
        features = encoder(images)
        pyramid = encoder.pyramid(images)
    rows, columns = encoder.grid(*size)
    assert features.patches.shape == (2, rows * columns, encoder.dim)
    assert features.pooled.shape == (2, encoder.dim)
    for feature_map, stride in pyramid:
        assert feature_map.shape[-2:] == (size[0] // stride, size[1] // stride)
    assert not isinstance(encoder, TokenBackbone)


def drop_paths(model: Any) -> set[float]:
    """The rates above 0 in a timm model."""
    return {module.drop_prob for module in model.modules() if isinstance(module, DropPath) and module.drop_prob > 0}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "img_size": 224}),
        ("vit_tiny_patch16_224", SMALL),
        ("beit_base_patch16_224", SMALL),
        ("resnet10t", {}),
        ("convnext_atto", {}),
        ("efficientnet_lite0", {}),
    ],
)
def test_drop_path_is_said_and_0_unless_asked_for(name: str, own: dict[str, Any]) -> None:
    arguments = create_arguments(name, image_size=(224, 224), **own)
    assert not drop_paths(timm.create_model(**arguments))  # what encoder.json says, in anybody's hands
    assert arguments["drop_path_rate"] == 0
    assert not drop_paths(underpaint.encoder(name, image_size=224, **own))
    asked = create_arguments(name, image_size=(224, 224), drop_path_rate=0.25, **own)
    assert max(drop_paths(timm.create_model(**asked))) > 0.15  # some families give the last block less than all


@pytest.mark.quick
@pytest.mark.parametrize("name", ["ghostnet_050", "selecsls42"])
def test_encoders_that_cannot_drop_paths_are_built_all_the_same(name: str) -> None:
    assert "drop_path_rate" not in create_arguments(name, image_size=(64, 64))
    assert underpaint.encoder(name, image_size=64).dim > 0
    with pytest.raises(InputError, match=r"'drop_path_rate' is no part of|cannot build"):
        underpaint.encoder(name, image_size=64, drop_path_rate=0.1)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "own", "said"),
    [
        ("vit_tiny_patch16_224", {"img_size": [32, 32], "patch_size": 8, **SMALL}, {"drop_path_rate": 0.1}),
        # written before drop path was said: timm's default is 0.1
        ("swin_tiny_patch4_window7_224", {"img_size": [64, 64], "patch_size": 2, "embed_dim": 24}, {}),
    ],
)
def test_drop_path_of_pretraining_ends_with_it(
    name: str, own: dict[str, Any], said: dict[str, Any], tmp_path: Path
) -> None:
    arguments = {"model_name": name, "num_classes": 0, "in_chans": 3, "global_pool": "avg", **own, **said}
    if name.startswith("vit"):
        arguments["fc_norm"] = False
    pretrained = from_arguments(arguments)
    assert max(drop_paths(pretrained)) == pytest.approx(0.1)
    save_encoder(tmp_path, pretrained, arguments, Standardize([0.5] * 3, [0.25] * 3))
    bundle = open_bundle(str(tmp_path), image_size=(own["img_size"][0], own["img_size"][1]))
    assert not drop_paths(bundle.encoder)  # what segmentation and detection train
    assert not drop_paths(bundle.random_init(0).encoder)
    assert bundle.arguments["drop_path_rate"] == 0
    assert not drop_paths(classifier(bundle, 3, drop_path=0.0, head_scale=1.0))
    assert max(drop_paths(classifier(bundle, 3, drop_path=0.3, head_scale=1.0))) == pytest.approx(0.3)


@pytest.mark.quick
def test_bad_encoders_are_named() -> None:
    with pytest.raises(InputError, match="vit_tiny_patch16_224"):
        underpaint.encoder("vit_tinny_patch16_224")
    with pytest.raises(InputError, match=r"does not divide .*32x48; .* 2, 4, 8, 16"):
        underpaint.encoder("vit_tiny_patch16_224", image_size=(32, 48), patch_size=7)
    with pytest.raises(InputError, match=r"'widht' is no part of vit_tiny_patch16_224; there are: .*embed_dim"):
        underpaint.encoder("vit_tiny_patch16_224", widht=3)
    with pytest.raises(InputError, match="cannot build"):
        underpaint.encoder("vit_tiny_patch16_224", num_heads=0)
    with pytest.raises(ValueError, match="64x64 pixels; this encoder was built for 32x32"):
        underpaint.encoder("vit_tiny_patch16_224", image_size=32)(torch.zeros(1, 3, 64, 64))


def test_init_adapts_size_patch_and_channels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    public = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=64, **SMALL)
    file = tmp_path / "public.pth"
    torch.save({"model": {f"module.{k}": v for k, v in public.state_dict().items()}}, file)
    encoder: Any = underpaint.encoder("vit_tiny_patch16_224", image_size=(32, 48), patch_size=8, channels=5, **SMALL)
    matched, statistics = init_from(encoder, str(file))
    assert sorted(matched.adapted) == ["patch_embed.proj.weight", "pos_embed"]
    assert sorted(matched.left_out) == ["head.bias", "head.weight"]
    assert not matched.untouched
    assert statistics is None
    assert torch.equal(encoder.model.blocks[2].mlp.fc1.weight, public.blocks[2].mlp.fc1.weight)  # pyright: ignore
    assert "adapted" in str(matched)


@pytest.mark.quick
def test_init_keeps_features_where_only_the_grid_differs() -> None:
    """The same image twice as large, with patches twice as large, gives nearly the same tokens."""
    torch.manual_seed(0)
    first: Any = underpaint.encoder("vit_tiny_patch16_224", image_size=32, patch_size=8, **SMALL)
    second: Any = underpaint.encoder("vit_tiny_patch16_224", image_size=64, patch_size=16, **SMALL)
    fill(second.model, first.model.state_dict())
    images = torch.randn(2, 3, 4, 4)
    small = torch.nn.functional.interpolate(images, (32, 32), mode="bilinear")
    large = torch.nn.functional.interpolate(small, (64, 64), mode="bilinear")
    torch.testing.assert_close(second(large).pooled, first(small).pooled, atol=0.05, rtol=0)


@pytest.mark.quick
def test_init_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    encoder = underpaint.encoder("vit_tiny_patch16_224", image_size=16, patch_size=4, **SMALL)
    torch.save({"other.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="nothing matched"):
        init_from(encoder, str(tmp_path / "other.pth"))
    with pytest.raises(InputError, match="no such file"):
        init_from(encoder, str(tmp_path / "absent.pth"))
    (tmp_path / "text.safetensors").write_text("not weights")
    with pytest.raises(InputError, match="not readable"):
        init_from(encoder, str(tmp_path / "text.safetensors"))


class Sly:
    """Would run code when unpickled without care."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (print, ("unpickled",))


@pytest.mark.quick
def test_files_that_hold_more_than_tensors_are_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": Sly()}, tmp_path / "sly.pth")
    with pytest.raises(InputError, match="more than tensors"):
        read_weights(tmp_path / "sly.pth")
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.quick
def test_the_widths_of_a_resnets_stages_are_told_from_the_channels_of_images() -> None:
    narrow = underpaint.encoder("resnet10t", channels=[8, 8, 16, 24], in_chans=1)
    assert (narrow.dim, narrow.channels) == (24, 1)
    assert underpaint.encoder("resnet10t", channels=5, in_chans=3).channels == 5
    assert narrow(torch.zeros(2, 1, 64, 64)).pooled.shape == (2, 24)
