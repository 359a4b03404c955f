"""Random numbers that are functions of what they are for: a seed, an image, and how many were drawn before.

Of a step they are functions of (seed, step, number of the image in the global batch). Whoever computes an image draws its
numbers and nobody else's, so one process or many, and any part of a batch, see the same; nothing waits for a state.

SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), read by counters:
the j-th 64 bits of a key are mix(key + j * GOLDEN), and keys are made of seeds and images in the same way. Wrapping
products and shifts of whole numbers are the same on every device, so uniform numbers and integers are, too; normal ones
are up to the rounding of a logarithm and a cosine.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
MIXING = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))  # right shift, then factor
LAST_SHIFT = 31
WORD = 2**64


@dataclass
class Draws:
    """The random numbers of some images: each call gives others, in the same order for every image.

    Attributes:
        seed: of all images together, such as `step_seed(seed, step, stream)`; moves on with every call.
        images: the number of each image, in its global batch or set.
    """

    seed: int
    images: Int[Tensor, "b"]

    @classmethod
    def of(cls, seed: int, count: int, first: int = 0) -> "Draws":
        """For `count` images, the first of which has the number `first`."""
        return cls(seed, torch.arange(first, first + count))

    @classmethod
    def some_or_new(cls, draws: "Draws | None", count: int) -> "Draws":
        """Those draws; where None, some for `count` images, seeded by torch's global generator."""
        return cls.of(int(torch.randint(2**62, ())), count) if draws is None else draws

    def __len__(self) -> int:
        return len(self.images)

    def keys(self) -> Int[Tensor, "b"]:
        """A key an image, of numbers that are to be made later, and elsewhere, by the functions below."""
        return _mixed(self.images * _signed(GOLDEN) + _signed(self._next()))

    def uniform(self, *shape: int) -> Float[Tensor, "b ..."]:
        """In [0, 1)."""
        return uniform(self.keys(), *shape)

    def integers(self, below: int, *shape: int) -> Int[Tensor, "b ..."]:
        """From 0 to `below` - 1, all equally likely."""
        return integers(self.keys(), below, *shape)

    def apart(self) -> "Draws":
        """Draws of their own for the same images: how often they are called changes nothing here."""
        return Draws(self._next(), self.images)

    def some(self, rows: Tensor | slice) -> "Draws":
        """Those of some of the images."""
        return Draws(self.seed, self.images[rows])

    def alike(self, run: int) -> "Draws":
        """Draws of their own that are the same for each `run` consecutive images: 0 to run - 1, and so on."""
        return Draws(self._next(), self.images // run)

    def _next(self) -> int:
        self.seed = (self.seed + GOLDEN) % WORD
        word = self.seed
        for shift, factor in MIXING:
            word = (word ^ word >> shift) * factor % WORD
        return word ^ word >> LAST_SHIFT


def uniform(keys: Int[Tensor, "b"], *shape: int) -> Float[Tensor, "b ..."]:
    """float32 in [0, 1), multiples of 2^-24, on the device of the keys."""
    bits = _bits(keys, math.prod(shape)) >> 8  # signed: -2^23 to 2^23 - 1, which floats hold exactly
    return bits.to(torch.float32).mul_(2.0**-24).add_(0.5).reshape(len(keys), *shape)


def normal(keys: Int[Tensor, "b"], *shape: int) -> Float[Tensor, "b ..."]:
    """float32 of mean 0 and variance 1, at most 5.8 from 0, on the device of the keys (Box and Muller, 1958)."""
    count = math.prod(shape)
    length, turn = uniform(keys, 2, (count + 1) // 2).unbind(1)
    length = (1 - length).log_().mul_(-2).sqrt_()
    turn = turn * (2 * math.pi)
    return torch.cat([length * turn.cos(), length * turn.sin()], 1)[:, :count].reshape(len(keys), *shape)


def integers(keys: Int[Tensor, "b"], below: int, *shape: int) -> Int[Tensor, "b ..."]:
    """From 0 to `below` - 1 (at most 2^31 - 1), on the device of the keys."""
    bits = _bits(keys, math.prod(shape)).to(torch.int64) & 0xFFFFFFFF
    return ((bits * below) >> 32).reshape(len(keys), *shape)


def _bits(keys: Int[Tensor, "b"], count: int) -> Int[Tensor, "b k"]:
    """`count` times 32 random bits for each key."""
    places = torch.arange(1, (count + 1) // 2 + 1, device=keys.device) * _signed(GOLDEN)
    return _mixed(keys.unsqueeze(1) + places).view(torch.int32)[:, :count]


def _mixed(words: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """In place. A right shift of signed numbers repeats the sign, which is masked away."""
    for shift, factor in MIXING:
        words.bitwise_xor_((words >> shift).bitwise_and_(2 ** (64 - shift) - 1)).mul_(_signed(factor))
    return words.bitwise_xor_((words >> LAST_SHIFT).bitwise_and_(2 ** (64 - LAST_SHIFT) - 1))


def _signed(word: int) -> int:
    """64 bits as torch has them."""
    return word - WORD if word >= WORD // 2 else word
