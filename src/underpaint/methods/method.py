"""The contract between a method and everything around it."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from timm.optim import param_groups_weight_decay
from torch import Tensor

from underpaint.backbones import Backbone
from underpaint.patches import Standardize
from underpaint.tokenizers import Tokenizer
from underpaint.trainable import Objective, Trainable


class Method(Trainable):
    """A pretraining method around an encoder: `method(images)` is an `Objective`.

    Images are standardised, float32 [b, c, height, width]. What is random in a step is drawn by `sample`, outside
    compiled regions; a method called without noise makes its own. Draws are a `Mask`, or a tuple of a method's own that
    has the same three verbs: `to(device)`, `rows(slice)`, and `repeat(batch)` of the noise of one image.

    A loss that is a sum of independent parts has `num_losses` above 1. `forward(images, noise, part, carry)` is then
    one of them, to be backpropagated before the next is made, which starts from the `carry` of the one before; the
    last one has the terms. Without `part`, forward is their sum.
    """

    encoder: Backbone

    def sample(self, batch: int, height: int, width: int, generator: torch.Generator | None = None) -> Any:
        """The random part of a step for `batch` images of this size in pixels, on the CPU."""
        raise NotImplementedError

    def forward(self, images: Float[Tensor, "b c height width"], noise: Any = None) -> Objective:
        raise NotImplementedError

    def noise_for(self, inputs: Float[Tensor, "b c height width"], count: int, generator: torch.Generator) -> Any:
        return self.sample(count, inputs.shape[2], inputs.shape[3], generator)

    def lr_scales(self) -> dict[str, float]:
        """Weights in a parameter group of their own, without decay: the factor on their learning rate, by name."""
        return {}

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """timm's: no decay on biases, norms, positions, class and mask tokens."""
        listed = {
            f"{place}.{name}"
            for place, module in self.named_modules()
            for name in getattr(module, "no_weight_decay", set)()
        }
        groups = param_groups_weight_decay(self, weight_decay, no_weight_decay_list=listed)
        named, scales = dict(self.named_parameters()), self.lr_scales()
        apart = {id(named[name]) for name in scales if name in named}
        for group in groups:
            group |= {"params": [p for p in group["params"] if id(p) not in apart], "lr": lr}
        groups += [
            {"params": [named[name]], "weight_decay": 0.0, "lr": lr * scale}
            for name, scale in scales.items()
            if name in named
        ]
        return groups

    def parts(self, images: Float[Tensor, "b c height width"], noise: Any = None) -> Iterator[Objective]:
        """The parts of the loss one by one; backpropagate each before asking for the next, and memory is that of one."""
        if self.num_losses == 1:
            yield self(images, noise)
            return
        if noise is None:
            noise = self.sample(len(images), images.shape[2], images.shape[3]).to(images.device)
        carry = None
        for part in range(self.num_losses):
            objective = self(images, noise, part, carry)
            yield objective
            carry = objective.carry

    def prepare(self, standardize: Standardize) -> Tokenizer | None:
        """Take over the transform of the images, where it is needed; returns the tokenizer that has to be ready before
        step 0, for methods that predict words."""
        return None

    def calibrate(
        self, images: Float[Tensor, "b c height width"], noise: Any, mean: Callable[[Tensor], Tensor] = lambda x: x
    ) -> dict[str, float]:
        """Settings that are measured on the first batch before step 0: taken over at once, and returned by name.

        `mean` averages a number over the processes of a run, so that all take over the same.
        """
        return {}

    def restore(self, images: Float[Tensor, "b c height width"], noise: Any = None) -> dict[str, Tensor]:
        """Pictures by caption, standardised like the images, from the original to the restoration."""
        raise NotImplementedError

    def score(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b"]:
        """How unusual each image is: higher means less like the training data."""
        raise NotImplementedError

    def held_out(
        self, images: Float[Tensor, "b c height width"], generator: torch.Generator
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """By task: each image's squared error on what was corrupted, restored and trivially restored ([b] each)."""
        raise NotImplementedError

    def fixed_noise(self, images: Tensor, count: int) -> list[Any]:
        """The noise of `count` steps, the same at every call, for scores and pictures that can be compared."""
        generator = torch.Generator().manual_seed(0)
        batch, _, height, width = images.shape
        return [self.sample(1, height, width, generator).repeat(batch).to(images.device) for _ in range(count)]
