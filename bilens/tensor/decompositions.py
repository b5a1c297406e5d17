"""Decompositions of a `BilinearTensor` into parts that can be read one by one, and rankings by their spectra."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from .bilinear import BilinearTensor, with_constant

_MATRIX_BYTES = 2**26  # interaction matrices held at once by `eigen` and `spectrum_in_basis`
_SCREEN_BYTES = 2**24  # and decomposed by `top_outputs`
_CUBE_BYTES = 2**29  # the cube in the residual basis is only built below this
# Squarings, and whether to start from matrices in full precision: S_8 of all finds candidates, up to S_64 excludes most
# of the rest.
_STAGES = ((2, False), (5, True))
_GUARD = 3e-5  # relative; what the exact eigenvalues may be wrong by


class _Pairs(NamedTuple):
    values: Float[Tensor, "*n k"]
    vectors: Float[Tensor, "*n k inp"]


class Eigen(_Pairs):
    """Eigenvalues and unit eigenvectors of interaction matrices, strongest |value| first: `values, vectors = ...`.

    `residual [.., k]` is `‖Q v - λ v‖ / ‖v‖`, evaluated in float64: no further than that from λ lies an eigenvalue of
    the exact matrix. `None` where it was not computed.
    """

    residual: Float[Tensor, "*n k"] | None = None

    def __new__(
        cls,
        values: Float[Tensor, "*n k"],
        vectors: Float[Tensor, "*n k inp"],
        residual: Float[Tensor, "*n k"] | None = None,
    ) -> "Eigen":
        """Make the pair, with the residual beside it."""
        pairs = super().__new__(cls, values, vectors)
        pairs.residual = residual
        return pairs

    def __repr__(self) -> str:
        top = ", ".join(f"{value:+.3g}" for value in self.values.reshape(-1, self.values.shape[-1])[0, :4].tolist())
        return f"Eigen(values={list(self.values.shape)}, vectors={list(self.vectors.shape)}; first: {top} ...)"


@dataclass(frozen=True, repr=False, eq=False)
class TopOutputs:
    """The output features that score highest, the highest first, ties by index."""

    out: Int[Tensor, " k"]
    score: Float[Tensor, " k"]
    values: Float[Tensor, "k 2"] | None  # the two eigenvalues of largest magnitude; None where none was needed
    decomposed: int  # how many matrices were decomposed to be sure

    def __repr__(self) -> str:
        top = ", ".join(f"#{out} {score:.3g}" for out, score in zip(self.out[:3].tolist(), self.score, strict=False))
        return f"TopOutputs({len(self.out)} features, {self.decomposed} decomposed; first: {top} ...)"


# -- spectra ----------------------------------------------------------------------------------------------------------


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
    directions = _directions("u", u, B)
    dtype, matrices = _working(B.down.dtype), _Matrices(B.to(torch.float64), len(directions))
    parts = []
    for Q in _bar(matrices.chunks(directions.double(), _MATRIX_BYTES), len(directions), progress):
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
    _check_finite("writers", writers)
    directions = _directions("readers", readers, B)
    dtype = _working(B.down.dtype)
    D = with_constant(writers.double(), B)
    U, R = _thin(D, torch.finfo(_working(writers.dtype)).eps)
    k = len(R) if k is None else k
    if not 1 <= k <= len(R):
        raise ValueError(f"k must lie between 1 and the rank of writers, {len(R)}, got {k}")
    parts = []
    for Q in _Matrices(B.to(torch.float64), len(directions)).chunks(directions.double(), _MATRIX_BYTES):
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


# -- ranking ----------------------------------------------------------------------------------------------------------


def top_outputs(
    B: BilinearTensor,
    readers: Float[Tensor, "n out"],
    k: int,
    by: Literal["spectral", "frobenius", "top2"] = "spectral",
) -> TopOutputs:
    """Find the k output features with the strongest interaction matrix, without decomposing them all.

    The score of a matrix Q is `max |λ|` (spectral), `|λ₁| + |λ₂|` of the two largest magnitudes (top2; 2410.08417,
    section 5.2) or `‖Q‖_F`. Schatten norms bound the first two from above, `|λ₁| ≤ S_p` and
    `|λ₁| + |λ₂| ≤ 2^(1-1/p) S_p`, and take matrix products only: `S_2p = ‖Q^p‖_F^(1/p)` by squaring. They are computed
    in bfloat16 where that is fast, with a bound on what rounding adds, so that the result is exact up to the rounding
    of the eigenvalues.

    Args:
        B: The layer.
        readers: Directions `[n, out]` of the output features.
        k: How many to find.
        by: The score.

    Returns:
        The k features, highest score first, ties by index. Cost `out · inp²` and a few `inp³` of matrix products for
        each reader and an eigenvalue problem for those that no bound excludes; `by="frobenius"` only `out²` for each
        reader. Memory: half the cube, one and a half times, if half of it fits into 512 MiB. bfloat16 and float16
        factors are computed in float32.

    Raises:
        ValueError: `k` or `by` out of range, or readers or factors of another width or not finite.
    """
    if by not in ("spectral", "frobenius", "top2"):
        raise ValueError(f"by must be 'spectral', 'frobenius' or 'top2', got {by!r}")
    if readers.ndim != 2:
        raise ValueError(f"readers must have shape [n, {B.out}], got {list(readers.shape)}")
    readers = _directions("readers", readers, B).detach()
    if not 1 <= k <= len(readers):
        raise ValueError(f"k must lie between 1 and the number of readers, {len(readers)}, got {k}")
    dtype = _working(B.down.dtype)
    B, readers = B.detach().to(dtype), readers.to(dtype)
    different, copy = torch.unique(readers, dim=0, return_inverse=True)  # equal readers tie exactly
    gram = output_gram(B)
    if by == "frobenius":
        score, values, decomposed = _frobenius(gram, different).to(dtype), None, 0
    else:
        search = _Search(B, different, gram, copy, k, by)
        search.run()
        score, values, decomposed = search.score, search.values, int(search.score.isfinite().sum())
    order = score[copy].argsort(descending=True, stable=True)[:k]
    return TopOutputs(order, score[copy[order]], None if values is None else values[copy[order]], decomposed)


def output_gram(B: BilinearTensor) -> Float[Tensor, "out out"]:
    """Return the inner products `⟨Q_o, Q_p⟩_F` of the matrices of two outputs, in float64, as `B.inner` does."""
    down, left, right = B.down.double(), B.left.double(), B.right.double()
    gram = down.new_zeros(B.out, B.out)
    for some in torch.arange(B.hidden, device=down.device).split(1024):
        straight = (left[some] @ left.T).mul_(right[some] @ right.T)
        crossed = (left[some] @ right.T).mul_(right[some] @ left.T)
        gram += down[:, some] @ straight.add_(crossed).div_(2) @ down.T
    return gram


def _frobenius(gram: Float[Tensor, "out out"], u: Float[Tensor, "n out"]) -> Float[Tensor, " n"]:
    """Return the Frobenius norm of each direction's matrix, given the Gram matrix of the outputs'."""
    u = u.to(gram)
    return (u @ gram * u).sum(1).clamp(min=0).sqrt()


class _Search:
    """Readers, each excluded by a bound or decomposed, the most promising ones first."""

    def __init__(self, B: BilinearTensor, readers: Tensor, gram: Tensor, copy: Tensor, k: int, by: str):
        self.readers, self.gram, self.copy, self.k, self.by = readers, gram, copy, k, by
        self.frobenius = _frobenius(gram, readers)
        self.matrices = _Matrices(B, len(readers))
        self.score = torch.full((len(readers),), -torch.inf, dtype=readers.dtype, device=readers.device)
        self.values = readers.new_zeros(len(readers), 2)
        self.bound = self._of_schatten(self.frobenius, 2)

    def run(self) -> None:
        """Decompose until every other reader is bounded below the k-th best score."""
        screen = _Screen(self.matrices, self.gram)
        for squarings, exact in _STAGES:
            order = self.bound.argsort(descending=True)
            for part in order[self._may_matter(order)].split(screen.chunk):
                self._tighten(screen, part, squarings, exact)
            if self.score.isinf().all():  # what the others have to reach
                self._decompose_best(self.k)
        while self._decompose_best(max(4, self.k // 4)):
            pass

    def _of_schatten(self, norm: Tensor, p: int) -> Tensor:
        return norm if self.by == "spectral" else norm * 2 ** (1 - 1 / p)

    def _may_matter(self, part: Tensor) -> Tensor:
        floor = self.score[self.copy].topk(self.k).values[-1]
        return self.bound[part] * (1 + _GUARD) >= floor

    def _tighten(self, screen: "_Screen", part: Tensor, squarings: int, exact: bool) -> None:
        """Lower the bounds of some readers, each until it is excluded or squared that often."""
        screen.start(self.readers[part], self.frobenius[part], exact)
        for _ in range(squarings):
            norm, p = screen.square()
            self.bound[part] = torch.minimum(self.bound[part], self._of_schatten(norm, p))
            keep = self._may_matter(part)
            part = part[keep]
            if not len(part):
                return
            screen.keep(keep)

    def _decompose_best(self, count: int) -> bool:
        """Decompose the readers with the largest bounds, unless they cannot matter; say whether there were any."""
        order = self.bound.masked_fill(self.score.isfinite(), -torch.inf).argsort(descending=True)[:count]
        order = order[~self.score[order].isfinite() & self._may_matter(order)]
        if not len(order):
            return False
        done = 0
        for Q in self.matrices.chunks(self.readers[order], _SCREEN_BYTES):
            values = torch.linalg.eigvalsh(Q)
            strongest = values.abs().argsort(dim=1, descending=True, stable=True)[:, :2]
            some = order[done : done + len(Q)]
            self.values[some, : strongest.shape[1]] = values.gather(1, strongest)
            magnitudes = self.values[some].abs()
            self.score[some] = magnitudes[:, 0] if self.by == "spectral" else magnitudes.sum(1)
            done += len(Q)
        return True


class _Screen:
    """Schatten norms of interaction matrices from above, in low precision, by repeated squaring.

    `S_p(Q) ≤ S_p(X) + ‖Q - X‖_F` for the rounded matrix X, `S_p(X)² = S_{p/2}(X Xᵀ)`, and so on for the rounded
    product. Everything is scaled by powers of two to a norm near 1.
    """

    def __init__(self, matrices: "_Matrices", gram: Tensor):
        d, device = matrices.B.inp, gram.device
        self.matrices, self.dtype = matrices, screen_dtype(device)
        self.roundoff = torch.finfo(self.dtype).eps / 2
        self.sums = 4 * d**0.5 * 2.0**-24  # sums of d terms in float32, whose errors are at random
        self.chunk = max(16, d // 4)  # readers that share one pass over the cube
        self.X, self.Y = (torch.empty(self.chunk, d, d, dtype=self.dtype, device=device) for _ in range(2))
        self.wide = torch.empty(
            max(1, _SCREEN_BYTES // (16 * d * d)), d, d, device=device
        )  # for norms, a few at a time
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


def screen_dtype(device: torch.device) -> torch.dtype:
    """Return the fastest dtype whose products this device sums in float32."""
    native = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _directions(name: str, u: Float[Tensor, "*n out"], B: BilinearTensor) -> Float[Tensor, "rows out"]:
    """Return directions as rows, after a look at them and at the layer."""
    if u.shape[-1:] != (B.out,):
        raise ValueError(f"{name} must have {B.out} entries on its last axis (out), got shape {list(u.shape)}")
    if not u.numel():
        raise ValueError(f"{name} must hold at least one direction, got none")
    for what, tensor in ((name, u), ("B.down", B.down), ("B.left", B.left), ("B.right", B.right)):
        _check_finite(what, tensor)
    return u.reshape(-1, B.out)


def _check_finite(name: str, tensor: Tensor) -> None:
    if not tensor.isfinite().all():
        raise ValueError(f"{name} must be finite, got {int((~tensor.isfinite()).sum())} entries that are not")


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _bar(matrices: Iterator[Tensor], total: int, progress: bool) -> Iterator[Tensor]:
    """Pass matrices through a progress bar that counts them."""
    with tqdm(total=total, unit="matrix", disable=not progress) as bar:
        for Q in matrices:
            yield Q
            bar.update(len(Q))


# -- many interaction matrices ----------------------------------------------------------------------------------------


class _Matrices:
    """Interaction matrices of many output directions; from the cube where that is cheaper than from the factors."""

    def __init__(self, B: BilinearTensor, n: int):
        self.B, self.blocks = B, None
        self.stripes = [(i, min(i + max(32, B.inp // 16), B.inp)) for i in range(0, B.inp, max(32, B.inp // 16))]
        numbers = B.out * sum((stop - start) * (B.inp - start) for start, stop in self.stripes)
        if n * B.hidden > B.out * (n + B.hidden) and numbers * B.down.element_size() <= _CUBE_BYTES:
            self.blocks = [self._block(start, stop) for start, stop in self.stripes]

    def _block(self, start: int, stop: int) -> Float[Tensor, "out pairs"]:
        """Return rows `start:stop` of the symmetric cube, from column `start` on."""
        left, right, down = self.B.left, self.B.right, self.B.down / 2
        rows = max(1, 2**23 // (left[:, start:].numel() * left.element_size()))  # temporaries that the allocator keeps
        parts = []
        for i in range(start, stop, rows):
            some = slice(i, min(i + rows, stop))
            pairs = left[:, some, None] * right[:, None, start:]
            parts.append(down @ torch.addcmul(pairs, right[:, some, None], left[:, None, start:]).flatten(1))
        return torch.cat(parts, 1)

    def chunks(self, u: Float[Tensor, "n out"], size: int) -> Iterator[Float[Tensor, "some inp inp"]]:
        """Yield the matrices of the directions in order, about `size` bytes at a time; each valid until the next."""
        B, bytes_each = self.B, self.B.inp**2 * u.element_size()
        if self.blocks is None:
            yield from map(B.matrix, u.split(max(1, size // (2 * bytes_each + B.hidden * B.inp * u.element_size()))))
            return
        parts = u.split(max(B.inp // 8, size // bytes_each))  # enough for a pass over the cube to be worth it
        reused = None if _needs_grad(u, *self.blocks) else u.new_empty(len(parts[0]), B.inp, B.inp)
        for some in parts:
            X = u.new_empty(len(some), B.inp, B.inp) if reused is None else reused[: len(some)]
            yield self.unfold(X, (some @ block for block in self.blocks))

    def unfold(self, X: Float[Tensor, "n inp inp"], blocks: Iterator[Tensor]) -> Float[Tensor, "n inp inp"]:
        """Fill symmetric matrices from the blocks of their upper triangles."""
        for (start, stop), block in zip(self.stripes, blocks, strict=True):
            block = block.view(len(X), stop - start, -1)
            X[:, start:stop, start:] = block
            X[:, stop:, start:stop] = block[:, :, stop - start :].mT
        return X


class _Rounded:
    """Matrices in low precision, rounded from full precision, which loses least."""

    def __init__(self, matrices: _Matrices):
        self.matrices = matrices

    def fill(self, X: Float[Tensor, "n inp inp"], u: Float[Tensor, "n out"]) -> Float[Tensor, " n"]:
        """Write the matrices of some directions; bound the Frobenius norm of what was lost."""
        lost = []
        for Q in self.matrices.chunks(u.to(self.matrices.B.down.dtype), _SCREEN_BYTES):
            part = X[sum(map(len, lost)) :][: len(Q)].copy_(Q)
            lost.append(torch.linalg.vector_norm(Q.sub_(part), dim=(1, 2)).double())
        return torch.cat(lost) * (1 + 1e-4)


class _LowCube:
    """Matrices in low precision from a cube in low precision, `ũ C̃`, with the cube scaled to a largest number near 1.

    `‖u C - ũ C̃‖_F ≤ ‖(u - ũ) C‖_F + ‖ũ (C - C̃)‖_F`, each from a Gram matrix of size `out`.
    """

    def __init__(self, matrices: _Matrices, dtype: torch.dtype, gram: Float[Tensor, "out out"]):
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
        size = (1 + self.roundoff) * _frobenius(self.gram, low) + rounded  # of what is rounded in the end
        return _frobenius(self.gram, u - low) + rounded + self.sums * norm + self.roundoff * size
