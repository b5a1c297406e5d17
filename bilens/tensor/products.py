"""Exact ranking of the entries of products of thin matrices: the pairs of features that a head's scores or values join.

The entries of `L Rᵀ`, a few hundred wide, are cheap beside the interactions of a whole layer, and most of the time goes
into looking at them. So all are screened in float32, each row with a bound on its rounding; those whose bound reaches
the k-th strongest are computed again in float64, by the same reckoning as that of `top_interactions` (`search`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .candidates import Pool
from .forms import BilinearForm
from .interactions import Certificate, Interactions
from .precision import product_roundoff
from .search import Search, Wanted

_TILE = 1 << 22  # entries that are screened at once
_UNDERFLOW = 2.0**-100  # what may be lost below the smallest float32, beside factors whose largest entry is about 1


@dataclass(frozen=True, eq=False)
class Entries:
    """Matrices that are given in factors, `forms[o]` between two bases each; an entry is a product over the branches.

    Entry (o, i, j) is `Π_b forms[o][b](query_i, key_j)`.
    """

    forms: Sequence[Sequence[BilinearForm]]
    query: Float[Tensor, "n_query a"] | None
    key: Float[Tensor, "n_key b"] | None
    cosine: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """Numbers of matrices, of their rows and of their columns, the constants included."""
        first = self.forms[0][0]
        sizes = (
            size if basis is None else len(basis) + first.constant
            for basis, size in zip((self.query, self.key), first.shape, strict=True)
        )
        return len(self.forms), *sizes

    @property
    def wide(self) -> bool:
        """Whether any argument is in float64."""
        given = (self.query, self.key, *(form.query for forms in self.forms for form in forms))
        return torch.float64 in {one.dtype for one in given if one is not None}

    def legs(self, out: int, side: str, rows: Int[Tensor, " row"] | None = None) -> list[Float[Tensor, "row hidden"]]:
        """Return one factor of each branch of a matrix in its basis, in float64: some of its rows, or all."""
        basis, legs = getattr(self, side), []
        for form in self.forms[out]:
            factor = getattr(form, side).double()
            leg = factor.T if basis is None else _rows(basis, factor, form.constant, rows)
            leg = leg if rows is None or basis is not None else leg[rows]
            legs.append(torch.nn.functional.normalize(leg, dim=1, eps=1e-300) if self.cosine else leg)
        return legs

    def __call__(
        self, out: Int[Tensor, " n"], left: Int[Tensor, " n"], right: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """Compute entries in float64."""
        values = torch.empty(len(out), dtype=torch.float64, device=out.device)
        for o in out.unique().tolist():
            mine = (out == o).nonzero()[:, 0]
            sides = []
            for side, index in (("query", left[mine]), ("key", right[mine])):
                rows, where = index.unique(return_inverse=True)
                sides.append([leg[where] for leg in self.legs(o, side, rows)])
            products = [(a * b).sum(1) for a, b in zip(*sides, strict=True)]
            values[mine] = torch.stack(products).prod(0)
        return values


def _rows(basis: Tensor, factor: Tensor, constant: bool, rows: Tensor | None) -> Tensor:
    """Write rows of a basis, and the constant as one more of them, in a head's own dimensions."""
    n, width = len(basis), factor.shape[1] - constant
    if rows is None:
        rows = torch.arange(n + constant, device=basis.device)
    leg = basis[rows.clamp(max=n - 1)].double() @ factor[:, :width].T
    return torch.where((rows == n)[:, None], factor[:, -1], leg) if constant else leg


@dataclass(frozen=True)
class _Screen:
    """What the reckoning of a ranking asks of what is screened: here sizes are magnitudes, in the entries' own unit."""

    n_in: int
    device: torch.device
    dtype: torch.dtype = torch.float32
    exponent: int = -1


@torch.no_grad()
def top_entries(
    forms: Sequence[Sequence[BilinearForm]],
    k: int,
    query: Float[Tensor, "n_query a"] | None = None,
    key: Float[Tensor, "n_key b"] | None = None,
    cosine: bool = False,
) -> Interactions:
    """Find the k strongest entries of matrices in factors, exactly: `Π_b forms[o][b](query_i, key_j)` over all o, i, j.

    Every entry is screened in float32, with the bound on sums that `top_interactions` grants; all that may be among the
    k strongest are verified in float64. Ties, to float32 (for float64 inputs: to 40 bits), go to the smaller (out,
    left, right).

    Args:
        forms: For each matrix, the forms whose values are multiplied: one, or the branches of a head.
        k: How many; all of them if there are fewer.
        query: One row per feature, written in the forms' query leg; `None` for that leg itself.
        key: The same for the key leg.
        cosine: Take the cosine of the two features in the head instead of their product.

    Returns:
        `out` (which matrix), `left` (query feature), `right` (key feature) and `value`, with `certificate`. Where the
        forms have a constant leg, the index after the last feature stands for it. Values are float64 for float64
        inputs, else float32.

    Raises:
        ValueError: No form, forms of different legs, `k` below 1, a basis of another width, NaN or infinite numbers.
        RuntimeError: The device's products are less exact than the bound grants them.

    Cost: `n_query · n_key · hidden` multiplications for each matrix and branch.
    """
    _check(forms, k, query, key)
    entries = Entries(forms, query, key, cosine)
    n_out, n_left, n_right = entries.shape
    search = Search(_Screen(max(n_left, n_right), forms[0][0].query.device), entries, Wanted(k, None, False))
    pool = search.pools()["all"]
    for out in range(n_out if n_left and n_right else 0):
        pool = _Matrix(search, out).screen(pool)
    found = Interactions(*search.ranked(pool, "all"))
    certificate = Certificate(n_out * n_left * n_right, **search.tally, dtype=torch.float32)
    return replace(found, certificate=certificate)


