"""timm's Eva: transformers whose attention turns queries and keys by where they are (EVA-02, DINOv3, Perception Encoder,
RoPE-ViT: Su et al. 2104.09864, Heo et al. 2403.13298, Siméoni et al. 2508.10104)."""

from typing import Any

from jaxtyping import Float, Int
from timm.models.eva import Eva as TimmEva
from torch import Tensor

from underpaint.backbones.plain import Plain


class Eva(Plain):
    """An adapter around timm's Eva. A token is turned by its own place in the grid, whichever others are there; class and
    register tokens are not turned. Frequencies may be fixed and shared by the blocks, or learned by each."""

    def __init__(self, model: TimmEva):
        super().__init__(model)

    def places(self, index: Int[Tensor, "b k"] | None) -> Any:
        rope = self.model.rope
        if rope is None:
            return None
        turns = rope.get_embed(shape=list(self.grid(*self.image_size)))  # [n, e], or [depth, heads, n, e]
        if index is None:
            return turns
        # [b, 1, k, e], or [depth, b, heads, k, e]
        return turns[index].unsqueeze(1) if turns.ndim == 2 else turns[:, :, index].transpose(1, 2)

    def run(self, number: int, tokens: Float[Tensor, "b t d"], places: Any) -> Float[Tensor, "b t d"]:
        return self.model.blocks[number](tokens, rope=places[number] if self.model.rope_mixed else places)

    def positions(self) -> Float[Tensor, "n d"] | None:
        """None where tokens are turned too: an embedding alone does not say then where a patch is."""
        return super().positions() if self.model.rope is None else None
