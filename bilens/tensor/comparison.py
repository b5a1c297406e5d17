"""How similar two bilinear layers are as functions, whatever their hidden units are called."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from .bilinear import BilinearTensor
from .decompositions import Eigen

_ROWS = 1024  # hidden units of the first tensor at a time
_ROUNDING = 1e-5  # relative; what a second moment summed in float32 may be off by

Moments = tuple[Float[Tensor, "d d"], Float[Tensor, " d"]]


def similarity(
    A: BilinearTensor,
    B: BilinearTensor,
    second_moment: Float[Tensor, "d d"] | None = None,
    mean: Float[Tensor, " d"] | None = None,
) -> Float[Tensor, ""]:
    """Return the cosine of two layers as functions of Gaussian inputs, `⟨A,B⟩ / sqrt(⟨A,A⟩ ⟨B,B⟩)`.

    With `⟨A,B⟩ = E[A(x)·B(x)]`, see `gaussian_inner` (2605.15183, one layer, where it is exact). 1 if the layers are
    the same function up to a positive factor; not changed by permuting hidden units, by moving scale between their
    factors, by swapping left and right, or by rotating the output of both.

    Args:
        A: One layer.
        B: Another one with the same legs.
        second_moment: `E[x xᵀ]` of the inputs; the identity if `None`.
        mean: `E[x]` of the inputs; zero if `None`.

    Returns:
        A float64 number between -1 and 1. Cost three times that of `gaussian_inner`.

    Raises:
        ValueError: As `gaussian_inner`; or a layer that is zero on these inputs.
    """
    return similarity_matrix((A, B), second_moment, mean)[0, 1]


def similarity_matrix(
    tensors: Sequence[BilinearTensor],
    second_moment: Float[Tensor, "d d"] | None = None,
    mean: Float[Tensor, " d"] | None = None,
    *,
    progress: bool = False,
) -> Float[Tensor, "n n"]:
    """Return the `similarity` of every two of several layers: seeds, checkpoints, the layers of one model.

    Args:
        tensors: The layers, all with the same legs.
        second_moment: `E[x xᵀ]` of the inputs; the identity if `None`.
        mean: `E[x]` of the inputs; zero if `None`.
        progress: Whether to show a progress bar.

    Returns:
        A symmetric float64 matrix with ones on the diagonal, from `n (n + 1) / 2` inner products.

    Raises:
        ValueError: As `gaussian_inner`; no layer at all, or one that is zero on these inputs.
    """
    if not tensors:
        raise ValueError("tensors must hold at least one layer, got none")
    moments = _moments(tensors[0], second_moment, mean)
    pairs = [(i, j) for i in range(len(tensors)) for j in range(i, len(tensors))]
    inner = {(i, j): _inner(tensors[i], tensors[j], moments) for i, j in tqdm(pairs, unit="pair", disable=not progress)}
    sizes = torch.stack([inner[i, i] for i in range(len(tensors))])
    for i, size in enumerate(sizes.tolist()):
        if not size > 0:
            raise ValueError(f"tensors must not be zero on the inputs, but number {i} has E|y|² = {size:.3g}")
    rows = [torch.stack([inner[min(i, j), max(i, j)] for j in range(len(tensors))]) for i in range(len(tensors))]
    return torch.stack(rows) / (sizes[:, None] * sizes).sqrt()


def gaussian_inner(
    A: BilinearTensor,
    B: BilinearTensor,
    second_moment: Float[Tensor, "d d"] | None = None,
    mean: Float[Tensor, " d"] | None = None,
) -> Float[Tensor, ""]:
    """Return `E[A(x)·B(x)]` for Gaussian x, exactly and from the factors.

    With `S = E[x xᵀ]` and `μ = E[x]`, `E[x_i x_j x_k x_l] = S_ij S_kl + S_ik S_jl + S_il S_jk - 2 μ_i μ_j μ_k μ_l`,
    thus `Σ_gh (down'ᵀ down)_gh [(lSl')(rSr') + (lSr')(rSl') + (lSr)(l'Sr') - 2 (l·μ)(r·μ)(l'·μ)(r'·μ)]_gh`
    (2605.15183). For `S = 1`, `μ = 0` these are `2 ⟨A,B⟩_F` plus the products of the traces. A layer's constant leg
    extends the inputs to `(x, 1)`, so biases count as what they are; a layer without one has zeros there.

    Args:
        A: One layer.
        B: Another one with the same outputs and inputs.
        second_moment: `E[x xᵀ]` of the inputs, without the constant, e.g. `x.T @ x / len(x)` of activations; the
            identity if `None` (plus `μ μᵀ` if there is a mean).
        mean: `E[x]` of the inputs; zero if `None`.

    Returns:
        A float64 number, whatever the dtype of the factors. Cost `hidden · hidden' · (out + 4 d)` in float64, and
        memory for 1024 rows of `hidden · hidden'` at a time.

    Raises:
        ValueError: Legs that differ; a second moment that is misshapen, not finite, not symmetric, or not one that
            inputs with this mean can have.
    """
    return _inner(A, B, _moments(A, second_moment, mean))


def frobenius_similarity(A: BilinearTensor, B: BilinearTensor) -> Float[Tensor, ""]:
    """Return the cosine of the symmetric cubes, `⟨A,B⟩_F / (‖A‖_F ‖B‖_F)`, in float64 and without the cubes.

    Unlike `similarity` it takes no notice of the inputs, and none of the traces, which are most of a layer's mean
    output.

    Raises:
        ValueError: Legs that differ, or a layer that is zero.
    """
    _check_legs(A, B)
    A, B = (_homogeneous(one, A.constant or B.constant) for one in (A, B))
    norms = [one.norm() for one in (A, B)]
    for name, norm in zip("AB", norms, strict=True):
        if not norm > 0:
            raise ValueError(f"{name} must not be zero, got norm {norm.item():.3g}")
    return A.inner(B) / (norms[0] * norms[1])


def quadratic_form_similarity(a: Eigen, b: Eigen) -> Float[Tensor, "*n"]:
    """Return the cosine of two interaction matrices, `tr(P Q) / (‖P‖_F ‖Q‖_F)`, from their decompositions.

    `Σ_ij λ_i λ'_j (v_i·v'_j)² / (‖λ‖ ‖λ'‖)`: no matter how the eigenvectors of close eigenvalues are turned, and, for
    decompositions cut to k eigenvalues, the cosine of the matrices cut to those.

    Args:
        a: Decompositions of one direction or a batch `[n]`.
        b: As many others, or one for all.

    Raises:
        ValueError: Vectors of different widths, or a matrix that is zero.
    """
    if a.vectors.shape[-1] != b.vectors.shape[-1]:
        raise ValueError(f"b must have vectors of width {a.vectors.shape[-1]}, as a has, got {b.vectors.shape[-1]}")
    norms = [one.values.norm(dim=-1) for one in (a, b)]
    for name, norm in zip("ab", norms, strict=True):
        if (norm == 0).any():
            raise ValueError(f"{name} must have a non-zero eigenvalue in each decomposition, got only zeros in one")
    overlap = (a.vectors @ b.vectors.mT) ** 2
    inner = (a.values[..., None, :] @ overlap @ b.values[..., :, None])[..., 0, 0]
    return inner / (norms[0] * norms[1])


def _inner(A: BilinearTensor, B: BilinearTensor, moments: Moments) -> Float[Tensor, ""]:
    """Evaluate the formula of `gaussian_inner` with moments of the inputs extended by the constant."""
    _check_legs(A, B)
    A, B = _homogeneous(A, True), _homogeneous(B, True)
    S, mean = moments
    left, right = B.left @ S, B.right @ S
    total = (A.down @ _diagonal(A, S)) @ (B.down @ _diagonal(B, S)) - 2 * (_at(A, mean) @ _at(B, mean))
    for some in torch.arange(A.hidden, device=S.device).split(_ROWS):
        straight = (A.left[some] @ left.T) * (A.right[some] @ right.T)
        crossed = (A.left[some] @ right.T) * (A.right[some] @ left.T)
        total = total + ((A.down[:, some].T @ B.down) * (straight + crossed)).sum()
    return total


def _diagonal(B: BilinearTensor, S: Float[Tensor, "d d"]) -> Float[Tensor, " hidden"]:
    """Return `l_h S r_h`, the mean of each hidden unit."""
    return (B.left @ S * B.right).sum(1)


def _at(B: BilinearTensor, point: Float[Tensor, " d"]) -> Float[Tensor, " out"]:
    return B.down @ ((B.left @ point) * (B.right @ point))


def _homogeneous(B: BilinearTensor, constant: bool) -> BilinearTensor:
    """Return a tensor in float64, with a constant leg of zeros if there has to be one and was none."""
    B = B.to(torch.float64)
    if B.constant or not constant:
        return B
    left, right = (torch.nn.functional.pad(factor, (0, 1)) for factor in (B.left, B.right))
    return BilinearTensor(B.down, left, right, constant=True)


def _check_legs(A: BilinearTensor, B: BilinearTensor) -> None:
    (out, width), theirs = ((one.out, one.inp - one.constant) for one in (A, B))
    if theirs != (out, width):
        raise ValueError(f"B must have {out} outputs and {width} inputs, as A has, got {theirs[0]} and {theirs[1]}")


def _moments(B: BilinearTensor, second_moment: Tensor | None, mean: Tensor | None) -> Moments:
    """Check the moments of the inputs and return those of `(x, 1)`."""
    d = B.inp - B.constant
    mu = B.left.new_zeros(d).double() if mean is None else mean.double()
    if mu.shape != (d,) or not mu.isfinite().all():
        raise ValueError(f"mean must be finite and have shape [{d}], got {list(mu.shape)}")
    S = torch.eye(d).to(mu) + mu.outer(mu) if second_moment is None else second_moment.double()
    if S.shape != (d, d) or not S.isfinite().all():
        raise ValueError(f"second_moment must be finite and have shape [{d}, {d}], got {list(S.shape)}")
    if second_moment is not None:
        _check_covariance(S, mu)
    point = torch.cat((mu, mu.new_ones(1)))
    extended = point.outer(point)
    extended[:d, :d] = (S + S.T) / 2
    return extended, point


def _check_covariance(S: Float[Tensor, "d d"], mean: Float[Tensor, " d"]) -> None:
    """Refuse a second moment that no inputs with that mean have; rounding of sums in float32 passes."""
    largest = S.abs().max().item()
    asymmetry = (S - S.T).abs().max().item()
    if asymmetry > _ROUNDING * largest:
        raise ValueError(f"second_moment must be symmetric, got entries that differ by {asymmetry:.3g}")
    lowest = torch.linalg.eigvalsh((S + S.T) / 2 - mean.outer(mean))[0].item()
    if lowest < -_ROUNDING * largest * len(S):
        raise ValueError(f"second_moment - mean meanᵀ must be positive semidefinite, got an eigenvalue {lowest:.3g}")
