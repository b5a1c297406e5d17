"""Decompositions of a `BilinearTensor` into parts that can be read one by one."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .tensor import BilinearTensor


class Eigen(NamedTuple):
    """Eigenvalues and unit eigenvectors of interaction matrices, strongest |value| first."""

    values: Float[Tensor, "*n k"]
    vectors: Float[Tensor, "*n k inp"]

    def __repr__(self) -> str:
        top = ", ".join(f"{value:+.3g}" for value in self.values.reshape(-1, self.values.shape[-1])[0, :4].tolist())
        return f"Eigen(values={list(self.values.shape)}, vectors={list(self.vectors.shape)}; first: {top} ...)"


def eigen(B: BilinearTensor, u: Float[Tensor, "*n out"], k: int | None = None) -> Eigen:
    """Decompose the interaction matrix of an output direction: `u·y = Σ_i λ_i (v_i·x)²` (2410.08417, section 3.2).

    The matrix is symmetrised first; reading only one triangle of the unsymmetrised one, as published code does, gives
    another spectrum. A vector and its negative mean the same; here the largest entry of each is positive.

    Args:
        B: The layer.
        u: One output direction `[out]`, or several `[n, out]`.
        k: How many pairs to return; all `inp` of them if `None`.

    Returns:
        `values [.., k]`, strongest |value| first, and `vectors [.., k, inp]`, orthonormal rows. Cost `inp³` and
        `2 · inp²` numbers for each direction in turn. bfloat16 and float16 are computed in float32.

    Raises:
        ValueError: `k` exceeds `inp`.
    """
    k = B.inp if k is None else k
    if not 1 <= k <= B.inp:
        raise ValueError(f"k must lie between 1 and inp={B.inp}, got {k}")
    dtype = torch.promote_types(B.down.dtype, torch.float32)
    B, u = B.to(dtype), u.to(dtype)
    pairs = [_eigen_one(B.matrix(direction), k) for direction in u.reshape(-1, u.shape[-1])]
    if not pairs:
        raise ValueError("u must hold at least one direction, got none")
    values, vectors = (torch.stack(part) for part in zip(*pairs, strict=True))
    return Eigen(values.reshape(*u.shape[:-1], k), vectors.reshape(*u.shape[:-1], k, B.inp))


def _eigen_one(matrix: Float[Tensor, "inp inp"], k: int) -> tuple[Float[Tensor, " k"], Float[Tensor, "k inp"]]:
    values, vectors = torch.linalg.eigh(matrix)
    strongest = values.abs().argsort(descending=True, stable=True)[:k]
    values, rows = values[strongest], vectors.T[strongest]
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return values, rows * torch.where(largest < 0, -1, 1).to(rows)
