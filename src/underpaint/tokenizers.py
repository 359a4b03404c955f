"""Images to and from discrete visual words: what BEiT and CAE predict, and what CIM corrupts with.

Contract: `encode(images)` gives one word a place of a grid of `stride` pixels, [b, n] row by row, from images in
[0, 1]; `decode(words, grid)` gives images in [0, 1]; there are `codebook_size` words. Frozen: no method trains one.

- `KMeansPatches`: the nearest of K centres to a raw patch. Fitted in a minute, misses nothing of its own.
- `ConvTokenizer`: a convolutional autoencoder with finite scalar quantisation (FSQ, arXiv 2309.15505) or vector
  quantisation (VQ-VAE, 1711.00937) in the middle, whose decoder sees beyond one place.
- `DallE`: the discrete VAE of DALL-E (2102.12092), which BEiT and CAE used, for its published weights.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from underpaint.computing import full, in_full
from underpaint.console import progress
from underpaint.data.scaling import Scaling, stored_scaling
from underpaint.errors import InputError
from underpaint.files import replacing, write_json
from underpaint.patches import patchify, unpatchify
from underpaint.reading import one_line
from underpaint.trainable import Objective, Trainable

FORMAT = 1
CHUNK = 2**24  # distances held at once
LEAST_USE = 0.1  # share of the codebook that held-out images must use
LEAST_PATCHES = 10  # a word
MOST_NUMBERS = 2**28  # in the patches that k-means is fitted to: 42 a word for 8192 words of 16 px
MOST_WORDS = 8192  # of k-means: the choice of its starts takes a pass a word
ITERATIONS = 25  # of Lloyd
STRIDES = (2, 4, 8, 16, 32)  # pixels of a word of a convolutional tokenizer
FSQ_LEVELS = {1000: (8, 5, 5, 5), 1024: (4, 4, 4, 4, 4), 4375: (7, 5, 5, 5, 5), 64: (4, 4, 4), 256: (4, 4, 4, 4)}


class Tokenizer(Trainable):
    """The contract above. `ready` says whether it was fitted, trained or loaded."""

    kind: str
    codebook_size: int
    stride: int
    channels: int
    ready: bool = False
    shares: Tensor

    def __init__(self, codebook_size: int):
        super().__init__()
        # how often each word comes in the crops that a method is trained on: equal until `count` has counted
        self.register_buffer("shares", torch.full((codebook_size,), 1 / codebook_size))

    def train(self, mode: bool = True) -> "Tokenizer":
        """Once ready it stays as it is: a codebook or a batch norm in train mode would go on changing."""
        return super().train(mode and not self.ready)

    def encode(self, images: Float[Tensor, "b c height width"]) -> Int[Tensor, "b n"]:
        raise NotImplementedError

    def decode(self, words: Int[Tensor, "b n"], grid: tuple[int, int]) -> Float[Tensor, "b c height width"]:
        raise NotImplementedError

    def arguments(self) -> dict[str, Any]:
        """What its constructor needs."""
        raise NotImplementedError

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return height // self.stride, width // self.stride

    @torch.no_grad()
    def judge(self, batches: Iterable[Tensor]) -> dict[str, float]:
        """On images it was not fitted on: `psnr` in dB, `used` (share of the codebook, or of the places where those
        are fewer), `perplexity` of the words, and `unigram`, their entropy in nats: the cross-entropy of always
        predicting by these images' own frequencies."""
        error, pixels = 0.0, 0
        counts = torch.zeros(self.codebook_size, dtype=torch.float64)
        for images in batches:
            words = self.encode(images)
            restored = self.decode(words, self.grid(*images.shape[-2:]))
            error += float((restored - images).double().square().sum())
            pixels += images.numel()
            counts += torch.bincount(words.flatten().cpu(), minlength=self.codebook_size)
        entropy = float(torch.special.entr(counts / counts.sum()).sum())
        return {
            "psnr": 10 * math.log10(pixels / max(error, 1e-30)),
            "used": float((counts > 0).sum() / min(self.codebook_size, max(1.0, float(counts.sum())))),
            "perplexity": math.exp(entropy),
            "unigram": entropy,
        }

    @torch.no_grad()
    def count(self, batches: Iterable[Tensor]) -> None:
        """Keep the words' frequencies in these images as `shares`, each word counted once more than it came.

        They are what a method's `baseline` says, so they must be those that a network can learn without looking.
        """
        counts = torch.zeros(self.codebook_size, dtype=torch.float64)
        for images in batches:
            counts += torch.bincount(self.encode(images).flatten().cpu(), minlength=self.codebook_size)
        self.shares.copy_((counts + 1) / (counts.sum() + self.codebook_size))


