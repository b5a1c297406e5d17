"""How a ranking stays within the memory granted: what is held at once, and the arrays that hold it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .scaled import WIDTHS, Scaled
from .search import Search

_SHAPES = 24  # tiles of so many widths at most, where each has a kernel of its own: in bfloat16
_SCRATCH = 3 << 24  # bytes that the libraries take for themselves: buffers, 0.7 MB of kernel for each shape


@dataclass(frozen=True)
class Plan:
    """How many things are held at once, within the memory granted."""

    rows: int  # of a matrix in the symmetric product, while matrices are built
    cube: bool  # whether the layer's own cube (half of it) is kept
    matrices: int  # output features whose matrices are held
    outputs: int  # of which so many are screened at once
    inputs: int  # input features in one tile
    align: int  # the columns of a tile start at a multiple of this
    look: int  # rows of a tile that are searched for candidates at once

    @classmethod
    def of(cls, search: Search, memory: int) -> "Plan":
        """Divide the memory; raises ValueError if it does not do for one of everything."""
        layer, wanted, n_pairs = search.layer, search.wanted, search.n_pairs
        n_out, n_in, d, hidden, B_out = layer.n_out, layer.n_in, layer.width, layer.hidden, search.coefficients.B.out
        item = layer.dtype.itemsize
        packed = 2  # products keep a second copy of one factor
        fixed = layer.bytes + packed * n_in * d * item + memory // 8  # the last for the factors in float64
        candidates = 1000 * min(wanted.k, n_out * n_pairs) + _SCRATCH
        candidates += 200 * min(wanted.per_output or 0, n_pairs) * n_out
        one_row = 3 * 4 * hidden * d
        one_matrix = 4 * d * d
        rounded = 0 if item == 4 else (4 + 2 * item) * d * d  # copies of each matrix
        one_output = rounded + packed * d * d * item + n_in * (d * item + 56)
        one_output += 0 if wanted.features is None else 12 * n_in
        one_tile = n_in * (item + 100)
        least = fixed + candidates + one_row + one_matrix + one_output + one_tile
        if memory < least:
            least = (least - memory // 8) * 8 // 7 + 8
            raise ValueError(f"memory must be at least {least} bytes for this layer and k, got {memory}")
        free = memory - least
        half_cube = 4 * B_out * d * (d + WIDTHS) // 2
        saves = B_out * hidden + n_out * B_out < n_out * hidden
        cube = layer.readers is not None and saves and half_cube <= free // 2
        free -= half_cube if cube else 0
        rows = _power_of_two(1 + free // 4 // one_row, at_most=WIDTHS)
        free -= (rows - 1) * one_row
        outputs = min(n_out, 64, 1 + free // 3 // one_output)
        free -= (outputs - 1) * one_output
        matrices = min(n_out, max(outputs, min(256, free // 2 // one_matrix) // outputs * outputs))
        tile = max(1 << 22, 1024 * n_in)  # entries: small enough for the cache, enough rows for a fast product
        inputs = max(1, min(n_in, tile // (outputs * n_in), free // 8 // (n_in * item * outputs)))
        look = max(1, min(1 << 27, free // 8) // (n_in * 100))
        align = inputs if item == 4 else -(-n_in // _SHAPES // inputs) * inputs
        return cls(rows, cube, matrices, outputs, inputs, align, look)


def _power_of_two(number: int, at_most: int) -> int:
    return 1 << (min(number, at_most).bit_length() - 1)


class Space:
    """The large arrays of a search, allocated once: fresh memory costs more than what is computed in it."""

    def __init__(self, layer: Scaled, plan: Plan):
        n, d, new = plan.outputs, layer.width, layer.writers.new_empty
        self.piece = new(layer.hidden * plan.rows * d, dtype=torch.float32)
        self.part = new(plan.matrices * plan.rows * d, dtype=torch.float32)
        self.M = new(plan.matrices * d * d, dtype=torch.float32)
        rounded = 0 if layer.dtype == torch.float32 else n * d * d
        self.lost = new(rounded, dtype=torch.float32)
        self.low, self.low_lost = new(rounded), new(rounded)
        self.A = new((layer.n_in - layer.n_base) * n * d)
        self.S = new(plan.inputs * n * layer.n_in)

    def take(self, name: str, *shape: int) -> Tensor:
        """Return the front of an array in some shape."""
        return getattr(self, name)[: math.prod(shape)].view(shape)
