"""Encoders: the protocols that methods state their needs in, and adapters over timm."""

from underpaint.backbones.build import (
    create_arguments,
    describe_encoder,
    encoder,
    from_arguments,
    load_encoder,
    save_encoder,
    scaling_for,
    standardize_for,
)
from underpaint.backbones.protocols import Backbone, Encoded, Features, StagedBackbone, TokenBackbone, Walk
from underpaint.backbones.swin import Swin, SwinV2
from underpaint.backbones.vit import ViT
from underpaint.backbones.weights import init_from

__all__ = [
    "Backbone",
    "Encoded",
    "Features",
    "StagedBackbone",
    "Swin",
    "SwinV2",
    "TokenBackbone",
    "ViT",
    "Walk",
    "create_arguments",
    "describe_encoder",
    "encoder",
    "from_arguments",
    "init_from",
    "load_encoder",
    "save_encoder",
    "scaling_for",
    "standardize_for",
]
