"""Keys and values of rows that were computed before.

Dimensions: N rows, B answers, P rows that are written, K key/value heads, d channels per head.
"""

from collections.abc import Sequence

from torch import Tensor


class LayerCache:
    """Keys and values of one layer, in a buffer of `capacity` rows that is allocated at the first `append`."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.length = 0
        self.buffers: tuple[Tensor, Tensor] | None = None

    def append(self, k_NKd: Tensor, v_NKd: Tensor) -> tuple[Tensor, Tensor]:
        """Add rows; returns keys and values of all rows so far, as views."""
        if self.buffers is None:
            self.buffers = _room(self.capacity, k_NKd, v_NKd)
        start, self.length = self.length, self.length + k_NKd.shape[0]
        for buffer, rows in zip(self.buffers, (k_NKd, v_NKd), strict=True):
            buffer[start : self.length] = rows
        return self.views()

    def views(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all rows so far."""
        return _views(self.buffers, 0, self.length)


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
        return [_views(layer.buffers, first, stop) for layer in self.layers]


class PoolLayer:
    """One layer of a `RowPool`; a model takes it for a `LayerCache`."""

    def __init__(self, rows: int):
        self.rows = rows
        self.buffers: tuple[Tensor, Tensor] | None = None
        self.places_B: Tensor | None = None
        self.stop = 0

    def write(self, places_P: Tensor, k_PKd: Tensor, v_PKd: Tensor) -> None:
        """Put rows into their places ([P] int64)."""
        if self.buffers is None:
            self.buffers = _room(self.rows, k_PKd, v_PKd)
        for buffer, rows in zip(self.buffers, (k_PKd, v_PKd), strict=True):
            buffer.index_copy_(0, places_P, rows)

    def append(self, k_BKd: Tensor, v_BKd: Tensor) -> tuple[Tensor, Tensor]:
        """Put rows where `RowPool.aim` told; returns keys and values of all rows, as views."""
        assert self.places_B is not None, "`RowPool.aim` comes first"
        self.write(self.places_B, k_BKd, v_BKd)
        return _views(self.buffers, 0, self.stop)


Cache = Sequence[LayerCache | PoolLayer]  # one for each layer of a decoder


def _room(rows, k_NKd, v_NKd):
    """Buffers of so many rows for keys and values like these."""
    return k_NKd.new_empty(rows, *k_NKd.shape[1:]), v_NKd.new_empty(rows, *v_NKd.shape[1:])


def _views(buffers, first, stop):
    """Rows [first, stop) of keys and values."""
    keys, values = buffers
    return keys[first:stop], values[first:stop]
