"""timm's Eva: transformers whose attention turns queries and keys by where they are (EVA-02, DINOv3, Perception Encoder,
RoPE-ViT: Su et al. 2104.09864, Heo et al. 2403.13298, Siméoni et al. 2508.10104)."""

from typing import Any

from jaxtyping import Float, Int
from timm.models.eva import Eva as TimmEva
from torch import Tensor, nn

from underpaint.backbones.plain import Plain


class Turns(nn.Module):
    """By how much queries and keys of each patch of a grid are turned; made once where nothing of it is learned or
    drawn, since timm makes some of them on the CPU."""

    fixed: Tensor | None

    def __init__(self, rope: Any, grid: tuple[int, int]):
        super().__init__()
        self.grid = grid
        fixed = None
        if rope is not None and not rope.aug_active and not list(rope.parameters()):
            fixed = rope.get_embed(shape=list(grid))
        self.register_buffer("fixed", fixed, persistent=False)

    def forward(self, rope: Any, index: Int[Tensor, "b k"] | None) -> Tensor | None:
        """Sines and cosines for the patches `index`, as timm's blocks take them: [n, e] for all patches, else
        [b, 1, k, e], and with frequencies of each block's own [depth, heads, n, e] or [depth, b, heads, k, e]."""
        if rope is None:
            return None
        turns = rope.get_embed(shape=list(self.grid)) if self.fixed is None else self.fixed
        if index is None:
            return turns
        return turns[index].unsqueeze(1) if turns.ndim == 2 else turns[:, :, index].transpose(1, 2)


class Eva(Plain):
    """An adapter around timm's Eva. A token is turned by its own place in the grid, whichever others are there; class and
    register tokens are not turned. Frequencies may be fixed and shared by the blocks, or learned by each."""

    def __init__(self, model: TimmEva, image_size: tuple[int, int] | None = None):
        super().__init__(model, image_size)
        self.turns = Turns(model.rope, self.grid(*self.image_size))

    def places(self, index: Int[Tensor, "b k"] | None) -> Any:
        return self.turns(self.model.rope, index)

    def run(self, number: int, tokens: Float[Tensor, "b t d"], places: Any) -> Float[Tensor, "b t d"]:
        return self.model.blocks[number](tokens, rope=places[number] if self.model.rope_mixed else places)

    def positions(self) -> Float[Tensor, "n d"] | None:
        """None where tokens are turned too: an embedding alone does not say then where a patch is."""
        return super().positions() if self.model.rope is None else None
