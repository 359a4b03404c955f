"""timm's Swin transformers, V1 and V2: on all patches, on replaced ones, and on visible ones alone.

Windows of visible patches are smaller than whole windows and of many sizes. Packed into groups of about one whole
window each, with attention only between patches of the same window, they cost what their number costs (GreenMIM,
arXiv 2205.13515). Which patch goes to which group depends on the mask alone, so masks come from a pool that is drawn
once, with everything worked out; a step only looks it up. Coordinates are the true ones, borders as in timm's shifted
windows, the order of merged neighbours timm's.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn
from torch.nn import functional

from underpaint.backbones.maps import MapBackbone
from underpaint.backbones.protocols import Layer, Walk
from underpaint.blocks import recomputing, replaced
from underpaint.draws import Draws
from underpaint.masking import Mask, Masking, refine
from underpaint.patches import patchify, take

POOL = 256  # masks


class PooledMask(NamedTuple):
    """Which mask of a pool each image has: the same one for each of `groups` equal runs of consecutive images."""

    choice: Int[Tensor, "b"]
    groups: int

    def to(self, device: torch.device) -> "PooledMask":
        return PooledMask(self.choice.to(device, non_blocking=True), self.groups)

    def rows(self, rows: slice) -> "PooledMask":
        """The masks of some images: in the same groups where these are whole, in one where they lie inside it, else in the
        largest equal runs that have one mask each."""
        start, stop, _ = rows.indices(len(self.choice))
        size, count = len(self.choice) // self.groups, stop - start
        inside = start // size == (stop - 1) // size
        return PooledMask(self.choice[rows], 1 if inside else count // math.gcd(size, start, count))

    def repeat(self, batch: int) -> "PooledMask":
        return PooledMask(self.choice.expand(batch), 1)


class Windows(nn.Module):
    """For each mask of a pool: how the visible tokens of one stage are packed into groups (buffers).

    token [p, group, place]: number of the token there; slot [p, token]: where it went, group * size + place;
    window, row, column [p, group, place]: its window (-1 where the place is empty) and true coordinates.
    """

    token: Tensor
    slot: Tensor
    window: Tensor
    row: Tensor
    column: Tensor

    def __init__(
        self,
        tokens: Int[np.ndarray, "p n"],
        columns: int,
        size: tuple[int, int],
        shift: tuple[int, int],
    ):
        super().__init__()
        packed = [_pack(numbers, columns, size, shift) for numbers in tokens]
        groups = max(group.max() + 1 for group, _, _ in packed)
        places = max(place.max() + 1 for _, place, _ in packed)
        shape = (len(tokens), groups, places)
        token, window = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
        row, column = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        slot = np.zeros(tokens.shape, np.int64)
        for number, (group, place, of) in enumerate(packed):
            token[number, group, place] = np.arange(tokens.shape[1])
            window[number, group, place] = of
            row[number, group, place], column[number, group, place] = np.divmod(tokens[number], columns)
            slot[number] = group * places + place
        for name, values in (("token", token), ("slot", slot), ("window", window), ("row", row), ("column", column)):
            self.register_buffer(name, torch.from_numpy(values).to(torch.int32), persistent=False)

    def chosen(self, choice: Int[Tensor, "m"], batch: int) -> "Packing":
        """Those of some masks, for a batch of as many equal runs of images."""
        token, slot, window, row, column = (
            getattr(self, name)[choice].long() for name in ("token", "slot", "window", "row", "column")
        )
        images = torch.arange(batch, device=choice.device).view(len(choice), -1, 1)
        places = token.shape[1] * token.shape[2]
        return Packing(
            (images * slot.shape[1] + token.flatten(1).unsqueeze(1)).flatten(),
            (images * places + slot.unsqueeze(1)).flatten(),
            window.unsqueeze(3) == window.unsqueeze(2),
            row.unsqueeze(3) - row.unsqueeze(2),
            column.unsqueeze(3) - column.unsqueeze(2),
        )


class Packing(NamedTuple):
    """Where the tokens of a batch go and come back from, and which see each other (m masks, g groups of s places)."""

    gather: Int[Tensor, "k"]  # rows of [b * n] tokens, group by group
    back: Int[Tensor, "k2"]  # rows of [b * groups * places]
    together: Tensor  # bool [m, g, s, s]
    down: Int[Tensor, "m g s s"]  # rows from key to query
    right: Int[Tensor, "m g s s"]


def _pack(
    tokens: Int[np.ndarray, "n"], columns: int, size: tuple[int, int], shift: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Group, place and window of each token: windows whole, the largest first, each into the first group with room."""
    row, column = np.divmod(tokens, columns)
    window = ((row - shift[0]) // size[0] + 1) * (columns + 1) + (column - shift[1]) // size[1] + 1
    names, of, counts = np.unique(window, return_inverse=True, return_counts=True)
    room = size[0] * size[1]
    if len(tokens) <= 2 * room:
        room = len(tokens)
    group_of, first = np.zeros(len(names), np.int64), np.zeros(len(names), np.int64)
    filled: list[int] = []
    for which in np.argsort(-counts, kind="stable"):
        fitting = [group for group, used in enumerate(filled) if used + counts[which] <= room]
        if not fitting:
            filled.append(0)
        group = fitting[0] if fitting else len(filled) - 1
        group_of[which], first[which] = group, filled[group]
        filled[group] += int(counts[which])
    order = np.argsort(of, kind="stable")
    rank = np.empty(len(tokens), np.int64)
    rank[order] = np.arange(len(tokens)) - np.repeat(np.cumsum(counts) - counts, counts)
    return group_of[of], first[of] + rank, of


class MaskPool(Walk):
    """Masks of units, and for each what every stage needs to run on its visible tokens (buffers).

    A unit is one position of the last stage: hidden or visible as a whole at every stage. The layers of this walk are the
    stages, each behind the merging of patches that follows it.
    """

    def __init__(self, encoder: "Swin", drawn: Mask, images_per_mask: int):
        super().__init__()
        columns = encoder.grid(*encoder.image_size)[1]
        self.count, self.stages, self.images_per_mask = len(drawn.hidden), len(encoder.stages), images_per_mask
        self.layers = []
        self.windows = nn.ModuleList()
        for number, stage in enumerate(encoder.stages):
            factor = 2 ** (self.stages - 1 - number)
            for name, index in (("visible", drawn.visible), ("hidden", drawn.hidden)):
                finer = np.stack([_finer(units, columns, factor) for units in index.numpy()])
                self.register_buffer(f"{name}{number}", torch.from_numpy(finer), persistent=False)
            tokens = getattr(self, f"visible{number}").numpy()
            kinds = {(tuple(block.window_size), tuple(block.shift_size)) for block in stage.blocks}
            self.windows.append(
                nn.ModuleDict({_kind(*kind): Windows(tokens, columns * factor, *kind) for kind in sorted(kinds)})
            )
            if number + 1 < self.stages:
                children = np.stack([_children(numbers, columns * factor) for numbers in tokens])
                self.register_buffer(f"children{number}", torch.from_numpy(children), persistent=False)
            behind = min(number + 1, self.stages - 1)
            stride = encoder.patch_size[0] * 2**behind
            grid = (encoder.image_size[0] // stride, encoder.image_size[1] // stride)
            self.layers.append(Layer(grid, stride, encoder.info[behind]["num_chs"]))

    def sample(
        self, batch: int, height: int, width: int, draws: Draws | None = None, alone: bool = False
    ) -> PooledMask:
        draws = Draws.some_or_new(draws, batch)
        share = 1 if alone else self.images_per_mask
        starts = (draws.images // share).diff().nonzero().flatten() + 1  # where another mask begins
        choice = draws.alike(share).integers(self.count)
        return PooledMask(choice, batch // math.gcd(batch, *starts.tolist()))

    def mask(self, noise: PooledMask, number: int) -> Mask:
        return self.at_stage(noise, min(number + 1, self.stages - 1))

    def at_stage(self, noise: PooledMask, stage: int) -> Mask:
        """Visible and hidden positions of each image on the grid of a stage, in ascending order."""
        visible, hidden = getattr(self, f"visible{stage}"), getattr(self, f"hidden{stage}")
        return Mask(visible[noise.choice], hidden[noise.choice])


def _kind(window: tuple[int, int], shift: tuple[int, int]) -> str:
    return "_".join(str(number) for number in (*window, *shift))


def _finer(units: Int[np.ndarray, "v"], columns: int, factor: int) -> Int[np.ndarray, "n"]:
    """Row by row, the places of these units on a grid that is `factor` times as fine."""
    row, column = np.divmod(units, columns)
    inside = np.arange(factor)
    rows = (row[:, None, None] * factor + inside[:, None]) * (columns * factor)
    return np.sort((rows + column[:, None, None] * factor + inside).reshape(-1))


def _children(tokens: Int[np.ndarray, "n"], columns: int) -> Int[np.ndarray, "m four"]:
    """The four tokens that merge, in timm's order (down, then right), for each coarse place row by row."""
    row, column = np.divmod(tokens, columns)
    coarse = row // 2 * (columns // 2) + column // 2
    order = np.lexsort((row % 2, column % 2, coarse))
    return order.reshape(-1, 4)


class Swin(MapBackbone):
    """An adapter around timm's SwinTransformer, which stays timm's: `model`.

    Besides what every map encoder does, a learned token takes the place of patches behind their embedding (`covered`), and
    it runs stage by stage on visible patches alone (`walk`, `advance`).
    """

    def __init__(self, model: SwinTransformer | SwinTransformerV2, channels: int):
        super().__init__(model, channels, tuple(cast(Any, model).patch_embed.img_size))
        self.patch_size: tuple[int, int] = self.model.patch_embed.patch_size
        self.token_dim: int = self.info[0]["num_chs"]
        self.depth = sum(len(stage.blocks) for stage in self.stages)

    @property
    def stages(self) -> Any:
        """timm's; not an attribute, which would put every weight into the state twice."""
        return self.model.layers

    def embed(
        self, images: Float[Tensor, "b c height width"], index: Int[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b k d"]:
        """Tokens of the patches `index`, all where None."""
        embedding = self.model.patch_embed
        patches = patchify(images, self.patch_size)
        if index is not None:
            patches = take(patches, index)  # hidden patches are never embedded
        return embedding.norm(functional.linear(patches, embedding.proj.weight.flatten(1), embedding.proj.bias))

    def covered(
        self, images: Float[Tensor, "b c height width"], mask: Mask, unit: tuple[int, int], token: Float[Tensor, "e"]
    ) -> Float[Tensor, "b n d"]:
        """The learned token stands for patches."""
        grid = (self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1])
        factor = unit[0] // self.patch_size[0]
        hidden = refine(mask, (grid[0] // factor, grid[1] // factor), factor).hidden
        tokens = replaced(self.embed(images), hidden, token)
        return self.model.norm(self.model.layers(tokens.unflatten(1, grid))).flatten(1, 2)

    # --- visible patches alone ------------------------------------------------------------------------------------

    def walk(
        self, masking: Masking, taps: Sequence[int] = (), images_per_mask: int = 1, seed: int = 0, masks: int = POOL
    ) -> MaskPool:
        """By masks of units, drawn once.

        Raises:
            ValueError: the image is no whole number of units.
        """
        unit = self.patch_size[0] * 2 ** (len(self.stages) - 1)
        height, width = self.image_size
        if height % unit or width % unit:
            raise ValueError(f"an image of {height}x{width} px is no whole number of units of {unit} px")
        return MaskPool(self, masking(masks, height, width, Draws.of(seed, masks)), images_per_mask)

    def advance(
        self, walk: Any, number: int, state: Any, images: Float[Tensor, "b c height width"], noise: PooledMask
    ) -> tuple[Tensor, Tensor]:
        if state is None:
            state = self.embed(images, walk.at_stage(noise, 0).visible)
        state = self.run_stage(state, walk, noise, number)
        if number + 1 == len(walk.layers):
            return state, self.model.norm(state)
        state = self.merge(state, walk, noise, number + 1)
        return state, state

    def merge(
        self, tokens: Float[Tensor, "b n d"], pool: MaskPool, noise: PooledMask, stage: int
    ) -> Float[Tensor, "b m e"]:
        """Into this stage from the one before: four neighbours become one token."""
        if stage == 0:
            return tokens
        children = getattr(pool, f"children{stage - 1}")[noise.choice]
        four = take(tokens, children.flatten(1)).unflatten(1, (-1, 4)).flatten(2)
        return self.reduce(self.stages[stage].downsample, four)

    def reduce(self, merging: Any, four: Float[Tensor, "b m d"]) -> Float[Tensor, "b m e"]:
        """One token of four that are joined."""
        return merging.reduction(merging.norm(four))

    def run_stage(
        self, tokens: Float[Tensor, "b n d"], pool: MaskPool, noise: PooledMask, stage: int
    ) -> Float[Tensor, "b n d"]:
        """The blocks of a stage on its visible tokens."""
        choice = noise.choice.view(noise.groups, -1)[:, 0]
        windows: Any = pool.windows[stage]
        packings = {kind: windows[kind].chosen(choice, len(tokens)) for kind in windows}
        for block in self.stages[stage].blocks:
            packing = packings[_kind(tuple(block.window_size), tuple(block.shift_size))]
            tokens = recomputing(self, self.run_block, block, tokens, packing)
        return tokens

    def run_block(self, block: Any, tokens: Float[Tensor, "b n d"], packing: Packing) -> Float[Tensor, "b n d"]:
        """timm's block on packed windows."""
        tokens = tokens + block.drop_path1(_attention(block.attn, block.norm1(tokens), packing))
        return tokens + block.drop_path2(block.mlp(block.norm2(tokens)))


class SwinV2(Swin):
    """An adapter around timm's SwinTransformerV2 (Liu et al., arXiv 2111.09883): norms lie behind attention, perceptron and
    merging, attention is by angle, and relative biases come from a perceptron."""

    def reduce(self, merging: Any, four: Float[Tensor, "b m d"]) -> Float[Tensor, "b m e"]:
        return merging.norm(merging.reduction(four))

    def run_block(self, block: Any, tokens: Float[Tensor, "b n d"], packing: Packing) -> Float[Tensor, "b n d"]:
        tokens = tokens + block.drop_path1(block.norm1(_cosine_attention(block.attn, tokens, packing)))
        return tokens + block.drop_path2(block.norm2(block.mlp(tokens)))


def _attention(attention: Any, tokens: Float[Tensor, "b n d"], packing: Packing) -> Float[Tensor, "b n d"]:
    """timm's window attention on packed windows, with the same relative biases."""
    q, k, v = _packed(attention.qkv(tokens), attention.num_heads, packing)
    bias = _biases(attention.relative_position_bias_table, attention.window_size, packing, q.dtype)
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return attention.proj(_unpacked(out, len(tokens), packing))


def _cosine_attention(attention: Any, tokens: Float[Tensor, "b n d"], packing: Packing) -> Float[Tensor, "b n d"]:
    """timm's window attention of Swin V2 on packed windows, with the same relative biases."""
    bias = None
    if attention.q_bias is not None:
        bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
    q, k, v = _packed(functional.linear(tokens, attention.qkv.weight, bias), attention.num_heads, packing)
    scale = attention.logit_scale.clamp(max=math.log(100)).exp()  # of each head
    q, k = (functional.normalize(q, dim=-1) * scale).to(v.dtype), functional.normalize(k, dim=-1).to(v.dtype)
    table = 16 * attention.cpb_mlp(attention.relative_coords_table).flatten(0, 2).sigmoid()
    bias = _biases(table, attention.window_size, packing, v.dtype)
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
    return attention.proj(_unpacked(out, len(tokens), packing))


# Queries, keys, values and biases have four dimensions, since fused kernels of attention take no more: the groups of all
# images in one, g of them an image; m masks have runs of images.


def _packed(joint: Float[Tensor, "b n e"], heads: int, packing: Packing) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [b * g, heads, s, d / heads] of groups."""
    places = packing.together.shape[2]
    rows = joint.flatten(0, 1).index_select(0, packing.gather)
    q, k, v = rows.view(-1, places, 3, heads, joint.shape[2] // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _biases(
    table: Float[Tensor, "t heads"], window: tuple[int, int], packing: Packing, dtype: torch.dtype
) -> Float[Tensor, "groups heads s s"]:
    """What is added to the attention of groups: by how far down and right, and -inf between windows."""
    tall, wide = window
    down = packing.down.clamp(1 - tall, tall - 1) + tall - 1
    right = packing.right.clamp(1 - wide, wide - 1) + wide - 1
    bias = table[down * (2 * wide - 1) + right].permute(0, 1, 4, 2, 3)
    bias = bias.masked_fill(~packing.together.unsqueeze(2), -torch.inf).to(dtype)  # [m, g, heads, s, s]
    run = len(packing.gather) // packing.together[..., 0].numel()  # images that have a mask
    return bias.unsqueeze(1).expand(-1, run, -1, -1, -1, -1).flatten(0, 2)


def _unpacked(groups: Float[Tensor, "k h s e"], batch: int, packing: Packing) -> Float[Tensor, "b n d"]:
    """The tokens of a batch in their own order."""
    rows = groups.transpose(1, 2).flatten(2).flatten(0, 1)
    return rows.index_select(0, packing.back).unflatten(0, (batch, -1))
