"""Factorisations of a whole layer into few parts, without a choice of output direction; each goes back to a layer."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from .bilinear import BilinearTensor
from .decompositions import Eigen, eigen
from .matrices import output_gram
from .records import Record
from .tables import number_of, sliced, taken

_SCALE = 1e6  # of the objective: torch's L-BFGS ignores curvature below 1e-10
_CHUNK = 10  # iterations between looks at the progress
_NOISE = 1e-3  # relative; what the first start is moved by


@dataclass(frozen=True, repr=False, eq=False)
class HOSVD(Record, rows="rank", unit="directions"):
    """The strongest output directions of a layer, `B ≈ Σ_i σ_i u_i ⊗ Q_i`, and the interaction matrix of each.

    `core` reads the layer along the directions: `core.matrix(e_i) = σ_i Q_i = Σ_o u_io B_o`, of Frobenius norm `σ_i`.
    Matrices of different directions are orthogonal.
    """

    directions: Float[Tensor, "rank out"]  # orthonormal rows, the largest entry of each positive
    singular: Float[Tensor, " rank"]  # float64, the largest first
    spectrum: Float[Tensor, " out"]  # all singular values
    core: BilinearTensor
    error: float  # ‖B - B_rank‖_F / ‖B‖_F

    @property
    def rank(self) -> int:
        """Number of directions kept."""
        return len(self.singular)

    def __getitem__(self, which: Any) -> Any:
        """Return the decomposition with some of its directions, and the error that these leave; or one row."""
        if isinstance(which := number_of(which), int):
            return super().__getitem__(which)
        cut = sliced(self, which)
        core = replace(self.core, down=taken(self.core.down, 0, which))
        left = 1 - (cut.singular.square().sum() / self.spectrum.square().sum()).item()
        return replace(cut, core=core, error=max(0.0, left) ** 0.5)

    def matrices(self) -> Float[Tensor, "rank inp inp"]:
        """Return the interaction matrices `σ_i Q_i`: `rank · inp²` numbers."""
        return self.core.dense()

    def eigen(self, k: int | None = None) -> Eigen:
        """Decompose each of the interaction matrices `σ_i Q_i`, as `bilens.eigen(B, directions, k)` does."""
        return eigen(self.core, torch.eye(self.rank).to(self.core.down), k)

    def __repr__(self) -> str:
        top = ", ".join(f"{value:.3g}" for value in self.singular[:4].tolist())
        return f"HOSVD(rank={self.rank} of {len(self.spectrum)}, error={self.error:.3g}; σ: {top} ...)"


@dataclass(frozen=True, repr=False, eq=False)
class CP(Record, tells=("rank", "error", "weights")):
    """A layer as few rank-one terms, `B ≈ Σ_r down_r ⊗ sym(left_r ⊗ right_r)`, the heaviest first.

    `left` and `right` have unit rows, the largest entry of each positive; the norms of `down`'s columns are the weights
    of the terms.
    """

    tensor: BilinearTensor  # hidden = rank
    cosine: float  # of the symmetrised cubes
    history: Float[Tensor, " looks"]  # cosine of the best start after every 10 steps
    steps: int
    converged: bool

    @property
    def rank(self) -> int:
        """Number of terms."""
        return self.tensor.hidden

    @property
    def error(self) -> float:
        """The relative error `‖B - B_rank‖_F / ‖B‖_F = sqrt(1 - cosine²)`, as scale is fitted exactly."""
        return max(0.0, 1 - self.cosine**2) ** 0.5

    @property
    def weights(self) -> Float[Tensor, " rank"]:
        """Norms of the terms' outputs, `‖down_r‖ ‖left_r‖ ‖right_r‖`."""
        return self.tensor.down.norm(dim=0)

    def squares(self) -> BilinearTensor:
        """Return the same tensor as a sum of squares, by `ab = ((a+b)² - (a-b)²) / 4`: left and right are equal.

        Term r becomes the hidden units 2r and 2r + 1, which read `a + b` and `a - b`; `rank` units if the terms are
        squares already.
        """
        B = self.tensor
        if torch.equal(B.left, B.right):
            return B
        factor = torch.stack((B.left + B.right, B.left - B.right), 1).flatten(0, 1)
        down = torch.stack((B.down / 4, -B.down / 4), 2).flatten(1)
        return BilinearTensor(down, factor, factor, B.constant)

    def __repr__(self) -> str:
        state = "converged" if self.converged else "not converged"
        return f"CP(rank={self.rank}, cosine={self.cosine:.4f}, {state} after {self.steps} steps)"


