"""BEiT: Bao et al., "BEiT: BERT Pre-Training of Image Transformers", ICLR 2022, arXiv 2106.08254.

A control, and the generator of the corrupted-image method. Patches are hidden in blocks and replaced in the encoder's
input by one learned token; a linear map of the encoder's output says which visual word stood there. A place of an encoder
with feature maps has several words, and is hidden as a whole.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from underpaint.masking import Mask
from underpaint.methods.method import Objective
from underpaint.methods.words import WordMethod, word_terms
from underpaint.patches import take
from underpaint.tokenizers import Tokenizer


class BEiT(WordMethod):
    """Say the words of hidden patches.

    Args:
        encoder: any `StagedBackbone`; the paper's is timm's own BEiT, which has relative position biases.
        mask_ratio: share of the patches that is hidden; 0.38 hides 75 of 196, as the paper does.
        mask: a name of `masking.MASKS`, or such a function.
        mask_patch_size: pixels of a side of what is hidden as one; a patch where None.
        tokenizer: a file of `underpaint tokenizer`; k-means over the training images' patches where None.
        codebook_size: words of that k-means: 1024 for images up to 64 px, 2048 above, where None.

    Raises:
        TypeError: an encoder of another kind.
        ValueError: patches that are not square; a tokenizer that does not fit the encoder.
    """

    mask_ratio: float = 0.38

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mask_token = nn.Parameter(torch.zeros(self.encoder.token_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.speak(self.tokenizer)

    def speak(self, tokenizer: Tokenizer) -> None:
        """Take over the words of a tokenizer, with a new head for them."""
        self.tokenizer = tokenizer
        self.head = nn.Linear(self.encoder.dim, self.along**2 * tokenizer.codebook_size)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def predict(self, images: Float[Tensor, "b c height width"], mask: Mask) -> Float[Tensor, "b h k"]:
        """Logits of the words of hidden patches."""
        tokens = self.encoder.covered(images, mask, self.masking.unit, self.mask_token)
        logits = self.head(take(tokens, mask.hidden))
        return logits.unflatten(2, (self.along**2, -1)).flatten(1, 2)

    def forward(self, images: Float[Tensor, "b c height width"], noise: Mask | None = None) -> Objective:
        mask = self.sample_for(images) if noise is None else noise
        return Objective(*word_terms(self.predict(images, mask), self.targets(images, mask), self.tokenizer.shares))
