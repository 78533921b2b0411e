"""Keys and values of rows that were computed before.

Dimensions: N rows, B answers, P rows that are written, K key/value heads, d channels per head.
"""

from torch import Tensor


class LayerCache:
    """Keys and values of one layer, in a buffer of `capacity` rows that is allocated at the first `append`."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.length = 0
        self.buffers = None

    def append(self, k_NKd, v_NKd):
        """Add rows; returns keys and values of all rows so far, as views."""
        if self.buffers is None:
            self.buffers = tuple(x.new_empty(self.capacity, *x.shape[1:]) for x in (k_NKd, v_NKd))
        start, self.length = self.length, self.length + k_NKd.shape[0]
        for buffer, rows in zip(self.buffers, (k_NKd, v_NKd), strict=True):
            buffer[start : self.length] = rows
        return tuple(buffer[: self.length] for buffer in self.buffers)


class RowPool:
    """Keys and values of several answers, each in a run of consecutive rows that its owner chooses.

    Args:
        num_layers: of the decoder.
        rows: of each layer's buffer, which is allocated at the first write.
    """

    def __init__(self, num_layers: int, rows: int):
        self.rows = rows
        self.layers = [PoolLayer(rows) for _ in range(num_layers)]

    def aim(self, places_B: Tensor, stop: int) -> None:
        """Tell where the next `append` puts its rows ([B] int64), and that its reader sees the rows before `stop`."""
        for layer in self.layers:
            layer.places_B, layer.stop = places_B, stop

    def views(self, first: int, stop: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [stop - first, K, d] of those rows, for each layer."""
        return [tuple(buffer[first:stop] for buffer in layer.buffers) for layer in self.layers]


class PoolLayer:
    """One layer of a `RowPool`; a model takes it for a `LayerCache`."""

    def __init__(self, rows: int):
        self.rows = rows
        self.buffers = self.places_B = None
        self.stop = 0

    def write(self, places_P, k_PKd, v_PKd):
        """Put rows into their places ([P] int64)."""
        if self.buffers is None:
            self.buffers = tuple(x.new_empty(self.rows, *x.shape[1:]) for x in (k_PKd, v_PKd))
        for buffer, rows in zip(self.buffers, (k_PKd, v_PKd), strict=True):
            buffer.index_copy_(0, places_P, rows)

    def append(self, k_BKd, v_BKd):
        """Put rows where `RowPool.aim` told; returns keys and values of all rows, as views."""
        self.write(self.places_B, k_BKd, v_BKd)
        return tuple(buffer[: self.stop] for buffer in self.buffers)
