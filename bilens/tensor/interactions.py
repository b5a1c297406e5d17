"""Exact ranking of the pairwise interactions of a whole layer: streamed, certified, sharded.

Every coefficient is looked at once in low precision, where a matrix product is cheap; a bound on the rounding error
says which ones could still be among the strongest; those are computed again in float64. Notation of the code: for one
output feature, `M` is the interaction matrix in the residual basis, `D` the writers, `A = D M`, and `S = |A Dᵀ|` is
half the magnitude of each coefficient.
"""

import hashlib
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from .bilinear import BilinearTensor, with_constant
from .precision import screen_dtype

SAVE_EVERY = 1.0  # seconds between two checkpoints
_SHAPES = 24  # tiles of so many widths at most
_SCRATCH = 3 << 24  # bytes that the libraries take for themselves: buffers, 0.7 MB of kernel for each shape
_FLOAT32_ROUNDOFF = 2.0**-24
_UNDERFLOW = 2.0**-100  # what may be lost below the smallest numbers, beside a largest of about 1
_TIE = 1 - 2.0**-20  # coefficients closer than this may tie, and then the index decides
_WIDTHS = 32  # matrix products in bfloat16 want legs that are a multiple of this


@dataclass(frozen=True)
class Certificate:
    """What was done to make a ranking exact.

    `screened` coefficients were computed in `dtype`. Each is within `bound` of the exact value (the largest of the
    bounds of those that could matter, in the unit of the coefficients); the `verified` ones, whose bound reaches the
    k-th strongest, were computed again in float64 (in large layers in float32 first, which leaves fewer). `error` is
    the largest difference to what was screened, which must not and did not exceed its bound.
    """

    screened: int
    verified: int
    bound: float
    error: float
    dtype: torch.dtype


class _Pairs(NamedTuple):
    out: Int[Tensor, " k"]
    left: Int[Tensor, " k"]
    right: Int[Tensor, " k"]
    value: Float[Tensor, " k"]


class Interactions(_Pairs):
    """Feature pairs and the coefficient of `z_left · z_right` in an output feature, strongest |value| first.

    A tuple `(out, left, right, value)` of tensors `[k]`. Two attributes beside it: `certificate`, and `per_output`, the
    m strongest of each output feature one feature after the other, where they were asked for.
    """

    certificate: Certificate | None = None
    per_output: "Interactions | None" = None

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
    *,
    per_output: int | None = None,
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
        exclude_self: Leave out `i = j`.
        memory: Bytes that may be allocated beyond the arguments and the result.
        progress: Show a progress bar.
        group: Divide the output features over the ranks of this process group, which must all call with the same
            arguments. Every rank gets the same result, bit for bit that of one process.
        checkpoint: Folder to keep the state of the search in. A search that was killed goes on from there; the state of
            another search is refused.
        screen: Dtype to screen in. By default bfloat16 where the device multiplies it natively, else float32.

    Returns:
        `out`, `left <= right`, `value`, with `certificate` (and `per_output`). If `B` has a constant leg, index `n_in`
        stands for it. Values are float64 for float64 inputs, else float32.

    Raises:
        ValueError: `k` or `per_output` below 1, a basis of another width, NaN or infinite weights, `memory` too small,
            a process group that cannot hold the tensors, or a checkpoint of another search.
        RuntimeError: The device's products are less exact than the bound grants them.

    Cost: per output feature `n_in² · inp` floating-point operations in the screening dtype (half of each symmetric
    matrix), `2 n_in · inp²` for `A`, and its matrix.
    """
    _check(B, k, out, inp, per_output, group)
    search = _Search.of(B, k, out, inp, per_output, exclude_self, memory, screen)
    shard = range(search.n_out)
    if group is not None:
        shard = shard[_share(search.n_out, group)]
    state = None if checkpoint is None else _State(Path(checkpoint), search, shard, group)
    found = search.run(shard, progress, state)
    if group is not None:
        found = {name: pool.gather(group) for name, pool in found.items()}
        search.share_tally(group)
    return search.finish(found)


def _check(B: BilinearTensor, k: int, out: Tensor | None, inp: Tensor | None, per_output: int | None, group) -> None:
    for name, number in (("k", k), ("per_output", per_output)):
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
    if group is not None:
        backends = dist.get_backend_config(group)
        if f"{B.down.device.type}:" not in backends:
            raise ValueError(f"the tensors are on {B.down.device}, where group cannot communicate: it is {backends}")


def _share(n_out: int, group) -> slice:
    """Return the output features of this rank: consecutive, and as many for each as can be."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    return slice(rank * n_out // size, (rank + 1) * n_out // size)


