"""Energy-inspired pretraining: Wang et al., ICLR 2023, arXiv 2302.01384. First form: masking, one step.

One network, no decoder. Forward, the network is an energy: one scalar an image, low for images like the data.
Backward, the gradient of that energy with respect to the *input* says how to change a corrupted image to make it more
likely. Training asks that one such step restores the image.

    E       = sum over patches of head(encoder(x))       one scalar an image
    x'      = x - step_size * dE/dx                      kept differentiable: a double backward
    loss    = smooth_l1(x', clean)                       the whole image
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from underpaint.backbones import Backbone
from underpaint.corruptions import mask_cells
from underpaint.masking import Mask, hidden_count, hidden_map, random_mask
from underpaint.methods.method import Method, Objective
from underpaint.patches import weighted_mean


class Energy(Method):
    """Restore hidden cells by one step down the gradient of an energy.

    >>> import torch, underpaint
    >>> energy = underpaint.Energy(underpaint.encoder("vit_tiny_patch16_224", image_size=64))
    >>> objective = energy(torch.randn(2, 3, 64, 64))
    >>> objective.loss.backward(); sorted(objective.terms)
    ['baseline', 'hidden_error', 'step_size']

    Args:
        encoder: any `Backbone` without batch norm (its statistics would couple the images of a batch).
        hidden_ratio: share of the cells that is hidden.
        cell: pixels of a side of a hidden cell; the patch of a ViT, else a quarter of the stride, where None.
        step_size: start value of the learned step size (0.1 as published). None: measured on the first batch so that
            the step changes a pixel by 0.1 (root of the mean square), since the scale of dE/dx at initialisation
            spans four orders of magnitude between encoders.

    Raises:
        ValueError: the encoder has batch norm.
    """

    paper = "one network: forward an energy, its input gradient restores (arXiv 2302.01384)"

    def __init__(
        self,
        encoder: Backbone,
        hidden_ratio: float = 0.5,
        cell: int | None = None,
        step_size: float | None = None,
    ):
        super().__init__()
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in encoder.model.modules()):
            raise ValueError(
                "the energy method needs an encoder without batch norm, which couples the images of a batch: "
                "a ViT, or --set encoder.norm_layer=groupnorm"
            )
        self.encoder = encoder
        self.hidden_ratio = hidden_ratio
        patch: tuple[int, int] = getattr(encoder, "patch_size", (8, 8))
        self.cell: tuple[int, int] = (cell, cell) if cell else patch
        self.calibrated = step_size is not None
        self.log_step_size = nn.Parameter(torch.tensor(math.log(step_size if step_size else 0.1)))
        self.head = nn.Linear(encoder.dim, 1, bias=False)  # a bias would be a constant of the energy
        nn.init.xavier_uniform_(self.head.weight)
        final_norm = getattr(encoder.model, "norm", None)
        if isinstance(final_norm, nn.LayerNorm) and final_norm.bias is not None:
            final_norm.bias.requires_grad_(False)  # a constant of the energy too: no gradient ever reaches it

    def draw(self, batch: int, height: int, width: int, generator: torch.Generator | None = None) -> Mask:
        if height % self.cell[0] or width % self.cell[1]:
            raise ValueError(f"cell {self.cell[0]} px does not divide an image of {height}x{width}")
        cells = (height // self.cell[0]) * (width // self.cell[1])
        return random_mask(batch, cells, hidden_count(cells, self.hidden_ratio), generator)

    def energy(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b"]:
        """One scalar an image: a bias-free linear read-out of every patch token, summed."""
        patches = self.encoder(images).patches
        return self.head(patches).float().sum((1, 2))

    def gradient(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        """dE/dx, itself differentiable."""
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
            return torch.func.grad(lambda x: self.energy(x).sum())(images)

    def step(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b c height width"]:
        """One restoring step down the energy; no clamp, which would kill gradients."""
        return images - self.log_step_size.exp() * self.gradient(images)

    def calibrate(
        self, images: Float[Tensor, "b c height width"], mask: Mask, mean: Callable[[Tensor], Tensor] = lambda x: x
    ) -> dict[str, float]:
        if self.calibrated:
            return {}
        change = mean(self.gradient(mask_cells(images, mask, self.cell)).square().mean()).sqrt()
        with torch.no_grad():
            self.log_step_size.copy_((0.1 / change.detach()).log())
        self.calibrated = True
        return {"step_size": float(self.log_step_size.detach().exp())}

    def forward(self, images: Float[Tensor, "b c height width"], mask: Mask | None = None) -> Objective:
        if mask is None:
            mask = self.draw(len(images), images.shape[2], images.shape[3]).to(images.device)
        corrupted = mask_cells(images, mask, self.cell)
        restored = self.step(corrupted)
        loss = functional.smooth_l1_loss(restored, images)
        nothing = functional.smooth_l1_loss(corrupted, images)
        return Objective(
            loss,
            {
                "baseline": nothing.detach(),
                "hidden_error": self.hidden_error(restored, images, mask).detach(),
                "step_size": self.log_step_size.detach().exp(),
            },
        )

    def hidden_error(self, restored: Tensor, images: Tensor, mask: Mask) -> Float[Tensor, ""]:
        """Squared error on hidden pixels over that of doing nothing: 1 at first, 0 when restored.

        A loss over the whole image falls while nothing is restored, since visible pixels are right already.
        """
        grid = (images.shape[-2] // self.cell[0], images.shape[-1] // self.cell[1])
        hidden = hidden_map(mask, grid, self.cell).expand_as(images)
        return weighted_mean((restored - images).square(), hidden) / weighted_mean(images.square(), hidden)

    @torch.no_grad()
    def restore(self, images: Float[Tensor, "b c height width"], mask: Mask | None = None) -> dict[str, Tensor]:
        mask = mask or self.fixed_draws(images, 1)[0]
        corrupted = mask_cells(images, mask, self.cell)
        return {"original": images, "hidden": corrupted, "restored": self.step(corrupted)}

    @torch.no_grad()
    def score(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b"]:
        """The energy."""
        return self.energy(images)
