"""Keys and values of rows that were computed before.

Dimensions: N rows, K key/value heads, d channels per head.
"""


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
