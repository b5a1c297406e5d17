"""Screening: every coefficient once, in low precision, with a bound on how far off it may be.

For one output feature, `M` is the interaction matrix in the residual basis, `D` the writers, `A = D M`, and
`S = |A Dᵀ|` is half the magnitude of each coefficient. What is computed is `Ã = fl(D̃ M̃)` and `S̃ = fl(Ã D̃ᵀ)` with the
rounded M̃ and D̃. `|S - S̃|` is bounded by norms that are measured on the rounded numbers, one bound for each row of Ã: no
sharper one is cheaper than the product itself.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from .budget import Plan, Space
from .candidates import Pool
from .scaled import FLOAT32_ROUNDOFF
from .search import Search
from .state import State
from .streaming import Streamed

_UNDERFLOW = 2.0**-100  # what may be lost below the smallest numbers, beside a largest of about 1


def run(search: Search, shard: range, memory: int, progress: bool, state: State | None) -> dict[str, Pool]:
    """Return the candidates among some output features."""
    start, pools = (shard.start, search.pools()) if state is None else state.load()
    if search.layer.n_in == 0 or start == shard.stop:
        return pools
    plan = Plan.of(search, memory)
    space = Space(search.layer, plan)
    streamed = Streamed(search.layer, plan, space)
    with tqdm(total=len(shard), initial=start - shard.start, unit="output", disable=not progress) as bar:
        # the matrices that were in the making are made again, as many at once: bit for bit the same
        begun = start - (start - shard.start) % plan.matrices
        for first in range(begun, shard.stop, plan.matrices):
            last = min(first + plan.matrices, shard.stop)
            matrices = streamed(first, last)
            for some in _slices(last - first, plan.outputs):
                if (done := first + some.stop) <= start:
                    continue
                some = slice(max(some.start, start - first), some.stop)  # another plan may have ended elsewhere
                block = Block(search, first + some.start, [part[some] for part in matrices], pools["all"], space)
                found = block.screen(plan)
                pools = {name: found[name] if name == "all" else pools[name] + found[name] for name in pools}
                bar.update(some.stop - some.start)
                if state is not None and (done == shard.stop or state.pace.due()):
                    state.save(done, pools)
    return pools


def _slices(n: int, size: int) -> Iterator[slice]:
    """Cut n things into slices of some size."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def _triangle(n: int, plan: Plan) -> Iterator[tuple[int, int, int]]:
    """Cut the upper triangle of n features: yield the first and last row of each tile, and its first column."""
    for start in range(0, n, plan.inputs):
        yield start, min(start + plan.inputs, n), start // plan.align * plan.align


def _amax(S: Tensor, dim: int) -> Tensor:
    """Return the largest of numbers that are not negative, in float32; of bfloat16 by the bits, which is faster."""
    if S.dtype == torch.float32:
        return S.amax(dim)
    return S.view(torch.int16).amax(dim).view(S.dtype).float()


def spectral_bound(X: Float[Tensor, "n d d"]) -> Float[Tensor, " n"]:
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
    # ‖G²‖² = ‖G⁴‖ ≤ ‖H Hᵀ‖_F (1 + 2u); G² differs from H by its rounding, at most u ‖H‖_F; G by that of its product and
    # of its scaling, each at most u since its norm is 1. Twice that for what is lost of second order.
    fourth, second = (torch.linalg.vector_norm(part.float(), dim=(1, 2)) for part in (torch.bmm(H, H), H))
    norm = ((fourth * (1 + 2 * u)).sqrt() + 2 * u * second).sqrt() + 4 * u
    bound = (norm * scale[:, 0, 0]).view(n, slices).sum(1).sqrt()
    return bound + 2.0**-50 * (bound > 1e-18)  # what underflows in the first product


