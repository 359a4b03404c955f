"""CIM: Fang et al., "Corrupted Image Modeling for Self-Supervised Visual Pre-Training", ICLR 2023, arXiv 2202.03382.

A re-implementation from the abstract and secondary sources; docs/methods/cim.md lists what is not the paper's.

A small BEiT, the generator, is shown part of an image and says the visual words of the rest. Words drawn from what it
says replace the true ones, and the frozen decoder of the tokenizer makes an image of them: plausible, and wrong in
places. The enhancer, any network, sees that image and nothing else, and either restores the true pixels (ResPix) or
says for each word whether it was replaced (RevDet). Both are trained together; the generator is thrown away.

    golden   = words of the whole image, hidden patches too                    frozen tokenizer
    logits   = generator(image, hidden patches masked)                         cross-entropy on hidden words
    words    = draws from softmax(logits / temperature) where hidden, golden elsewhere
    x'       = decode(words), without gradient: the whole grid, so untouched places are the codec's too
    ResPix:    1/2 |y - t| + 1/2 (y - t)^2,  t = pixels by the mean and deviation of their window
    RevDet:    binary cross-entropy of (words != golden) at every place
"""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from underpaint.backbones import Backbone, TokenBackbone
from underpaint.backbones import encoder as make_encoder
from underpaint.blocks import heads_for
from underpaint.draws import Draws
from underpaint.masking import Mask, repeated, some_rows, to_device
from underpaint.methods.beit import BEiT
from underpaint.methods.masked import MaskedMethod
from underpaint.methods.method import Objective
from underpaint.methods.words import SMALL, cross_entropies, frequency_losses, word_side
from underpaint.patches import Standardize, patchify, put, take, unpatchify
from underpaint.targets import sliding_window, window_moments
from underpaint.tokenizers import STRIDES, ConvTokenizer, Tokenizer, load_tokenizer, width_for


class Corruption(NamedTuple):
    """The random part of a step: which words are hidden, and a number in [0, 1) for each to draw its replacement by."""

    mask: Mask
    uniform: Float[Tensor, "b h"]

    to = to_device
    rows = some_rows
    repeat = repeated


class Corrupted(NamedTuple):
    """What the enhancer gets, and what it is to find out."""

    images: Float[Tensor, "b c height width"]  # standardised
    golden: Int[Tensor, "b n"]
    words: Int[Tensor, "b n"]
    logits: Float[Tensor, "b h k"]  # of the generator, with its gradient

    @property
    def replaced(self) -> Bool[Tensor, "b n"]:
        """A draw that is the golden word counts as original."""
        return self.words != self.golden


