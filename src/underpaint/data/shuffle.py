"""Random orders of images: of millions, of which only the places that are asked for are worked out; of sets that are read in
pieces, as windows go over them."""

import numpy as np

# Up to here an epoch's order is held as a list (8 MB), as it always was, so that runs and published numbers stay what
# they are; beyond, every process would hold hundreds of megabytes for a large set, and start each epoch by making them.
LARGE = 1_000_000
ROUNDS = 8
LANES = 64  # stretches of a window, each for its rows of every batch: more processes than that share them


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


class Windows:
    """The order of a set that is read in pieces (`sources.pieces`), a permutation by (seed, epoch) in two steps.

    The pieces are permuted, and windows of whole batches cut from what lies in them one after the other. A window is cut
    into lanes of equal length, the images of each lane are permuted, and every batch of the window takes equally many
    from each, in the order of its rows. So a batch is drawn from all of a window, while a process needs the pieces of the
    lanes of its own rows alone, each once an epoch, whatever the number of processes.

    Args:
        samples: [n] in the order in which the pieces hold them.
        pieces: [p] the number of each piece that holds any of them.
        counts: [p] how many it holds.
        batch_size: at most n.
        batches: about how many a window has.
    """

    def __init__(
        self, samples: np.ndarray, pieces: np.ndarray, counts: np.ndarray, batch_size: int, batches: int, seed: int
    ):
        self._samples, self._pieces, self._counts = samples, pieces, counts
        self._starts = counts.cumsum() - counts
        self._batch_size = batch_size
        self._total = len(samples) // batch_size  # batches of an epoch
        self._windows = -(-self._total // batches)
        self._batches = -(-self._total // self._windows)  # of a window: so that the last is hardly shorter
        self._seed = seed % 2**64
        self._lanes = next(lanes for lanes in range(min(LANES, batch_size), 0, -1) if batch_size % lanes == 0)
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """The samples at some places of an epoch, which are those of whole batches."""
        batches, rows = np.divmod(places, self._batch_size)
        windows, steps = np.divmod(batches, self._batches)
        lanes, within = np.divmod(rows, self._batch_size // self._lanes)
        found = np.empty(len(places), np.int64)
        for key in np.unique(windows * self._lanes + lanes).tolist():
            window, lane = divmod(key, self._lanes)
            mine = (windows == window) & (lanes == lane)
            first, stop = self._lane(window, lane)
            bits = np.random.Philox(key=[self._seed, epoch], counter=[0, 0, key, 1])  # of the pieces: [0, 0, 0, 0]
            order = np.random.Generator(bits).permutation(stop - first)
            found[mine] = first + order[steps[mine] * (self._batch_size // self._lanes) + within[mine]]
        order, ends = self._order(epoch)
        piece = np.searchsorted(ends, found, side="right")
        return self._samples[self._starts[order[piece]] + found - (ends[piece] - self._counts[order[piece]])]

    def ahead(self, batch: int, rows: slice) -> list[int]:
        """What to read ahead with a batch, so that the next window is there when its turn comes: an equal share of the
        pieces that these rows will need of it."""
        epoch, number = divmod(batch, self._total)
        window, step = divmod(number, self._batches)
        steps = min(self._batches, self._total - window * self._batches)
        window += 1
        if window == self._windows:
            epoch, window = epoch + 1, 0
        each = self._batch_size // self._lanes
        first, stop = self._lane(window, rows.start // each)[0], self._lane(window, (rows.stop - 1) // each)[1]
        order, ends = self._order(epoch)
        begin, last = np.searchsorted(ends, [first, stop - 1], side="right").tolist()
        count = last + 1 - begin
        share = order[begin + count * step // steps : begin + count * (step + 1) // steps]
        return self._pieces[share].tolist()

    def _lane(self, window: int, lane: int) -> tuple[int, int]:
        """Where a lane begins and ends among what lies in the permuted pieces."""
        steps = min(self._batches, self._total - window * self._batches)
        length = steps * (self._batch_size // self._lanes)
        first = window * self._batches * self._batch_size + lane * length
        return first, first + length

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The permuted pieces, and where each ends."""
        if epoch not in self._orders:
            bits = np.random.Philox(key=[self._seed, epoch])
            order = np.random.Generator(bits).permutation(len(self._counts))
            # the last window of an epoch needs two
            self._orders = {k: v for k, v in self._orders.items() if abs(k - epoch) == 1}
            self._orders[epoch] = order, self._counts[order].cumsum()
        return self._orders[epoch]
