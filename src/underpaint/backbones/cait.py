"""timm's CaiT: a plain transformer whose class token comes in behind the blocks of the patches (Touvron et al. 2103.17239)."""

from jaxtyping import Float, Int
from timm.models.cait import Cait as TimmCait
from torch import Tensor

from underpaint.backbones.plain import Plain, placed
from underpaint.backbones.protocols import Encoded


class Cait(Plain):
    """An adapter around timm's Cait. Its class token looks at the patches, and they never at it."""

    def __init__(self, model: TimmCait, image_size: tuple[int, int] | None = None):
        super().__init__(model, image_size)
        for part in (self.model.blocks_token_only, self.model.cls_token):
            part.requires_grad_(False)  # nothing that is asked of patches reaches them

    @property
    def prefix(self) -> int:
        return 0

    def begin(
        self,
        tokens: Float[Tensor, "b k d"],
        index: Int[Tensor, "b k"] | None = None,
        positions: Float[Tensor, "b n d"] | None = None,
    ) -> Float[Tensor, "b k d"]:
        return self.model.pos_drop(placed(tokens, self.model.pos_embed if positions is None else positions, index))

    def finish(self, tokens: Float[Tensor, "b k d"]) -> Encoded:
        return Encoded(self.model.norm(tokens), [], tokens[:, :0])

    @property
    def class_token(self) -> bool:
        return False
