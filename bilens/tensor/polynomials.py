"""Is this module exactly quadratic in its input? The degree of a black box, and its tensor if it has one."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .bilinear import BilinearTensor
from .records import Record

Function = nn.Module | Callable[[Tensor], Tensor]

_NODES = 32  # Chebyshev points on each line; a degree above 31 folds back onto lower ones, and is still seen
_ROWS = 4096  # inputs per call
_ROUNDING = 1e-12  # eigenvalues below this, relative to the largest, are rounding


@dataclass(frozen=True, repr=False)
class Degree(Record, tells=("residual",)):
    """The polynomial degree of a function, as far as random lines tell.

    `residuals[k]` is what the best polynomial of degree k leaves, relative to the function (both as root mean square in
    Chebyshev coefficients along a line): the largest over lines and outputs. `degree` is the smallest whose residual is
    below `tolerance`, `None` if there is none.
    """

    degree: int | None
    residuals: tuple[float, ...]
    tolerance: float
    scaling: float | None  # n if f(2x) = 2^n f(x) for all that was tried, as 0 for what a norm leaves

    @property
    def residual(self) -> float:
        """What the polynomial of the degree found leaves; of the highest degree tried, if none fits."""
        return self.residuals[-1 if self.degree is None else self.degree]

    def __repr__(self) -> str:
        if self.degree is None:
            return f"Degree(None: degree {len(self.residuals) - 1} leaves {self.residual:.1e})"
        below = f", degree {self.degree - 1} leaves {self.residuals[self.degree - 1]:.1e}" if self.degree else ""
        return f"Degree({self.degree}, residual {self.residual:.1e}{below})"


@dataclass(frozen=True, eq=False)
class _Box:
    """A function on float64 `[..., inp]`, whose results are checked, and where to try it."""

    f: Callable[[Tensor], Tensor]
    width: int
    device: torch.device
    inputs: Tensor | None
    out: Tensor | None = None

    @classmethod
    def of(cls, f: Function, inp: int | Tensor | None) -> "_Box":
        """Make one of a module, which is copied, or a function."""
        width, device = _width(f, inp), _device(f, inp)
        made = copy.deepcopy(f).double().eval() if isinstance(f, nn.Module) else f
        return cls(made, width, device, inp.to(torch.float64) if isinstance(inp, Tensor) else None)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.width).split(_ROWS)
        y = torch.cat([_checked(self.f(some), len(some)) for some in rows]).unflatten(0, x.shape[:-1])
        if self.out is None:
            return y
        if self.out.ndim != 2 or self.out.shape[1] != y.shape[-1]:
            raise ValueError(f"out must have shape [n, {y.shape[-1]}], got {list(self.out.shape)}")
        return y @ self.out.to(y).T

    def ends(self, lines: int, scale: int | float, generator: torch.Generator | None) -> Float[Tensor, "2 line inp"]:
        """Return two points on each line."""
        where = {"generator": generator, "device": "cpu" if generator is None else generator.device}
        if self.inputs is None:
            return (scale * torch.randn(2, lines, self.width, dtype=torch.float64, **where)).to(self.device)
        n = len(self.inputs)
        first = torch.randint(n, (lines,), **where)
        second = (first + torch.randint(1, n, (lines,), **where)) % n
        return self.inputs[torch.stack((first, second)).to(self.device)]


@torch.no_grad()
def degree(
    f: Function,
    inp: int | Float[Tensor, "n inp"] | None = None,
    *,
    max_degree: int = 6,
    lines: int = 16,
    scale: int | float = 1.0,
    tolerance: float = 1e-9,
    generator: torch.Generator | None = None,
) -> Degree:
    """Find the polynomial degree of a module or function, by interpolation along random lines in float64.

    Along a line `f(a + t b)` has the degree that f has, for almost all a and b. Its Chebyshev coefficients on
    `-1 <= t <= 1` end there; those of a gate, an activation or a norm do not end. (All of 2305.03452 rests on a layer
    being of degree two.) What f does away from the lines stays unseen: give real inputs, or a larger
    `scale`, where a function may be clipped or switched.

    Cost: `32 · lines` rows through f.

    Args:
        f: Maps `[n, inp]` to `[n, out]`, each row by itself. A module is copied, the copy put into float64 and
            evaluation mode; a function must compute in float64.
        inp: Width of the input, or inputs `[n, inp]` through two of which each line goes. `None`: that of the module's
            first linear layer.
        max_degree: Highest degree to try, at most 30.
        lines: How many.
        scale: Standard deviation of the random points; 1 is what a norm gives.
        tolerance: Relative residual that counts as rounding.
        generator: Source of randomness; torch's default one if `None`.

    Raises:
        ValueError: No width, a `max_degree` out of range, or a function that does not return finite float64 `[n, out]`.
    """
    if not 0 <= max_degree < _NODES - 1:
        raise ValueError(f"max_degree must lie between 0 and {_NODES - 2}, got {max_degree}")
    if lines < 1:
        raise ValueError(f"lines must be at least 1, got {lines}")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be positive, got {scale}")
    box = _Box.of(f, inp)
    first, second = box.ends(lines, scale, generator)
    angles = (torch.arange(_NODES, dtype=torch.float64, device=first.device) + 0.5) * (torch.pi / _NODES)
    t = angles.cos()[:, None, None]
    values = box(((1 + t) * first + (1 - t) * second) / 2)  # node line out
    orders = torch.arange(_NODES, device=first.device)
    chebyshev = (orders[:, None] * angles).cos() * (2.0 - (orders == 0).double())[:, None] / _NODES
    energy = (chebyshev @ values.flatten(1)).unflatten(1, values.shape[1:]).square()
    left = energy.flip(0).cumsum(0).flip(0).sqrt()  # what orders >= k carry
    whole = left[0] + left[0].square().mean(-1, keepdim=True).sqrt() * 1e-6  # an output that is zero is no remainder
    share = (left / whole.clamp(min=torch.finfo(whole.dtype).tiny)).flatten(1).amax(1)
    residuals = tuple(share[1 : max_degree + 2].tolist())
    found = next((k for k, residual in enumerate(residuals) if residual <= tolerance), None)
    return Degree(found, residuals, tolerance, _scaling(box, first))


def check_quadratic(
    f: Function,
    inp: int | Float[Tensor, "n inp"] | None = None,
    *,
    lines: int = 16,
    scale: int | float = 1.0,
    tolerance: float = 1e-9,
    generator: torch.Generator | None = None,
) -> Degree:
    """Check that a module or function is a polynomial of degree two at most in its input, and return what was found.

    A bilinear layer, with or without biases, passes. What does not: a gate or an activation that is not the identity; a
    norm left in; the cubic `(Lx) ⊙ x ⊙ (Rx)` that an annealed gate can turn into. Linear and constant maps are special
    quadratic ones and pass: look at `.degree` to tell them apart.

    Args:
        f: As for `degree`.
        inp: As for `degree`.
        lines: As for `degree`.
        scale: As for `degree`.
        tolerance: As for `degree`.
        generator: As for `degree`.

    Raises:
        ValueError: It is not quadratic; the message has the residual, and what it looks like instead.
    """
    found = degree(f, inp, lines=lines, scale=scale, tolerance=tolerance, generator=generator)
    if found.degree is None or found.degree > 2:
        raise ValueError(
            f"f must be quadratic in its input, but {_suspect(found)}: the best quadratic function misses "
            f"{found.residuals[2]:.1e} of it, and {tolerance:.0e} is allowed"
        )
    return found


@torch.no_grad()
def recover_tensor(
    f: Function,
    inp: int | Float[Tensor, "n inp"] | None = None,
    *,
    out: Float[Tensor, "n_out out"] | None = None,
    scale: int | float = 1.0,
    tolerance: float = 1e-9,
    generator: torch.Generator | None = None,
) -> BilinearTensor:
    """Recover the tensor of a black box that is quadratic, its linear and constant part included, by polarisation.

    `B[:,i,j] = (f(e_i + e_j) - f(e_i) - f(e_j) + f(0)) / 2` off the diagonal, `(f(e_i) + f(-e_i)) / 2 - f(0)` on it,
    linear part `(f(e_i) - f(-e_i)) / 2` and constant `f(0)` in the constant leg, if there are any. The hidden
    units of what is returned are the eigenvectors of each output's matrix (2410.08417, section 3.2), in float64.

    Cost: `inp² / 2` rows through f, and `n_out · inp²` numbers: a black box has no factors to start from. Read a wide
    one a few directions at a time.

    Args:
        f: As for `degree`.
        inp: As for `degree`.
        out: Directions of the output to recover; `None` for all outputs.
        scale: As for `degree`, and the length of the steps.
        tolerance: As for `degree`; also how far the tensor may be from f at random inputs.
        generator: As for `degree`.

    Raises:
        ValueError: f is not quadratic, or `out` has another width than its output.
    """
    check_quadratic(f, inp, scale=scale, tolerance=tolerance, generator=generator)
    box = replace(_Box.of(f, inp), out=out)
    points, _ = box.ends(16, scale, generator)
    tensor = _from_matrices(_polarise(box, points, scale))
    actual = box(points)
    miss = ((tensor.apply(points) - actual).norm() / actual.norm().clamp(min=torch.finfo(actual.dtype).tiny)).item()
    if miss > 1e3 * tolerance:  # the differences above amplify rounding
        raise ValueError(
            f"f must be quadratic in its input: it is along random lines, but the tensor read off at unit vectors "
            f"misses {miss:.1e} of it at random inputs"
        )
    return tensor


def _polarise(f: _Box, like: Tensor, step: int | float) -> Float[Tensor, "out leg leg"]:
    """Return the symmetric matrices of a quadratic function in homogeneous coordinates `(x, 1)`."""
    n = like.shape[1]
    unit = step * torch.eye(n, dtype=like.dtype, device=like.device)
    zero = f(torch.zeros_like(unit[:1]))[0]
    plus, minus = f(unit), f(-unit)
    matrices = like.new_zeros(len(zero), n + 1, n + 1)
    matrices[:, -1, -1] = zero
    matrices[:, :n, -1] = matrices[:, -1, :n] = ((plus - minus) / (4 * step)).T
    own = torch.arange(n, device=like.device)
    matrices[:, own, own] = ((plus + minus) / 2 - zero).T / step**2
    rows, columns = torch.triu_indices(n, n, 1, device=like.device)
    for i, j in zip(rows.split(_ROWS), columns.split(_ROWS), strict=True):
        mixed = (f(unit[i] + unit[j]) - plus[i] - plus[j] + zero).T / (2 * step**2)
        matrices[:, i, j] = matrices[:, j, i] = mixed
    return matrices


def _from_matrices(matrices: Float[Tensor, "out leg leg"]) -> BilinearTensor:
    """Factor homogeneous matrices by their eigenvectors; without linear and constant part there is no constant leg."""
    size = matrices.abs().amax()
    constant = bool(matrices[:, -1].abs().amax() > _ROUNDING * size)
    matrices = matrices if constant else matrices[:, :-1, :-1]
    values, vectors = torch.linalg.eigh(matrices)
    output, index = (values.abs() > _ROUNDING * values.abs().amax()).nonzero(as_tuple=True)
    rows = vectors.mT[output, index]
    down = values.new_zeros(len(matrices), len(output))
    down[output, torch.arange(len(output), device=down.device)] = values[output, index]
    return BilinearTensor(down, rows, rows, constant=constant)


def _suspect(found: Degree) -> str:
    """Say what a function that is not quadratic looks like."""
    if found.degree is not None:
        return f"is a polynomial of degree {found.degree}"
    if found.scaling == 0:
        return "does not depend on the length of its input, so a norm is left in"
    if found.scaling is not None:
        return (
            f"is no polynomial although f(2x) = {2**found.scaling:g} f(x), so a gate or activation like ReLU is left in"
        )
    return f"is no polynomial of degree up to {len(found.residuals) - 1}, so a gate, an activation or a norm is left in"


def _scaling(f: _Box, x: Tensor) -> float | None:
    """Return n if `f(2x) = 2^n f(x)`, with room for the epsilon of a norm."""
    once, twice = f(x), f(2 * x)
    size = once.norm()
    if size == 0:
        return None
    n = round(math.log2(max((twice.norm() / size).item(), 2.0**-64)))
    return float(n) if (twice - 2.0**n * once).norm() <= 1e-4 * twice.norm() else None


def _checked(y: Tensor, n: int) -> Tensor:
    if not isinstance(y, Tensor) or y.ndim != 2 or len(y) != n:
        got = f"shape {list(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"f must map [n, inp] to [n, out], here n = {n}, got {got}")
    if y.dtype != torch.float64:
        raise ValueError(f"f must compute in float64, or rounding hides what is looked for, got {y.dtype}")
    if not y.isfinite().all():
        raise ValueError("f must be finite at finite inputs, got NaN or infinity")
    return y


def _width(f: Function, inp: int | Tensor | None) -> int:
    if isinstance(inp, Tensor):
        if inp.ndim != 2 or len(inp) < 2:
            raise ValueError(f"inp must be at least two inputs [n, inp], got shape {list(inp.shape)}")
        return inp.shape[1]
    if inp is None and isinstance(f, nn.Module):
        inp = next((part.in_features for part in f.modules() if isinstance(part, nn.Linear)), None)
    if inp is None:
        raise ValueError("inp must give the width of the input, as f is no module with a linear layer to take it from")
    if inp < 1:
        raise ValueError(f"inp must be at least 1, got {inp}")
    return inp


def _device(f: Function, inp: int | Tensor | None) -> torch.device:
    if isinstance(inp, Tensor):
        return inp.device
    weight = next(f.parameters(), None) if isinstance(f, nn.Module) else None
    return torch.device("cpu") if weight is None else weight.device