# -- candidates -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pool:
    """Coefficients that may be among the strongest: |½ coefficient| as screened, and how far off it may be."""

    out: Tensor
    left: Tensor
    right: Tensor
    size: Tensor  # float64, in scaled units
    slack: Tensor
    sure: Tensor  # 1 where it was verified in float64

    @classmethod
    def empty(cls, device: torch.device) -> "_Pool":
        index, number = torch.empty(0, dtype=torch.long, device=device), torch.empty(0, device=device).double()
        return cls(index, index, index, number, number, index.to(torch.uint8))

    def __len__(self) -> int:
        return len(self.out)

    def unsure(self) -> Tensor:
        """Return which candidates have not been verified."""
        return (self.sure == 0) & (self.slack > 0)

    def parts(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in _PARTS)

    def __getitem__(self, which: Tensor) -> "_Pool":
        return _Pool(*(part[which] for part in self.parts()))

    def __add__(self, other: "_Pool") -> "_Pool":
        return _Pool(*(torch.cat(parts) for parts in zip(self.parts(), other.parts(), strict=True)))

    def floor(self, k: int) -> Tensor:
        """Return what the k-th strongest of the pool surely reaches, less what counts as a tie."""
        if len(self) < k:
            return self.size.new_tensor(-torch.inf)
        return (self.size - self.slack).topk(k).values[-1] * _TIE

    def floor_of_each(self, k: int, first: int, n: int) -> Tensor:
        """Return the same for each of n output features."""
        lower, floors = self.size - self.slack, self.size.new_full((n,), -torch.inf)
        order = lower.argsort(descending=True)
        order = order[self.out[order].argsort(stable=True)]
        features, counts = self.out[order].unique_consecutive(return_counts=True)
        full, starts = counts >= k, counts.cumsum(0) - counts
        floors[features[full] - first] = lower[order[starts[full] + k - 1]] * _TIE
        return floors

    def gather(self, group) -> "_Pool":
        """Return the candidates of all ranks, in the order of the ranks."""
        counts = [self.out.new_empty(1) for _ in range(dist.get_world_size(group))]
        dist.all_gather(counts, self.out.new_tensor([len(self)]), group=group)
        most = int(max(counts))
        parts = []
        for part in self.parts():
            padded = [part.new_empty(most) for _ in counts]
            dist.all_gather(padded, torch.nn.functional.pad(part, (0, most - len(part))), group=group)
            parts.append(torch.cat([row[:count] for row, count in zip(padded, counts, strict=True)]))
        return _Pool(*parts)


_PARTS = tuple(part.name for part in fields(_Pool))


# -- the search -------------------------------------------------------------------------------------------------------


def _scaled(name: str, tensor: Tensor) -> tuple[Tensor, int]:
    """Return a tensor divided by a power of two, so that its largest entry is about 1, and that power's exponent."""
    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    largest = tensor.abs().max().item() if tensor.numel() else 0.0
    exponent = math.frexp(largest)[1]
    if abs(exponent) > 160:
        raise ValueError(f"the largest entry of {name} must lie between 2^-160 and 2^160, got {largest:.3g}")
    return tensor * 2.0 ** -(exponent // 2) * 2.0 ** -(exponent - exponent // 2), exponent


def _scaled_rows(name: str, tensor: Tensor) -> tuple[Tensor, Tensor, int]:
    """Scale each row to a largest entry of about 1; return also the rows' scales and the exponent of all."""
    tensor, exponent = _scaled(name, tensor)
    largest = tensor.abs().amax(1).double() if tensor.numel() else tensor.new_zeros(len(tensor)).double()
    scale = torch.where(largest > 0, largest.clamp(min=2.0**-100).log2().floor().exp2(), 1.0)
    return tensor / scale.to(tensor.dtype)[:, None], scale, exponent


def _padded(tensor: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]))


