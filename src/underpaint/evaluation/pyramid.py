"""Feature maps at strides 4, 8, 16 and 32 from any encoder, for dense tasks.

Convolutional nets and Swin have them. A plain ViT has one stride: its simple feature pyramid (Li et al., "Exploring
Plain Vision Transformer Backbones for Object Detection", arXiv 2203.16527) makes the others from its last map by
deconvolutions and pooling; for UperNet the four maps come from four depths, as in BEiT.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from underpaint.backbones import Backbone, TokenBackbone


def patch_of(encoder: Backbone) -> tuple[int, int] | None:
    """Height and width of an encoder's patches in pixels; None where it has maps."""
    return (encoder.patch_size[0], encoder.patch_size[1]) if isinstance(encoder, TokenBackbone) else None


class ChannelNorm(nn.Module):
    """Layer norm over the channels of a map."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def rescaler(dim: int, out: int, times: float, smooth: bool) -> nn.Module:
    """A map made `times` as fine by deconvolutions of 2, or as coarse by pooling, with `out` channels; `smooth` adds a
    3 x 3 convolution."""
    steps: list[nn.Module] = []
    while times >= 2:
        half = max(out, dim // 2)
        steps += [nn.ConvTranspose2d(dim, half, 2, 2), ChannelNorm(half), nn.GELU()]
        dim, times = half, times / 2
    while times <= 0.5:
        steps.append(nn.MaxPool2d(2))
        times *= 2
    steps += [nn.Conv2d(dim, out, 1), ChannelNorm(out)]
    if smooth:
        steps += [nn.Conv2d(out, out, 3, padding=1), ChannelNorm(out)]
    return nn.Sequential(*steps)


class Pyramid(nn.Module):
    """Maps of `dim` channels at strides `first`, 2 `first`, 4 `first` and 8 `first`, fine to coarse.

    Args:
        encoder: any; trained along.
        depths: one map of a ViT from each of four depths (UperNet), or all from the last (simple feature pyramid).
        first: stride of the finest map in pixels; 4, or less for small images.
    """

    def __init__(self, encoder: Backbone, dim: int, depths: bool, first: int = 4, levels: int = 4):
        super().__init__()
        self.encoder, self.depths = encoder, depths
        self.strides = [first * 2**level for level in range(levels)]
        self.is_vit = isinstance(encoder, TokenBackbone)
        if self.is_vit:
            vit: Any = encoder
            patch = vit.patch_size[0]
            self.levels = nn.ModuleList(
                rescaler(vit.dim, dim, patch / stride, smooth=not depths) for stride in self.strides
            )
        else:
            known: Any = encoder
            by_stride = {info["reduction"]: info["num_chs"] for info in known.info}
            # what the encoder lacks is made from its nearest map
            self.sources = [min(by_stride, key=lambda s, want=stride: (abs(s - want), -s)) for stride in self.strides]
            self.levels = nn.ModuleList(
                rescaler(by_stride[source], dim, source / stride, smooth=False)
                for source, stride in zip(self.sources, self.strides, strict=True)
            )

    def forward(self, images: Float[Tensor, "b c height width"]) -> list[Tensor]:
        maps = self.encoder.pyramid(images)
        if self.is_vit:
            taps = [m for m, _ in maps]
            if self.depths:
                count = len(self.levels)
                chosen = [taps[min(level * len(taps) // count, len(taps) - 1)] for level in range(count)]
            else:
                chosen = [taps[-1]] * len(self.levels)
        else:
            by_stride = {stride: m for m, stride in maps}
            chosen = [by_stride[source] for source in self.sources]
        made = [level(m) for level, m in zip(self.levels, chosen, strict=True)]
        sizes = [(-(-images.shape[-2] // s), -(-images.shape[-1] // s)) for s in self.strides]
        return [
            m if tuple(m.shape[-2:]) == size else F.interpolate(m, size, mode="bilinear", align_corners=False)
            for m, size in zip(made, sizes, strict=True)
        ]


def tokens_to_map(tokens: Float[Tensor, "b n d"], grid: tuple[int, int]) -> Float[Tensor, "b d h w"]:
    return tokens.transpose(1, 2).unflatten(2, grid)


def sliding(length: int, window: int, stride: int) -> list[int]:
    """Where windows start so that they cover a length, the last one flush with its end."""
    if length <= window:
        return [0]
    starts = list(range(0, length - window, stride))
    return [*starts, length - window]


def padded(images: Float[Tensor, "b c h w"], size: tuple[int, int], value: float = 0.0) -> Tensor:
    down, right = max(0, size[0] - images.shape[-2]), max(0, size[1] - images.shape[-1])
    return F.pad(images, (0, right, 0, down), value=value) if down or right else images
