"""Exact ranking of the pairwise interactions of a whole layer: streamed, certified, sharded.

Every coefficient is looked at once in low precision, where a matrix product is cheap (`screening`); a bound on the
rounding error says which ones could still be among the strongest (`candidates`, `search`); those are computed again in
float64 (`coefficients`).
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from .bilinear import BilinearTensor
from .coefficients import Coefficients
from .keeping import user_path
from .precision import SCREENS, fastest, product_rates
from .records import Record
from .scaled import Scaled
from .screening import run
from .search import Search, Wanted
from .sharding import check_group, gather, of_the_first, share, share_findings
from .state import State
from .tables import number_of, sliced

_COLUMNS = ("out", "left", "right", "value")
_ALL = 2**62  # as many as an index can count


@dataclass(frozen=True, repr=False)
class Certificate(Record):
    """What was done to make a ranking exact.

    `screened` coefficients were computed in `dtype`, chosen by `rates` unless it was asked for. Each is within `bound`
    of the exact value (the largest of the bounds of those that could matter, in the unit of the coefficients); the
    `verified` ones, whose bound reaches the k-th strongest, were computed again in float64 (in large layers in float32
    first, which leaves fewer). `error` is the largest difference to what was screened, which must not and did not
    exceed its bound.
    """

    screened: int
    verified: int
    bound: float
    error: float
    dtype: torch.dtype
    rates: dict[torch.dtype, float] | None = None  # measured products, in floating-point operations per second


@dataclass(frozen=True, repr=False, eq=False)
class Interactions(Record, rows="k", names={"out": "out", "left": "inp", "right": "inp"}, unit="pairs"):
    """Feature pairs and the coefficient of `z_left · z_right` in an output feature, strongest |value| first.

    It unpacks into its four columns, `out, left, right, value = found`; its rows are the pairs: `len(found)` of them,
    `found[:5]` the five strongest, `found[0]` the numbers of one. Beside them `certificate`, and `per_output`, the m
    strongest of each output feature one feature after the other, and `features`, the input features of each with the
    largest coefficient with any, where they were asked for; all stay through slices and `_replace`, and so do names:
    `found.named(lens.name)` has them beside the numbers of the features.
    """

    out: Int[Tensor, " k"]
    left: Int[Tensor, " k"]
    right: Int[Tensor, " k"]
    value: Float[Tensor, " k"]
    certificate: Certificate | None = None
    per_output: "Interactions | None" = None
    name: Callable[[str, int], str] | None = None  # of a feature, by its side and number
    features: Int[Tensor, "n_out most"] | None = None

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.out, self.left, self.right, self.value))

    def __getitem__(self, which: Any) -> "Interactions | tuple[int, int, int, float]":
        which = number_of(which)
        return tuple(part[which].item() for part in self) if isinstance(which, int) else sliced(self, which)

    def _replace(self, **changes) -> "Interactions":
        """Return a copy with other columns, as the method of a named tuple does."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, list[int] | list[float]]:
        """Return the columns by name, in numbers that JSON knows."""
        return {name: part.tolist() for name, part in zip(_COLUMNS, self, strict=True)}

    def __repr__(self) -> str:
        if not len(self):
            return "Interactions(0 pairs)"
        out, left, right, value = self[0]
        return f"Interactions({len(self)} pairs; first: {left} × {right} → {out}: {value:+.4g})"