def refuse_collapsed(quality: dict[str, float], name: str) -> None:
    """Raises InputError where held-out images use a small part of the codebook."""
    if quality["used"] < LEAST_USE:
        raise InputError(
            f"{name}: held-out images use {100 * quality['used']:.1f} % of the words; at least {100 * LEAST_USE:.0f} % "
            "are needed: a smaller codebook_size, or more training images"
        )


def described(quality: dict[str, float]) -> str:
    """A line for people."""
    return (
        f"PSNR {quality['psnr']:.1f} dB, {100 * quality['used']:.0f} % of the words used, perplexity "
        f"{quality['perplexity']:.0f}, unigram cross-entropy {quality['unigram']:.2f} nats"
    )


# -- k-means -----------------------------------------------------------------------------------------------------------


class KMeansPatches(Tokenizer):
    """Words are the nearest of `codebook_size` centres to a raw patch; a word decodes to its centre.

    Nothing is learned by gradients: k-means++ (Arthur and Vassilvitskii 2007), then Lloyd's iterations; a centre that
    lost its patches moves to the patch that is worst represented. As targets of masked image modelling: CCViT, arXiv
    2303.04664; ClusterMIM, 2407.09087.
    """

    kind = "kmeans"
    centres: Tensor

    def __init__(self, codebook_size: int, stride: int, channels: int = 3):
        super().__init__(codebook_size)
        if not 2 <= codebook_size <= MOST_WORDS:
            raise InputError(f"k-means has 2 to {MOST_WORDS} words, not {codebook_size}")
        self.codebook_size, self.stride, self.channels = codebook_size, stride, channels
        self.register_buffer("centres", torch.zeros(codebook_size, channels * stride * stride))

    def arguments(self) -> dict[str, Any]:
        return {"codebook_size": self.codebook_size, "stride": self.stride, "channels": self.channels}

    @torch.no_grad()
    def fit(self, patches: Float[Tensor, "n d"], seed: int = 0) -> None:
        """From patches in [0, 1] (flattened as `patchify` does): the same patches and seed give the same words (on a GPU
        up to the order in which it sums).

        Raises:
            InputError: fewer than 10 patches a word, or fewer different ones than words.
        """
        if len(patches) < LEAST_PATCHES * self.codebook_size:
            raise InputError(
                f"k-means of {self.codebook_size} words needs {LEAST_PATCHES * self.codebook_size} patches; there are "
                f"{len(patches)}: more images, or a smaller codebook_size"
            )
        generator = torch.Generator().manual_seed(seed)
        some = patches[torch.randperm(len(patches), generator=generator)[: 40 * self.codebook_size].to(patches.device)]
        centres = _plus_plus(some, self.codebook_size, generator)
        for _ in progress(range(ITERATIONS), "k-means"):
            word, distance = _nearest(patches, centres)
            sums = torch.zeros_like(centres).index_add_(0, word, patches)
            counts = torch.bincount(word, minlength=self.codebook_size)
            centres = torch.where(counts.unsqueeze(1) == 0, centres, sums / counts.clamp_min(1).unsqueeze(1))
            empty = (counts == 0).nonzero().flatten()
            if len(empty):
                centres[empty] = patches[distance.topk(len(empty)).indices]
        self.centres.copy_(centres)
        self.ready = True

    def encode(self, images: Float[Tensor, "b c height width"]) -> Int[Tensor, "b n"]:
        patches = patchify(images, (self.stride, self.stride))
        return _nearest(patches.flatten(0, 1), self.centres)[0].view(patches.shape[:2])

    def decode(self, words: Int[Tensor, "b n"], grid: tuple[int, int]) -> Float[Tensor, "b c height width"]:
        return unpatchify(self.centres[words], (self.stride, self.stride), grid).clamp(0, 1)


