"""The spectra of interaction matrices: parts of a `BilinearTensor` that can be read one by one."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from .bilinear import BilinearTensor, with_constant
from .matrices import Matrices, check_directions, check_finite
from .precision import working_dtype
from .records import Record
from .tables import number_of, sliced

MATRIX_BYTES = 2**26  # interaction matrices held at once


@dataclass(frozen=True, repr=False, eq=False)
class Eigen(Record, rows="k", unit="eigenvectors"):
    """Eigenvalues and unit eigenvectors of interaction matrices, strongest |value| first: `values, vectors = ...`.

    Its rows are the pairs: `len(found)` is k, `found[:5]` the five strongest of each direction, `found[0]` the value
    and the vector of the strongest.

    `residual [.., k]` is `‖Q v - λ v‖ / ‖v‖`, evaluated in float64: no further than that from λ lies an eigenvalue of
    the exact matrix. `None` where it was not computed. It stays through slices and `_replace`, unless replaced too.
    """

    values: Float[Tensor, "*n k"]
    vectors: Float[Tensor, "*n k inp"]
    residual: Float[Tensor, "*n k"] | None = None

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.values, self.vectors))

    def __len__(self) -> int:
        return self.values.shape[-1]

    def __getitem__(self, which: Any) -> "Eigen | tuple[Tensor, Tensor]":
        which = number_of(which)
        return (self.values[..., which], self.vectors[..., which, :]) if isinstance(which, int) else sliced(self, which)

    def _replace(self, **changes: Tensor | None) -> "Eigen":
        """Return a copy with other values or vectors, as the method of a named tuple does."""
        return replace(self, **changes)

    def __repr__(self) -> str:
        top = ", ".join(f"{value:+.3g}" for value in self.values.reshape(-1, self.values.shape[-1])[0, :4].tolist())
        return f"Eigen(values={list(self.values.shape)}, vectors={list(self.vectors.shape)}; first: {top} ...)"


def eigen(B: BilinearTensor, u: Float[Tensor, "*n out"], k: int | None = None, *, progress: bool = False) -> Eigen:
    """Decompose the interaction matrix of an output direction: `u·y = Σ_i λ_i (v_i·x)²` (2410.08417, section 3.2).

    The matrix is symmetrised first; reading only one triangle of the unsymmetrised one, as published code does, gives
    another spectrum. A vector and its negative mean the same; here the largest entry of each is positive.

    Args:
        B: The layer.
        u: One output direction `[out]`, or several `[n, out]`.
        k: How many pairs to return; all `inp` of them if `None`.
        progress: Whether to show a progress bar.

    Returns:
        `values [.., k]`, strongest |value| first, and `vectors [.., k, inp]`, orthonormal rows, with `residual [.., k]`
        as an attribute. Cost `inp³` for each direction; besides the result, 64 MiB of matrices at a time and, for more
        directions than `out`, half the cube if that fits into 512 MiB. bfloat16 and float16 are computed in float32.

    Raises:
        ValueError: `k` exceeds `inp`, or a direction is of another width or not finite.
    """
    k = B.inp if k is None else k
    if not 1 <= k <= B.inp:
        raise ValueError(f"k must lie between 1 and inp={B.inp}, got {k}")
    directions = check_directions("u", u, B)
    dtype, matrices = working_dtype(B.down.dtype), Matrices(B.to(torch.float64), len(directions))
    parts = []
    for Q in _bar(matrices.chunks(directions.double(), MATRIX_BYTES), len(directions), progress):
        values, vectors = _strongest(Q.to(dtype), k)
        parts.append((values, vectors, _residual(Q.detach() @ vectors.detach().double().mT, values, vectors)))
    values, vectors, residual = (torch.cat(part) for part in zip(*parts, strict=True))
    n = u.shape[:-1]
    return Eigen(values.reshape(*n, k), vectors.reshape(*n, k, B.inp), residual.reshape(*n, k))


def spectrum_in_basis(
    B: BilinearTensor,
    readers: Float[Tensor, "*n out"],
    writers: Float[Tensor, "n_in inp"],
    k: int | None = None,
) -> Eigen:
    """Decompose the interactions of input features, `D Q Dᵀ` with D = `writers`, without building that matrix.

    With `D = U R`, U of orthonormal columns and as many as the rank of D, `D Q Dᵀ v = λ v` has the non-zero solutions
    `R Q Rᵀ y = λ y`, `v = U y`: a problem no larger than `min(n_in, inp)`, where the features are thousands.

    Args:
        B: The layer, in the basis that the writers write to.
        readers: One output direction `[out]`, or several `[n, out]`.
        writers: Directions of the input features, without the constant. A constant leg is passed through as the last
            feature, as `BilinearTensor.project` does.
        k: How many pairs to return; as many as the rank of `writers` if `None`.

    Returns:
        `values [.., k]`, strongest |value| first, `vectors [.., k, n_in]`, orthonormal rows, and `residual [.., k]`,
        that of `D Q Dᵀ` itself. Cost `n_in · inp²` once and `rank³ + k · n_in · inp` for each direction.

    Raises:
        ValueError: `k` exceeds the rank, or the writers or readers are of another width or not finite.
    """
    width = B.inp - B.constant
    if writers.ndim != 2 or writers.shape[1] != width:
        raise ValueError(f"writers must have shape [n, {width}], got {list(writers.shape)}")
    check_finite("writers", writers)
    directions = check_directions("readers", readers, B)
    dtype = working_dtype(B.down.dtype)
    D = with_constant(writers.double(), B)
    U, R = _thin(D, torch.finfo(working_dtype(writers.dtype)).eps)
    k = len(R) if k is None else k
    if not 1 <= k <= len(R):
        raise ValueError(f"k must lie between 1 and the rank of writers, {len(R)}, got {k}")
    parts = []
    for Q in Matrices(B.to(torch.float64), len(directions)).chunks(directions.double(), MATRIX_BYTES):
        values, small = _strongest((R @ Q @ R.T).to(dtype), k)
        vectors = _positive(torch.nn.functional.normalize(small.double() @ U.T, dim=-1).to(dtype))
        parts.append((values, vectors, _residual(D @ (Q @ (vectors.double() @ D).mT), values, vectors).detach()))
    values, vectors, residual = (torch.cat(part) for part in zip(*parts, strict=True))
    n = readers.shape[:-1]
    return Eigen(values.reshape(*n, k), vectors.reshape(*n, k, len(D)), residual.reshape(*n, k))


def _strongest(Q: Float[Tensor, "n d d"], k: int) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n k d"]]:
    """Return the k eigenvalues of largest magnitude, and their vectors as rows."""
    values, vectors = torch.linalg.eigh(Q)
    order = values.abs().argsort(dim=1, descending=True, stable=True)[:, :k]
    rows = vectors.mT.gather(1, order[..., None].expand(-1, -1, Q.shape[-1]))
    return values.gather(1, order), _positive(rows)


def _positive(rows: Float[Tensor, "n k d"]) -> Float[Tensor, "n k d"]:
    """Turn each row so that its largest entry is positive."""
    largest = rows.gather(2, rows.abs().argmax(2, keepdim=True))
    return rows * torch.where(largest < 0, -1, 1).to(rows)


def _residual(image: Tensor, values: Tensor, vectors: Tensor) -> Float[Tensor, "n k"]:
    """Return `‖Q v - λ v‖ / ‖v‖`, given `Q v` in columns."""
    values, vectors = values.detach().double(), vectors.detach().double()
    error = (image.mT - values[..., None] * vectors).norm(dim=-1) / vectors.norm(dim=-1)
    return (error * (1 + 1e-6)).to(torch.float64)


def _thin(D: Float[Tensor, "n d"], eps: float) -> tuple[Float[Tensor, "n rank"], Float[Tensor, "rank d"]]:
    """Factor `D = U R`, U with orthonormal columns, as many as D has singular values that are not rounding."""
    Q, R = torch.linalg.qr(D)
    U, S, V = torch.linalg.svd(R, full_matrices=False)
    rank = int((S / max(D.shape) > eps * S.max()).sum()) if S.numel() else 0
    if not rank:
        raise ValueError("writers must hold at least one row that is not zero, got none")
    return Q @ U[:, :rank], S[:rank, None] * V[:rank]


def _bar(matrices: Iterator[Tensor], total: int, progress: bool) -> Iterator[Tensor]:
    """Pass matrices through a progress bar that counts them."""
    with tqdm(total=total, unit="matrix", disable=not progress) as bar:
        for Q in matrices:
            yield Q
            bar.update(len(Q))
