"""Files that are whole or not there, and the fingerprint by which one file refers to the weights of another."""

import hashlib
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor, nn


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path beside `path` to write to, which becomes `path` at the end of the `with` block.

    A kill or an exception at any time leaves the old file, or none. Missing folders are made. The new file may be read
    by whom the process' umask lets, also where its writer is stricter (safetensors).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid4().hex[:12]}.partial")
    partial.touch(exist_ok=False)
    mode = partial.stat().st_mode
    try:
        yield partial
        partial.chmod(mode)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


# By module: the state of its tensors when they were hashed, and the hash.
_known: weakref.WeakKeyDictionary[nn.Module, tuple[list, str]] = weakref.WeakKeyDictionary()


def fingerprint(module: nn.Module) -> str:
    """Return a hash of the names and values of a model's or an SAE's weights, whatever their device and dtype.

    Half precision counts as the float32 that it widens to, and float64 as float32 where it holds nothing else. It is
    remembered as long as the module lives and its weights are the same tensors, unchanged; a change through `.data`,
    which torch does not record, goes unnoticed.
    """
    tensors = module.state_dict(keep_vars=True)
    state = [_state(name, tensor) for name, tensor in sorted(tensors.items())]
    known, digest = _known.get(module, (None, ""))
    if known != state or None in state:
        digest = _digest(tensors)
        _known[module] = state, digest
    return digest


def _state(name: str, tensor: Tensor) -> tuple | None:
    """Return what differs after any recorded change; None for a tensor whose changes are not recorded."""
    if tensor.is_inference():
        return None
    # the object too, weakly: a new tensor may lie where an old one was
    return name, weakref.ref(tensor), tensor.data_ptr(), tensor._version, tensor.shape, tensor.dtype


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + hashlib.sha256(_bytes(tensor.detach().cpu())).hexdigest().encode())
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    if tensor.dtype in (torch.float16, torch.bfloat16) or (
        tensor.dtype == torch.float64 and torch.equal(tensor.float().double(), tensor)
    ):
        tensor = tensor.float()
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
