"""The fingerprint by which one file refers to the weights of another."""

import hashlib
import weakref
from collections.abc import Mapping

import torch
from torch import Tensor, nn

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


def casts(module: nn.Module) -> dict[str, str]:
    """Return the fingerprints that weights have after a cast that changes them, by the name of the dtype.

    Whoever writes down a fingerprint writes these beside it: weights that were cast are then still known, by their
    values (`known_as`). Cost: each is a pass over the weights, as the first `fingerprint` is.
    """
    tensors, own = module.state_dict(keep_vars=True), fingerprint(module)
    found = {
        str(dtype).removeprefix("torch."): _digest({name: one.detach().to(dtype) for name, one in tensors.items()})
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    return {name: digest for name, digest in found.items() if digest != own}


def known_as(module: nn.Module, digest: str, cast: Mapping[str, str]) -> str | None:
    """Return how weights are those of a fingerprint: `""` as they are, else after which cast; None if they are not.

    Args:
        module: The model or SAE.
        digest: The `fingerprint` that was written down.
        cast: The `casts` that were written down beside it; empty where none were.
    """
    own = fingerprint(module)
    return "" if own == digest else next((name for name, other in cast.items() if other == own), None)


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
