"""A ranking that several processes share: each screens some of the output features, and all get the same result."""

from dataclasses import replace

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from .candidates import Pool
from .search import Search


def check_group(group: "dist.ProcessGroup", device: torch.device) -> None:
    """Refuse a process group that cannot hold tensors of this device."""
    backends = dist.get_backend_config(group)
    if f"{device.type}:" not in backends:
        raise ValueError(f"the tensors are on {device}, where group cannot communicate: it is {backends}")


def share(n_out: int, group: "dist.ProcessGroup") -> range:
    """Return the output features of this rank: consecutive, and as many for each as can be."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    return range(rank * n_out // size, (rank + 1) * n_out // size)


def of_the_first(
    rates: dict[torch.dtype, float], group: "dist.ProcessGroup", device: torch.device
) -> dict[torch.dtype, float]:
    """Return what the first rank measured, so that all screen in one dtype."""
    first = _of_all(torch.tensor(list(rates.values()), dtype=torch.float64, device=device), group)[0]
    return dict(zip(rates, first.tolist(), strict=True))


def gather(pool: Pool, group: "dist.ProcessGroup") -> Pool:
    """Return the candidates of all ranks, in the order of the ranks."""
    counts = _of_all(pool.out.new_tensor([len(pool)]), group)[:, 0].tolist()
    parts = {}
    for name, part in pool.parts().items():
        rows = _of_all(torch.nn.functional.pad(part, (0, max(counts) - len(part))), group)
        parts[name] = torch.cat([row[:count] for row, count in zip(rows, counts, strict=True)])
    return replace(pool, **parts)


def share_findings(search: Search, group: "dist.ProcessGroup") -> None:
    """Put together what the ranks chose and verified: the sum of the counts, the largest bound and error."""
    if search.features is not None:  # -1 where another rank has screened
        dist.all_reduce(search.features, dist.ReduceOp.MAX, group=group)
    mine = torch.tensor(list(search.tally.values()), dtype=torch.float64, device=search.layer.device)
    every = _of_all(mine, group)
    verified, (_, bound, error) = int(every[:, 0].sum()), every.amax(0).tolist()
    search.tally.update(verified=verified, bound=bound, error=error)


def _of_all(mine: Shaped[Tensor, " n"], group: "dist.ProcessGroup") -> Shaped[Tensor, "rank n"]:
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    return torch.stack(every)
