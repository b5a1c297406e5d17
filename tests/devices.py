"""A second device without hardware: tensors that say they are on `meta`, keep their values, and mix with no others."""

from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

AWAY = torch.device("meta")
aten = torch.ops.aten
MIXED = {  # what takes tensors on two devices on real hardware too
    *(aten._to_copy.default, aten.copy_.default, aten.index.Tensor, aten.index_put.default, aten.index_put_.default),
}


class Away(Tensor):
    """A tensor on the second device; `held` has its values."""

    @staticmethod
    def __new__(cls, held):
        return Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=AWAY
        )

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"Away({self.held})"

    def tolist(self):  # torch has none for subclasses
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    """Run an operation where its tensors are, or where it is told to put its result."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    away = [tensor for tensor in tensors if isinstance(tensor, Away)]
    here = [tensor for tensor in tensors if not isinstance(tensor, Away) and tensor.ndim]
    if away and here and func not in MIXED:
        raise RuntimeError(f"{func} got tensors on two devices: {[list(tensor.shape) for tensor in (*away, *here)]}")
    device = kwargs.get("device")
    kwargs = kwargs if device is None else kwargs | {"device": torch.device("cpu")}
    wrapped = {id(tensor.held): tensor for tensor in away}  # what an in-place operation returns
    held_args, held_kwargs = tree_map_only(Away, lambda tensor: tensor.held, (args, kwargs))
    result = func(*held_args, **held_kwargs)
    first = isinstance(tensors[0], Away) if tensors else False
    if not (first if device is None else torch.device(device) == AWAY):
        return result
    return tree_map_only(Tensor, lambda out: wrapped[id(out)] if id(out) in wrapped else Away(out), result)


class _Factories(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


@contextmanager
def second_device():
    """Let tensors be made on the second device, and moved to it, for the length of a `with` block."""
    with _Factories():
        yield


def move(module: nn.Module) -> nn.Module:
    """Put the weights of a module on the second device; they need no gradient there."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(Away(parameter.detach()), requires_grad=False))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, Away(buffer))
    return module
