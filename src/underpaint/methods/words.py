"""What methods share that predict visual words: a tokenizer, and the way to its images."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from underpaint.backbones import PatchBackbone
from underpaint.masking import Mask, Strategy
from underpaint.methods.masked import MaskedMethod
from underpaint.patches import Standardize
from underpaint.tokenizers import KMeansPatches, Tokenizer, codebook_size_for, load_tokenizer


class WordMethod(MaskedMethod[Mask]):
    """A method whose targets are words, one a patch of the encoder.

    Without a tokenizer's file it has k-means over patches, which is still to be fitted to the training images;
    `standardize` leads back from the images of the method to those of the tokenizer, in [0, 1].

    Args:
        tokenizer: a file of `underpaint tokenizer`; k-means over the training images' patches where None.
        codebook_size: words of that k-means: 1024 for images up to 64 px, 2048 above, where None.
    """

    encoder: PatchBackbone
    mask: str | Strategy = "block"
    tokenizer: Any = None  # a file before the weights are made, a `Tokenizer` after
    codebook_size: int | None = None

    def __post_init__(self) -> None:
        encoder, codebook_size, file = self.encoder, self.codebook_size, self.tokenizer
        if not isinstance(encoder, PatchBackbone):
            raise TypeError(f"{type(self).__name__} needs a plain vision transformer, not {type(encoder).__name__}")
        self.patch_size = encoder.patch_size
        side = self.patch_size[0]
        if self.patch_size != (side, side):
            raise ValueError(f"words need square patches, not {self.patch_size}")
        self.hide(self.patch_size, encoder.image_size)
        if file is None:
            words = codebook_size or codebook_size_for(encoder.image_size)
            self.tokenizer = KMeansPatches(words, side, encoder.channels)
        else:
            self.tokenizer = load_tokenizer(file)
            if (self.tokenizer.stride, self.tokenizer.channels) != (side, encoder.channels):
                raise ValueError(
                    f"the tokenizer makes a word of {self.tokenizer.stride} px of {self.tokenizer.channels} channels; the "
                    f"encoder has patches of {side} px of {encoder.channels} channels"
                )
            if codebook_size not in (None, self.tokenizer.codebook_size):
                raise ValueError(
                    f"codebook_size is {codebook_size}, but the tokenizer has {self.tokenizer.codebook_size} words"
                )
        self.standardize = Standardize([0.0] * encoder.channels, [1.0] * encoder.channels)
        self.register_load_state_dict_post_hook(_ready)

    def prepare(self, standardize: Standardize) -> Tokenizer | None:
        self.standardize.load_state_dict(standardize.state_dict())
        return self.tokenizer

    @torch.no_grad()
    def words(self, images: Float[Tensor, "b c height width"]) -> Int[Tensor, "b n"]:
        """The word of every patch of standardised images, found in float32 wherever a step computes in less."""
        if not self.tokenizer.ready:
            raise RuntimeError("the tokenizer is not fitted yet: fit it, or give a file of 'underpaint tokenizer'")
        with torch.autocast(images.device.type, enabled=False):
            return self.tokenizer.encode(self.standardize.inverse(images.float()).clamp(0, 1))

    def spoken(self, images: Float[Tensor, "b c height width"], words: Int[Tensor, "b n"]) -> Tensor:
        """Standardised pictures of words, on the grid of `images`."""
        return self.standardize(self.tokenizer.decode(words, self.tokenizer.grid(*images.shape[-2:])))

    def targets(self, images: Float[Tensor, "b c height width"], mask: Mask) -> Tensor:
        return self.words(images).gather(1, mask.hidden)

    @torch.no_grad()
    def restore(
        self, images: Float[Tensor, "b c height width"], noise: Mask | None = None, task: str | None = None
    ) -> dict[str, Tensor]:
        """What the tokenizer makes of all patches, and the same with the hidden ones as predicted."""
        mask = self.fixed_noise(images, 1)[0] if noise is None else noise
        words = self.words(images)
        predicted = words.scatter(1, mask.hidden, self.predict(images, mask).argmax(-1))
        return {
            "original": images,
            "hidden": self.hidden(images, mask),
            "words": self.spoken(images, words),
            "restored": self.spoken(images, predicted),
        }

    def errors(self, images: Float[Tensor, "b c height width"], noise: Mask) -> dict[str, tuple[Tensor, Tensor]]:
        """Cross-entropy, against that of always saying words by their frequency."""
        words = self.targets(images, noise)
        left = cross_entropies(self.predict(images, noise), words).mean(1)
        return {"words": (left, frequency_losses(words, self.tokenizer.shares).mean(1))}


def _ready(method: Any, _: Any) -> None:
    """A state that is loaded holds a tokenizer that was fitted."""
    method.tokenizer.ready = True


def cross_entropies(logits: Float[Tensor, "b h k"], words: Int[Tensor, "b h"]) -> Float[Tensor, "b h"]:
    return F.cross_entropy(logits.float().transpose(1, 2), words, reduction="none")


def frequency_losses(words: Int[Tensor, "b h"], shares: Float[Tensor, "k"]) -> Float[Tensor, "b h"]:
    """The cross-entropy of each word under the words' frequencies: what no prediction from context needs."""
    return -shares.log()[words]


def word_terms(
    logits: Float[Tensor, "b h k"], words: Int[Tensor, "b h"], shares: Float[Tensor, "k"]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss on hidden words, and its numbers: accuracy, and the baseline of word frequencies."""
    loss = cross_entropies(logits, words).mean()
    hit = (logits.detach().argmax(-1) == words).float().mean()
    return loss, {"words": loss.detach(), "accuracy": hit, "baseline": frequency_losses(words, shares).mean()}
