"""Any timm model that makes feature maps: ResNet, ConvNeXt, Swin and the rest."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from underpaint.backbones.protocols import Backbone, Features


class MapBackbone(Backbone):
    """An adapter through `forward_intermediates` (timm's `features_only` would rename the weights)."""

    def __init__(self, model: nn.Module, channels: int):
        super().__init__()
        if not hasattr(model, "forward_intermediates"):
            raise ValueError(f"{type(model).__name__} has no forward_intermediates, so it gives no feature maps")
        self.model: Any = model
        self.channels = channels
        info: Any = model.feature_info
        self.info: list[dict[str, Any]] = info if isinstance(info, list) else info.info
        self.dim: int = self.info[-1]["num_chs"]
        self.stride: int = self.info[-1]["reduction"]
        for parameter in getattr(model, "head", nn.Identity()).parameters():
            parameter.requires_grad_(False)  # ConvNeXt's norm behind the pooling: the maps are from before it

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return -(-height // self.stride), -(-width // self.stride)

    def _maps(self, images: Tensor, indices: int | None) -> list[Tensor]:
        return self.model.forward_intermediates(
            images, indices=indices, norm=True, output_fmt="NCHW", intermediates_only=True
        )

    def forward(self, images: Float[Tensor, "b c height width"]) -> Features:
        """The last feature map as places, and their mean."""
        patches = self._maps(images, 1)[-1].flatten(2).transpose(1, 2)
        return Features(patches.mean(1), patches)

    def pyramid(self, images: Float[Tensor, "b c height width"]) -> list[tuple[Tensor, int]]:
        return [(m, info["reduction"]) for m, info in zip(self._maps(images, None), self.info, strict=True)]
