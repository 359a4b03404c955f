"""Seeds: all that is random in a step is a function of (seed, step, what it is for)."""

import random

import numpy as np
import torch

ROLLED_BACK = 1_000_003  # by which a roll-back moves the seed on, so that other batches come


def step_seed(seed: int, step: int, stream: int) -> int:
    """A seed for one purpose in one step."""
    state = np.random.SeedSequence([seed, step, stream]).generate_state(1, np.uint64)[0]
    return int(state) >> 1


def seed_everything(seed: int) -> None:
    """torch for drop path and sampling, numpy for timm's mixup, Python's for timm's RandAugment."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
