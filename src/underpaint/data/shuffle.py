"""A random order of millions of images of which only the places that are asked for are worked out."""

import numpy as np

# Up to here an epoch's order is held as a list (8 MB), as it always was, so that runs and published numbers stay what
# they are; beyond, every process would hold hundreds of megabytes for a large set, and start each epoch by making them.
LARGE = 1_000_000
ROUNDS = 8


def shuffled(places: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """The numbers below `count` at some places of their order, a permutation by (seed, epoch).

    A Feistel network permutes the numbers below a power of 4, the smallest that is not below `count`; what comes out
    too large goes through it again until it is not, which permutes those below `count`.
    """
    half = np.uint64(max(1, (max(1, count - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.Philox(key=[seed % 2**64, epoch]).random_raw(ROUNDS)
    found = places.astype(np.uint64)
    open_ones = np.arange(len(found))
    while len(open_ones):
        left, right = found[open_ones] >> half, found[open_ones] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right + key) & mask)
        found[open_ones] = (left << half) | right
        open_ones = open_ones[found[open_ones] >= count]
    return found.astype(np.int64)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Whole numbers of 64 bits scrambled, so that each bit depends on all (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