def _nearest(
    patches: Float[Tensor, "n d"], centres: Float[Tensor, "k d"]
) -> tuple[Int[Tensor, "n"], Float[Tensor, "n"]]:
    """The nearest centre and its squared distance; one matrix product, a chunk of patches at a time.

    Near ties must not be decided by a GPU's short mantissas: products are of what is left without the mean centre.
    """
    mean = centres.mean(0)
    centres = centres - mean
    half = 0.5 * centres.square().sum(1)
    words, distances = [], []
    with in_full(patches):
        for part in patches.split(max(1, CHUNK // len(centres))):
            part = part.float() - mean
            score, word = torch.addmm(-half, part, centres.T).max(1)  # part . centre - |centre|^2 / 2
            words.append(word)
            distances.append((part.square().sum(1) - 2 * score).clamp_min(0))
    return torch.cat(words), torch.cat(distances)


def _plus_plus(patches: Float[Tensor, "n d"], count: int, generator: torch.Generator) -> Float[Tensor, "k d"]:
    """Starts far from each other: each next one drawn by its squared distance to those before."""
    draws = torch.rand(count, generator=generator).tolist()
    centred = patches - patches.mean(0)
    squares = centred.square().sum(1)
    chosen = [int(draws[0] * len(patches))]
    nearest = torch.full_like(squares, torch.inf)
    for draw in draws[1:]:
        both = squares + squares[chosen[-1]]
        distance = both - 2 * centred @ centred[chosen[-1]]
        # equal patches would be apart by what rounding leaves
        nearest = torch.minimum(nearest, torch.where(distance > 1e-5 * both, distance, 0.0))
        total = nearest.double().cumsum(0)
        if float(total[-1]) <= 0:
            raise InputError(f"k-means of {count} words: there are only {len(chosen)} different patches")
        chosen.append(min(int(torch.searchsorted(total, draw * total[-1])), len(patches) - 1))
    return patches[chosen]


def width_for(image_size: tuple[int, int]) -> int:
    """Channels of a convolutional tokenizer: 64 for images up to 64 px, 128 above."""
    return 64 if max(image_size) <= 64 else 128


def codebook_size_for(image_size: tuple[int, int]) -> int:
    """1024 words for images up to 64 px, 2048 above."""
    return 1024 if max(image_size) <= 64 else 2048


def sample_patches(batches: Iterable[Tensor], stride: int, wanted: int, seed: int) -> Float[Tensor, "n d"]:
    """Random patches of images in [0, 1], at most 16 of each, and at most a GiB of them."""
    generator = torch.Generator().manual_seed(seed)
    found: Tensor | None = None
    filled = 0
    for images in batches:
        patches = patchify(images, (stride, stride)).flatten(0, 1)
        if found is None:
            found = patches.new_empty(min(wanted, MOST_NUMBERS // patches.shape[1]), patches.shape[1])
        chosen = torch.randperm(len(patches), generator=generator)[: min(16 * len(images), len(found) - filled)]
        found[filled : filled + len(chosen)] = patches[chosen.to(patches.device)]
        filled += len(chosen)
        if filled == len(found):
            break
    assert found is not None
    return found[:filled]


# -- convolutional autoencoders ----------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside the identity."""

    def __init__(self, dim: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, dim), nn.SiLU(), nn.Conv2d(dim, dim, 3, padding=1),
            nn.GroupNorm(8, dim), nn.SiLU(), nn.Conv2d(dim, dim, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        return x + self.body(x)


class ConvTokenizer(Tokenizer):
    """A convolutional autoencoder whose middle is quantised: `fsq` (a fixed grid, which cannot collapse) or `vq` (a
    learned codebook by moving averages, dead codes replaced), both vector-quantize-pytorch's.

    Args:
        kind: fsq or vq.
        codebook_size: words; for fsq one of `FSQ_LEVELS`.
        stride: pixels of a place, a power of 2.
        dim: channels, of the places; half of it at finer scales.
        blocks: residual blocks at each scale.
    """

    def __init__(
        self,
        kind: Literal["fsq", "vq"],
        codebook_size: int,
        stride: int,
        channels: int = 3,
        dim: int = 128,
        blocks: int = 2,
    ):
        if codebook_size < 2:
            raise InputError(f"a tokenizer has 2 words or more, not {codebook_size}")
        super().__init__(codebook_size)
        if stride not in STRIDES:
            raise InputError(
                f"a convolutional tokenizer has a stride of {', '.join(map(str, STRIDES))} pixels, not {stride}"
            )
        self.kind, self.codebook_size, self.stride, self.channels = kind, codebook_size, stride, channels
        self.dim, self.blocks = dim, blocks
        first = 4 if stride >= 16 else 2  # where words are large, finer scales would cost most and matter least
        strides = [first] + [2] * (round(math.log2(stride / first)))
        last = max(32, dim // 2)
        widths = [last] * (len(strides) - 1) + [dim]
        down: list[nn.Module] = []
        before = channels
        for width, step in zip(widths, strides, strict=True):
            down += [nn.Conv2d(before, width, 2 * step, step, step // 2), *(Residual(width) for _ in range(blocks))]
            before = width
        up: list[nn.Module] = []
        for width, after, step in zip(widths[::-1], [*widths[-2::-1], last], strides[::-1], strict=True):
            up += [
                *(Residual(width) for _ in range(blocks)),
                nn.ConvTranspose2d(width, after, 2 * step, step, step // 2),
            ]
        up += [nn.GroupNorm(8, last), nn.SiLU(), nn.Conv2d(last, channels, 3, padding=1)]
        self.down, self.up = nn.Sequential(*down), nn.Sequential(*up)
        from vector_quantize_pytorch import FSQ, VectorQuantize

        if kind == "fsq":
            if codebook_size not in FSQ_LEVELS:
                raise InputError(
                    f"an FSQ tokenizer has {', '.join(map(str, sorted(FSQ_LEVELS)))} words, not {codebook_size}"
                )
            self.quantize: Any = FSQ(list(FSQ_LEVELS[codebook_size]))
            code = len(FSQ_LEVELS[codebook_size])
        else:
            code = min(32, dim)
            self.quantize = VectorQuantize(
                code, codebook_size, decay=0.9, kmeans_init=True, threshold_ema_dead_code=1, commitment_weight=0.25
            )
        self.narrow, self.widen = nn.Conv2d(dim, code, 1), nn.Conv2d(code, dim, 1)
        # each coordinate over all its levels from the first step on, so that all words are used
        self.spread = nn.BatchNorm2d(code, affine=False) if kind == "fsq" else nn.Identity()

    def arguments(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "codebook_size": self.codebook_size,
            "stride": self.stride,
            "channels": self.channels,
            "dim": self.dim,
            "blocks": self.blocks,
        }

    def _codes(self, images: Float[Tensor, "b c height width"]) -> tuple[Tensor, Tensor, Tensor]:
        """Quantised codes [b, n, code], words [b, n], and the loss of the codebook; rounded to words in float32."""
        found = full(self.narrow(self.down(2 * images - 1)))
        with in_full(images):
            found = self.spread(found).flatten(2).transpose(1, 2)
            if self.kind == "fsq":
                codes, words = self.quantize(found)
                return codes, words, images.new_zeros(())
            return self.quantize(found)

    def _images(self, codes: Float[Tensor, "b n k"], grid: tuple[int, int]) -> Float[Tensor, "b c height width"]:
        return 0.5 + 0.5 * full(self.up(self.widen(codes.transpose(1, 2).unflatten(2, grid))))

    def loss(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, ""]:
        """Squared error of the restored pixels, and the commitment of a codebook."""
        codes, _, commitment = self._codes(images)
        restored = self._images(codes, self.grid(*images.shape[-2:]))
        return (restored - images).square().mean() + commitment.sum()

    def forward(self, images: Float[Tensor, "b c height width"], noise: None = None) -> Objective:
        return Objective(self.loss(images), {})

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b c height width"]) -> Int[Tensor, "b n"]:
        # of pixels that are no numbers the codes are anything; such a batch is left out by its gradient, not by an error
        return self._codes(images)[1].long().clamp(0, self.codebook_size - 1)

    @torch.no_grad()
    def decode(self, words: Int[Tensor, "b n"], grid: tuple[int, int]) -> Float[Tensor, "b c height width"]:
        codes = (
            self.quantize.indices_to_codes(words)
            if self.kind == "fsq"
            else self.quantize.get_output_from_indices(words)
        )
        return self._images(codes, grid).clamp(0, 1)


# -- the discrete VAE of DALL-E ----------------------------------------------------------------------------------------


class _Bottleneck(nn.Module):
    """Pre-activated: four convolutions a quarter wide, beside the identity (a 1 x 1 convolution where widths differ)."""

    def __init__(self, before: int, after: int, sides: tuple[int, int, int, int], gain: float):
        super().__init__()
        self.gain = gain
        self.identity = nn.Conv2d(before, after, 1) if before != after else nn.Identity()
        widths = [before, *[after // 4] * 3, after]
        self.convs = nn.ModuleList(
            nn.Conv2d(widths[k], widths[k + 1], side, padding=side // 2) for k, side in enumerate(sides)
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k h w"]:
        found = x
        for conv in self.convs:
            found = conv(found.relu())
        return self.identity(x) + self.gain * found


class DallE(Tokenizer):
    """The discrete VAE of DALL-E (Ramesh et al., arXiv 2102.12092): 8192 words at stride 8.

    Its published weights are read from a safetensors file that `scripts/convert_dalle.py` makes from the authors' two
    files. BEiT and CAE show it the crop at half size, so that a word stands for a patch of 16 px; here `stride` is 8 times
    `shrink`, and images are made smaller by that first: bicubic and antialiased, where the codes of BEiT and CAE have
    Lanczos, which torch does not have on GPUs.
    """

    kind = "dalle"
    codebook_size = 8192

    def __init__(self, shrink: int = 2, width: int = 256, channels: int = 3, codebook_size: int = 8192):
        super().__init__(codebook_size)
        self.shrink, self.stride, self.channels, self.width = shrink, 8 * shrink, channels, width
        self.codebook_size = codebook_size
        gain = 1 / 64  # of four groups of two blocks
        times = (1, 2, 4, 8)
        self.first = nn.Conv2d(channels, width, 7, padding=3)
        befores = [1, *times[:-1]]
        self.encoder = nn.ModuleList(
            nn.ModuleList(
                _Bottleneck(width * (before if k == 0 else after), width * after, (3, 3, 3, 1), gain) for k in (0, 1)
            )
            for before, after in zip(befores, times, strict=True)
        )
        self.logits = nn.Conv2d(8 * width, codebook_size, 1)
        self.codebook = nn.Conv2d(codebook_size, width // 2, 1)
        self.decoder = nn.ModuleList()
        before = width // 2
        for after in times[::-1]:
            group = nn.ModuleList()
            for _ in (0, 1):
                group.append(_Bottleneck(before, width * after, (1, 3, 3, 3), gain))
                before = width * after
            self.decoder.append(group)
        self.last = nn.Conv2d(width, 2 * channels, 1)

    def arguments(self) -> dict[str, Any]:
        return {
            "shrink": self.shrink,
            "width": self.width,
            "channels": self.channels,
            "codebook_size": self.codebook_size,
        }

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b c height width"]) -> Int[Tensor, "b n"]:
        if self.shrink > 1:
            size = (images.shape[-2] // self.shrink, images.shape[-1] // self.shrink)
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        found = self.first(0.8 * images + 0.1)
        for number, group in enumerate(self.encoder):
            for block in group:  # pyright: ignore[reportGeneralTypeIssues]
                found = block(found)
            if number < 3:
                found = F.max_pool2d(found, 2)
        return self.logits(found.relu()).argmax(1).flatten(1)

    @torch.no_grad()
    def decode(self, words: Int[Tensor, "b n"], grid: tuple[int, int]) -> Float[Tensor, "b c height width"]:
        bias = self.codebook.bias
        assert bias is not None
        codes = F.embedding(words, self.codebook.weight.flatten(1).T) + bias
        found = codes.transpose(1, 2).unflatten(2, grid)
        for number, group in enumerate(self.decoder):
            for block in group:  # pyright: ignore[reportGeneralTypeIssues]
                found = block(found)
            if number < 3:
                found = F.interpolate(found, scale_factor=2.0, mode="nearest")
        restored = ((self.last(found.relu())[:, : self.channels].sigmoid() - 0.1) / 0.8).clamp(0, 1)
        if self.shrink > 1:
            restored = F.interpolate(restored, scale_factor=float(self.shrink), mode="bilinear", align_corners=False)
        return restored


# -- on disk -----------------------------------------------------------------------------------------------------------


def save_tokenizer(
    tokenizer: Tokenizer,
    path: Path,
    quality: dict[str, float] | None = None,
    scaling: Scaling | None = None,
    seconds: float | None = None,
) -> None:
    """Write `path` (safetensors, with what its constructor needs among its metadata, and how its images came to lie in
    [0, 1]) in one piece; beside it a .json that says the same to people, how good it is, and the seconds that making it
    took."""
    path.parent.mkdir(parents=True, exist_ok=True)
    description = {"format": FORMAT, "kind": tokenizer.kind, "arguments": tokenizer.arguments()}
    if scaling is not None:
        description["scaling"] = scaling.stored()
    write_json(path.with_suffix(".json"), {**description, "quality": quality, "seconds": seconds})
    weights = {k: v.detach().cpu().contiguous() for k, v in tokenizer.state_dict().items()}
    with replacing(path) as temporary:
        save_file(weights, temporary, {"tokenizer": json.dumps(description)})


def tokenizer_scaling(path: str | Path) -> Scaling | None:
    """The scaling of the images that a tokenizer was made from, where that is not the one of 8 bit.

    A file that is no tokenizer is left to `load_tokenizer`.
    """
    try:
        with safe_open(Path(path), framework="pt") as opened:
            description = json.loads((opened.metadata() or {}).get("tokenizer", "null"))
        scaling = stored_scaling((description or {}).get("scaling"))
    except (OSError, ValueError, SafetensorError):
        return None
    return None if scaling is None or scaling.plain else scaling


def making_seconds(path: str | Path) -> float | None:
    """How long making the tokenizer `path` took, where the .json beside it tells."""
    try:
        found = json.loads(Path(path).with_suffix(".json").read_text())["seconds"]
    except (OSError, ValueError, KeyError, TypeError):  # not there, from before it told, or not ours
        return None
    return float(found) if isinstance(found, int | float) else None


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer of `save_tokenizer`.

    Raises:
        InputError: it is not there, or cannot be read.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"tokenizer {file}: no such file; 'underpaint tokenizer' makes one")
    kinds: dict[str, Any] = {"kmeans": KMeansPatches, "fsq": ConvTokenizer, "vq": ConvTokenizer, "dalle": DallE}
    try:
        with safe_open(file, framework="pt") as opened:
            description = json.loads((opened.metadata() or {}).get("tokenizer", "null"))
        if description is None:
            raise ValueError("no description of one in its metadata; 'underpaint tokenizer' writes such files")
        if description["format"] != FORMAT:
            raise ValueError(f"format {description['format']}; this version reads format {FORMAT}")
        tokenizer: Tokenizer = kinds[description["kind"]](**description["arguments"])
        tokenizer.load_state_dict(load_file(file))
    except Exception as error:  # of arguments and weights that are anything: a division by 0, a size, a name, ...
        raise InputError(f"tokenizer {file}: not a tokenizer: {one_line(error) or type(error).__name__}") from error
    tokenizer.ready = True
    return tokenizer.eval().requires_grad_(False)
