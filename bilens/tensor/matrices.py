"""Many interaction matrices of one layer at a time: what `decompositions`, `outputs` and `factorizations` stand on."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from .bilinear import BilinearTensor

CUBE_BYTES = 2**29  # half the cube in the residual basis is only built below this


class Matrices:
    """Interaction matrices of many output directions; from the cube where that is cheaper than from the factors."""

    def __init__(self, B: BilinearTensor, n: int):
        self.B, self.blocks = B, None
        self.stripes = [(i, min(i + max(32, B.inp // 16), B.inp)) for i in range(0, B.inp, max(32, B.inp // 16))]
        numbers = B.out * sum((stop - start) * (B.inp - start) for start, stop in self.stripes)
        if n * B.hidden > B.out * (n + B.hidden) and numbers * B.down.element_size() <= CUBE_BYTES:
            self.blocks = [self._block(start, stop) for start, stop in self.stripes]

    def _block(self, start: int, stop: int) -> Float[Tensor, "out pairs"]:
        """Return rows `start:stop` of the symmetric cube, from column `start` on."""
        left, right, down = self.B.left, self.B.right, self.B.down / 2
        rows = max(1, 2**23 // (left[:, start:].numel() * left.element_size()))  # temporaries that the allocator keeps
        parts = []
        for i in range(start, stop, rows):
            some = slice(i, min(i + rows, stop))
            pairs = left[:, some, None] * right[:, None, start:]
            parts.append(down @ torch.addcmul(pairs, right[:, some, None], left[:, None, start:]).flatten(1))
        return torch.cat(parts, 1)

    def of(self, u: Float[Tensor, "n out"]) -> Float[Tensor, "n inp inp"]:
        """Return the matrices of some directions at once."""
        if self.blocks is None:
            return self.B.matrix(u)
        return self.unfold(u.new_empty(len(u), self.B.inp, self.B.inp), (u @ block for block in self.blocks))

    def chunks(self, u: Float[Tensor, "n out"], size: int) -> Iterator[Float[Tensor, "some inp inp"]]:
        """Yield the matrices of the directions in order, about `size` bytes at a time; each valid until the next."""
        B, bytes_each = self.B, self.B.inp**2 * u.element_size()
        if self.blocks is None:
            yield from map(B.matrix, u.split(max(1, size // (2 * bytes_each + B.hidden * B.inp * u.element_size()))))
            return
        parts = u.split(max(B.inp // 8, size // bytes_each))  # enough for a pass over the cube to be worth it
        reused = None if _needs_grad(u, *self.blocks) else u.new_empty(len(parts[0]), B.inp, B.inp)
        for some in parts:
            X = u.new_empty(len(some), B.inp, B.inp) if reused is None else reused[: len(some)]
            yield self.unfold(X, (some @ block for block in self.blocks))

    def unfold(self, X: Float[Tensor, "n inp inp"], blocks: Iterator[Tensor]) -> Float[Tensor, "n inp inp"]:
        """Fill symmetric matrices from the blocks of their upper triangles."""
        for (start, stop), block in zip(self.stripes, blocks, strict=True):
            block = block.view(len(X), stop - start, -1)
            X[:, start:stop, start:] = block
            X[:, stop:, start:stop] = block[:, :, stop - start :].mT
        return X


def output_gram(B: BilinearTensor) -> Float[Tensor, "out out"]:
    """Return the inner products `⟨Q_o, Q_p⟩_F` of the matrices of two outputs, in float64, as `B.inner` does."""
    down, left, right = B.down.double(), B.left.double(), B.right.double()
    gram = down.new_zeros(B.out, B.out)
    for some in torch.arange(B.hidden, device=down.device).split(1024):
        straight = (left[some] @ left.T).mul_(right[some] @ right.T)
        crossed = (left[some] @ right.T).mul_(right[some] @ left.T)
        gram += down[:, some] @ straight.add_(crossed).div_(2) @ down.T
    return gram


def frobenius(gram: Float[Tensor, "out out"], u: Float[Tensor, "n out"]) -> Float[Tensor, " n"]:
    """Return the Frobenius norm of each direction's matrix, given the Gram matrix of the outputs'."""
    u = u.to(gram)
    return (u @ gram * u).sum(1).clamp(min=0).sqrt()


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def check_directions(name: str, u: Float[Tensor, "*n out"], B: BilinearTensor) -> Float[Tensor, "rows out"]:
    """Return directions as rows, after a look at them and at the layer."""
    if u.shape[-1:] != (B.out,):
        raise ValueError(f"{name} must have {B.out} entries on its last axis (out), got shape {list(u.shape)}")
    if not u.numel():
        raise ValueError(f"{name} must hold at least one direction, got none")
    for what, tensor in ((name, u), ("B.down", B.down), ("B.left", B.left), ("B.right", B.right)):
        check_finite(what, tensor)
    return u.reshape(-1, B.out)


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinities."""
    if not tensor.isfinite().all():
        raise ValueError(f"{name} must be finite, got {int((~tensor.isfinite()).sum())} entries that are not")
