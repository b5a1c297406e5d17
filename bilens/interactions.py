"""Exact ranking of the pairwise interactions of a whole layer, streamed over output features."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .tensor import BilinearTensor

BLOCK_BYTES = 1 << 26  # of the largest intermediate: output features at once times n_in²


class Interactions(NamedTuple):
    """Feature pairs and the coefficient of `z_left · z_right` in an output feature, strongest |value| first."""

    out: Int[Tensor, " k"]
    left: Int[Tensor, " k"]
    right: Int[Tensor, " k"]
    value: Float[Tensor, " k"]

    def __repr__(self) -> str:
        if not len(self.value):
            return "Interactions(0 pairs)"
        out, left, right, value = (part[0].item() for part in self)
        return f"Interactions({len(self.value)} pairs; first: {left} × {right} → {out}: {value:+.4g})"


@torch.no_grad()
def top_interactions(
    B: BilinearTensor,
    k: int,
    out: Float[Tensor, "n_out out"] | None = None,
    inp: Float[Tensor, "n_in inp"] | None = None,
) -> Interactions:
    """Find the k strongest coefficients over all output features and all unordered pairs of input features, exactly.

    The coefficient of `z_i z_j` in output feature o is `Q_ii` on the diagonal and `2 Q_ij` for `i < j`, where
    `Q = D · B.matrix(readers_o) · Dᵀ` and D holds the writers (2410.08417, section 3.1; its Figure 27 counts pairs the
    same way). Every entry of every matrix is looked at; ties go to the smaller (out, left, right).

    Args:
        B: The layer, in the basis that `out` reads and `inp` writes.
        k: How many; all of them if there are fewer.
        out: Readers, one output feature per row; `None` for the output basis itself.
        inp: Writers, one input feature per row; `None` for the input basis itself.

    Returns:
        `out`, `left <= right`, `value`. If `B` has a constant leg, index `n_in` stands for it. Half precision is
        computed in float32.

    Raises:
        ValueError: `k` below 1, a basis of another width, or an interaction that is NaN or infinite.

    Cost: `n_in · inp · (n_in + inp)` products per output feature, beside `hidden · inp²` for its matrix; memory of a
    few times `max(64 MiB, n_in²)` beyond the result, whatever `n_out`.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if out is not None and (out.ndim != 2 or out.shape[1] != B.out):
        raise ValueError(f"out must have shape [n_out, {B.out}], got {list(out.shape)}")
    dtype = torch.promote_types(B.down.dtype, torch.float32)
    B = B.to(dtype)
    readers = torch.eye(B.out, dtype=dtype, device=B.down.device) if out is None else out.to(dtype)
    writers = None if inp is None else _with_constant(inp.to(dtype), B)
    n_in = B.inp if writers is None else len(writers)
    n_at_once = max(1, BLOCK_BYTES // max(1, n_in**2 * dtype.itemsize))
    best = Interactions(*(readers.new_empty(0, dtype=torch.long) for _ in range(3)), readers.new_empty(0))
    for start in range(0, len(readers), n_at_once):
        matrices = B.matrix(readers[start : start + n_at_once])
        if writers is not None:
            matrices = writers @ matrices @ writers.T
        best = _merge(best, _strongest(matrices, start, k, best), k)
    return best


def _with_constant(writers: Tensor, B: BilinearTensor) -> Tensor:
    """Check the writers' width and let them pass the constant leg through."""
    width = B.inp - B.constant
    if writers.ndim != 2 or writers.shape[1] != width:
        raise ValueError(f"inp must have shape [n_in, {width}], got {list(writers.shape)}")
    return torch.block_diag(writers, writers.new_ones(1, 1)) if B.constant else writers


def _strongest(matrices: Float[Tensor, "n inp inp"], first: int, k: int, best: Interactions) -> Interactions:
    """Return the pairs of a block of matrices that can still be among the k strongest; overwrites the matrices."""
    matrices.diagonal(dim1=1, dim2=2).div_(2)  # now twice an entry is its coefficient, on the diagonal and off
    low, high = matrices.aminmax() if matrices.numel() else (matrices.new_zeros(()),) * 2
    if not (low.isfinite() and high.isfinite()):  # NaN is neither stronger nor weaker than a number: it would be lost
        raise ValueError("B, out and inp must be finite, but some interactions are NaN or infinite")
    threshold = matrices.new_zeros(())
    if len(best.value) == k:
        threshold = best.value[-1].abs() / 2
    elif matrices.numel() > 2 * k:
        threshold = matrices.triu().abs_().flatten().topk(k).values[-1]
    if torch.maximum(-low, high) < threshold:
        return Interactions(*(part[:0] for part in best))
    out, left, right = ((matrices >= threshold) | (matrices <= -threshold)).nonzero(as_tuple=True)
    upper = left <= right
    out, left, right = out[upper], left[upper], right[upper]
    return Interactions(out + first, left, right, 2 * matrices[out, left, right])


def _merge(one: Interactions, other: Interactions, k: int) -> Interactions:
    """Return the k strongest of two lists; `one` holds earlier output features, so a stable sort settles ties."""
    merged = [torch.cat(parts) for parts in zip(one, other, strict=True)]
    order = merged[3].abs().sort(descending=True, stable=True).indices[:k]
    return Interactions(*(part[order] for part in merged))