class Block:
    """Some output features, screened together."""

    def __init__(self, search: Search, first: int, matrices: list[Tensor], so_far: Pool, space: Space):
        M, M_error, self.reach = matrices  # as `Streamed` gives them
        self.search, self.layer, self.first, self.n, self.space = search, search.layer, first, len(M), space
        self.pools = search.pools() | {"all": so_far}
        self.scale = self.layer.scale[first : first + len(M)]
        self.before = {name: self._floor(name) for name in self.pools}
        self.floors, self.room = dict(self.before), {name: -len(pool) for name, pool in self.pools.items()}
        self.new: dict[str, list[Pool]] = {name: [] for name in self.pools}
        n_in, d = self.layer.writers.shape
        M_norm = torch.linalg.vector_norm(M, dim=(1, 2))
        self.others = n_in - self.layer.n_base  # the base comes last, and of its features M holds the coefficients
        # for candidates computed again in float32: the error of M, and that of two sums of d terms
        self.M, self.M_slack = M, M_error + 8 * d**0.5 * FLOAT32_ROUNDOFF * M_norm
        self.A = space.take("A", self.others, self.n, d)
        if self.layer.dtype == torch.float32:
            M_largest = M_norm  # here it hardly matters
            for number, one in enumerate(M):  # one at a time: it stays in the cache
                torch.mm(self.layer.writers[: self.others], one, out=self.A[:, number])
        else:
            M_largest, M_error = self._product_of_rounded(M, M_error)
        self.bounds = self.row_bounds(M_norm, M_largest, M_error)
        # of each feature, for which they are asked for: the largest half of its coefficients
        self.largest = None if search.features is None else M.new_zeros(self.n, n_in)

    def _product_of_rounded(self, M: Tensor, M_error: Tensor) -> tuple[Tensor, Tensor]:
        """Fill A from the rounded matrices; return bounds on `‖M̃‖₂`, zero if it is not needed, and on `‖M - M̃‖₂`."""
        d, take = self.layer.width, self.space.take
        low = take("low_lost", *M.shape).copy_(M)
        across = take("low", d, self.n, d).copy_(low.transpose(0, 1))
        torch.mm(self.layer.writers[: self.others], across.view(d, -1), out=self.A.flatten(1))
        # what the writers' rounding took meets M itself: by its spectral norm, a tenth of the Frobenius norm
        M_largest = spectral_bound(low) if self.layer.writer_error.any() else torch.zeros_like(M_error)
        lost = take("lost", *M.shape).copy_(low)  # M - M̃ is known, so that its spectral norm can be measured
        return M_largest, M_error + spectral_bound(low.copy_(torch.sub(M, lost, out=lost)))

    def row_bounds(self, M_norm: Tensor, M_largest: Tensor, M_error: Tensor) -> Float[Tensor, "3 n_in n"]:
        """Bound `|A Dᵀ - Ã D̃ᵀ|` in each row of A, by Cauchy-Schwarz: `bounds · (|d̃'|, |d' - d̃'|, 1)` in column d'.

        `a - ã = d̃ (M - M̃) + (d - d̃) M + (d̃ M̃ - ã)` for a row d of D, and then, for any other row d',
        `a·d' - ã·d̃' = (a - ã)·d̃' + a·(d' - d̃')`. Sums of n terms in float32 add 4 sqrt(n) roundoffs of the norms. What
        rounding the result takes is relative to it, and added where the result is known.

        Args:
            M_norm: `‖M‖_F`.
            M_largest: Bound on `‖M̃‖₂`, zero where the writers have no error.
            M_error: Bound on `‖M - M̃‖₂`.
        """
        layer, u = self.layer, self.layer.roundoff
        sums = 4 * layer.width**0.5 * FLOAT32_ROUNDOFF
        norm, error = layer.writer_norm[:, None], layer.writer_error[:, None]
        if layer.dtype == torch.float32:  # there what grows with it is small beside the error of M
            A_norm = norm * M_norm * (1 + 2 * sums)
        else:
            A_norm = torch.linalg.vector_norm(self.A, dim=2).float() * (1 + 2 * u)  # a norm that is rounded itself
        # d̃ (M - M̃); the sum d̃ M̃, which meets all of M; the rounding of ã
        A_error = norm * (M_error + sums * M_norm) + u * A_norm
        if error.any():  # (d - d̃) M, with ‖M‖₂ ≤ ‖M̃‖₂ + ‖M - M̃‖₂
            A_error = A_error + error * (M_largest + M_error)
        # (a - ã)·d̃' and the sum ã·d̃'; a·(d' - d̃') with ‖a‖ ≤ ‖ã‖ + ‖a - ã‖; what a base made of features takes
        bounds = torch.stack((A_error + sums * A_norm, A_norm + A_error, self._basis()))
        bounds[2] += _UNDERFLOW * (bounds[0] > 0)
        return bounds

    def _basis(self) -> Float[Tensor, "n_in n"]:
        """Bound what a base made of features takes from the coefficients of each writer: `e M d' + (d + e) M e'`."""
        residual, length = self.layer.residual, self.layer.length
        off = residual * length.max() + (length + residual) * residual.max()
        return (off[:, None] * self.reach).float()

    def _slack(self, start: int, rows: int, origin: int, columns: int) -> Float[Tensor, "rows n"]:
        """Bound the error of a tile in each of its rows, by the largest of its columns."""
        here, layer = slice(origin, origin + columns), self.layer
        by_norm, by_error, always = self.bounds[:, start : start + rows]
        return by_norm * layer.writer_norm[here].max() + by_error * layer.writer_error[here].max() + always

    def _floor(self, name: str) -> Tensor:
        """Return what a coefficient must reach to matter for a pool, for each output feature of this block."""
        pool, k = self.pools[name], self.search.wanted.count(name)
        floor = pool.floor(k).expand(self.n) if name == "all" else pool.floor_of_each(k, self.first, self.n)
        return (floor / self.scale).float()

    def screen(self, plan: Plan) -> dict[str, Pool]:
        """Go through the tiles of the upper triangle; return the pools with what this block adds."""
        for S, start, origin in self._tiles(plan):
            shape = len(S) // self.n, self.n
            highest = _amax(S, 1).view(shape)
            if self.largest is not None:
                across = _amax(S.unflatten(0, shape), 0)
                for first, found in ((start, highest.T), (origin, across)):
                    columns = self.largest[:, first : first + found.shape[1]]
                    torch.maximum(columns, found, out=columns)
            slack = self._slack(start, len(highest), origin, S.shape[1])
            for name in self.pools:
                self._collect(name, S, highest, slack, (start, origin), plan.look)
        if self.largest is not None:
            self.search.features[self.first : self.first + self.n] = self._strongest_features()
        return {name: self._prune(name) for name in self.pools}

    def _tiles(self, plan: Plan) -> Iterator[tuple[Tensor, int, int]]:
        """Yield half the magnitude of coefficients, `[rows · n, columns]`, and where its rows and columns start.

        Pairs below the diagonal are zero. A tile is overwritten by the next. A is overwritten by its magnitude, where
        it holds the coefficients with the base's features itself.
        """
        others, n_base, W = self.others, self.layer.n_base, self.layer.writers
        for start, stop, origin in _triangle(others, plan):
            rows = self.A[start:stop].flatten(0, 1)
            S = self.space.take("S", len(rows), others - origin)
            # not negative, so that its bits are in the order of the numbers
            yield self._cornered(torch.mm(rows, W[origin:others].T, out=S).abs_(), start - origin), start, origin
            if n_base:
                yield rows[:, :n_base].abs_(), start, others
        for start, stop, origin in _triangle(n_base, plan):
            S = self.space.take("S", stop - start, self.n, n_base - origin)
            torch.abs(self.M[:, start:stop, origin:n_base].transpose(0, 1), out=S)
            yield self._cornered(S.flatten(0, 1), start - origin), others + start, others + origin

    def _cornered(self, S: Tensor, lead: int) -> Tensor:
        """Keep the pairs from the diagonal on, half of each coefficient of a feature with itself, if it is wanted."""
        rows = len(S) // self.n
        corner = torch.ones(rows, lead + rows, dtype=S.dtype, device=S.device).triu(lead)
        corner.diagonal(lead).fill_(0.0 if self.search.wanted.exclude_self else 0.5)
        S.view(rows, self.n, -1)[:, :, : lead + rows].mul_(corner[:, None])
        return S

    def _strongest_features(self) -> Int[Tensor, "n most"]:
        """Return the features with the largest coefficients, computed again in float32 where they may be among them."""
        layer, most = self.layer, self.search.features.shape[1]
        largest = self.largest[:, layer.place]
        if layer.dtype != torch.float32:
            off = layer.roundoff * largest + self._slack(0, layer.n_in, 0, layer.n_in).amax(0)[:, None]
            least = (largest - off).topk(most).values[:, -1:]
            for number, some in enumerate(largest + off >= least):
                rows = (layer.fine_writers[some] @ self.M[number] @ layer.fine_writers.T).abs_()
                rows[:, some] = torch.maximum(rows[:, some], rows[:, some].T)  # the two of a pair tie
                own = torch.arange(len(rows), device=rows.device), some.nonzero()[:, 0]
                rows[own] *= 0.0 if self.search.wanted.exclude_self else 0.5
                largest[number] = torch.where(some, 0.0, -1.0).masked_scatter(some, rows.amax(1))
        return largest.argsort(dim=1, descending=True, stable=True)[:, :most]

    def _collect(self, name: str, S: Tensor, highest: Tensor, slack: Tensor, at: tuple[int, int], look: int) -> None:
        """Add the coefficients of a tile that may matter to a pool, and raise its floor when it has grown."""
        u, floor = self.layer.roundoff, self.floors[name]
        if floor.isneginf().any():  # the first tiles: nothing to compare with yet
            floor = torch.maximum(floor, self._first_floor(name, S, highest, slack))
        upper = highest * (1 + u) + slack
        hit = ((upper >= floor) & (upper > self.before[name])).flatten().nonzero()[:, 0]
        for some in hit.split(look) if len(hit) else ():
            self.new[name].append(self._candidates(S, some, floor, slack, at))
            self.room[name] -= len(self.new[name][-1])
            if self.room[name] < 0:
                self._prune(name)

    def _prune(self, name: str) -> Pool:
        """Drop from a pool what cannot matter any more, and raise the floor."""
        wanted = self.search.wanted.count(name) * (self.n if name == "each" else 1)
        enough = wanted if name == "each" else 4 * wanted + (1 << 14)
        pool, self.new[name] = self.pools[name].joined(self.new[name]), []
        if self.search.coefficients.legs is None:  # float64 is dear
            pool = self._refined(self.search.strongest(pool, name, len(pool)))
        self.pools[name] = pool = self.search.strongest(pool, name, enough)
        self.room[name] = wanted + 4096
        self.floors[name] = torch.maximum(self.floors[name], self._floor(name))
        return pool

    def _refined(self, pool: Pool) -> Pool:
        """Compute this block's candidates again in float32, which leaves few of them to verify."""
        layer, size, slack = self.layer, pool.size.clone(), pool.slack.clone()
        mine = ((pool.out >= self.first) & pool.unsure()).nonzero()[:, 0]
        mine = mine[pool.out[mine].argsort(stable=True)]
        outs, counts = pool.out[mine].unique_consecutive(return_counts=True)
        for out, some in zip((outs - self.first).tolist(), mine.split(counts.tolist()), strict=True):
            left, right = layer.fine_writers[pool.left[some]], layer.fine_writers[pool.right[some]]
            half = torch.where(pool.left[some] == pool.right[some], 0.5, 1.0)
            size[some] = ((left @ self.M[out]) * right).sum(1).abs().double() * half * self.scale[out]
            norms = torch.linalg.vector_norm(left, dim=1) * torch.linalg.vector_norm(right, dim=1)
            basis = self.bounds[2, layer.place[pool.left[some]], out]
            slack[some] = (self.M_slack[out] * norms + basis + _UNDERFLOW).double() * self.scale[out]
        better = slack < pool.slack
        size, slack = torch.where(better, size, pool.size), torch.where(better, slack, pool.slack)
        self.search.compare(pool, size, slack)
        return replace(pool, size=size, slack=slack)

    def _first_floor(self, name: str, S: Tensor, highest: Tensor, slack: Tensor) -> Tensor:
        """Return what the k-th strongest of this tile alone surely reaches."""
        k, u = self.search.wanted.count(name), self.layer.roundoff
        if name == "all":
            some = (highest * self.scale).flatten()  # one of each row is enough
            if len(some) <= k:
                some = S[: -(-8 * k // S.shape[1])]
                some = (some * self.scale.repeat(-(-len(some) // self.n))[: len(some), None]).flatten()
            kth = some.topk(k).values[-1] if len(some) > k else some.new_tensor(-torch.inf)
            return ((kth * (1 - u) - (slack * self.scale).max()) / self.scale).float()
        mine = S.unflatten(0, (-1, self.n)).transpose(0, 1).flatten(1)
        if mine.shape[1] <= k:
            return slack.new_full((self.n,), -torch.inf)
        return mine.topk(k).values[:, -1].float() * (1 - u) - slack.amax(0)

    def _candidates(self, S: Tensor, rows: Tensor, floor: Tensor, slack: Tensor, at: tuple[int, int]) -> Pool:
        """Return those coefficients of some rows of a tile, at a row and a column, whose bound reaches the floor."""
        u, (start, origin) = self.layer.roundoff, at
        inp, out = rows // self.n, rows % self.n
        values, slack = S[rows].float(), slack.flatten()[rows]
        row, column = (values * (1 + u) + slack[:, None] >= floor[out, None]).nonzero(as_tuple=True)
        keep = origin + column >= start + inp[row] + self.search.wanted.exclude_self
        row, column = row[keep], column[keep]
        out, size = out[row], values[row, column].double()
        slack = (u * size + slack[row].double()) * self.scale[out]
        sure = torch.zeros_like(row, dtype=torch.uint8)
        pair = torch.stack((self.layer.features[start + inp[row]], self.layer.features[origin + column]))
        return Pool(self.first + out, pair.amin(0), pair.amax(0), size * self.scale[out], slack, sure)
