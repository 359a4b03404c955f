"""What makes the judgement fast, held against the plain way: the same values."""

import json
import math
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from underpaint.cli import main
from underpaint.evaluation.attentive import AttentiveProbe, normalized
from underpaint.evaluation.linear import cross_entropy

attentive_module: Any = import_module("underpaint.evaluation.attentive")
features_module: Any = import_module("underpaint.evaluation.features")
visualizations_module: Any = import_module("underpaint.evaluation.visualizations")


def plain_scores(probe: AttentiveProbe, tokens: Tensor) -> Tensor:
    """One probe by itself, step by step as the module's docstring has it."""
    dim = tokens.shape[-1]
    query = probe.query.view(probe.heads, 1, -1) / math.sqrt(dim // probe.heads)
    keys = (query @ probe.key.view(probe.heads, -1, dim)).squeeze(1) * probe.key_scale
    pooled = (tokens @ keys.T).softmax(dim=1).transpose(1, 2) @ tokens
    pooled = pooled * probe.value_scale + probe.value_shift
    values = torch.einsum("bhd,hed->bhe", pooled, probe.value.view(probe.heads, -1, dim)).flatten(1)
    return F.linear(probe.norm(F.linear(values + probe.value_bias, probe.output)), probe.classify, probe.classify_bias)


def plain_training(patches: Tensor, labels: np.ndarray, members: np.ndarray, rates: Any, epochs: int) -> list[Any]:
    """The same training, a probe after the other."""
    probes, classes = [], int(labels.max()) + 1
    batch = min(len(members), max(16, min(256, len(members) // 16)))
    steps = epochs * (len(members) // batch)
    warm_up = max(1, round(attentive_module.WARM_UP * steps))
    for rate in rates:
        probe = AttentiveProbe(patches.shape[2], classes, torch.Generator().manual_seed(0))
        optimizer = torch.optim.AdamW(probe.parameters(), lr=rate, weight_decay=attentive_module.WEIGHT_DECAY)
        order, index = torch.Generator().manual_seed(1), torch.from_numpy(members)
        for step in range(steps):
            place = step % (len(members) // batch)
            if not place:
                shuffled = index[torch.randperm(len(index), generator=order)]
            chosen = shuffled[place * batch : (place + 1) * batch]
            share = max(0.0, (step - warm_up) / max(1, steps - warm_up))
            factor = min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * share))
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.zero_grad()
            wanted = torch.from_numpy(labels)[chosen]
            F.cross_entropy(plain_scores(probe, normalized(patches[chosen])), wanted).backward()
            optimizer.step()
        probes.append(probe.eval())
    return probes


@pytest.mark.quick
@pytest.mark.parametrize("once", [5e8, 0.0])
def test_probes_of_all_rates_at_once_are_those_one_by_one(monkeypatch: pytest.MonkeyPatch, once: float) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = np.arange(180) % 5
    patches = torch.randn(180, 6, 128, generator=generator)
    patches[:, 2] += 2 * torch.randn(5, 128, generator=generator)[torch.from_numpy(labels)]
    members = np.arange(150)
    monkeypatch.setattr(attentive_module, "NORMALIZED_BYTES", once)
    tokens = attentive_module.Tokens.of(patches)
    assert tokens.ready == bool(once)
    rates = attentive_module.RATES
    together = attentive_module._train(tokens, labels, members, rates, 3, 0)
    alone = plain_training(patches, labels, members, rates, 3)
    for one, other in zip(together, alone, strict=True):
        for name, value in other.named_parameters():
            if name not in ("value_shift", "value_bias"):  # undone by the batch norm: their gradients are rounding
                torch.testing.assert_close(one.get_parameter(name), value, rtol=1e-4, atol=2e-5)
    ready = normalized(patches)
    with torch.no_grad():
        found = attentive_module.scores(together, ready)
        for scores, probe in zip(found, together, strict=True):
            torch.testing.assert_close(scores, plain_scores(probe, ready), rtol=1e-4, atol=1e-5)
        expected = torch.stack([plain_scores(probe, ready) for probe in alone]).argmax(2).numpy()
    said = attentive_module._predict(together, tokens, np.arange(180))
    assert (said == found.argmax(2).numpy()).all()
    assert (said != expected).mean() < 0.02
    assert ((said == labels).mean(axis=1) > 0.5).all()


@pytest.mark.quick
@pytest.mark.parametrize("classes", [2, 10, 40])
def test_the_slope_of_the_linear_probe_is_that_of_autograd(classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 12, generator=generator)
    y = torch.randint(classes, (300,), generator=generator)
    weights = torch.randn(classes, 13, generator=generator).requires_grad_()
    expected = F.cross_entropy(F.linear(x, weights[:, :-1], weights[:, -1]), y)
    expected.backward()
    value, slope = cross_entropy(x, y, weights.detach())
    torch.testing.assert_close(value, expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(slope, weights.grad, rtol=1e-5, atol=1e-7)


def test_a_run_looks_at_its_images_once_before_and_once_after_training(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Probes, the judgement and its pictures; the encoder before training is seen by the first probe alone."""
    counts: list[tuple[bool, int]] = []

    def counting(encoder: Any, batches: Any, **given: Any) -> Any:
        found = plain(encoder, batches, **given)
        counts.append((isinstance(encoder, torch.nn.Module), len(found.pooled)))
        return found

    plain = features_module.extract
    monkeypatch.setattr(features_module, "extract", counting)
    monkeypatch.setattr(visualizations_module, "extract", counting)
    out = tmp_path / "run"
    command = [
        "pretrain",
        str(pictures),
        "--out",
        str(out),
        "--method",
        "mae",
        "--image-size",
        "32",
        "--patch-size",
        "8",
    ]
    small = [f"encoder.{name}" for name in ("embed_dim=32", "depth=1", "num_heads=1")]
    small += ["method.decoder_dim=32", "method.decoder_depth=1"]
    command += ["--encoder", "vit_tiny_patch16_224", "--steps", "2", "--batch-size", "16", "--probe-every", "2"]
    assert main([*command, *(word for setting in small for word in ("--set", setting))]) == 0
    assert sum(count for network, count in counts if network) == 2 * 90
    assert sum(count for network, count in counts if not network) == 90  # raw pixels and HOG
    judged = json.loads((out / "probes.json").read_text())
    lines = [json.loads(line)["probe"] for line in (out / "metrics.jsonl").read_text().splitlines() if "probe" in line]
    for who, probe in (("untrained", lines[0]), ("encoder", lines[-1])):
        for kind in ("linear", "attentive", "knn"):
            assert judged[who][kind]["accuracy"] == probe[kind]