@dataclass(frozen=True)
class _Plan:
    """How many things are held at once, within the memory granted."""

    rows: int  # of a matrix in the symmetric product, while matrices are built
    cube: bool  # whether the layer's own cube (half of it) is kept
    matrices: int  # output features whose matrices are held
    outputs: int  # of which so many are screened at once
    inputs: int  # input features in one tile
    align: int  # the columns of a tile start at a multiple of this
    look: int  # rows of a tile that are searched for candidates at once

    @classmethod
    def of(cls, search: "_Search", memory: int) -> "_Plan":
        n_out, n_in, d, hidden, B_out = search.n_out, search.n_in, search.width, search.B.hidden, search.B.out
        item = search.dtype.itemsize
        packed = 2  # products keep a second copy of one factor
        fixed = search.bytes + packed * n_in * d * item + memory // 8  # the last for the factors in float64
        candidates = 1000 * min(search.k, n_out * search.n_pairs) + _SCRATCH
        candidates += 200 * min(search.per_output or 0, search.n_pairs) * n_out
        one_row = 3 * 4 * hidden * d
        one_matrix = 4 * d * d
        one_output = 4 * d * d + (2 + packed) * d * d * item + n_in * (d * item + 40)
        one_tile = n_in * (item + 100)
        least = fixed + candidates + one_row + one_matrix + one_output + one_tile
        if memory < least:
            least = (least - memory // 8) * 8 // 7 + 8
            raise ValueError(f"memory must be at least {least} bytes for this layer and k, got {memory}")
        free = memory - least
        half_cube = 4 * B_out * d * (d + _WIDTHS) // 2
        saves = B_out * hidden + n_out * B_out < n_out * hidden
        cube = search.readers is not None and saves and half_cube <= free // 2
        free -= half_cube if cube else 0
        rows = _power_of_two(1 + free // 4 // one_row, at_most=_WIDTHS)
        free -= (rows - 1) * one_row
        outputs = min(n_out, 64, 1 + free // 3 // one_output)
        free -= (outputs - 1) * one_output
        matrices = min(n_out, max(outputs, min(256, free // 2 // one_matrix)))
        tile = max(1 << 22, 1024 * n_in)  # entries: small enough for the cache, enough rows for a fast product
        inputs = max(1, min(n_in, tile // (outputs * n_in), free // 8 // (n_in * item * outputs)))
        look = max(1, min(1 << 27, free // 8) // (n_in * 100))
        align = -(-n_in // _SHAPES // inputs) * inputs
        return cls(rows, cube, matrices, outputs, inputs, align, look)


def _power_of_two(number: int, at_most: int) -> int:
    return 1 << (min(number, at_most).bit_length() - 1)


@dataclass(frozen=True, eq=False)
class _Search:
    """One ranking: the arguments, scaled by powers of two so that nothing over- or underflows while screening."""

    B: BilinearTensor
    out: Tensor | None
    inp: Tensor | None
    k: int
    per_output: int | None
    exclude_self: bool
    memory: int
    dtype: torch.dtype
    exponent: int  # exact value = 2 ** exponent · scaled value
    scale: Tensor  # of each output feature's coefficients beside those of the others
    readers: Tensor | None  # float32, scaled
    down: Tensor
    left: Tensor
    right: Tensor
    writers: Tensor  # in the screening dtype, scaled
    writer_norm: Tensor  # of each row of the rounded writers
    writer_error: Tensor  # norm of what the rounding took from each row
    fine_writers: Tensor  # in float32, scaled
    tally: dict = field(default_factory=lambda: {"verified": 0, "bound": 0.0, "error": 0.0})

    @classmethod
    def of(cls, B, k, out, inp, per_output, exclude_self, memory, screen) -> "_Search":
        dtype = screen_dtype(B.down.device) if screen is None else screen
        if dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"screen must be torch.bfloat16 or torch.float32, got {dtype}")
        width = -(-B.inp // _WIDTHS) * _WIDTHS
        down, e_down = _scaled("B.down", B.down)
        readers, scale, e_out = None, None, 0
        if out is None:
            down, scale, e_down = _scaled_rows("B.down", B.down)
        else:
            readers, scale, e_out = _scaled_rows("out", out)
        (left, e_left), (right, e_right) = _scaled("B.left", B.left), _scaled("B.right", B.right)
        eye = torch.eye(B.inp, dtype=down.dtype, device=down.device)
        exact, e_inp = _scaled("inp", eye if inp is None else with_constant(inp, B))
        rounded = _padded(exact, width).to(dtype)
        norm = torch.linalg.vector_norm(rounded.to(exact.dtype), dim=1) * (1 + 1e-6)
        error = torch.linalg.vector_norm(rounded[:, : B.inp].to(exact.dtype) - exact, dim=1) * (1 + 1e-6)
        return cls(
            B, out, inp, k, per_output, exclude_self, memory, dtype, e_down + e_left + e_right + e_out + 2 * e_inp,
            scale, None if readers is None else readers.float(), down.float(),
            _padded(left, width).float(), _padded(right, width).float(), rounded, norm.float(), error.float(),
            _padded(exact, width).float(),
        )  # fmt: skip

    @property
    def n_out(self) -> int:
        return self.B.out if self.out is None else len(self.out)

    @property
    def n_in(self) -> int:
        return len(self.writers)

    @property
    def width(self) -> int:
        return self.writers.shape[1]

    @property
    def bytes(self) -> int:
        """Size of the scaled copies."""
        kept = [
            self.readers,
            self.down,
            self.left,
            self.right,
            self.writers,
            self.writer_norm,
            self.writer_error,
            self.fine_writers,
        ]
        return sum(tensor.nbytes for tensor in kept if tensor is not None)

    @property
    def n_pairs(self) -> int:
        """Number of coefficients of one output feature."""
        return self.n_in * (self.n_in + (-1 if self.exclude_self else 1)) // 2

    @property
    def wide(self) -> bool:
        """Whether any argument is in float64."""
        return torch.float64 in {t.dtype for t in (self.B.down, self.out, self.inp) if t is not None}

    @property
    def roundoff(self) -> float:
        """Largest relative error of rounding a number to the screening dtype."""
        return torch.finfo(self.dtype).eps / 2

    def pools(self) -> dict[str, _Pool]:
        names = ["all"] if self.per_output is None else ["all", "each"]
        return {name: _Pool.empty(self.writers.device) for name in names}

    def count(self, name: str) -> int:
        """How many are wanted of a pool (of each output feature)."""
        return self.k if name == "all" else self.per_output

    def run(self, shard: range, progress: bool, state: "_State | None") -> dict[str, _Pool]:
        """Return the candidates among some output features."""
        start, pools = (shard.start, self.pools()) if state is None else state.load()
        if self.n_in == 0 or start == shard.stop:
            return pools
        plan = _Plan.of(self, self.memory)
        space = _Space(self, plan)
        matrices = _Matrices(self, plan, space)
        with tqdm(total=len(shard), initial=start - shard.start, unit="output", disable=not progress) as bar:
            for first in range(start, shard.stop, plan.matrices):
                last = min(first + plan.matrices, shard.stop)
                M, error = matrices(first, last)
                for begin in range(first, last, plan.outputs):
                    some = slice(begin - first, min(begin + plan.outputs, last) - first)
                    found = _Block(self, begin, M[some], error[some], pools["all"], space).screen(plan)
                    pools = {name: found[name] if name == "all" else pools[name] + found[name] for name in pools}
                bar.update(last - first)
                if state is not None and (last == shard.stop or state.due()):
                    state.save(last, pools)
        return pools

    @cached_property
    def legs(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return the factors in the feature bases, in float64, if they are small beside the memory granted."""
        hidden = self.B.hidden
        if 8 * hidden * (2 * self.n_in + self.n_out) > self.memory // 8:
            return None
        every_out = torch.arange(self.n_out, device=self.writers.device)
        return self._legs(every_out, torch.arange(self.n_in, device=self.writers.device))

    def _legs(self, outs: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B = self.B
        down = B.down[outs].double() if self.out is None else self.out[outs].double() @ B.down.double()
        if self.inp is None:
            return down, B.left.double().T[features], B.right.double().T[features]
        D = with_constant(self.inp, B)[features].double()
        return down, D @ B.left.double().T, D @ B.right.double().T

    def exact(self, pool: _Pool) -> Tensor:
        """Compute coefficients of the layer itself in float64, `Σ_h down (left_i right_j + left_j right_i)`."""
        at_once = max(1, min(1024, self.memory // 16 // (64 * self.B.hidden)))
        parts = zip(*(part.split(at_once) for part in (pool.out, pool.left, pool.right)), strict=True)
        values = [self._exact(*some) for some in parts]
        return torch.cat(values) if values else pool.size

    def _exact(self, out: Tensor, left: Tensor, right: Tensor) -> Tensor:
        o, i, j, legs = out, left, right, self.legs
        if legs is None:
            outs, o = out.unique(return_inverse=True)
            features, ij = torch.cat((left, right)).unique(return_inverse=True)
            legs, (i, j) = self._legs(outs, features), ij.chunk(2)
        down, lefts, rights = legs
        at_once = max(1, (1 << 17) // self.B.hidden)  # small enough for the cache
        values = [
            (down[o] * (lefts[i] * rights[j]).addcmul_(lefts[j], rights[i])).sum(1)
            for o, i, j in zip(*(part.split(at_once) for part in (o, i, j)), strict=True)
        ]
        return torch.cat(values) * torch.where(left == right, 0.5, 1.0)

    def verified(self, pool: _Pool) -> Tensor:
        """Compute candidates in float64, and hold what was screened against it."""
        exact = self.exact(pool)
        self.compare(pool, self.halved(exact), 0.0)
        self.tally["verified"] += int(pool.unsure().sum())
        return exact

    def compare(self, pool: _Pool, size: Tensor, slack: Tensor | float) -> None:
        """Hold what was screened against what is known better."""
        off = (size - pool.size).abs()
        if (off > pool.slack + slack).any():
            raise RuntimeError(
                f"a coefficient screened in {self.dtype} was off by {(off / pool.slack).max():.2g} times its bound: "
                "products on this device are less exact than granted; pass screen=torch.float32"
            )
        for name, what in (("bound", pool.slack), ("error", off)):
            if len(what):
                self.tally[name] = max(self.tally[name], what.max().item() * 2.0 ** (self.exponent + 1))

    def strongest(self, pool: _Pool, name: str, enough: int = 0) -> _Pool:
        """Drop what surely is not among the strongest; verify the likely ones if more than enough are left."""
        pool, k = self._above_floor(pool, name), self.count(name)
        if len(pool) <= enough:
            return pool
        likely = _order(pool, pool.size, name, k)
        pool = self._above_floor(self._settled(pool, likely[pool.unsure()[likely]]), name)
        if len(pool) > 2 * len(likely) + (1 << 14):  # too many to tell apart: ties, which go by index
            pool = self._settled(pool, pool.unsure().nonzero()[:, 0])
            pool = pool[_order(pool, self._key(pool.size), name, k)]
        return pool

    def _above_floor(self, pool: _Pool, name: str) -> _Pool:
        if name == "all":
            floor = pool.floor(self.k)
        elif len(pool):
            first, last = int(pool.out.min()), int(pool.out.max())
            floor = pool.floor_of_each(self.per_output, first, last - first + 1)[pool.out - first]
        else:
            return pool
        return pool[pool.size + pool.slack >= floor]

    def _settled(self, pool: _Pool, which: Tensor) -> _Pool:
        size, slack, sure = pool.size.clone(), pool.slack.clone(), pool.sure.clone()
        size[which] = self.halved(self.verified(pool[which]))
        slack[which] = torch.maximum(1e-12 * size[which], 1e-6 * slack[which])  # float64 in another order of summation
        sure[which] = 1
        return replace(pool, size=size, slack=slack, sure=sure)

    def halved(self, exact: Tensor) -> Tensor:
        """Return half the magnitude of exact coefficients, in scaled units: what screening computes."""
        return exact.abs() * 2.0 ** (-self.exponent - 1)

    def share_tally(self, group) -> None:
        """Put together what the ranks verified."""
        mine = self.writers.new_tensor(list(self.tally.values()), dtype=torch.float64)
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, mine, group=group)
        every = torch.stack(every)
        verified, (_, bound, error) = int(every[:, 0].sum()), every.amax(0).tolist()
        self.tally.update(verified=verified, bound=bound, error=error)

    def finish(self, pools: dict[str, _Pool]) -> Interactions:
        """Verify the candidates in float64 and rank them."""
        results = {}
        for name, pool in pools.items():
            pool = self.strongest(pool, name)
            results[name] = self._rank(pool, self.verified(pool), name)
        found = results["all"]
        found.certificate = Certificate(self.n_out * self.n_pairs, dtype=self.dtype, **self.tally)
        found.per_output = results.get("each")
        return found

    def _rank(self, pool: _Pool, exact: Tensor, name: str) -> Interactions:
        """Sort by strength, then by index."""
        best = pool[_order(pool, self._key(exact), name, self.count(name))]
        index = (best.out * self.n_in + best.left) * self.n_in + best.right
        by_index = index.argsort()
        value = torch.empty_like(best.size)
        value[by_index] = self.exact(best[by_index])  # once more, so that they do not depend on what else was verified
        return Interactions(best.out, best.left, best.right, value if self.wide else value.float())

    def _key(self, exact: Tensor) -> Tensor:
        """Round what is sorted by, so that equal coefficients tie whatever the order of their summation."""
        if not self.wide:
            return exact.abs().float()
        mantissa, exponent = exact.abs().frexp()
        return torch.ldexp((mantissa * 2.0**40).round(), exponent.double())


def _order(pool: _Pool, key: Tensor, name: str, k: int) -> Tensor:
    """Return the k strongest (of each output feature), ties by index, as indices into the pool."""
    order = pool.right.argsort(stable=True)
    for part in (pool.left, pool.out):
        order = order[part[order].argsort(stable=True)]
    order = order[key[order].argsort(descending=True, stable=True)]
    if name == "all":
        return order[:k]
    order = order[pool.out[order].argsort(stable=True)]
    _, counts = pool.out[order].unique_consecutive(return_counts=True)
    rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return order[rank < k]


class _Space:
    """The large arrays of a search, allocated once: fresh memory costs more than what is computed in it."""

    def __init__(self, search: _Search, plan: _Plan):
        n, d, new = plan.outputs, search.width, search.writers.new_empty
        self.piece = new(search.B.hidden * plan.rows * d, dtype=torch.float32)
        self.part = new(plan.matrices * plan.rows * d, dtype=torch.float32)
        self.M = new(plan.matrices * d * d, dtype=torch.float32)
        self.lost = new(n * d * d, dtype=torch.float32)
        self.low, self.low_lost = new(n * d * d), new(n * d * d)
        self.A = new(search.n_in * n * d)
        self.S = new(plan.inputs * n * search.n_in)

    def take(self, name: str, *shape: int) -> Tensor:
        """Return the front of an array in some shape."""
        return getattr(self, name)[: math.prod(shape)].view(shape)


class _Matrices:
    """Interaction matrices of many output features, in float32, from the half of the symmetric product that counts."""

    def __init__(self, search: _Search, plan: _Plan, space: _Space):
        self.search, self.rows, self.space = search, plan.rows, space
        self.term_norm = torch.linalg.vector_norm(search.left, dim=1) * torch.linalg.vector_norm(search.right, dim=1)
        self.cube = None
        if plan.cube:
            self.cube = [(start, search.down @ piece) for start, piece in self._pieces()]
            self.cube_norm = torch.stack([p.pow(2).sum(1) for _, p in self.cube]).sum(0).mul(2).sqrt()

    def _pieces(self) -> Iterator[tuple[int, Tensor]]:
        """Yield `½ (left_k right_l + right_k left_l)` for some rows k and all l from there on, `[hidden, rows · l]`."""
        left, right, (hidden, width) = self.search.left / 2, self.search.right, self.search.left.shape
        for start in range(0, width, self.rows):
            some = slice(start, start + self.rows)
            piece = self.space.take("piece", hidden, self.rows, width - start)
            torch.mul(left[:, some, None], right[:, None, start:], out=piece)
            yield start, piece.addcmul_(right[:, some, None], left[:, None, start:]).flatten(1)

    def __call__(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Return the matrices `[n, width, width]` and a bound on the Frobenius norm of their error."""
        search, width, n = self.search, self.search.width, last - first
        readers = None if search.readers is None else search.readers[first:last]
        weights = search.down[first:last] if readers is None else readers @ search.down
        M = self.space.take("M", n, width, width)
        for start, piece in self._pieces() if self.cube is None else self.cube:
            some = slice(start, start + self.rows)
            part = self.space.take("part", n, piece.shape[1])
            torch.mm(weights if self.cube is None else readers, piece, out=part)
            M[:, some, start:] = part.view(n, self.rows, -1)
            M[:, start:, some] = part.view(n, self.rows, -1).mT
        roundoff = _FLOAT32_ROUNDOFF if torch.get_float32_matmul_precision() == "highest" else 2.0**-8
        norm = torch.linalg.vector_norm(M, dim=(1, 2))
        error = search.B.hidden**0.5 * (torch.linalg.vector_norm(weights * self.term_norm, dim=1) + norm)
        if self.cube is not None:
            error += search.B.out**0.5 * torch.linalg.vector_norm(readers * self.cube_norm, dim=1)
        return M, 4 * roundoff * error


def _spectral_bound(X: Float[Tensor, "n d d"]) -> Float[Tensor, " n"]:
    """Bound the spectral norm of low-precision matrices from above.

    With row slices `X_q` and `G_q = X_q X_qᵀ`, `‖X‖² ≤ Σ_q ‖X_q‖² = Σ_q ‖G_q‖` and `‖G‖⁴ ≤ ‖G⁴‖_F`. For a random
    matrix that is about twice the norm itself, where the Frobenius norm is `sqrt(d) / 2` times as large. Cost `0.6 d³`.
    What rounding takes from each product is added as a Frobenius norm.
    """
    n, d, _ = X.shape
    slices, u = 4 if d % 4 == 0 else 1, torch.finfo(X.dtype).eps / 2
    X = X.reshape(n * slices, d // slices, d)
    G = torch.bmm(X, X.mT)
    scale = torch.linalg.vector_norm(G.float(), dim=(1, 2), keepdim=True).clamp(min=1e-37)
    G = (G.float() / scale).to(X.dtype)  # of norm 1, so that its powers do not underflow
    H = torch.bmm(G, G)
    fourth, second = (torch.linalg.vector_norm(part.float(), dim=(1, 2)) for part in (torch.bmm(H, H), H))
    norm = ((fourth * (1 + 2 * u)).sqrt() + 2 * u * second).sqrt() + 4 * u
    bound = (norm * scale[:, 0, 0]).view(n, slices).sum(1).sqrt()
    return bound + 2.0**-50 * (bound > 1e-18)  # what underflows in the first product


class _Block:
    """Some output features, screened together."""

    def __init__(self, search: _Search, first: int, M: Tensor, M_error: Tensor, so_far: _Pool, space: _Space):
        self.search, self.first, self.n, self.space = search, first, len(M), space
        self.pools = search.pools() | {"all": so_far}
        self.scale = search.scale[first : first + len(M)]
        self.before = {name: self._floor(name) for name in self.pools}
        self.floors, self.limits = dict(self.before), dict.fromkeys(self.pools, 0)
        d = search.width
        M_norm = torch.linalg.vector_norm(M, dim=(1, 2))
        low = space.take("low_lost", *M.shape).copy_(M)
        across = space.take("low", d, self.n, d).copy_(low.transpose(0, 1))
        M_largest = _spectral_bound(low) if search.writer_error.any() else torch.zeros_like(M_norm)
        self.M, self.M_slack = M, M_error + 8 * d**0.5 * _FLOAT32_ROUNDOFF * M_norm
        if search.dtype != torch.float32:
            lost = space.take("lost", *M.shape).copy_(low)
            M_error = M_error + _spectral_bound(low.copy_(torch.sub(M, lost, out=lost)))
        self.A = space.take("A", search.n_in, self.n, d)
        torch.mm(search.writers, across.view(d, -1), out=self.A.view(search.n_in, -1))
        self.slack = self._slack(M_norm, M_largest, M_error)

    def _slack(self, M_norm: Tensor, M_largest: Tensor, M_error: Tensor) -> Float[Tensor, "n_in n"]:
        """Bound `|A Dᵀ - Ã D̃ᵀ|` for each row of A: what the rounding of M, D and A itself may do, by Cauchy-Schwarz."""
        u, sums = self.search.roundoff, 4 * self.search.width**0.5 * _FLOAT32_ROUNDOFF
        norm, error = self.search.writer_norm[:, None], self.search.writer_error[:, None]
        A_norm = torch.linalg.vector_norm(self.A, dim=2).float() * (1 + 2 * u)
        A_error = norm * (M_error + sums * M_norm) + u * A_norm
        if error.any():
            A_error = A_error + error * (M_largest + M_error)
        slack = A_error * norm.max() + (A_norm + A_error) * error.max() + sums * A_norm * norm.max()
        return slack + _UNDERFLOW * (slack > 0)

    def _floor(self, name: str) -> Tensor:
        """Return what a coefficient must reach to matter for a pool, for each output feature of this block."""
        pool, k = self.pools[name], self.search.count(name)
        floor = pool.floor(k).expand(self.n) if name == "all" else pool.floor_of_each(k, self.first, self.n)
        return (floor / self.scale).float()

    def screen(self, plan: _Plan) -> dict[str, _Pool]:
        """Go through the tiles of the upper triangle; return the pools with what this block adds."""
        search, n_in = self.search, self.search.n_in
        bits = torch.int16 if search.dtype == torch.bfloat16 else torch.int32
        for start in range(0, n_in, plan.inputs):
            stop = min(start + plan.inputs, n_in)
            origin = start // plan.align * plan.align  # of the columns: few shapes, since each has a kernel of its own
            S = self.space.take("S", (stop - start) * self.n, n_in - origin)
            torch.mm(self.A[start:stop].flatten(0, 1), search.writers[origin:].T, out=S)
            S.abs_()  # not negative, so that its bits are in the order of the numbers
            corner = torch.ones(stop - start, stop - origin, dtype=search.dtype, device=S.device).triu(start - origin)
            corner.diagonal(start - origin).fill_(0.0 if search.exclude_self else 0.5)
            S.view(stop - start, self.n, -1)[:, :, : stop - origin].mul_(corner[:, None])
            highest = S.view(bits).amax(1).view(search.dtype).float().view(-1, self.n)
            for name in self.pools:
                self._collect(name, S, highest, start, origin, plan.look)
        return {name: self._prune(name) for name in self.pools}

    def _collect(self, name: str, S: Tensor, highest: Tensor, start: int, origin: int, look: int) -> None:
        """Add the coefficients of a tile that may matter to a pool, and raise its floor when it has grown."""
        u, floor = self.search.roundoff, self.floors[name]
        slack = self.slack[start : start + len(highest)]
        if floor.isneginf().any():  # the first tiles: nothing to compare with yet
            floor = torch.maximum(floor, self._first_floor(name, S, highest, slack))
        upper = highest * (1 + u) + slack
        hit = ((upper >= floor) & (upper > self.before[name])).flatten().nonzero()[:, 0]
        for some in hit.split(look):
            self.pools[name] += self._candidates(S, some, floor, slack, start, origin)
            if len(self.pools[name]) > self.limits[name]:
                self._prune(name)

    def _prune(self, name: str) -> _Pool:
        """Drop from a pool what cannot matter any more, and raise the floor."""
        wanted = self.search.count(name) * (self.n if name == "each" else 1)
        enough = wanted if name == "each" else 4 * wanted + (1 << 14)
        pool = self.pools[name]
        if self.search.legs is None:  # float64 is dear
            pool = self._refined(self.search.strongest(pool, name, len(pool)))
        self.pools[name] = pool = self.search.strongest(pool, name, enough)
        self.limits[name] = len(pool) + wanted + 4096
        self.floors[name] = torch.maximum(self.floors[name], self._floor(name))
        return pool

    def _refined(self, pool: _Pool) -> _Pool:
        """Compute this block's candidates again in float32, which leaves few of them to verify."""
        search, size, slack = self.search, pool.size.clone(), pool.slack.clone()
        mine = ((pool.out >= self.first) & pool.unsure()).nonzero()[:, 0]
        mine = mine[pool.out[mine].argsort(stable=True)]
        outs, counts = pool.out[mine].unique_consecutive(return_counts=True)
        for out, some in zip((outs - self.first).tolist(), mine.split(counts.tolist()), strict=True):
            left, right = search.fine_writers[pool.left[some]], search.fine_writers[pool.right[some]]
            half = torch.where(pool.left[some] == pool.right[some], 0.5, 1.0)
            size[some] = ((left @ self.M[out]) * right).sum(1).abs().double() * half * self.scale[out]
            norms = torch.linalg.vector_norm(left, dim=1) * torch.linalg.vector_norm(right, dim=1)
            slack[some] = (self.M_slack[out] * norms + _UNDERFLOW).double() * self.scale[out]
        better = slack < pool.slack
        size, slack = torch.where(better, size, pool.size), torch.where(better, slack, pool.slack)
        search.compare(pool, size, slack)
        return replace(pool, size=size, slack=slack)

    def _first_floor(self, name: str, S: Tensor, highest: Tensor, slack: Tensor) -> Tensor:
        """Return what the k-th strongest of this tile alone surely reaches."""
        k, u = self.search.count(name), self.search.roundoff
        if name == "all":
            some = (highest * self.scale).flatten()  # one of each row is enough
            if len(some) <= k:
                some = S[: -(-8 * k // S.shape[1])]
                some = (some * self.scale.repeat(-(-len(some) // self.n))[: len(some), None]).flatten()
            kth = some.topk(k).values[-1] if len(some) > k else some.new_tensor(-torch.inf)
            return ((kth * (1 - u) - (slack * self.scale).max()) / self.scale).float()
        mine = S.view(-1, self.n, S.shape[1]).transpose(0, 1).flatten(1)
        if mine.shape[1] <= k:
            return slack.new_full((self.n,), -torch.inf)
        return mine.topk(k).values[:, -1].float() * (1 - u) - slack.amax(0)

    def _candidates(self, S: Tensor, rows: Tensor, floor: Tensor, slack: Tensor, start: int, origin: int) -> _Pool:
        """Return those coefficients of some rows of a tile whose bound reaches the floor."""
        u = self.search.roundoff
        inp, out = rows // self.n, rows % self.n
        values, slack = S[rows].float(), slack.flatten()[rows]
        row, column = (values * (1 + u) + slack[:, None] >= floor[out, None]).nonzero(as_tuple=True)
        keep = origin + column >= start + inp[row] + self.search.exclude_self
        row, column = row[keep], column[keep]
        out, size = out[row], values[row, column].double()
        slack = (u * size + slack[row].double()) * self.scale[out]
        sure = torch.zeros_like(row, dtype=torch.uint8)
        return _Pool(self.first + out, start + inp[row], origin + column, size * self.scale[out], slack, sure)


# -- state on disk ----------------------------------------------------------------------------------------------------


class _State:
    """The candidates found so far, in a folder of the user's choice, one file for each rank."""

    def __init__(self, folder: Path, search: _Search, shard: range, group):
        rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        self.path = folder / f"rank-{rank}-of-{size}.safetensors"
        self.shard, self.search, self.saved = shard, search, time.monotonic()
        digest = hashlib.sha256()
        for tensor in (search.B.down, search.B.left, search.B.right, search.out, search.inp):
            header = "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            digest.update(header.encode())
            if tensor is not None:
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        arguments = (search.k, search.per_output, search.exclude_self, search.dtype, search.B.constant, shard)
        digest.update(repr(arguments).encode())
        self.fingerprint = digest.hexdigest()

    def load(self) -> tuple[int, dict[str, _Pool]]:
        """Return where to go on and what was found until there."""
        pools = self.search.pools()
        if not self.path.exists():
            return self.shard.start, pools
        with safe_open(self.path, "pt") as file:
            about = file.metadata()
            if about["fingerprint"] != self.fingerprint:
                raise ValueError(
                    f"checkpoint must be of this search, but {self.path} is of one with other weights, bases or "
                    f"arguments (fingerprint {about['fingerprint'][:12]}, not {self.fingerprint[:12]}): remove it or "
                    "name another folder"
                )
            device = self.search.writers.device
            found = {n: _Pool(*(file.get_tensor(f"{n}.{part}").to(device) for part in _PARTS)) for n in pools}
        return int(about["next"]), found

    def due(self) -> bool:
        """Return whether the last checkpoint is old."""
        return time.monotonic() - self.saved > SAVE_EVERY

    def save(self, following: int, pools: dict[str, _Pool]) -> None:
        """Write the state so that a kill at any time leaves the old one or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"{n}.{p}": part for n, pool in pools.items() for p, part in zip(_PARTS, pool.parts(), strict=True)}
        partial = self.path.with_suffix(f".{os.getpid()}.partial")
        save_file(tensors, partial, {"fingerprint": self.fingerprint, "next": str(following)})
        os.replace(partial, self.path)
        self.saved = time.monotonic()
