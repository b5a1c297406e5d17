"""A device that is not there: tensors on it are ordinary ones with a mark; mixing the two kinds is an error."""

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

FAR, CPU = torch.device("xpu", 0), torch.device("cpu")


def send(module: nn.Module) -> nn.Module:
    """Mark the weights of a module as being far."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.is_far = True
    return module


def is_far(value: object) -> bool:
    return isinstance(value, Tensor) and getattr(value, "is_far", False)


class Far(TorchFunctionMode):
    """Follow which tensors are far, and refuse to compute with both kinds at once, as torch does between devices."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__ and is_far(args[0]):
            return FAR
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        near = [tensor for tensor in tensors if tensor.ndim and not is_far(tensor)]
        far, copies = any(map(is_far, tensors)), func in (Tensor.to, Tensor.cpu, Tensor.copy_)
        assert copies or not (far and near), f"{func} mixes devices: {[(t.shape, is_far(t)) for t in tensors]}"
        assert not (far and func is Tensor.numpy), "an array of another device's memory"
        place = next((value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.device)), None)
        if place == FAR:
            args = [CPU if isinstance(value, torch.device) else value for value in args]
            kwargs = {key: CPU if isinstance(value, torch.device) else value for key, value in kwargs.items()}
        if func is Tensor.copy_:
            return func(*args, **kwargs)
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):
            place = FAR if is_far(args[1]) else CPU
        far = func is not Tensor.cpu and (far if place is None else place == FAR)
        found = func(*args, **kwargs)
        if copies and found is args[0] and is_far(found) != far:
            found = found.view(found.shape)  # it would have been another tensor
        for value in tree_leaves(found):
            if isinstance(value, Tensor):
                value.is_far = far
        return found
