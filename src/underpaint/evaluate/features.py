"""Features of a frozen encoder, kept on the CPU."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from underpaint.errors import InputError

FULL_PRECISION_BYTES = 1e9  # patch tokens beyond this are kept in half precision
HALF_LIMIT = torch.finfo(torch.float16).max


class Features(NamedTuple):
    """One vector an image, and one a place of its grid; on the CPU."""

    pooled: Float[Tensor, "n d"]  # float32
    patches: Float[Tensor, "n t d"]  # float32, or float16 beyond 1 GB; t is 0 where none were asked for
    groups: list[str] | None = None  # of each image (patient, slide, video), where they have some


def extract(
    encoder: Callable[..., Any],
    batches: Iterable[Any],
    *,
    transform: Callable[[Tensor], Tensor] | None = None,
    with_patches: bool = True,
) -> Features:
    """Run `encoder` over `batches`, in eval mode and without gradients.

    Each batch has `.images` [b, c, height, width]; `transform` standardises them. `encoder(images)` has `.pooled`
    [b, d] and `.patches` [b, t, d]. Patch tokens are float32 up to 1 GB and float16 beyond, clipped to its range.
    The training flag of every module, and the global random state of the CPU, are as before when it returns.
    Raises InputError where there are no batches.
    """
    modules = list(encoder.modules()) if isinstance(encoder, nn.Module) else []
    training = [module.training for module in modules]
    pooled: list[Tensor] = []
    patches: list[Tensor] = []
    precision, held = torch.float32, 0
    try:
        for module in modules:
            module.training = False
        # a loader draws a seed for its workers from the global generator
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for batch in batches:
                images = batch.images if transform is None else transform(batch.images)
                found = encoder(images)
                pooled.append(found.pooled.float().cpu())
                if not with_patches:
                    continue
                patches.append(_kept(found.patches, precision))
                held += 4 * patches[-1].numel()
                if precision == torch.float32 and held > FULL_PRECISION_BYTES:
                    precision = torch.float16
                    patches = [_kept(part, precision) for part in patches]
    finally:
        for module, flag in zip(modules, training, strict=True):
            module.training = flag
    if not pooled:
        raise InputError("there are no images to extract features from")
    vectors = torch.cat(pooled)
    tokens = torch.cat(patches) if with_patches else vectors.new_empty(len(vectors), 0, vectors.shape[1])
    return Features(vectors, tokens)


def _kept(tokens: Float[Tensor, "b t d"], precision: torch.dtype) -> Float[Tensor, "b t d"]:
    if precision == torch.float16:
        tokens = tokens.clamp(-HALF_LIMIT, HALF_LIMIT)  # an overflow would make every later number infinite
    return tokens.to("cpu", precision)