def recompose(
    parts: HOSVD | CP | Eigen, directions: Float[Tensor, "n out"] | None = None, *, constant: bool = False
) -> BilinearTensor:
    """Put the parts together again, as a layer like the one that was factorised.

    For eigenvectors, `B = Σ_n u_n⁺ ⊗ Σ_i λ_ni v_ni v_niᵀ` with the pseudo-inverse `u_n⁺` of the directions (2410.08417,
    appendix K), which is exact if the directions span the outputs and all eigenvalues are there.

    Args:
        parts: A factorisation, or the eigen decompositions of several output directions.
        directions: Those directions `[n, out]`; only for eigen decompositions.
        constant: Whether the last input leg is the constant 1; only for eigen decompositions, as the others know.

    Raises:
        ValueError: Directions missing, of another number than the decompositions, or given where they are known.
    """
    if isinstance(parts, Eigen):
        return _from_eigen(parts, directions, constant)
    if directions is not None or constant:
        raise ValueError(f"directions and constant must be left out for {type(parts).__name__}, which holds them")
    if isinstance(parts, CP):
        return parts.tensor
    return parts.core.project(out=parts.directions.T)


def _from_eigen(parts: Eigen, directions: Tensor | None, constant: bool) -> BilinearTensor:
    sizes = list(parts.values.shape)
    if len(sizes) != 2 or directions is None or directions.ndim != 2 or len(directions) != sizes[0]:
        got = "none" if directions is None else list(directions.shape)
        raise ValueError(f"directions must have shape [n, out] where values have [n, k], here {sizes}, got {got}")
    inverse = torch.linalg.pinv(directions.double()).to(parts.values.dtype)  # [out, n]
    down = (inverse[:, :, None] * parts.values).flatten(1)
    vectors = parts.vectors.flatten(0, 1)
    return BilinearTensor(down, vectors, vectors, constant)


# -- HOSVD ------------------------------------------------------------------------------------------------------------


def hosvd(B: BilinearTensor, rank: int) -> HOSVD:
    """Find the output directions in which a layer does most: the singular value decomposition of `[out, inp²]`.

    `B = Σ_i σ_i u_i ⊗ Q_i` (2410.08417, section 3.3 and appendix D), of the symmetrised tensor and from its Gram matrix
    `Σ_ij B_oij B_pij`, which the factors give without the cube. Truncated at `rank` it is the best approximation with
    so many output directions; those of close singular values are as arbitrary as eigenvectors of close eigenvalues.
    Weights alone decide: an input that never occurs counts like any other, and so does a constant leg.

    Args:
        B: The layer.
        rank: How many directions to keep.

    Returns:
        The directions, in the dtype of the layer but not below float32, with the singular values in float64 and the
        error of the truncation. Cost `hidden² (out + 4 inp)` and `out³` in float64, and memory for `1024 · hidden`
        numbers. As squares are decomposed, singular values below 1e-8 of the largest are lost in rounding.

    Raises:
        ValueError: `rank` exceeds `out`; factors that are not finite, or a layer that is zero.
    """
    _check(B, rank, B.out, f"out={B.out}")
    B = B.detach().to(torch.promote_types(B.down.dtype, torch.float32))
    squares, vectors = torch.linalg.eigh(_gram(B))
    squares, rows = squares.flip(0).clamp(min=0), vectors.T.flip(0)[:rank]
    directions = (rows * _signs(rows)).to(B.down.dtype)
    error = (squares[rank:].sum() / squares.sum()).sqrt().item()
    return HOSVD(directions, squares[:rank].sqrt(), squares.sqrt(), B.project(out=directions), error)


def _check(B: BilinearTensor, rank: int, most: int, why: str) -> None:
    if not 1 <= rank <= most:
        raise ValueError(f"rank must lie between 1 and {why}, got {rank}")
    for name in ("down", "left", "right"):
        if not getattr(B, name).isfinite().all():
            raise ValueError(f"B.{name} must be finite, got entries that are not")


def _gram(B: BilinearTensor) -> Float[Tensor, "out out"]:
    """Return the Gram matrix of the outputs, unless there is nothing to factorise."""
    gram = output_gram(B)
    if not gram.trace() > 0:
        raise ValueError(f"B must not be zero, got {B!r} with norm 0")
    return gram


