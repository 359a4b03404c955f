"""What methods share that predict visual words: a tokenizer, and the way to its images."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from underpaint.backbones import StagedBackbone, TokenBackbone
from underpaint.computing import in_full
from underpaint.masking import Mask, Strategy, refine
from underpaint.methods.masked import MaskedMethod, check_staged
from underpaint.patches import Standardize
from underpaint.tokenizers import KMeansPatches, Tokenizer, codebook_size_for, load_tokenizer

SMALL = 64  # pixels: up to here images are small


class WordMethod(MaskedMethod[Mask]):
    """A method whose targets are words: one a patch of a plain transformer, several a place of another encoder, which is
    hidden as a whole.

    Without a tokenizer's file it has k-means over patches, which is still to be fitted to the training images;
    `standardize` leads back from the images of the method to those of the tokenizer, in [0, 1].

    Args:
        tokenizer: a file of `underpaint tokenizer`; k-means over the training images' patches where None.
        codebook_size: words of that k-means: 1024 for images up to 64 px, 2048 above, where None.
    """

    encoder: StagedBackbone
    mask: str | Strategy = "block"
    tokenizer: Any = None  # a file before the weights are made, a `Tokenizer` after
    codebook_size: int | None = None

    def __post_init__(self) -> None:
        encoder, codebook_size, file = self.encoder, self.codebook_size, self.tokenizer
        check_staged(self, encoder)
        side = word_side(encoder, encoder.unit[0], encoder.image_size)
        if encoder.unit[0] != encoder.unit[1] or encoder.unit[0] % side:
            raise ValueError(f"words of {side} px need square places of a whole number of words, not {encoder.unit}")
        self.along = encoder.unit[0] // side  # words along a side of a place
        self.hide(encoder.unit, encoder.image_size)
        if file is None:
            words = codebook_size or codebook_size_for(encoder.image_size)
            self.tokenizer = KMeansPatches(words, side, encoder.channels)
        else:
            self.tokenizer = load_tokenizer(file)
            if (self.tokenizer.stride, self.tokenizer.channels) != (side, encoder.channels):
                raise ValueError(
                    f"the tokenizer makes a word of {self.tokenizer.stride} px of {self.tokenizer.channels} channels; the "
                    f"encoder has words of {side} px of {encoder.channels} channels"
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
        with in_full(images):
            return self.tokenizer.encode(self.standardize.inverse(images.float()).clamp(0, 1))

    def spoken(self, images: Float[Tensor, "b c height width"], words: Int[Tensor, "b n"]) -> Tensor:
        """Standardised pictures of words, on the grid of `images`, in float32 too."""
        with in_full(images):
            return self.standardize(self.tokenizer.decode(words, self.tokenizer.grid(*images.shape[-2:])))

    def said(self, images: Float[Tensor, "b c height width"], mask: Mask) -> Int[Tensor, "b h"]:
        """The numbers of the words of hidden places, place by place."""
        if self.along == 1:
            return mask.hidden
        return refine(mask, self.masking.grid(*images.shape[-2:]), self.along).hidden

    def targets(self, images: Float[Tensor, "b c height width"], mask: Mask) -> Tensor:
        return self.words(images).gather(1, self.said(images, mask))

    @torch.no_grad()
    def restore(
        self, images: Float[Tensor, "b c height width"], noise: Mask | None = None, task: str | None = None
    ) -> dict[str, Tensor]:
        """What the tokenizer makes of all patches, and the same with the hidden ones as predicted."""
        mask = self.fixed_noise(images, 1)[0] if noise is None else noise
        words = self.words(images)
        predicted = words.scatter(1, self.said(images, mask), self.predict(images, mask).argmax(-1))
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


def word_side(encoder: Any, place: int, size: tuple[int, int]) -> int:
    """Pixels of a side of a word where none are said: the patch of a plain transformer; else 8 for images up to SMALL px
    and 16 above, or a place of the encoder where that is smaller."""
    return place if isinstance(encoder, TokenBackbone) else min(place, 8 if max(size) <= SMALL else 16)


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
