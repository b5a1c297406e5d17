"""Interaction matrices of thousands of output features, a group at a time, with a bound on their error."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from .budget import Plan, Space
from .precision import product_roundoff
from .scaled import Scaled


class Streamed:
    """Interaction matrices of many output features, in float32, from the half of the symmetric product that counts."""

    def __init__(self, layer: Scaled, plan: Plan, space: Space):
        self.layer, self.rows, self.space = layer, plan.rows, space
        self.term_norm = torch.linalg.vector_norm(layer.left, dim=1) * torch.linalg.vector_norm(layer.right, dim=1)
        self.cube = None
        if plan.cube:
            self.cube = [(start, layer.down @ piece) for start, piece in self._pieces()]
            self.cube_norm = torch.stack([p.pow(2).sum(1) for _, p in self.cube]).sum(0).mul(2).sqrt()

    def _pieces(self) -> Iterator[tuple[int, Tensor]]:
        """Yield `½ (left_k right_l + right_k left_l)` for some rows k and all l from there on, `[hidden, rows · l]`."""
        left, right, (hidden, width) = self.layer.left / 2, self.layer.right, self.layer.left.shape
        for start in range(0, width, self.rows):
            some = slice(start, start + self.rows)
            piece = self.space.take("piece", hidden, self.rows, width - start)
            torch.mul(left[:, some, None], right[:, None, start:], out=piece)
            yield start, piece.addcmul_(right[:, some, None], left[:, None, start:]).flatten(1)

    def __call__(
        self, first: int, last: int
    ) -> tuple[Float[Tensor, "n width width"], Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Return the matrices, a bound on the Frobenius norm of their error, and `Σ_h |weight_h| terms_h` of each."""
        layer, width, n = self.layer, self.layer.width, last - first
        readers = None if layer.readers is None else layer.readers[first:last]
        weights = layer.down[first:last] if readers is None else readers @ layer.down
        M = self.space.take("M", n, width, width)
        for start, piece in self._pieces() if self.cube is None else self.cube:
            some = slice(start, start + self.rows)
            part = self.space.take("part", n, piece.shape[1])
            torch.mm(weights if self.cube is None else readers, piece, out=part)
            M[:, some, start:] = part.view(n, self.rows, -1)
            M[:, start:, some] = part.view(n, self.rows, -1).mT
        reach = weights.abs().double() @ layer.terms * (1 + 1e-3)  # far more than the rounding of the weights
        return M, self._error(M, readers, weights) + (reach * layer.base_error).float(), reach

    def _error(self, M: Tensor, readers: Tensor | None, weights: Tensor) -> Float[Tensor, " n"]:
        """Bound what the sums in float32 took: 4 sqrt(terms) roundoffs of what is summed and of the sum."""
        roundoff = product_roundoff()
        # each term weighs a rank-one matrix, of norm |left_h| |right_h|
        size = torch.linalg.vector_norm(weights * self.term_norm, dim=1) + torch.linalg.vector_norm(M, dim=(1, 2))
        error = self.layer.hidden**0.5 * size
        if self.cube is not None:  # a second sum, over the outputs, of what the first one left
            error += len(self.layer.down) ** 0.5 * torch.linalg.vector_norm(readers * self.cube_norm, dim=1)
        return 4 * roundoff * error
