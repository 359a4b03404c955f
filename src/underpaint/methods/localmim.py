"""LocalMIM: Wang et al., "Masked Image Modeling with Local Multi-Scale Reconstruction", CVPR 2023, arXiv 2303.05251.

Reconstruction is asked not only of the top of the encoder but of several depths, each with a small decoder of its
own: lower depths predict a fine description of the hidden patches, upper ones a coarse one. So the lower layers get a
task that fits them, and learn it from a nearby loss. For each tapped depth k, with cells of s_k pixels:

    tokens_k  = norm_k(output of the block, visible patches only)
    h_k       = block(visible tokens and mask tokens, with positions)      reasoning
    y_k       = linear(rescale(h_k))          deconvolution where s_k is finer than the patch, pooling where coarser
    loss     += mean over hidden cells of (y_k - target_k)^2               targets: HOG, or standardised pixels

On a Swin the taps follow the merging of patches, whose grids have the scales already; the encoder runs on visible
patches alone, by packed windows (`backbones/swin.py`).
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from timm.layers import LayerNorm
from torch import Tensor, nn

from underpaint.backbones import StagedBackbone
from underpaint.blocks import MaskedDecoder
from underpaint.computing import in_full
from underpaint.corruptions import mask_cells
from underpaint.masking import Mask
from underpaint.methods.masked import WalkedMethod, check_staged
from underpaint.methods.method import Objective, Sampled
from underpaint.patches import put, take
from underpaint.targets import Pixels, Target, enlarge, enlargement, target_for

log = logging.getLogger(__name__)


class Tap(nn.Module):
    """What hangs on one depth: reason, rescale, predict.

    `factor` finer cells fit along a patch: 1, 2 or 4. 0 stands for cells of 2 x 2 patches.
    Deconvolutions of kernel and stride 2 do not overlap, so they are linear maps of single tokens, and run on hidden
    patches only. Where patches are pooled every cell is predicted, since most hold a hidden patch.
    """

    cells: Tensor

    def __init__(self, encoder_dim: int, grid: tuple[int, int], dim: int, depth: int, factor: int, outputs: int):
        super().__init__()
        self.factor = factor
        self.decoder = MaskedDecoder(encoder_dim, grid, dim, depth, None)
        steps: list[nn.Module] = []
        widths = [dim // 2 ** (step + 1) for step in range({0: 0, 1: 0, 2: 1, 4: 2}[factor])]
        for number, width in enumerate(widths):
            if number:
                steps += [LayerNorm(dim), nn.GELU()]
            steps.append(Deconvolve(dim, width))
            dim = width
        self.rescale = nn.Sequential(*steps)
        self.predict = nn.Linear(dim, outputs)
        rows = torch.arange(grid[0]).view(-1, 1) // 2 * (grid[1] // 2)
        self.register_buffer("cells", (rows + torch.arange(grid[1]) // 2).flatten(), persistent=False)
        self.cell_count = (grid[0] // 2) * (grid[1] // 2)

    def forward(self, tokens: Float[Tensor, "b v e"], mask: Mask) -> Tensor:
        """[b, hidden, factor * factor, outputs], or [b, cells, outputs] where patches are pooled."""
        if self.factor:
            found = self.predict(self.rescale(self.decoder(tokens, mask)))
            return found.reshape(*found.shape[:2], -1, found.shape[-1])
        every = self.decoder.norm(self.decoder.tokens(tokens, mask))
        cells = self.cells[torch.cat([mask.visible, mask.hidden], dim=1)]
        pooled = every.new_zeros(len(every), self.cell_count, every.shape[-1])
        pooled = pooled.scatter_add(1, cells.unsqueeze(-1).expand_as(every), every / 4)
        return self.predict(pooled)

    def target(self, level: Shaped[Tensor, "b d rows columns"], mask: Mask) -> Tensor:
        """What `forward` should give."""
        if not self.factor:
            return level.flatten(2).transpose(1, 2)
        b, d, rows, columns = level.shape
        f = self.factor
        # along a patch, in the order of the deconvolutions: halves first, then halves of halves
        halves = (2,) * (f // 2)
        split = level.reshape(b, d, rows // f, *halves, columns // f, *halves)
        n = len(halves)
        inner = [axis for step in range(n) for axis in (3 + step, 4 + n + step)]
        nested = split.permute(0, 2, 3 + n, *inner, 1).reshape(b, (rows // f) * (columns // f), f * f * d)
        return take(nested, mask.hidden).unflatten(2, (f * f, d))

    def weights(self, mask: Mask) -> Tensor | None:
        """Share of each pooled cell that is hidden."""
        if self.factor:
            return None
        share = torch.zeros(len(mask.hidden), self.cell_count, device=mask.hidden.device)
        return share.scatter_add(1, self.cells[mask.hidden], share.new_full(mask.hidden.shape, 0.25))


class Deconvolve(nn.Module):
    """A transposed convolution of kernel and stride 2, on single tokens: [..., d] to [..., 4, width].

    It starts as a linear layer does, and has a bias for each of the four cells; torch's own has one for all.
    """

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.linear = nn.Linear(dim, 4 * width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(tokens).unflatten(-1, (4, -1))


class LocalMIM(WalkedMethod):
    """Restore hidden patches at several scales from several depths.

    >>> import torch, underpaint
    >>> local = underpaint.LocalMIM(underpaint.encoder("vit_tiny_patch16_224", image_size=64))
    >>> objective = local(torch.randn(2, 3, 64, 64))
    >>> objective.loss.backward(); sorted(objective.terms)
    ['baseline', 'hog_16px', 'hog_32px', 'hog_4px', 'hog_8px']

    Args:
        encoder: any `StagedBackbone`.
        mask_ratio: share of the patches that is hidden (of a Swin: of units, a position of its last stage each).
        mask: a name of `masking.MASKS`, or such a function.
        mask_patch_size: pixels of a side of what is hidden as one; a patch, of a Swin a unit, where None.
        taps: blocks of a ViT with a loss, 0-based or from the end below 0, the last block among them; blocks 1, 3, L-3
            and L-1 where None (the outputs of evenly spread blocks below depth 8). A Swin's follow its stages.
        scales: pixels of a cell for each tap of a ViT: a quarter, a half, one and two patches where None, or for fewer
            than four taps the largest of them up to one patch. A scale that does not fit the image, or makes HOG cells
            below 2 px, is dropped with its tap and a message.
        target: a name of `targets.TARGETS`, or a `Target`: hog (9 bins a channel) or pixels (each cell standardised).
        bins: of HOG (18 in the paper for ViT-L and Swin).
        decoder_dim: width of the decoders; a third of the encoder's (256 at ViT-B, as in the paper), or for a Swin an
            eighth of the last stage's and half of that at the first tap (64 and 128 at Swin-B), where None.
        decoder_depth: blocks of each decoder.
        stop_gradient: each part between taps is trained by its own loss alone; memory is then that of one part.
        pixel_head: a linear map from the decoder of the tap at the patch's scale to pixels, for pictures; it trains
            nothing below it.
        images_per_mask: how many consecutive images share a mask (Swin).
        seed: of the masks that these are drawn from (Swin); a run's own seed, else 0, where None.

    Raises:
        TypeError: an encoder of another kind.
        ValueError: no scale fits; taps that do not end at the last block; as many scales as taps are needed.
    """

    taps: Sequence[int] | None = None
    scales: Sequence[int] | None = None
    target: str | Target = "hog"
    bins: int = 9
    decoder_dim: int | None = None
    decoder_depth: int = 1
    stop_gradient: bool = False
    pixel_head: bool = False

    def __post_init__(self) -> None:
        encoder = self.encoder
        check_staged(self, encoder)
        self.wanted = target_for(self.target, bins=self.bins)
        taps, scales = self._fitting(encoder)
        self.hide_from(encoder, taps)
        if self.stop_gradient and not self.walk.by_layer:
            raise ValueError(
                "stop_gradient needs an encoder that can be run layer by layer: a plain transformer, a Swin"
            )
        layers = self.walk.layers
        self.cells = scales or [layer.stride for layer in layers]
        factors = [layer.stride // cell for layer, cell in zip(layers, self.cells, strict=True)]
        width = self.decoder_dim or max(64, round(encoder.dim / (8 if encoder.hierarchical else 3) / 32) * 32)
        widths = [width] * len(layers)
        if encoder.hierarchical:
            widths[0] = max(32, width // 2)
        # the norm of the last tap is the encoder's own final norm
        self.norms = nn.ModuleList(LayerNorm(layer.dim) for layer in layers[:-1])
        self.decoders = nn.ModuleList(
            Tap(layer.dim, layer.grid, dim, self.decoder_depth, factor, self.wanted.width(cell, encoder.channels))
            for layer, dim, factor, cell in zip(layers, widths, factors, self.cells, strict=True)
        )
        self.num_losses = len(layers) if self.stop_gradient else 1
        self.painter = max((number for number, factor in enumerate(factors) if factor == 1), default=None)
        self.to_pixels = None
        if self.pixel_head:
            if self.painter is None:
                raise ValueError(f"pixel_head needs a tap whose cells are patches; scales are {self.cells} px")
            self.to_pixels = nn.Linear(widths[self.painter], Pixels().width(self.cells[self.painter], encoder.channels))

    def _fitting(self, encoder: StagedBackbone) -> tuple[list[int], list[int]]:
        """The taps of a ViT, and for each the pixels of its cells; none of a Swin, whose stages say both."""
        taps, scales = self.taps, self.scales
        if encoder.hierarchical:
            if taps is not None or scales is not None:
                raise ValueError("taps and scales of an encoder with feature maps follow its stages; leave them away")
            return [], []
        patch, depth = encoder.stride, encoder.depth
        height, width = encoder.image_size
        if encoder.unit != (patch, patch):
            raise ValueError(f"LocalMIM needs square patches, not {encoder.unit}")
        possible = [patch / 4, patch / 2, patch, 2 * patch]
        if scales is not None:
            wanted = list(scales)
        elif taps is None or len(taps) == 4:
            wanted = possible
        else:
            wanted = possible[max(0, 3 - len(taps)) : 3]
        blocks = [1, 3, depth - 3, depth - 1] if depth >= 8 else [round(depth * k / 4) - 1 for k in (1, 2, 3, 4)]
        kept = []
        for number, scale in enumerate(wanted):
            if (
                scale not in possible
                or scale != int(scale)
                or scale < self.wanted.smallest
                or height % scale
                or width % scale
            ):
                if scales is not None:
                    raise ValueError(
                        f"scale {scale} px: a quarter, a half, one or two patches of {patch} px are possible, "
                        f"of at least {self.wanted.smallest} px and a whole number of them along {height}x{width}"
                    )
                log.warning("LocalMIM: cells of %g px do not fit here; that scale and its tap are left out", scale)
            else:
                kept.append((number, int(scale)))
        if taps is None:
            taps = [max(0, blocks[number if len(wanted) == 4 else -len(wanted) + number]) for number, _ in kept]
            taps = sorted({*taps[:-1], depth - 1})  # whatever was dropped, the last block has a loss
            for _, scale in kept[: -len(taps)]:
                log.warning("LocalMIM: %d blocks are too few for all scales; cells of %d px are left out", depth, scale)
            kept = kept[-len(taps) :]
        else:
            taps = [tap + depth if tap < 0 else tap for tap in taps]
            if scales is None and len(taps) == len(wanted):
                taps = [taps[number] for number, _ in kept]
        found = [scale for _, scale in kept]
        if not found or len(found) != len(taps):
            raise ValueError(f"taps {list(taps)} and scales {found} px: as many of one as of the other are needed")
        if list(taps) != sorted(set(taps)) or taps[-1] != depth - 1 or taps[0] < 0:
            raise ValueError(
                f"taps are {list(taps)}; they must ascend and end at the last block, {depth - 1}, since the encoder's "
                f"final norm is that of the last tap"
            )
        return list(taps), found

    # --- masks and targets -----------------------------------------------------------------------------------------

    def levels(self, images: Float[Tensor, "b c height width"]) -> list[Float[Tensor, "b d rows columns"]]:
        """The target of each tap."""
        cells = sorted(set(self.cells))
        levels = self.wanted(images, cells)
        return [levels[cells.index(cell)] for cell in self.cells]

    # --- the encoder, tap by tap -----------------------------------------------------------------------------------

    def advance(
        self, number: int, state: Any, images: Float[Tensor, "b c height width"], noise: Sampled
    ) -> tuple[Any, Tensor]:
        """The encoder's state at tap `number` from that at the tap before, and the normed tokens there."""
        state, tokens = self.encoder.advance(self.walk, number, state, images, noise)
        return state, self.norms[number](tokens) if number < len(self.norms) else tokens

    # --- the loss ---------------------------------------------------------------------------------------------------

    def forward(
        self,
        images: Float[Tensor, "b c height width"],
        noise: Sampled | None = None,
        part: int | None = None,
        carry: Any = None,
    ) -> Objective:
        if noise is None:
            noise = self.sample_for(images)
        state, levels, terms = carry or (None, self.levels(images), {"baseline": images.new_zeros(())})
        loss: Any = 0
        for number in range(len(self.cells)) if part is None else (part,):
            state, tokens = self.advance(number, state, images, noise)
            here, trivial = (each.mean() for each in self.errors_at(number, tokens, levels[number], noise))
            terms = terms | {self._name(number): here.detach(), "baseline": terms["baseline"] + trivial}
            loss = loss + here
            if number == self.painter and self.to_pixels is not None:
                here, trivial = (each.mean() for each in self.painting(tokens, images, noise))
                terms = terms | {"pixels": here.detach(), "baseline": terms["baseline"] + trivial}
                loss = loss + here
            if self.stop_gradient:
                state = state.detach()
        last = part is None or part + 1 == len(self.cells)  # terms of a step are those of its last part
        return Objective(loss, terms if last else {}, (state, levels, terms))

    def _name(self, number: int) -> str:
        name = f"{self.wanted.name}_{self.cells[number]}px"
        return f"{name}_{number}" if self.cells.count(self.cells[number]) > 1 else name

    def errors_at(
        self, number: int, tokens: Float[Tensor, "b v d"], target: Float[Tensor, "b f rows columns"], noise: Sampled
    ) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
        """An image's mean squared error over hidden cells at one tap, and that of the best constant prediction; both in
        float32."""
        tap: Any = self.decoders[number]
        mask = self.walk.mask(noise, number)
        wanted, predicted = tap.target(target, mask), tap(tokens, mask).float()
        weights = tap.weights(mask)
        with in_full(wanted):
            squares = (predicted - wanted).square().mean(-1)
            if weights is None:
                constant = wanted.flatten(0, -2).mean(0)
            else:
                constant = (wanted * weights.unsqueeze(-1)).sum((0, 1)) / weights.sum()
            # |wanted - constant|^2, without another tensor as large
            flat = (wanted.square().sum(-1) - 2 * wanted @ constant + constant @ constant) / wanted.shape[-1]
        if weights is None:
            return squares.flatten(1).mean(1), flat.flatten(1).mean(1)
        # every image has as many hidden patches, so the mean over images is that over all cells
        hidden = weights.sum(1)
        return (squares * weights).sum(1) / hidden, (flat * weights).sum(1) / hidden

    def paint(self, tokens: Float[Tensor, "b v d"], mask: Mask) -> Float[Tensor, "b h p"]:
        """Standardised pixels of hidden patches, by a linear map that trains nothing below it."""
        assert self.to_pixels is not None
        tap: Any = self.decoders[self.painter or 0]
        with torch.no_grad():
            seen = tap.decoder(tokens, mask)
        return self.to_pixels(seen).float()

    def painting(self, tokens: Tensor, images: Tensor, noise: Sampled) -> tuple[Tensor, Tensor]:
        number = self.painter or 0
        mask = self.walk.mask(noise, number)
        wanted = take(Pixels()(images, [self.cells[number]])[0].flatten(2).transpose(1, 2), mask.hidden)
        return (self.paint(tokens, mask) - wanted).square().mean((1, 2)), wanted.square().mean((1, 2))

    # --- pictures and scores ----------------------------------------------------------------------------------------

    def every_tap(self, images: Float[Tensor, "b c height width"], noise: Sampled) -> list[Float[Tensor, "b v d"]]:
        """The normed tokens at each tap."""
        state, found = None, []
        for number in range(len(self.cells)):
            state, tokens = self.advance(number, state, images, noise)
            found.append(tokens)
        return found

    def errors(self, images: Float[Tensor, "b c height width"], noise: Sampled) -> dict[str, tuple[Tensor, Tensor]]:
        """Each scale, against the best constant prediction for these images together."""
        taps = zip(self.every_tap(images, noise), self.levels(images), strict=True)
        return {
            self._name(number): self.errors_at(number, tokens, level, noise)
            for number, (tokens, level) in enumerate(taps)
        }

    @torch.no_grad()
    def score(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b"]:
        """The sum of the squared errors of all taps on hidden cells, mean over four fixed masks."""
        found = [self.errors(images, noise).values() for noise in self.fixed_noise(images, 4)]
        return torch.stack([torch.stack([left for left, _ in taps]).sum(0) for taps in found]).mean(0)

    @torch.no_grad()
    def restore(
        self, images: Float[Tensor, "b c height width"], noise: Sampled | None = None, task: str | None = None
    ) -> dict[str, Tensor]:
        """Original, visible patches, and the target with the prediction in its hidden cells, at the finest scale and
        at the patch's: for HOG a stroke along the edges of each cell. All frames are enlarged alike, so that strokes
        can be seen."""
        if noise is None:
            noise = self.fixed_noise(images, 1)[0]
        times, unit = enlargement(images), self.encoder.stride
        hidden = mask_cells(images, self.walk.mask(noise, len(self.cells) - 1), (unit, unit))
        frames = {"original": enlarge(images, times), "hidden": enlarge(hidden, times)}
        levels, tokens = self.levels(images), self.every_tap(images, noise)
        shown = {number for number, cell in enumerate(self.cells) if cell <= unit}
        for number in sorted({min(shown, default=0), max(shown, default=0)}):
            filled = self._filled(number, tokens[number], levels[number], self.walk.mask(noise, number))
            for name, values in (("target", levels[number]), ("restored", filled)):
                caption = f"{name}\n{self.wanted.name} {self.cells[number]} px"
                frames[caption] = self.wanted.picture(values, images, times)
        if self.to_pixels is not None and self.painter is not None:
            pixels, mask = Pixels(), self.walk.mask(noise, self.painter)
            [level] = pixels(images, [self.cells[self.painter]])
            painted = put(level.flatten(2).transpose(1, 2), mask.hidden, self.paint(tokens[self.painter], mask))
            whole = painted.transpose(1, 2).unflatten(2, level.shape[-2:])
            frames["restored\npixels"] = pixels.picture(whole, images, times)
        return frames

    def _filled(self, number: int, tokens: Tensor, level: Tensor, mask: Mask) -> Tensor:
        """The target with hidden cells predicted."""
        tap: Any = self.decoders[number]
        predicted = tap(tokens, mask)
        every = level.flatten(2).transpose(1, 2)
        if not tap.factor:
            share = (tap.weights(mask) > 0).unsqueeze(-1)
            made = torch.where(share, predicted, every)
        else:
            # where each of the cells of a patch lies among all cells
            rows, columns = level.shape[-2:]
            numbers = torch.arange(rows * columns, device=level.device).view(1, 1, rows, columns)
            where = tap.target(numbers.expand(len(level), -1, -1, -1), mask).flatten(1)
            made = put(every, where, predicted.flatten(1, 2))
        return made.transpose(1, 2).unflatten(2, level.shape[-2:])
