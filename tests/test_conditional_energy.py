"""What the energy of hidden patches owes: gradients, that only hidden patches are restored, that it learns."""

import pytest
import torch
from test_energy import exact_equals_finite_differences, fixed
from test_methods import photographs, small

from underpaint.masking import hidden_map


@pytest.mark.parametrize("readout", ["sum", "mean", "square"])
def test_gradient_equals_finite_differences(readout: str) -> None:
    """One step, in float64, for a weight of every block."""
    method, images = small("conditional-energy", readout=readout, step_size=0.5).double(), photographs(3).double()
    noise = fixed(method, images)
    exact_equals_finite_differences(method, images, lambda: method(images, noise).loss)


@pytest.mark.quick
def test_only_hidden_patches_are_restored_and_they_do_not_leak() -> None:
    method, images = small("conditional-energy", step_size=0.5), photographs()
    noise = fixed(method, images)
    [corrupted] = method.corrupt(images, noise)
    [restored] = method.step((corrupted,), noise)
    hidden = hidden_map(noise, (4, 4), (4, 4)).expand_as(images)
    assert torch.equal(restored * (1 - hidden), images * (1 - hidden))
    assert not torch.equal(restored * hidden, corrupted * hidden)
    changed = images + 10 * hidden
    assert torch.equal(method.step(method.corrupt(changed, noise), noise)[0] * hidden, restored * hidden)
    # the target is the image but for the mean and the contrast of hidden patches
    target = method.target(images, noise)
    assert torch.equal(target * (1 - hidden), images * (1 - hidden))
    assert not torch.equal(target, images)


def test_it_learns_and_its_parts_add_up() -> None:
    method, images = small("conditional-energy", steps=2), photographs(8)
    noise = fixed(method, images)
    method.calibrate(images, noise)
    parts = [part.loss.detach() for part in method.parts(images, noise)]
    torch.testing.assert_close(sum(parts), method(images, noise).loss.detach())
    optimiser = torch.optim.AdamW(method.parameters(), 3e-3, weight_decay=0.0)
    for _ in range(150):
        optimiser.zero_grad()
        method(images, noise).loss.backward()
        optimiser.step()
    assert method(images, noise).terms["error"] < 0.6
