"""Upper bounds on Schatten norms of many interaction matrices, from matrix products in low precision."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from .matrices import Matrices, frobenius
from .precision import screen_dtype

CHUNK_BYTES = 2**24  # interaction matrices in full precision held at once


class Screen:
    """Schatten norms of interaction matrices from above, in low precision, by repeated squaring.

    `S_p(Q) ≤ S_p(X) + ‖Q - X‖_F` for the rounded matrix X, `S_p(X)² = S_{p/2}(X Xᵀ)`, and so on for the rounded
    product. Everything is scaled by powers of two to a norm near 1.
    """

    def __init__(self, matrices: Matrices, gram: Tensor):
        d, device = matrices.B.inp, gram.device
        self.matrices, self.dtype = matrices, screen_dtype(device)
        self.roundoff = torch.finfo(self.dtype).eps / 2
        self.sums = 4 * d**0.5 * 2.0**-24  # sums of d terms in float32, whose errors are at random
        self.chunk = max(16, d // 4)  # readers that share one pass over the cube
        self.X, self.Y = (torch.empty(self.chunk, d, d, dtype=self.dtype, device=device) for _ in range(2))
        self.wide = torch.empty(max(1, CHUNK_BYTES // (16 * d * d)), d, d, device=device)  # for norms, a few at a time
        self.exact = _Rounded(matrices)
        self.low = self.exact if matrices.blocks is None else _LowCube(matrices, self.dtype, gram)

    def start(self, readers: Tensor, frobenius: Tensor, exact: bool) -> None:
        """Take readers, at most `chunk`, with the Frobenius norms of their matrices."""
        scale = torch.exp2(-frobenius.clamp(min=1e-300).log2().round()) * (frobenius > 0)
        unit = readers.double() * scale[:, None]  # their matrices have a norm near 1
        self.n, self.scale = len(readers), torch.where(scale > 0, 1 / scale, 0.0)
        error = (self.exact if exact else self.low).fill(self.X[: self.n], unit)
        self.norm = self._norm(self.X[: self.n])
        self.steps = [(torch.ones_like(error), error)]

    def square(self) -> tuple[Tensor, int]:
        """Square the matrices; return the next bound on a Schatten norm of the original ones, and its p."""
        X, Y = self.X[: self.n], self.Y[: self.n]
        torch.bmm(X, X.mT, out=Y)
        norm = self._norm(Y)
        scale = torch.exp2(-norm.clamp(min=1e-30).log2().round())
        self.steps.append((scale, self.roundoff * norm + self.sums * self.norm**2 + 1e-30))
        Y.mul_(scale.to(self.dtype)[:, None, None])
        self.X, self.Y = self.Y, self.X
        bound = self.norm = norm * scale
        for scale, error in reversed(self.steps[1:]):
            bound = (bound / scale + error).sqrt()
        return (bound + self.steps[0][1]) * self.scale, 2 ** len(self.steps)

    def keep(self, which: Tensor) -> None:
        """Go on with some of the matrices only."""
        if which.all():
            return
        index = which.nonzero()[:, 0]
        torch.index_select(self.X[: self.n], 0, index, out=self.Y[: len(index)])
        self.X, self.Y, self.n = self.Y, self.X, len(index)
        self.scale, self.norm = self.scale[index], self.norm[index]
        self.steps = [(scale[index], error[index]) for scale, error in self.steps]

    def _norm(self, X: Tensor) -> Tensor:
        norms = [
            torch.linalg.vector_norm(self.wide[: len(part)].copy_(part), dim=(1, 2)) for part in X.split(len(self.wide))
        ]
        return torch.cat(norms).double() * (1 + 1e-4)  # of a long sum in float32


class _Rounded:
    """Matrices in low precision, rounded from full precision, which loses least."""

    def __init__(self, matrices: Matrices):
        self.matrices = matrices

    def fill(self, X: Float[Tensor, "n inp inp"], u: Float[Tensor, "n out"]) -> Float[Tensor, " n"]:
        """Write the matrices of some directions; bound the Frobenius norm of what was lost."""
        lost = []
        for Q in self.matrices.chunks(u.to(self.matrices.B.down.dtype), CHUNK_BYTES):
            part = X[sum(map(len, lost)) :][: len(Q)].copy_(Q)
            lost.append(torch.linalg.vector_norm(Q.sub_(part), dim=(1, 2)).double())
        return torch.cat(lost) * (1 + 1e-4)


class _LowCube:
    """Matrices in low precision from a cube in low precision, `ũ C̃`, with the cube scaled to a largest number near 1.

    `‖u C - ũ C̃‖_F ≤ ‖(u - ũ) C‖_F + ‖ũ (C - C̃)‖_F`, each from a Gram matrix of size `out`.
    """

    def __init__(self, matrices: Matrices, dtype: torch.dtype, gram: Float[Tensor, "out out"]):
        self.matrices, self.dtype, self.roundoff = matrices, dtype, torch.finfo(dtype).eps / 2
        largest = max(float(block.abs().max()) for block in matrices.blocks)
        self.scale = 2.0 ** round(math.log2(largest)) if largest else 1.0
        self.gram = gram / self.scale**2
        self.lost, self.lost_error = torch.zeros_like(self.gram), 0.0
        self.blocks = [
            self._round(block, *stripe) for block, stripe in zip(matrices.blocks, matrices.stripes, strict=True)
        ]
        self.sums = 4 * matrices.B.out**0.5 * 2.0**-24 * float(self.gram.trace().sqrt())

    def _round(self, block: Tensor, start: int, stop: int) -> Tensor:
        """Round a block; add the Gram matrix of what that takes, each number counted as often as the cube has it."""
        low = (block / self.scale).to(self.dtype)
        lost = ((block / self.scale).sub_(low) / self.roundoff).view(len(low), stop - start, -1)
        lost[:, :, stop - start :] *= 2**0.5
        lost = lost.flatten(1).to(self.dtype)
        gram = (lost @ lost.T).double()
        self.lost += gram
        self.lost_error += 4 * self.roundoff * float(gram.norm() + gram.trace())
        return low

    def fill(self, X: Float[Tensor, "n inp inp"], u: Float[Tensor, "n out"]) -> Float[Tensor, " n"]:
        """Write the matrices of some directions; bound the Frobenius norm of what was lost."""
        u = u * self.scale
        low = u.to(self.dtype)
        self.matrices.unfold(X, (low @ block for block in self.blocks))
        low = low.double()
        norm = low.norm(dim=1)
        rounded = ((low @ self.lost * low).sum(1).clamp(min=0) + self.lost_error * norm**2).sqrt() * self.roundoff
        size = (1 + self.roundoff) * frobenius(self.gram, low) + rounded  # of what is rounded in the end
        return frobenius(self.gram, u - low) + rounded + self.sums * norm + self.roundoff * size
