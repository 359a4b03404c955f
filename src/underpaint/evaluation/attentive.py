"""The attentive probe: how much the patch tokens hold, when a probe may look where it wants."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from underpaint.console import progress
from underpaint.errors import InputError
from underpaint.evaluation.results import Probe
from underpaint.evaluation.splits import Labels, as_task, hold_out

RATES = (1e-3, 3e-3, 1e-2)  # of AdamW, at their highest
WEIGHT_DECAY = 0.05
WARM_UP = 0.1  # share of the steps
EVALUATION_TOKENS = 2**18  # that are looked at together
NORMALIZED_BYTES = (
    5e8  # of patch tokens in float32 that are normalised once; more are in each batch, without a second copy
)


def attentive(
    train_patches: Float[Tensor, "n t d"],
    train_y: Labels,
    test_patches: Float[Tensor, "m t d"],
    test_y: Labels,
    *,
    epochs: int = 20,
    seed: int = 0,
) -> Probe:
    """CAE's attentive probe (Chen et al., arXiv 2202.03026) on frozen patch tokens.

    The module is CAE's; the training is shorter: AdamW with a cosine in place of 90 epochs of SGD, without
    augmentation, since features are fixed. Probes of a few learning rates see the same batches of four fifths of
    train; the rate that is best on the rest (the lowest among equals) trains once more on all of it. At evaluation
    the batch norm uses its running statistics, so no test image influences another. It runs where `train_patches` lies.
    Raises InputError for labels or tokens that cannot be probed.
    """
    return attentive_head(train_patches, train_y, test_patches, test_y, epochs=epochs, seed=seed)[0]


def attentive_head(
    train_patches: Float[Tensor, "n t d"],
    train_y: Labels,
    test_patches: Float[Tensor, "m t d"],
    test_y: Labels,
    *,
    epochs: int = 20,
    seed: int = 0,
) -> "tuple[Probe, AttentiveHead]":
    """What `attentive` found, and the probe itself, whose scores are of the classes of train, ascending."""
    if train_patches.shape[1] == 0:
        raise InputError("the attentive probe needs patch tokens; there are none an image")
    task = as_task(train_patches, train_y, test_patches, test_y)
    fit, held = hold_out(task.train, seed)
    best = RATES[len(RATES) // 2]  # where there is nothing to choose by
    tokens = Tokens.of(train_patches)
    if len(held):
        probes = _train(tokens, task.train, fit, RATES, epochs, seed)
        found = (_predict(probes, tokens, held) == task.train[held]).mean(axis=1)
        best = RATES[int(np.argmax(found))]
    (probe,) = _train(tokens, task.train, np.arange(len(task.train)), [best], epochs, seed)
    (predicted,) = _predict([probe], Tokens(test_patches, False), np.arange(len(test_patches)))
    return Probe.of(task.hits(predicted), {"rate": best}, task.classes[predicted]), AttentiveHead(probe)


class AttentiveProbe(nn.Module):
    """Cross-attention of one learned query over tokens, batch norm without affine, one linear layer; no residual.

    Tokens come standardised by `normalized`; the affine parts of the norms of keys and values are here. With one
    query for all images three steps of the paper fold into others without changing what can be computed: the norm and the
    projection of the query into the query itself; the projection of keys into one vector a head, and that of values
    to after the weighted mean, so that no token is ever projected; and the shift of the keys' norm, which moves all
    scores of a head alike, is left out. A query of zeros starts as average pooling.
    """

    def __init__(self, dim: int, classes: int, generator: torch.Generator):
        super().__init__()
        self.heads = heads_of(dim)
        self.query = nn.Parameter(torch.zeros(dim))
        self.key_scale = nn.Parameter(torch.ones(dim))
        self.value_scale = nn.Parameter(torch.ones(dim))
        self.value_shift = nn.Parameter(torch.zeros(dim))
        self.key = _weight(dim, dim, dim**-0.5, generator)
        self.value = _weight(dim, dim, dim**-0.5, generator)
        self.value_bias = nn.Parameter(torch.zeros(dim))
        self.output = _weight(dim, dim, dim**-0.5, generator)  # its bias would be undone by the batch norm
        self.norm = nn.BatchNorm1d(dim, affine=False)
        self.classify = _weight(classes, dim, 0.01, generator)
        self.classify_bias = nn.Parameter(torch.zeros(classes))

    def forward(self, tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b classes"]:
        return scores([self], tokens)[0]


def scores(probes: Sequence[AttentiveProbe], tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "r b classes"]:
    """What each of several probes says of the same tokens, which are read once for the heads of all."""
    (images, count, dim), rates, heads = tokens.shape, len(probes), probes[0].heads
    weight = {name: torch.stack([getattr(one, name) for one in probes]) for name, _ in probes[0].named_parameters()}
    query = weight["query"].view(rates * heads, 1, -1) / math.sqrt(dim // heads)
    keys = (query @ weight["key"].view(rates * heads, -1, dim)).view(rates, heads, dim)  # one vector a head
    keys = (keys * weight["key_scale"][:, None]).view(rates * heads, dim)
    attention = (keys @ tokens.reshape(-1, dim).T).view(rates * heads, images, count).softmax(dim=2)
    pooled = (attention.transpose(0, 1) @ tokens).transpose(0, 1)  # [rates * heads, b, d]
    # scale and shift act on the projection, not on what is projected: [b, rates * heads, d] is many times as large
    value = (weight["value"] * weight["value_scale"][:, None]).view(rates * heads, -1, dim)
    bias = (weight["value"] @ weight["value_shift"][:, :, None]).squeeze(2) + weight["value_bias"]
    values = (pooled @ value.transpose(1, 2)).view(rates, heads, images, -1).transpose(1, 2).reshape(rates, images, dim)
    seen = (values + bias[:, None]) @ weight["output"].transpose(1, 2)
    seen = torch.stack([one.norm(each) for one, each in zip(probes, seen, strict=True)])
    return torch.baddbmm(weight["classify_bias"][:, None], seen, weight["classify"].transpose(1, 2))


class AttentiveHead(nn.Module):
    """A probe on patch tokens as they come."""

    def __init__(self, probe: AttentiveProbe):
        super().__init__()
        self.probe = probe

    @classmethod
    def untrained(cls, dim: int, classes: int) -> "AttentiveHead":
        return cls(AttentiveProbe(dim, classes, torch.Generator().manual_seed(0)))

    def forward(self, tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b classes"]:
        return self.probe(normalized(tokens))


def heads_of(dim: int) -> int:
    """Heads of about 64 features, as in CAE: the largest number up to dim / 64 that divides dim."""
    return next(heads for heads in range(max(1, dim // 64), 0, -1) if dim % heads == 0)


def normalized(tokens: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
    """The layer norm (eps 1e-6) of tokens without its affine part, in float32."""
    return F.layer_norm(tokens.float(), tokens.shape[-1:], eps=1e-6)


class Tokens(NamedTuple):
    """Patch tokens of which the probe takes batches."""

    patches: Float[Tensor, "n t d"]
    ready: bool  # normalised already

    @classmethod
    def of(cls, patches: Float[Tensor, "n t d"]) -> "Tokens":
        """To be taken many times."""
        few = 4 * patches.numel() <= NORMALIZED_BYTES
        return cls(normalized(patches), True) if few else cls(patches, False)

    def batch(self, members: Int[Tensor, "b"], device: torch.device) -> Float[Tensor, "b t d"]:
        chosen = self.patches[members.to(self.patches.device)].to(device)
        return chosen if self.ready else normalized(chosen)


def _train(
    tokens: Tokens,
    labels: Int[np.ndarray, "n"],
    members: Int[np.ndarray, "k"],
    rates: Sequence[float],
    epochs: int,
    seed: int,
) -> list[AttentiveProbe]:
    """A probe for every rate, trained on the images `members`; all start alike and see the same batches."""
    device, dim = tokens.patches.device, tokens.patches.shape[2]
    classes = int(labels.max()) + 1
    probes = [AttentiveProbe(dim, classes, torch.Generator().manual_seed(seed)).to(device) for _ in rates]
    groups = [{"params": list(probe.parameters()), "lr": rate} for probe, rate in zip(probes, rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY, fused=True)
    batch = min(len(members), max(16, min(256, len(members) // 16)))
    an_epoch = len(members) // batch
    steps, warm_up = epochs * an_epoch, max(1, round(WARM_UP * epochs * an_epoch))
    targets = torch.from_numpy(labels)
    order = torch.Generator().manual_seed(seed + 1)
    index = torch.from_numpy(members)
    for step in progress(range(steps), "attentive probe"):
        if step % an_epoch == 0:
            shuffled = index[torch.randperm(len(index), generator=order)]
        start = (step % an_epoch) * batch
        chosen = shuffled[start : start + batch]
        share = max(0.0, (step - warm_up) / max(1, steps - warm_up))
        factor = min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * share))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        found, wanted = scores(probes, tokens.batch(chosen, device)), targets[chosen].to(device)
        # the sum over the rates of mean losses: each probe's gradient is its own
        loss = F.cross_entropy(found.flatten(0, 1), wanted.repeat(len(rates)), reduction="sum") / len(chosen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [probe.eval() for probe in probes]


@torch.no_grad()
def _predict(probes: Sequence[AttentiveProbe], tokens: Tokens, members: Int[np.ndarray, "k"]) -> Int[np.ndarray, "r k"]:
    """The likeliest class of each image of `members`, by each probe."""
    device = probes[0].query.device
    batch = max(1, EVALUATION_TOKENS // tokens.patches.shape[1])
    parts = torch.from_numpy(members).split(batch)
    said = [scores(probes, tokens.batch(part, device)).argmax(dim=2) for part in parts]
    return torch.cat(said, dim=1).cpu().numpy()


def _weight(outputs: int, inputs: int, deviation: float, generator: torch.Generator) -> nn.Parameter:
    return nn.Parameter(torch.randn(outputs, inputs, generator=generator) * deviation)