class CIM(MaskedMethod[Corruption]):
    """Restore, or find, what a small generator made up.

    Args:
        encoder: the enhancer: any encoder whose last stride is a whole number of words.
        objective: pixels (ResPix), or detect (RevDet).
        mask_ratio: share of the words that is hidden (110 of 196 in secondary sources).
        mask: a name of `masking.MASKS`, or such a function.
        mask_patch_size: pixels of a side of what is hidden as one; a word where None.
        stride: pixels of a word; the patch of a ViT, or 8 up to 64 px and 16 above, where None.
        tokenizer: a file of `underpaint tokenizer --kind fsq`; one is trained on the training images where None.
        codebook_size: words of that tokenizer; 1024 where None.
        generator_depth: blocks; a quarter of a ViT's, or 3, where None.
        generator_dim: width; that of a ViT, or 192 up to 64 px and 384 above, where None.
        temperature: of the draws.
        sampler: multinomial; or, as controls, argmax, uniform, unigram (by the words' frequencies), none (golden words
            throughout: the codec alone).
        paste: decoded patches pasted into the true image where hidden, as a control: their seams give them away.
        window: pixels of the side of the window that targets are normalised by; 8, or 4 up to 64 px, where None.
        epsilon: added to the window's variance (pixels in [0, 1]).

    Raises:
        ValueError: words that do not fit the encoder's places or the image.
    """

    encoder: Backbone
    mask_ratio: float = 0.56
    objective: Literal["pixels", "detect"] = "pixels"
    stride: int | None = None
    tokenizer: str | None = None
    codebook_size: int | None = None
    generator_depth: int | None = None
    generator_dim: int | None = None
    temperature: float = 1.0
    sampler: Literal["multinomial", "argmax", "uniform", "unigram", "none"] = "multinomial"
    paste: bool = False
    window: int | None = None
    epsilon: float = 1e-4
    image_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        encoder = self.encoder
        plain = encoder if isinstance(encoder, TokenBackbone) else None
        own: Any = getattr(encoder, "image_size", (224, 224))
        height, width = size = own if plain is not None else self.image_size or own
        small = max(size) <= SMALL
        self.place = place = plain.patch_size[0] if plain is not None else getattr(encoder, "stride", 32)
        self.word = self.stride or word_side(encoder, place, size)
        if place % self.word or height % place or width % place:
            raise ValueError(
                f"words of {self.word} px: a place of this encoder is {place} px, which must be a whole number of words "
                f"and divide images of {height}x{width}"
            )
        if self.temperature <= 0:
            raise ValueError(
                f"temperature is {self.temperature:g}; it must be above 0 (sampler: argmax takes the likeliest word)"
            )
        self.side = self.window or (4 if small else 8)
        if not 1 < self.side <= min(size):
            raise ValueError(f"window is {self.side} px; it must be 2 or more and fit an image of {height}x{width}")
        self.hide((self.word, self.word), size)
        words = self._tokenizer(size)
        dim = self.generator_dim or (plain.dim if plain is not None else 192 if small else 384)
        depth = self.generator_depth or (max(1, plain.depth // 4) if plain is not None else 3)
        tokens: Any = make_encoder(
            "vit_tiny_patch16_224",
            image_size=size,
            patch_size=self.word,
            channels=encoder.channels,
            embed_dim=dim,
            depth=depth,
            num_heads=heads_for(dim),
        )
        self.generator = BEiT(tokens, self.mask_ratio, "random", codebook_size=2)
        self.generator.speak(words.requires_grad_(False).eval())
        outputs = encoder.channels * place * place if self.objective == "pixels" else (place // self.word) ** 2
        self.head = nn.Linear(encoder.dim, outputs)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def _tokenizer(self, size: tuple[int, int]) -> Tokenizer:
        channels = self.encoder.channels
        if self.tokenizer is None:
            if self.word not in STRIDES:
                known = ", ".join(map(str, STRIDES))
                inside = " or ".join(str(stride) for stride in STRIDES if self.place % stride == 0)
                raise ValueError(
                    f"words of {self.word} px: the tokenizer that a run trains has words of {known} px; such a --patch-size "
                    + (f"serves, or --set method.stride={inside}" if inside else "serves")
                )
            return ConvTokenizer("fsq", self.codebook_size or 1024, self.word, channels, width_for(size))
        words = load_tokenizer(self.tokenizer)
        if (words.stride, words.channels) != (self.word, channels):
            raise ValueError(
                f"the tokenizer makes a word of {words.stride} px of {words.channels} channels; "
                f"{self.word} px of {channels} are needed"
            )
        if self.codebook_size not in (None, words.codebook_size):
            raise ValueError(
                f"codebook_size is {self.codebook_size}, but the tokenizer has {words.codebook_size} words"
            )
        return words

    @property
    def standardize(self) -> Standardize:
        return self.generator.standardize

    def clip_groups(self) -> list[list[nn.Parameter]]:
        """Generator and enhancer share nothing, so the weight of neither loss may reach the other through the norm."""
        mine = [p for name, p in self.named_parameters() if not name.startswith("generator.") and p.requires_grad]
        return [[p for p in self.generator.parameters() if p.requires_grad], mine]

    def recompute_blocks(self) -> None:
        super().recompute_blocks()
        self.generator.recompute_blocks()

    def sample(self, batch: int, height: int, width: int, draws: Draws | None = None) -> Corruption:
        draws = Draws.some_or_new(draws, batch)
        mask = super().sample(batch, height, width, draws)
        return Corruption(mask, draws.uniform(mask.hidden.shape[1]))

    def prepare(self, standardize: Standardize) -> Tokenizer | None:
        return self.generator.prepare(standardize)

    # --- corrupting ------------------------------------------------------------------------------------------------

    def sample_tokens(
        self, logits: Float[Tensor, "b h k"], golden: Int[Tensor, "b h"], uniform: Float[Tensor, "b h"]
    ) -> Int[Tensor, "b h"]:
        """Replacements of hidden words, by the inverse of their cumulative distribution; no gradient."""
        logits = logits.detach().float()
        codebook_size = logits.shape[-1]
        if self.sampler == "none":
            return golden
        if self.sampler == "argmax":
            return logits.argmax(-1)
        if self.sampler == "uniform":
            return (uniform * codebook_size).long().clamp_max(codebook_size - 1)
        if self.sampler == "unigram":
            shares = self.generator.tokenizer.shares.expand_as(logits)
        else:
            shares = (logits / self.temperature).softmax(-1)
        reached = shares.cumsum(-1)
        place = uniform.unsqueeze(-1) * reached[..., -1:]
        return torch.searchsorted(reached, place, right=True).squeeze(-1).clamp_max(codebook_size - 1)

    def corrupt(self, images: Float[Tensor, "b c height width"], noise: Corruption) -> Corrupted:
        """What the generator makes of part of the images."""
        golden = self.generator.words(images)
        logits = self.generator.predict(images, noise.mask)
        hidden = golden.gather(1, noise.mask.hidden)
        words = golden.scatter(1, noise.mask.hidden, self.sample_tokens(logits, hidden, noise.uniform))
        decoded = self.generator.spoken(images, words)
        if self.paste:
            size = self.masking.unit
            pieces = take(patchify(decoded, size), noise.mask.hidden)
            whole = put(patchify(images, size), noise.mask.hidden, pieces)
            decoded = unpatchify(whole, size, self.masking.grid(*images.shape[-2:]))
        return Corrupted(decoded.detach(), golden, words, logits)

    # --- enhancing -------------------------------------------------------------------------------------------------

    def enhance(self, corrupted: Float[Tensor, "b c height width"]) -> Float[Tensor, "b k rows columns"]:
        """Normalised pixels [b, c, height, width], or a logit a word [b, 1, rows, columns]: replaced or not."""
        found = self.head(self.encoder(corrupted).patches).float()
        grid = self.encoder.grid(*corrupted.shape[-2:])
        side = self.place if self.objective == "pixels" else self.place // self.word
        return unpatchify(found, (side, side), grid)

    def targets(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        """Each pixel by the mean and deviation of the window around it, from pixels in [0, 1]."""
        return sliding_window(self.standardize.inverse(images), self.side, self.epsilon)

    def losses(
        self, images: Float[Tensor, "b c height width"], corrupted: Corrupted
    ) -> tuple[Float[Tensor, "b m"], Float[Tensor, "b m"], Tensor]:
        """Of the enhancer at every pixel or word, that of a trivial answer, and the enhancer's answer.

        Trivial are: every pixel the mean of its window; every word replaced with the share that is.
        """
        answer = self.enhance(corrupted.images)
        if self.objective == "pixels":
            target = self.targets(images)
            left = 0.5 * (answer - target).abs() + 0.5 * (answer - target).square()
            trivial = 0.5 * target.abs() + 0.5 * target.square()
            return left.flatten(1), trivial.flatten(1), answer
        truth = corrupted.replaced.float()
        share = truth.mean().clamp(1e-6, 1 - 1e-6)
        trivial = -(truth * share.log() + (1 - truth) * (1 - share).log())
        return F.binary_cross_entropy_with_logits(answer.flatten(1), truth, reduction="none"), trivial, answer

    def forward(self, images: Float[Tensor, "b c height width"], noise: Corruption | None = None) -> Objective:
        drawn: Corruption = self.sample_for(images) if noise is None else noise
        corrupted = self.corrupt(images, drawn)
        hidden = corrupted.golden.gather(1, drawn.mask.hidden)
        generator = cross_entropies(corrupted.logits, hidden).mean()
        left, trivial, answer = self.losses(images, corrupted)
        replaced = corrupted.replaced.float()
        hits = 1 - replaced.gather(1, drawn.mask.hidden).mean()
        baseline = frequency_losses(hidden, self.generator.tokenizer.shares).mean() + trivial.mean()
        terms = {
            "generator": generator.detach(),
            "hits": hits,  # draws that are the golden word
            "enhancer": left.mean().detach(),
            "baseline": baseline.detach(),
        }
        if self.objective == "pixels":
            where = F.interpolate(
                replaced.view(-1, 1, *self.masking.grid(*images.shape[-2:])), scale_factor=float(self.word)
            )
            where = where.expand(-1, images.shape[1], -1, -1).flatten(1)
            for name, weights in (("replaced", where), ("untouched", 1 - where)):
                terms[name] = ((left.detach() * weights).sum() / weights.sum().clamp_min(1)).detach()
        else:
            said = answer.detach().flatten()
            truth = replaced.flatten()
            terms["accuracy"] = ((said > 0).float() == truth).float().mean()
            terms["majority"] = torch.maximum(truth.mean(), 1 - truth.mean())
            terms["auroc"] = auroc(said, truth)
        return Objective(generator + left.mean(), terms)

    # --- pictures and scores ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def restore(
        self, images: Float[Tensor, "b c height width"], noise: Corruption | None = None, task: str | None = None
    ) -> dict[str, Tensor]:
        """Original, what the codec alone makes of it, corrupted; then restored, or where a replacement is seen, with
        the truth beside it."""
        same: Corruption = self.fixed_noise(images, 1)[0] if noise is None else noise
        corrupted = self.corrupt(images, same)
        frames = {
            "original": images,
            "golden words": self.generator.spoken(images, corrupted.golden),
            "corrupted": corrupted.images,
        }
        answer = self.enhance(corrupted.images)
        if self.objective == "pixels":
            # normalised pixels leave mean and contrast of their window open; those of the corrupted image are all that
            # the enhancer has seen
            mean, variance = window_moments(self.standardize.inverse(corrupted.images), self.side)
            restored = answer * (variance + self.epsilon).sqrt() + mean
            frames["restored"] = self.standardize(restored.clamp(0, 1))
            return frames
        size = (images.shape[-2], images.shape[-1])
        truth = corrupted.replaced.float().view(-1, 1, *self.masking.grid(*images.shape[-2:]))
        for name, values in (("said to be\nreplaced", answer.sigmoid()), ("replaced", truth)):
            frames[name] = self.standardize(F.interpolate(values, size, mode="nearest").expand_as(images).contiguous())
        return frames

    def errors(self, images: Float[Tensor, "b c height width"], noise: Corruption) -> dict[str, tuple[Tensor, Tensor]]:
        """The enhancer's loss, by which images are scored, and the generator's."""
        corrupted = self.corrupt(images, noise)
        hidden = corrupted.golden.gather(1, noise.mask.hidden)
        left, trivial, _ = self.losses(images, corrupted)
        return {
            self.objective: (left.mean(1), trivial.mean(1)),
            "generator": (
                cross_entropies(corrupted.logits, hidden).mean(1),
                frequency_losses(hidden, self.generator.tokenizer.shares).mean(1),
            ),
        }


def auroc(scores: Float[Tensor, "n"], truth: Float[Tensor, "n"]) -> Float[Tensor, ""]:
    """The share of (positive, negative) pairs in the right order; 0.5 where there is no pair. No host synchronisation."""
    order = scores.argsort()
    ranks = torch.zeros_like(scores).scatter(0, order, torch.arange(1.0, len(scores) + 1, device=scores.device))
    positive = truth.sum()
    negative = len(truth) - positive
    pairs = positive * negative
    found = ((ranks * truth).sum() - positive * (positive + 1) / 2) / pairs.clamp_min(1)
    return torch.where(pairs > 0, found, torch.full_like(found, 0.5))
