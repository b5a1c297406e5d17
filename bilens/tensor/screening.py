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
            M, error = streamed(first, min(first + plan.matrices, shard.stop))
            for some in _slices(len(M), plan.outputs):
                if (done := first + some.stop) <= start:
                    continue
                some = slice(max(some.start, start - first), some.stop)  # another plan may have ended elsewhere
                found = Block(search, first + some.start, M[some], error[some], pools["all"], space).screen(plan)
                pools = {name: found[name] if name == "all" else pools[name] + found[name] for name in pools}
                bar.update(some.stop - some.start)
                if state is not None and (done == shard.stop or state.due()):
                    state.save(done, pools)
    return pools


def _slices(n: int, size: int) -> Iterator[slice]:
    """Cut n things into slices of some size."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


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

    def __init__(self, search: Search, first: int, M: Tensor, M_error: Tensor, so_far: Pool, space: Space):
        self.search, self.layer, self.first, self.n, self.space = search, search.layer, first, len(M), space
        self.pools = search.pools() | {"all": so_far}
        self.scale = self.layer.scale[first : first + len(M)]
        self.before = {name: self._floor(name) for name in self.pools}
        self.floors, self.limits = dict(self.before), dict.fromkeys(self.pools, 0)
        n_in, d = self.layer.writers.shape
        M_norm = torch.linalg.vector_norm(M, dim=(1, 2))
        low = space.take("low_lost", *M.shape).copy_(M)
        across = space.take("low", d, self.n, d).copy_(low.transpose(0, 1))
        # what the writers' rounding took meets M itself: by its spectral norm, a tenth of the Frobenius norm
        M_largest = torch.zeros_like(M_norm)
        if self.layer.writer_error.any():
            M_largest = M_norm if self.layer.dtype == torch.float32 else spectral_bound(low)  # there it hardly matters
        # for candidates computed again in float32: the error of M, and that of two sums of d terms
        self.M, self.M_slack = M, M_error + 8 * d**0.5 * FLOAT32_ROUNDOFF * M_norm
        if self.layer.dtype != torch.float32:  # M - M̃ is known, so that its spectral norm can be measured
            lost = space.take("lost", *M.shape).copy_(low)
            M_error = M_error + spectral_bound(low.copy_(torch.sub(M, lost, out=lost)))
        self.A = space.take("A", n_in, self.n, d)
        self.n_base = self.layer.n_base  # of them the product is M itself
        others = n_in - self.n_base
        torch.mm(self.layer.writers[:others], across.view(d, -1), out=self.A[:others].flatten(1))
        self.A[others:] = across[: self.n_base]
        self.slack = self.row_bounds(M_norm, M_largest, M_error)
        # of each feature, for which they are asked for: the largest half of its coefficients
        self.largest = None if search.features is None else M.new_zeros(self.n, n_in)

    def row_bounds(self, M_norm: Tensor, M_largest: Tensor, M_error: Tensor) -> Float[Tensor, "n_in n"]:
        """Bound `|A Dᵀ - Ã D̃ᵀ|` in each row of A, by Cauchy-Schwarz.

        `a - ã = d̃ (M - M̃) + (d - d̃) M + (d̃ M̃ - ã)` for a row d of D, and then, for any other row d',
        `a·d' - ã·d̃' = (a - ã)·d̃' + a·(d' - d̃')`. Sums of n terms in float32 add 4 sqrt(n) roundoffs of the norms. What
        rounding the result takes is relative to it, and added where the result is known.

        Args:
            M_norm: `‖M‖_F`.
            M_largest: Bound on `‖M̃‖₂`, zero where the writers have no error.
            M_error: Bound on `‖M - M̃‖₂`.
        """
        u, sums = self.layer.roundoff, 4 * self.layer.width**0.5 * FLOAT32_ROUNDOFF
        norm, error = self.layer.writer_norm[:, None], self.layer.writer_error[:, None]
        A_norm = torch.linalg.vector_norm(self.A, dim=2).float() * (1 + 2 * u)  # a norm that is rounded itself
        # d̃ (M - M̃); the sum d̃ M̃, which meets all of M; the rounding of ã
        A_error = norm * (M_error + sums * M_norm) + u * A_norm
        if error.any():  # (d - d̃) M, with ‖M‖₂ ≤ ‖M̃‖₂ + ‖M - M̃‖₂
            A_error = A_error + error * (M_largest + M_error)
        # (a - ã)·d̃'; a·(d' - d̃') with ‖a‖ ≤ ‖ã‖ + ‖a - ã‖; the sum ã·d̃'. The largest d' serves the whole row.
        slack = A_error * norm.max() + (A_norm + A_error) * error.max() + sums * A_norm * norm.max()
        return slack + _UNDERFLOW * (slack > 0)

    def _floor(self, name: str) -> Tensor:
        """Return what a coefficient must reach to matter for a pool, for each output feature of this block."""
        pool, k = self.pools[name], self.search.wanted.count(name)
        floor = pool.floor(k).expand(self.n) if name == "all" else pool.floor_of_each(k, self.first, self.n)
        return (floor / self.scale).float()

    def screen(self, plan: Plan) -> dict[str, Pool]:
        """Go through the tiles of the upper triangle; return the pools with what this block adds."""
        layer, n_in = self.layer, self.layer.n_in
        exclude_self = self.search.wanted.exclude_self
        bits = torch.int16 if layer.dtype == torch.bfloat16 else torch.int32
        for start in range(0, n_in, plan.inputs):
            stop = min(start + plan.inputs, n_in)
            origin = start // plan.align * plan.align  # of the columns: few shapes, since each has a kernel of its own
            S = self.space.take("S", (stop - start) * self.n, n_in - origin)
            self._multiply(self.A[start:stop].flatten(0, 1), origin, out=S)
            S.abs_()  # not negative, so that its bits are in the order of the numbers
            corner = torch.ones(stop - start, stop - origin, dtype=layer.dtype, device=S.device).triu(start - origin)
            corner.diagonal(start - origin).fill_(0.0 if exclude_self else 0.5)
            S.view(stop - start, self.n, -1)[:, :, : stop - origin].mul_(corner[:, None])
            highest = S.view(bits).amax(1).view(layer.dtype).float().view(-1, self.n)
            if self.largest is not None:
                across = S.view(bits).view(stop - start, self.n, -1).amax(0).view(layer.dtype).float()
                for columns, found in ((slice(start, stop), highest.T), (slice(origin, n_in), across)):
                    self.largest[:, columns] = torch.maximum(self.largest[:, columns], found)
            for name in self.pools:
                self._collect(name, S, highest, start, origin, plan.look)
        if self.largest is not None:
            self.search.features[self.first : self.first + self.n] = self._strongest_features()
        return {name: self._prune(name) for name in self.pools}

    def _strongest_features(self) -> Int[Tensor, "n most"]:
        """Return the features with the largest coefficients, computed again in float32 where they may be among them."""
        layer, most = self.layer, self.search.features.shape[1]
        largest = self.largest[:, layer.features.argsort()]
        if layer.dtype != torch.float32:
            off = layer.roundoff * largest + self.slack.amax(0)[:, None]
            least = (largest - off).topk(most).values[:, -1:]
            for number, some in enumerate(largest + off >= least):
                rows = (layer.fine_writers[some] @ self.M[number] @ layer.fine_writers.T).abs_()
                rows[:, some] = torch.maximum(rows[:, some], rows[:, some].T)  # the two of a pair tie
                own = torch.arange(len(rows), device=rows.device), some.nonzero()[:, 0]
                rows[own] *= 0.0 if self.search.wanted.exclude_self else 0.5
                largest[number] = torch.where(some, 0.0, -1.0).masked_scatter(some, rows.amax(1))
        return largest.argsort(dim=1, descending=True, stable=True)[:, :most]

    def _multiply(self, A: Tensor, origin: int, out: Tensor) -> None:
        """Multiply rows of A by the writers from `origin` on, of which the unit vectors at the end need no product."""
        n_in, n_base = self.layer.n_in, self.n_base
        products = max(0, n_in - n_base - origin)
        if products:
            torch.mm(A, self.layer.writers[origin : n_in - n_base].T, out=out[:, :products])
        if n_base:
            out[:, products:] = A[:, max(0, origin - (n_in - n_base)) : n_base]

    def _collect(self, name: str, S: Tensor, highest: Tensor, start: int, origin: int, look: int) -> None:
        """Add the coefficients of a tile that may matter to a pool, and raise its floor when it has grown."""
        u, floor = self.layer.roundoff, self.floors[name]
        slack = self.slack[start : start + len(highest)]
        if floor.isneginf().any():  # the first tiles: nothing to compare with yet
            floor = torch.maximum(floor, self._first_floor(name, S, highest, slack))
        upper = highest * (1 + u) + slack
        hit = ((upper >= floor) & (upper > self.before[name])).flatten().nonzero()[:, 0]
        for some in hit.split(look):
            self.pools[name] += self._candidates(S, some, floor, slack, start, origin)
            if len(self.pools[name]) > self.limits[name]:
                self._prune(name)

    def _prune(self, name: str) -> Pool:
        """Drop from a pool what cannot matter any more, and raise the floor."""
        wanted = self.search.wanted.count(name) * (self.n if name == "each" else 1)
        enough = wanted if name == "each" else 4 * wanted + (1 << 14)
        pool = self.pools[name]
        if self.search.coefficients.legs is None:  # float64 is dear
            pool = self._refined(self.search.strongest(pool, name, len(pool)))
        self.pools[name] = pool = self.search.strongest(pool, name, enough)
        self.limits[name] = len(pool) + wanted + 4096
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
            slack[some] = (self.M_slack[out] * norms + _UNDERFLOW).double() * self.scale[out]
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
        mine = S.view(-1, self.n, S.shape[1]).transpose(0, 1).flatten(1)
        if mine.shape[1] <= k:
            return slack.new_full((self.n,), -torch.inf)
        return mine.topk(k).values[:, -1].float() * (1 - u) - slack.amax(0)

    def _candidates(self, S: Tensor, rows: Tensor, floor: Tensor, slack: Tensor, start: int, origin: int) -> Pool:
        """Return those coefficients of some rows of a tile whose bound reaches the floor."""
        u = self.layer.roundoff
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
