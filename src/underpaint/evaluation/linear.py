"""The linear probe: the optimum of one convex problem in place of a training run."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from underpaint.console import Going
from underpaint.evaluation.results import Probe
from underpaint.evaluation.splits import Labels, as_task, hold_out, stratified

GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # C: weight of the summed loss against half the squared weights
CHOOSING_TRAIN, CHOOSING_VALIDATION = 10_000, 5_000  # images that choose C
STEPS = 100  # of L-BFGS at most; preconditioned it converges in 20 to 60


def linear(
    train_x: Float[Tensor, "n d"],
    train_y: Labels,
    test_x: Float[Tensor, "m d"],
    test_y: Labels,
    *,
    seed: int = 0,
) -> Probe:
    """Multinomial logistic regression on features standardised with the statistics of train.

    MAE's protocol (arXiv 2111.06377: batch norm without affine, then one linear layer) with the optimum in place of
    90 epochs of LARS. C, as scikit-learn defines it, is chosen on a stratified fifth of train, going up from strong to weak
    regularisation until the validation accuracy falls (the strongest among equals), then all of train is fitted again
    with it. It runs where `train_x` lies. Raises InputError for labels or features that cannot be probed.
    """
    return linear_head(train_x, train_y, test_x, test_y, seed=seed)[0]


class Affine(NamedTuple):
    """Class scores of features as they come: `x @ weight.T + bias`; rows are the classes of train, ascending."""

    weight: Float[Tensor, "k d"]
    bias: Float[Tensor, "k"]


def linear_head(
    train_x: Float[Tensor, "n d"],
    train_y: Labels,
    test_x: Float[Tensor, "m d"],
    test_y: Labels,
    *,
    seed: int = 0,
) -> tuple[Probe, Affine]:
    """What `linear` found, and the probe itself."""
    task = as_task(train_x, train_y, test_x, test_y)
    mean, scale = statistics(train_x.float())
    x = (train_x.float() - mean) / scale
    basis, spread = _principal(x)
    x = x @ basis
    y = torch.from_numpy(task.train).to(x.device)
    c, start = _choose(x, y, spread, len(task.classes), seed)
    weights = _fit(x, y, spread, c, start)
    z = ((test_x.to(x.device).float() - mean) / scale) @ basis
    predicted = _predict(weights, z)
    weight = (weights[:, :-1] @ basis.T / scale).cpu()
    head = Affine(weight, weights[:, -1].cpu() - weight @ mean.cpu())
    return Probe.of(task.hits(predicted), {"C": c}, task.classes[predicted]), head


def _choose(
    x: Float[Tensor, "n r"], y: Int[Tensor, "n"], spread: Float[Tensor, "r"], classes: int, seed: int
) -> tuple[float, Float[Tensor, "k r1"]]:
    """The best C of the grid, and its weights to start from."""
    labels = y.cpu().numpy()
    fit, held = hold_out(labels, seed)
    fit = fit[stratified(labels[fit], max(CHOOSING_TRAIN, classes), seed)]
    held = held[stratified(labels[held], CHOOSING_VALIDATION, seed)]
    weights = x.new_zeros(classes, x.shape[1] + 1)
    if not len(held):  # nothing to choose by
        return GRID[len(GRID) // 2], weights
    some, wanted = x[torch.from_numpy(fit).to(x.device)], y[torch.from_numpy(fit).to(x.device)]
    others = x[torch.from_numpy(held).to(x.device)]
    best, best_accuracy, start = GRID[0], -1.0, weights
    for c in GRID:
        weights = _fit(some, wanted, spread, c, weights)
        accuracy = float((_predict(weights, others) == labels[held]).mean())
        if accuracy > best_accuracy:
            best, best_accuracy, start = c, accuracy, weights
        elif accuracy < best_accuracy:
            break
    return best, start


def _fit(
    x: Float[Tensor, "n r"],
    y: Int[Tensor, "n"],
    spread: Float[Tensor, "r"],
    c: float,
    start: Float[Tensor, "k r1"],
) -> Float[Tensor, "k r1"]:
    """Weights [classes, features and a bias] of the smallest mean cross-entropy + |weights without bias|^2 / (2 C n).

    Along principal axes the curvature is about variance p (1 - p) + 1 / (C n) with p = 1 / classes, so steps are
    taken in weights divided by its root: pixels, whose variances span many powers of ten, need tens of steps so
    and many hundreds without.
    """
    classes, n = len(start), len(x)
    decay = 1 / (c * n)
    share = (1 - 1 / classes) / classes
    unit = torch.cat([(spread * share + decay).rsqrt(), spread.new_tensor([share**-0.5])])
    free = (start / unit).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [free],
        max_iter=STEPS,
        history_size=20,
        tolerance_grad=1e-5,
        tolerance_change=1e-7,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def loss() -> Tensor:
        weights = free * unit
        value, slope = cross_entropy(x, y, weights)
        plain = weights.clone()
        plain[:, -1] = 0
        free.grad = (slope + decay * plain) * unit
        going.advance()
        return value + 0.5 * decay * plain.square().sum()

    with Going("linear probe, steps", total=None) as going:
        optimizer.step(loss)
    return free.detach() * unit


def cross_entropy(
    x: Float[Tensor, "n r"], y: Int[Tensor, "n"], weights: Float[Tensor, "k r1"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "k r1"]]:
    """The mean cross-entropy of an affine map (its bias comes last), and its gradient. Written out, with a row of scores a class:
    the softmax then goes down contiguous rows, and of ten classes all takes a quarter of the time."""
    share = torch.addmm(weights[:, -1:], weights[:, :-1], x.T).log_softmax(dim=0)
    value = -share.gather(0, y[None]).mean()
    share.exp_().scatter_add_(0, y[None], share.new_full((1, len(y)), -1.0))
    return value, torch.cat([share @ x, share.sum(dim=1, keepdim=True)], dim=1) / len(y)


def _predict(weights: Float[Tensor, "k r1"], x: Float[Tensor, "n r"]) -> Int[np.ndarray, "n"]:
    return torch.addmm(weights[:, -1], x, weights[:, :-1].T).argmax(dim=1).cpu().numpy()


def statistics(x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "d"], Float[Tensor, "d"]]:
    """Mean and standard deviation of every feature; a constant one gets scale 1, so it becomes about 0 everywhere."""
    variance, mean = torch.var_mean(x.double(), dim=0, correction=0)
    scale = variance.sqrt()
    constant = scale <= 1e-6 * mean.abs()  # float32 rounding of a constant
    return mean.to(x.dtype), torch.where(constant, 1.0, scale).to(x.dtype)


def _principal(x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "d r"], Float[Tensor, "r"]]:
    """Principal axes of standardised features as columns, and the variance along each.

    The penalised optimum does not change with a rotation, and has no part outside the span of train: where there are
    fewer images than features, the axes span the images only.
    """
    n, d = x.shape
    if d <= n:
        variance, axes = torch.linalg.eigh(x.T @ x / n)
        return axes, variance.clamp(min=0)
    variance, images = torch.linalg.eigh(x @ x.T / n)
    kept = variance > 1e-6 * variance[-1]  # below is float32 rounding
    axes = x.T @ images[:, kept] / (variance[kept] * n).sqrt()
    return axes, variance[kept]
