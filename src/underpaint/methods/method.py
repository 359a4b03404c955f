"""The contract between a method and everything around it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, dataclass_transform, runtime_checkable

import torch
from jaxtyping import Float
from timm.models import group_parameters
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from underpaint.backbones import Backbone
from underpaint.draws import Draws
from underpaint.patches import Standardize
from underpaint.tokenizers import Tokenizer
from underpaint.trainable import Noise, Objective, Same, Trainable


@runtime_checkable
class Sampled(Noise, Protocol):
    """What a method draws for a step: it can be repeated for the images of a batch, too."""

    def repeat(self: Same, batch: int) -> Same: ...


N = TypeVar("N", bound=Sampled)


@dataclass_transform(eq_default=False, field_specifiers=(field,))
class Method(Trainable, Generic[N]):
    """A pretraining method around an encoder: `method(images)` is an `Objective`.

    A subclass without an `__init__` of its own is a dataclass: its annotated fields, after those of the classes that it
    extends, are the arguments of its constructor and with that the settings of a recipe; `__post_init__` makes the weights.

    Images are standardised, float32 [b, c, height, width]. What is random in a step is drawn by `sample`, outside
    compiled regions; a method called without noise makes its own. Noise is a `Mask`, or a tuple of a method's own that
    has the same three verbs: `to(device)`, `rows(slice)`, and `repeat(batch)` of the noise of one image.

    A loss that is a sum of independent parts has `num_losses` above 1. `forward(images, noise, part, carry)` is then
    one of them, to be backpropagated before the next is made, which starts from the `carry` of the one before; the
    last one has the terms. Without `part`, forward is their sum.
    """

    encoder: Backbone
    tasks: tuple[str, ...] = ("mask",)  # the kinds of corruption that it is trained to restore

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "__init__" not in cls.__dict__:
            dataclass(eq=False, repr=False)(cls)
            for name in set(vars(cls)) & set(vars(cls)["__dataclass_fields__"]):
                delattr(cls, name)  # a default there would hide a module that takes the setting's place

    def __setattr__(self, name: str, value: Any) -> None:
        if "_modules" not in self.__dict__:  # a dataclass sets its fields before anything else
            nn.Module.__init__(self)
        super().__setattr__(name, value)

    def sample(self, batch: int, height: int, width: int, draws: Draws | None = None) -> N:
        """The random part of a step for `batch` images of this size in pixels, on the CPU; where no draws are given,
        torch's global generator seeds some."""
        raise NotImplementedError

    def sample_for(self, images: Float[Tensor, "b c height width"], draws: Draws | None = None) -> N:
        """The same for these images, on their device."""
        return self.sample(len(images), images.shape[2], images.shape[3], draws).to(images.device)

    def forward(self, images: Float[Tensor, "b c height width"], noise: N | None = None) -> Objective:
        raise NotImplementedError

    def noise_for(self, inputs: Float[Tensor, "b c height width"], draws: Draws) -> N:
        return self.sample(len(draws), inputs.shape[2], inputs.shape[3], draws)

    def param_groups(self, lr: float, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, object]]:
        """timm's: no decay on biases, norms, positions, class and mask tokens.

        Args:
            layer_decay: the rate of a layer of the encoder, times that of the layer above it. What is not the encoder's is
                above its last layer, and has the whole rate.

        Raises:
            ValueError: the encoder's layers are not known, where `layer_decay` is not 1.
        """
        listed = {
            f"{place}.{name}"
            for place, module in self.named_modules()
            for name in getattr(module, "no_weight_decay", set)()
        }
        groups = param_groups_weight_decay(self, weight_decay, no_weight_decay_list=listed)
        if layer_decay == 1:
            return [{**group, "lr": lr} for group in groups]
        layers = layers_of(self.encoder)
        above, apart = max(layers.values()) + 1, dict[tuple[int, int], dict[str, Any]]()
        for number, group in enumerate(groups):
            for parameter in group["params"]:
                down = above - layers.get(parameter, above)
                made = apart.setdefault((down, number), {**group, "params": [], "lr": lr * layer_decay**down})
                made["params"].append(parameter)
        return [apart[key] for key in sorted(apart)]  # the whole rate first

    def parts(self, images: Float[Tensor, "b c height width"], noise: N | None = None) -> Iterator[Objective]:
        """The parts of the loss one by one; backpropagate each before asking for the next, and memory is that of one."""
        if self.num_losses == 1:
            yield self(images, noise)
            return
        if noise is None:
            noise = self.sample_for(images)
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
        self, images: Float[Tensor, "b c height width"], noise: N, mean: Callable[[Tensor], Tensor] = lambda x: x
    ) -> dict[str, float | list[float]]:
        """Settings that are measured on the first batch before step 0: taken over at once, and returned by name.

        `mean` averages a number over the processes of a run, so that all take over the same.
        """
        return {}

    def errors(self, images: Float[Tensor, "b c height width"], noise: N) -> dict[str, tuple[Tensor, Tensor]]:
        """By task: what is wrong with each image where it was corrupted, restored and trivially restored ([b] each)."""
        raise NotImplementedError

    @torch.no_grad()
    def held_out(self, images: Float[Tensor, "b c height width"], draws: Draws) -> dict[str, tuple[Tensor, Tensor]]:
        """The errors of images that were not trained on, corrupted by draws of their own."""
        return self.errors(images, self.sample_for(images, draws))

    @torch.no_grad()
    def score(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b"]:
        """How unusual each image is, higher for less like the training data: the errors of the first task, mean over the
        noise of four steps."""
        found = [self.errors(images, noise) for noise in self.fixed_noise(images, 4)]
        return torch.stack([next(iter(tasks.values()))[0] for tasks in found]).mean(0)

    def fixed_noise(self, images: Tensor, count: int) -> list[N]:
        """The noise of `count` steps, the same at every call, for scores and pictures that can be compared."""
        draws = Draws.of(0, 1)
        batch, _, height, width = images.shape
        return [self.sample(1, height, width, draws).repeat(batch).to(images.device) for _ in range(count)]


def layers_of(encoder: Backbone) -> dict[nn.Parameter, int]:
    """The layer of each weight of an encoder's network, as timm numbers them: 0 is what is below the first block, then come
    the blocks; a norm behind the last one belongs to it.

    Raises:
        ValueError: timm does not say it of this network.
    """
    model: Any = getattr(encoder, "model", None)
    if not hasattr(model, "group_matcher"):
        raise ValueError(
            "layers of this encoder are not known, so optimiser.layer_decay must be 1 and optimiser.freeze 0"
        )
    found: Any = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    return {parameter: int(found[name]) for name, parameter in model.named_parameters()}


def freeze(encoder: Backbone, blocks: int) -> None:
    """Keep the first blocks of an encoder, and what is below them, as they are. Batch norms there still take statistics.

    Raises:
        ValueError: the last block would be among them; its layers are not known.
    """
    if not blocks:
        return
    layers = layers_of(encoder)
    if blocks >= max(layers.values()):
        raise ValueError(f"optimiser.freeze: {blocks}; it must be at most {max(layers.values()) - 1} for this encoder")
    for parameter, layer in layers.items():
        if layer <= blocks:
            parameter.requires_grad_(False)


@runtime_checkable
class Restores(Protocol):
    """A method that can show what it restores."""

    def restore(
        self, images: Float[Tensor, "b c height width"], noise: Any = None, task: str | None = None
    ) -> dict[str, Tensor]:
        """Pictures by caption, standardised like the images, from the original to the restoration, of one of its `tasks`
        or of each in turn."""
        ...
