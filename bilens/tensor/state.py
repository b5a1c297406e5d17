"""The state of a ranking on disk, from which a search that was killed goes on."""

import hashlib
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .candidates import PARTS, Pool
from .search import Search

SAVE_EVERY = 1.0  # seconds between two checkpoints


class State:
    """The candidates found so far, in a folder of the user's choice, one file for each rank.

    Candidates carry their own bounds, so a search may go on in another screening dtype than it was begun in.
    """

    def __init__(self, folder: Path, search: Search, shard: range, group: "dist.ProcessGroup | None"):
        rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        self.path = folder / f"rank-{rank}-of-{size}.safetensors"
        self.shard, self.search, self.saved = shard, search, time.monotonic()
        self.fingerprint = _fingerprint(search, shard)

    def load(self) -> tuple[int, dict[str, Pool]]:
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
            device = self.search.layer.device
            found = {n: Pool(**{part: file.get_tensor(f"{n}.{part}").to(device) for part in PARTS}) for n in pools}
            if self.search.features is not None:
                self.search.features.copy_(file.get_tensor("features"))
        return int(about["next"]), found

    def due(self) -> bool:
        """Return whether the last checkpoint is old."""
        return time.monotonic() - self.saved > SAVE_EVERY

    def save(self, following: int, pools: dict[str, Pool]) -> None:
        """Write the state so that a kill at any time leaves the old one or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"{n}.{name}": part for n, pool in pools.items() for name, part in pool.parts().items()}
        if self.search.features is not None:
            tensors["features"] = self.search.features
        partial = self.path.with_suffix(f".{os.getpid()}.partial")
        save_file(tensors, partial, {"fingerprint": self.fingerprint, "next": str(following)})
        os.replace(partial, self.path)
        self.saved = time.monotonic()


def _fingerprint(search: Search, shard: range) -> str:
    """Return a hash of all that the candidates depend on."""
    digest, of = hashlib.sha256(), search.coefficients
    for tensor in (of.B.down, of.B.left, of.B.right, of.out, of.inp):
        header = "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        digest.update(header.encode())
        if tensor is not None:
            digest.update(_bytes(tensor))
    digest.update(repr((search.wanted, of.B.constant, shard)).encode())
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