def _signs(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n 1"]:
    """Return the sign of the largest entry of each row."""
    return torch.where(rows.gather(1, rows.abs().argmax(1, keepdim=True)) < 0, -1, 1).to(rows)


# -- CP ---------------------------------------------------------------------------------------------------------------


def cp(  # eight parameters: each of the last six is a choice of the fit, with a default
    B: BilinearTensor,
    rank: int,
    *,
    generator: torch.Generator,
    terms: Literal["products", "squares"] = "products",
    starts: int = 1,
    steps: int = 1000,
    tol: float = 1e-4,
    progress: bool = False,
) -> CP:
    """Fit a layer by few hidden units, `B ≈ Σ_r d_r ⊗ sym(a_r ⊗ b_r)`, by the cosine of the symmetrised cubes.

    The partially symmetric CP decomposition. Inner products come from Gram matrices: between terms
    `K_rs = ½ [(a_r·a_s)(b_r·b_s) + (a_r·b_s)(b_r·a_s)]`, with the layer
    `M_or = ½ Σ_h down_oh [(left_h·a_r)(right_h·b_r) + (left_h·b_r)(right_h·a_r)]`. The best outputs for given `a`, `b`
    are `d = M K⁻¹`, so that `cosine² = tr(M K⁻¹ Mᵀ) / ‖B‖²` depends on `a` and `b` alone (variable projection), and
    L-BFGS maximises it. Unlike HOSVD this is not convex: another start may end elsewhere, and no bound says how far
    from the best; as for any CP there may be none, while terms grow and all but cancel.

    Args:
        B: The layer.
        rank: How many terms.
        generator: Source of the random numbers.
        terms: `"products"` `sym(a ⊗ b)`, like a layer's hidden units; or `"squares"` `c ⊗ c`, which one CP of the
            symmetric cube finds, each half as expressive.
        starts: Fits from different points, of which the best is kept: the layer's heaviest hidden units, slightly
            perturbed, then random rows.
        steps: L-BFGS iterations of each start, at most.
        tol: A start has converged when 20 iterations change neither `cosine²` nor `1 - cosine²` by more than this
            fraction.
        progress: Whether to show a progress bar.

    Returns:
        The terms as a layer of `rank` hidden units, in its dtype but not below float32, with their cosine. It costs
        `hidden² (out + 4 inp)` once and about `12 · hidden · rank · (2 inp + out) + rank³` for each iteration, all in
        float64.

    Raises:
        ValueError: `rank` exceeds what makes the fit exact (`hidden` products, `2 hidden` squares); `terms`, `starts`,
            `steps` or `tol` out of range; factors that are not finite, or a layer that is zero.
    """
    if terms not in ("products", "squares"):
        raise ValueError(f"terms must be 'products' or 'squares', got {terms!r}")
    most = B.hidden if terms == "products" else 2 * B.hidden
    _check(B, rank, most, f"{'hidden' if terms == 'products' else '2 hidden'}={most}")
    for name, count in (("starts", starts), ("steps", steps)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if not 0 <= tol < 1:
        raise ValueError(f"tol must lie between 0 and 1, got {tol}")
    dtype, B = torch.promote_types(B.down.dtype, torch.float32), B.detach().to(torch.float64)
    square = _gram(B).trace().item()
    fits = []
    with tqdm(total=starts * steps, unit="step", disable=not progress) as bar:
        for start in range(starts):
            fits.append(_Fit(B, square, _start(B, rank, terms, start == 0, generator)))
            fits[-1].run(steps, tol, bar)
    return max(fits, key=lambda fit: fit.history[-1]).result(dtype)


def _symmetric(left: Tensor, right: Tensor, a: Tensor, b: Tensor) -> Float[Tensor, "hidden rank"]:
    """Return the inner products of `sym(left_h ⊗ right_h)` and `sym(a_r ⊗ b_r)`."""
    straight = (left @ a.T) * (right @ b.T)
    return straight if a is b else (straight + (left @ b.T) * (right @ a.T)) / 2


def _units(rows: list[Tensor]) -> tuple[Float[Tensor, "rank inp"], Float[Tensor, "rank inp"]]:
    """Return unit vectors a and b of the terms, one and the same for squares."""
    units = [torch.nn.functional.normalize(row, dim=1) for row in rows]
    return units[0], units[-1]


def _heaviest(B: BilinearTensor, rank: int, terms: str) -> list[Float[Tensor, "rank inp"]]:
    """Return the input rows of the layer's heaviest hidden units, for squares the sums and differences of a unit's."""
    weight = B.down.norm(dim=0) * B.left.norm(dim=1) * B.right.norm(dim=1)
    rows = [torch.nn.functional.normalize(factor, dim=1) for factor in (B.left, B.right)]
    if terms == "squares":
        rows = [torch.cat((rows[0] + rows[1], rows[0] - rows[1]))]
        weight = weight.repeat(2) * rows[0].square().sum(1)
    else:
        weight = weight * (1 + (rows[0] * rows[1]).sum(1) ** 2).sqrt()  # √2 ‖sym(a ⊗ b)‖
    best = weight.topk(rank).indices
    return [factor[best] for factor in rows]


def _start(
    B: BilinearTensor, rank: int, terms: str, first: bool, generator: torch.Generator
) -> list[Float[Tensor, "rank inp"]]:
    """Return where a fit starts: at the heaviest hidden units, moved a little so that no two coincide, or anywhere."""
    n = 1 if terms == "squares" else 2
    noise = torch.randn(n, rank, B.inp, generator=generator, device=generator.device).to(B.left)
    noise = torch.nn.functional.normalize(noise, dim=-1)
    if not first:
        return list(noise)
    return [row + _NOISE * some for row, some in zip(_heaviest(B, rank, terms), noise, strict=True)]


class _Fit:
    """One start of `cp`: input rows as parameters, the outputs solved for."""

    def __init__(self, B: BilinearTensor, square: float, rows: list[Float[Tensor, "rank inp"]]):
        self.B, self.square = B, square
        self.rows = [row.requires_grad_() for row in rows]
        self.history: list[float] = []
        self.steps, self.converged = 0, False

    @torch.enable_grad()
    def run(self, steps: int, tol: float, bar: tqdm) -> None:
        """Maximise the cosine until two chunks of iterations hardly change it, or nothing but rounding is left."""
        options = {"line_search_fn": "strong_wolfe", "tolerance_grad": 0, "tolerance_change": 0, "history_size": 20}
        optimizer = torch.optim.LBFGS(self.rows, max_iter=_CHUNK, max_eval=4 * _CHUNK, **options)
        losses = [self._loss().item()]
        while self.steps < steps and not self.converged:
            optimizer.param_groups[0]["max_iter"] = count = min(_CHUNK, steps - self.steps)
            optimizer.step(self._closure)
            losses.append(self._loss().item())
            self.steps += count
            self.history.append(max(0.0, 1 - losses[-1]) ** 0.5)
            bar.set_postfix(cosine=f"{self.history[-1]:.4f}")
            bar.update(count)
            stalled = len(losses) > 2 and losses[-3] - losses[-1] <= tol * min(losses[-3], 1 - losses[-3])
            self.converged = stalled or losses[-1] < 10 * _ridge(self.rows[0])

    def _closure(self) -> Float[Tensor, ""]:
        loss = _SCALE * self._loss()
        for row, gradient in zip(self.rows, torch.autograd.grad(loss, self.rows), strict=True):
            row.grad = gradient
        return loss

    def _loss(self) -> Float[Tensor, ""]:
        """Return `1 - cosine²` for the best outputs."""
        a, b = _units(self.rows)
        root = torch.linalg.cholesky(_symmetric(a, b, a, b) + _ridge(a) * torch.eye(len(a)).to(a))
        with_layer = self.B.down @ _symmetric(self.B.left, self.B.right, a, b)
        return 1 - torch.linalg.solve_triangular(root, with_layer.T, upper=False).square().sum() / self.square

    def result(self, dtype: torch.dtype) -> CP:
        """Return the terms, the heaviest first, and what they are worth in that dtype."""
        B = self.B
        a, b = _units([row.detach() for row in self.rows])
        terms = _symmetric(a, b, a, b) + _ridge(a) * torch.eye(len(a)).to(a)
        down = torch.linalg.solve(terms, (B.down @ _symmetric(B.left, B.right, a, b)).T).T
        order = down.norm(dim=0).argsort(descending=True)
        signs = [_signs(row) for row in (a, b)]
        down, a, b = down * (signs[0] * signs[1])[:, 0], a * signs[0], b * signs[1]
        fitted = BilinearTensor(down[:, order], a[order], b[order], B.constant).to(dtype)
        cosine = _cosine(B, self.square, fitted.to(torch.float64))
        return CP(fitted, cosine, torch.tensor(self.history, dtype=torch.float64), self.steps, self.converged)


def _ridge(rows: Float[Tensor, "rank inp"]) -> float:
    """Return what keeps the Gram matrix of unit terms invertible where two of them coincide."""
    return 10 * len(rows) * torch.finfo(rows.dtype).eps


def _cosine(B: BilinearTensor, square: float, fitted: BilinearTensor) -> float:
    """Return the cosine of a layer with a fit, given the layer's squared norm."""
    inner = (fitted.down * (B.down @ _symmetric(B.left, B.right, fitted.left, fitted.right))).sum()
    return (inner / (square**0.5 * fitted.norm())).item()
