"""BEiT: Bao et al., "BEiT: BERT Pre-Training of Image Transformers", ICLR 2022, arXiv 2106.08254.

A control, and the generator of the corrupted-image method. Patches are hidden in blocks and replaced in the encoder's
input by one learned token; a linear map of the encoder's output says which visual word stood there.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from underpaint.backbones import PatchBackbone
from underpaint.masking import Mask, block_mask, hidden_count, random_mask
from underpaint.methods.method import Objective
from underpaint.methods.words import WordMethod, word_terms
from underpaint.tokenizers import Tokenizer


class BEiT(WordMethod):
    """Say the words of hidden patches.

    Args:
        encoder: a plain ViT, or timm's own BEiT, which has relative position biases.
        mask_ratio: share of the patches that is hidden; 0.4 hides 78 of 196, 0.383 the paper's 75.
        mask: block, or random.
        tokenizer: a file of `underpaint tokenizer`; k-means over the training images' patches where None.
        codebook_size: words of that k-means: 1024 for images up to 64 px, 2048 above, where None.

    Raises:
        TypeError: an encoder of another kind.
        ValueError: patches that are not square; a tokenizer that does not fit the encoder.
    """

    def __init__(
        self,
        encoder: PatchBackbone,
        mask_ratio: float = 0.4,
        mask: Literal["block", "random"] = "block",
        tokenizer: str | None = None,
        codebook_size: int | None = None,
    ):
        super().__init__(encoder, tokenizer, codebook_size)
        self.mask_ratio, self.mask_kind = mask_ratio, mask
        grid = encoder.grid(*encoder.image_size)
        hidden_count(grid[0] * grid[1], mask_ratio)  # says early that a ratio or a grid is impossible
        self.mask_token = nn.Parameter(torch.zeros(encoder.dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.speak(self.tokenizer)

    def speak(self, tokenizer: Tokenizer) -> None:
        """Take over the words of a tokenizer, with a new head for them."""
        self.tokenizer = tokenizer
        self.head = nn.Linear(self.encoder.dim, tokenizer.codebook_size)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def sample(self, batch: int, height: int, width: int, generator: torch.Generator | None = None) -> Mask:
        return word_mask(self.mask_kind, batch, self.encoder.grid(height, width), self.mask_ratio, generator)

    def logits(self, images: Float[Tensor, "b c height width"], mask: Mask) -> Float[Tensor, "b h k"]:
        tokens = self.encoder.embed(images)
        hidden = torch.zeros_like(tokens[..., 0]).scatter(1, mask.hidden, 1.0).unsqueeze(-1)
        tokens = tokens * (1 - hidden) + self.mask_token.to(tokens.dtype) * hidden
        last = self.encoder.encode(tokens).tokens
        return self.head(last.gather(1, mask.hidden.unsqueeze(-1).expand(-1, -1, last.shape[-1])))

    def forward(self, images: Float[Tensor, "b c height width"], mask: Mask | None = None) -> Objective:
        if mask is None:
            mask = self.mask_for(images)
        loss, terms = word_terms(self.logits(images, mask), self.hidden_words(images, mask), self.tokenizer.shares)
        return Objective(loss, terms)


def word_mask(
    kind: str, batch: int, grid: tuple[int, int], ratio: float, generator: torch.Generator | None = None
) -> Mask:
    """Patches hidden in blocks, or each alone."""
    hidden = hidden_count(grid[0] * grid[1], ratio)
    if kind == "random":
        return random_mask(batch, grid[0] * grid[1], hidden, generator)
    return block_mask(batch, grid, hidden, generator)