@torch.no_grad()
def top_interactions(  # more parameters than elsewhere: six answer how it is run, and each stands alone
    B: BilinearTensor,
    k: int,
    out: Float[Tensor, "n_out out"] | None = None,
    inp: Float[Tensor, "n_in inp"] | None = None,
    *,
    per_output: int | None = None,
    features: int | None = None,
    exclude_self: bool = False,
    memory: int = 1 << 30,
    progress: bool = False,
    group: "dist.ProcessGroup | None" = None,
    checkpoint: str | os.PathLike | None = None,
    screen: torch.dtype | None = None,
) -> Interactions:
    """Find the k strongest coefficients over all output features and all unordered pairs of input features, exactly.

    The coefficient of `z_i z_j` in output feature o is `Q_ii` on the diagonal and `2 Q_ij` for `i < j`, where
    `Q = D · B.matrix(readers_o) · Dᵀ` and D holds the writers (2410.08417, section 3.1; its Figure 27 counts pairs the
    same way). Every coefficient is screened in low precision; all whose error bound reaches the k-th strongest are
    verified in float64. Ties, to float32 (for float64 inputs: to 40 bits), go to the smaller (out, left, right).

    The bound covers the rounding of both factors of each product and of its result in full, through norms measured on
    the rounded numbers themselves. Sums in float32 are granted an error of 4 sqrt(n) roundoffs for n terms (the
    probabilistic bound of Higham and Mary, 2019). Every verified coefficient is checked against its bound.

    Args:
        B: The layer, in the basis that `out` reads and `inp` writes.
        k: How many; all of them if there are fewer.
        out: Readers, one output feature per row; `None` for the output basis itself.
        inp: Writers, one input feature per row; `None` for the input basis itself.
        per_output: Find also the strongest `per_output` of each output feature: `.per_output` of the result.
        features: Find also so many input features of each output feature, those whose largest coefficient with any
            (and with themselves) is largest, as float32 tells them, ties by index: `.features` of the result.
        exclude_self: Leave out `i = j`.
        memory: Bytes that may be allocated beyond the arguments and the result.
        progress: Show a progress bar.
        group: Divide the output features over the ranks of this process group, which must all call with the same
            arguments. Every rank gets the same result, bit for bit that of one process.
        checkpoint: Folder to keep the state of the search in. A search that was killed goes on from there; the state of
            another search is refused.
        screen: Dtype to screen in. By default float32 or bfloat16, whichever the device multiplies faster, which is
            measured once. The result is the same.

    Returns:
        `out`, `left <= right`, `value`, with `certificate` (and `per_output`). If `B` has a constant leg, index `n_in`
        stands for it. Values are float64 for float64 inputs, else float32.

    Raises:
        ValueError: `k`, `per_output` or `features` below 1, a basis of another width, NaN or infinite weights,
            coefficients beyond float32 of weights that are not float64, `memory` too small, a process group that cannot
            hold the tensors, or a checkpoint of another search.
        RuntimeError: The device's products are less exact than the bound grants them.

    Cost: per output feature `n_in² · inp` floating-point operations in the screening dtype (half of each symmetric
    matrix), `2 n_in · inp²` for `A`, and its matrix. In float32 and from 64 output features on, the first `inp` input
    features, chosen by QR with pivots, are the basis (where no other is a sum of large multiples of them): the products
    are then among the others, `n_in - inp` of them for `n_in` in both terms.
    """
    _check(B, {"k": k, "per_output": per_output, "features": features}, out, inp, screen)
    device, rates = B.down.device, None
    if group is not None:
        check_group(group, device)
    if screen is None:
        rates = product_rates(device) if group is None else of_the_first(product_rates(device), group, device)
        screen = fastest(rates)
    layer = Scaled.of(B, out, inp, screen)
    chosen = None if features is None else layer.features.new_full((layer.n_out, min(features, layer.n_in)), -1)
    wanted = Wanted(min(k, _ALL), None if per_output is None else min(per_output, _ALL), exclude_self, features)
    search = Search(layer, Coefficients(B, out, inp, memory), wanted, features=chosen)
    shard = range(search.layer.n_out) if group is None else share(search.layer.n_out, group)
    state = None if checkpoint is None else State(user_path(checkpoint), search, shard, group)
    pools = run(search, shard, memory, progress, state)
    if group is not None:
        pools = {name: gather(pool, group) for name, pool in pools.items()}
        share_findings(search, group)
    found = {name: Interactions(*search.ranked(pool, name)) for name, pool in pools.items()}
    if not all(one.value.isfinite().all() for one in found.values()):
        raise ValueError("B must have coefficients within float32, or weights in float64, got some that overflow it")
    screened = search.layer.n_out * search.n_pairs
    certificate = Certificate(screened, **search.tally, dtype=screen, rates=rates)
    return replace(found["all"], certificate=certificate, per_output=found.get("each"), features=chosen)


def _check(
    B: BilinearTensor, counts: dict[str, int | None], out: Tensor | None, inp: Tensor | None, screen: torch.dtype | None
) -> None:
    """Refuse what would fail later and say less, or be ranked as if it were a number."""
    for name, number in counts.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    width = B.inp - B.constant
    for name, basis, rows, size in (("out", out, "n_out", B.out), ("inp", inp, "n_in", width)):
        if basis is not None and (basis.ndim != 2 or basis.shape[1] != size):
            raise ValueError(f"{name} must have shape [{rows}, {size}], got {list(basis.shape)}")
    tensors = {"B.down": B.down, "B.left": B.left, "B.right": B.right, "out": out, "inp": inp}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in tensors.items():
        if tensor.device != B.down.device:
            raise ValueError(f"{name} must be on the device of B.down, {B.down.device}, but is on {tensor.device}")
        bad = ~tensor.isfinite().all(1)
        if bad.any():
            raise ValueError(f"{name} must be finite, but its row {bad.nonzero()[0].item()} is NaN or infinite")
    if screen is not None and screen not in SCREENS:
        raise ValueError(f"screen must be torch.bfloat16 or torch.float32, got {screen}")