class _Matrix:
    """One matrix, as it is screened: factors scaled by powers of two, and a bound for each row."""

    def __init__(self, search: Search, out: int):
        entries = search.coefficients
        self.search, self.out = search, out
        scaled = [[_scaled(leg) for leg in entries.legs(out, side)] for side in ("query", "key")]
        self.left, self.right = ([leg for leg, _ in side] for side in scaled)
        self.unit = 2.0 ** sum(exponent for side in scaled for _, exponent in side)
        self.size, self.slack = self._bounds()

    def _bounds(self) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Bound the entries of each row, and how far off they are as screened.

        Of one branch, `|l·r - fl(l̃·r̃)| ≤ (2 + 4 sqrt(w)) u |l| |r|` for w terms: both factors are rounded, and a sum is
        granted `4 sqrt(w)` roundoffs (Higham and Mary, 2019). Of a product, `Π(s + e) - Π s` and a rounding for each.
        """
        u, size, upper = product_roundoff(), 1.0, 1.0
        for left, right in zip(self.left, self.right, strict=True):
            norm = (
                torch.linalg.vector_norm(left.double(), dim=1) * torch.linalg.vector_norm(right.double(), dim=1).max()
            )
            norm = norm * (1 + 1e-6)  # of the factors before they were rounded
            upper = upper * norm * (1 + (2 + 4 * left.shape[1] ** 0.5) * u)
            size = size * norm
        slack = (upper - size) * (1 + 1e-6) + (len(self.left) - 1) * u * upper
        return upper, slack + _UNDERFLOW

    def screen(self, pool: Pool) -> Pool:
        """Add to a pool those entries that may be among the strongest."""
        n_right, k = len(self.right[0]), self.search.wanted.k
        limit = len(pool) + 4 * k + (1 << 14)
        for rows in torch.arange(len(self.left[0]), device=self.size.device).split(max(1, _TILE // n_right)):
            floor = pool.floor(k)
            if (self.size[rows] * self.unit < floor).all():
                continue
            S = self._tile(rows)
            if floor.isneginf():  # nothing to compare with yet
                floor = self._first_floor(S, rows)
            pool = pool + self._candidates(S, rows, floor)
            if len(pool) > limit:
                pool = self.search.strongest(pool, "all", 4 * k + (1 << 14))
                limit = len(pool) + 4 * k + (1 << 14)
        return pool

    def _tile(self, rows: Tensor) -> Float[Tensor, "row n_right"]:
        S = self.left[0][rows] @ self.right[0].T
        for left, right in zip(self.left[1:], self.right[1:], strict=True):
            S *= left[rows] @ right.T
        return S.abs_()

    def _first_floor(self, S: Tensor, rows: Tensor) -> Tensor:
        """Return what the k-th strongest of a tile alone surely reaches."""
        k = self.search.wanted.k
        if S.numel() < k:
            return self.slack.new_tensor(-torch.inf)
        return (S.flatten().topk(k).values[-1].double() - self.slack[rows].max()) * self.unit

    def _candidates(self, S: Tensor, rows: Tensor, floor: Tensor) -> Pool:
        slack = self.slack[rows]
        least = floor / self.unit - slack  # of each row, as screened; one float32 lower, as it is rounded to that
        hit = (S.amax(1).double() >= least).nonzero()[:, 0]
        row, column = (S[hit] >= (least[hit] - least[hit].abs() * 1e-6).float()[:, None]).nonzero(as_tuple=True)
        row = hit[row]
        out = torch.full_like(row, self.out)
        sure = torch.zeros_like(row, dtype=torch.uint8)
        return Pool(out, rows[row], column, S[row, column].double() * self.unit, slack[row] * self.unit, sure)


def _scaled(leg: Float[Tensor, "row hidden"]) -> tuple[Float[Tensor, "row hidden"], int]:
    """Return a leg in float32, divided by a power of two so that its largest entry is about 1, and the exponent."""
    largest = leg.abs().max()
    exponent = int(torch.frexp(largest).exponent) if largest > 0 else 0
    return torch.ldexp(leg, torch.tensor(-exponent, device=leg.device)).float(), exponent


def _check(forms: Sequence[Sequence[BilinearForm]], k: int, query: Tensor | None, key: Tensor | None) -> None:
    """Refuse what would fail later and say less, or be ranked as if it were a number."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if not forms or not all(forms):
        raise ValueError(f"forms must hold at least one form for each matrix, got {[len(some) for some in forms]}")
    first = forms[0][0]
    for form in (form for some in forms for form in some):
        if (form.shape, form.constant) != (first.shape, first.constant):
            raise ValueError(f"forms must have the same legs, got {first!r} and {form!r}")
        for name in ("query", "key"):
            if not getattr(form, name).isfinite().all():
                raise ValueError(
                    f"forms must be finite, but the {name} factor of {form!r} holds NaN or infinite numbers"
                )
    for name, basis, size in (("query", query, first.shape[0]), ("key", key, first.shape[1])):
        if basis is None:
            continue
        if basis.ndim != 2 or basis.shape[1] != size - first.constant:
            raise ValueError(f"{name} must have shape [n, {size - first.constant}], got {list(basis.shape)}")
        bad = ~basis.isfinite().all(1)
        if bad.any():
            raise ValueError(f"{name} must be finite, but its row {bad.nonzero()[0].item()} is NaN or infinite")
