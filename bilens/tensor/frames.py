"""Writers as sums of a few of them, in whose basis most products of a whole layer are already there."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .precision import working_dtype

_BLOCKS = 16  # of rows, in the products for the largest coefficients
_TOGETHER = 8  # matrices whose products stay in the cache
_STEEP = 8.0  # largest norm of weights: with it float32 keeps five digits of the largest coefficients


@dataclass(frozen=True, eq=False)
class Frame:
    """Writers in a basis of their own, `D[order] = (1; W) base`: r of them are the base, the others sums of those.

    Coefficients among the base's features are then the matrix `base · M · baseᵀ` itself, those of the others with them
    its product with W, so that only those among the others take the two products that all would take otherwise: a
    third less to multiply for four features to a dimension.
    """

    base: Float[Tensor, "r d"]
    rest: Float[Tensor, "others r"]  # W
    order: Int[Tensor, " n"]  # of the features: the base's, if it is made of features, then the others

    @classmethod
    def of(cls, D: Float[Tensor, "n d"]) -> "Frame":
        """Choose a base among the writers, the next always the one with the most that is new (QR with pivots).

        Where the others would be differences of large multiples of the base, it is the residual basis instead.
        """
        from scipy.linalg import qr  # a tenth of a second to import

        exact = D.detach().double().cpu()
        R, pivots = (torch.from_numpy(part) for part in qr(exact.T.numpy(), mode="r", pivoting=True))
        size, order = R.diagonal().abs(), pivots.long()
        rank = int((size > torch.finfo(working_dtype(D.dtype)).eps * max(D.shape) * size[:1]).sum())
        # D[order]ᵀ = Q R, so that the others are the base's times this
        rest = torch.linalg.solve_triangular(R[:rank, :rank], R[:rank, rank:], upper=True).T
        if not rank or (len(rest) and torch.linalg.vector_norm(rest, dim=1).max() > _STEEP):
            return cls.plain(D)
        return cls(D[order[:rank].to(D.device)], rest.to(D), order.to(D.device))

    @classmethod
    def plain(cls, D: Float[Tensor, "n d"]) -> "Frame":
        """Take the residual basis: no feature is part of it."""
        eye = torch.eye(D.shape[1], dtype=D.dtype, device=D.device)
        return cls(eye, D, torch.arange(len(D), device=D.device))

    @property
    def n_base(self) -> int:
        """Number of features that the base consists of."""
        return len(self.order) - len(self.rest)

    def residual(self, D: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"], float]:
        """Bound what the writers differ from their sums of the base; return it, their norms, and what projecting takes.

        The last is for the matrix of a term `left rightᵀ` in the base, projected in float64, as a part of
        `|left| |right|`: `γ |base|²` from each factor, with `γ = d u` and float64's roundoff u. The sums that the
        difference is measured by are off by as much. All zero in the residual basis.
        """
        exact, u = D.double(), torch.finfo(torch.float64).eps / 2
        length, lost = torch.linalg.vector_norm(exact, dim=1), exact.new_zeros(len(D))
        if not self.n_base:
            return lost, length, 0.0
        rest, base = self.rest.double(), self.base.double()
        some, size = self.order[self.n_base :], float(torch.linalg.vector_norm(base))
        off = torch.linalg.vector_norm(exact[some] - rest @ base, dim=1)
        lost[some] = off + 2 * D.shape[1] * u * (size * torch.linalg.vector_norm(rest, dim=1) + length[some])
        return lost, length, 4 * D.shape[1] * u * size**2

    def largest(
        self, M: Float[Tensor, "out r r"], numbers: int
    ) -> tuple[Float[Tensor, "out n"], Float[Tensor, "out n"]]:
        """Return half the largest coefficient of each feature with any, and self terms, of matrices in this basis.

        Coefficients are `2 Q_ij` of a pair and `Q_ii` of a feature with itself. The two features of a pair tie exactly.

        Args:
            M: Symmetric matrices, `base · M · baseᵀ`.
            numbers: How many coefficients to hold at once.
        """
        found = [self._largest(some, numbers) for some in M.split(_TOGETHER)]
        back = self.order.argsort()
        return tuple(torch.cat(part)[:, back] for part in zip(*found, strict=True))

    def _largest(self, M: Float[Tensor, "out r r"], numbers: int) -> tuple[Tensor, Tensor]:
        """Do what `largest` does, with the features in the order of the frame."""
        n_base, c, n = self.n_base, len(M), len(self.order)
        largest, own = M.new_zeros(n, c), M.new_empty(n, c)
        A = (self.rest @ M.transpose(0, 1).flatten(1)).unflatten(1, M.shape[:2])  # [others, out, r]
        if n_base:
            own[:n_base] = M.diagonal(dim1=1, dim2=2).T
            largest[:n_base] = M.abs().diagonal_scatter(own[:n_base].T.abs() / 2, dim1=1, dim2=2).amax(2).T
            across = A.abs()  # between the others and the base
            largest[n_base:] = across.amax(2)
            if len(A):
                largest[:n_base] = torch.maximum(largest[:n_base], across.amax(0).T)
        step = max(1, min(numbers // max(1, len(A) * c), -(-len(A) // _BLOCKS)))
        for start in range(0, len(A), step):  # coefficients are symmetric: from the diagonal on
            rows = A[start : start + step]
            S = (rows.flatten(0, 1) @ self.rest[start:].T).unflatten(0, rows.shape[:2])
            here = slice(n_base + start, n_base + start + len(rows))
            diagonal = S.diagonal(0, 0, 2)  # [out, rows]
            own[here] = diagonal.T
            diagonal.div_(2)
            S.abs_()
            largest[here] = torch.maximum(largest[here], S.amax(2))
            largest[n_base + start :] = torch.maximum(largest[n_base + start :], S.amax(0).T)
        return largest.T, own.T
