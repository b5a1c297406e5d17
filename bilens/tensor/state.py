"""The state of a ranking on disk, from which a search that was killed goes on."""

from pathlib import Path

import torch
import torch.distributed as dist

from .candidates import PARTS, Pool
from .keeping import Pace, damaged, fingerprint_of, read_own_state, write_state
from .search import Search


class State:
    """The candidates found so far, in a folder of the user's choice, one file for each rank.

    Candidates carry their own bounds, so a search may go on in another screening dtype than it was begun in.
    """

    def __init__(self, folder: Path, search: Search, shard: range, group: "dist.ProcessGroup | None"):
        rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        self.path = folder / f"rank-{rank}-of-{size}.safetensors"
        self.shard, self.search, self.pace = shard, search, Pace()
        self.fingerprint = _fingerprint(search, shard)

    def load(self) -> tuple[int, dict[str, Pool]]:
        """Return where to go on and what was found until there.

        Raises:
            ValueError: The file is of another search, or damaged; it says what to do.
        """
        pools = self.search.pools()
        if (own := read_own_state(self.path, self.fingerprint)) is None:
            return self.shard.start, pools
        tensors, about = own
        chosen = {} if self.search.features is None else {"features": self.search.features}
        if set(tensors) != {f"{name}.{part}" for name in pools for part in PARTS} | set(chosen):
            raise damaged(self.path, f"it holds {', '.join(sorted(tensors)) or 'nothing'}")
        device = self.search.layer.device
        found = {n: Pool(**{part: tensors[f"{n}.{part}"].to(device) for part in PARTS}) for n in pools}
        following = about.get("next")
        if not isinstance(following, int) or not self.shard.start <= following <= self.shard.stop:
            raise damaged(self.path, f"next must lie in {self.shard}, got {following!r}")
        for name, pool in found.items():
            if (why := self._flaw(pool, following)) is not None:
                raise damaged(self.path, f"{name}.{why}")
        for name, mine in chosen.items():
            stored, n_in = tensors[name], self.search.layer.n_in
            fits = stored.shape == mine.shape and stored.dtype == mine.dtype
            if not fits or not -1 <= stored.min() <= stored.max() < n_in:
                raise damaged(self.path, f"{name} must hold features below {n_in}, {list(mine.shape)} of them")
            mine.copy_(stored)
        return following, found

    def _flaw(self, pool: Pool, following: int) -> str | None:
        """Say what of a pool cannot be; None if nothing."""
        empty, sizes = Pool.empty(pool.out.device), {len(part) for part in pool.parts().values() if part.ndim == 1}
        for name, part in pool.parts().items():
            if part.ndim != 1 or len(sizes) != 1 or part.dtype != getattr(empty, name).dtype:
                return f"{name} must be a column as the others, got {part.dtype} of shape {list(part.shape)}"
        limits = {"out": (self.shard.start, following - 1), "left": (0, self.search.layer.n_in - 1), "sure": (0, 1)}
        limits |= {
            "right": limits["left"],
            "size": (0.0, torch.finfo(torch.float64).max),
            "slack": (0.0, torch.finfo(torch.float64).max),
        }
        for name, (low, high) in limits.items():
            part = getattr(pool, name)
            if len(part) and not (part.min() >= low and part.max() <= high):
                return f"{name} must lie between {low} and {high}, got {part.min().item()} to {part.max().item()}"
        return None if (pool.left <= pool.right).all() else "left must not exceed right"

    def save(self, following: int, pools: dict[str, Pool]) -> None:
        """Write the state so that a kill at any time leaves the old one or the new one."""
        tensors = {f"{n}.{name}": part for n, pool in pools.items() for name, part in pool.parts().items()}
        if self.search.features is not None:
            tensors["features"] = self.search.features
        with self.pace.writing():
            write_state(self.path, tensors, {"fingerprint": self.fingerprint, "next": following})


def _fingerprint(search: Search, shard: range) -> str:
    """Return a hash of all that the candidates depend on."""
    of = search.coefficients
    return fingerprint_of((of.B.down, of.B.left, of.B.right, of.out, of.inp), search.wanted, of.B.constant, shard)
