"""How heads make queries and keys of what attention reads: a linear map, perhaps a norm, a rotation by position."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .layers import Norm
from .rotary import Angles, rotate


@dataclass(frozen=True, repr=False, eq=False)
class Projection:
    """Queries or keys of all heads, one branch of them: `gain (W x + b) / divisor(x) + shift`, before rotation.

    The division is the norm's, of queries and keys; without one, divisor 1. It is the only part that is not affine.

    Args:
        weight: Of each head that has its own, as in `W_Q`.
        bias: Theirs.
        norm: The norm of queries or keys; one that does nothing if there is none.
        full: Whether it takes all heads as one vector.
        group: How many heads share each of these (grouped queries): what is returned repeats them.
    """

    weight: Float[Tensor, "shared d_model d_head"]
    bias: Float[Tensor, "shared d_head"] | None
    norm: Norm
    full: bool
    group: int

    def folded(self) -> tuple[Float[Tensor, "head d_model d_head"], Float[Tensor, "head d_head"]]:
        """Return weights and biases with the norm's gain (and centring, if it centres) folded in."""
        bias = self.weight.new_zeros(self.weight[:, 0].shape) if self.bias is None else self.bias
        rows = self._joined(torch.cat((self.weight, bias[:, None]), 1).transpose(0, 1))
        rows = self._split(self.norm.center(rows) * self.norm.affine(rows)[0]).transpose(0, 1)
        return rows[:, :-1], rows[:, -1]

    def shift(self) -> Float[Tensor, "head d_head"] | None:
        """Return what the norm adds after its division, `None` if it adds nothing."""
        if self.norm.affine(self._joined(self.weight[:, 0]))[1].count_nonzero() == 0:
            return None
        like = self._joined(self.weight.transpose(0, 1))
        return self._split(self.norm.affine(like)[1].expand_as(like[:1]))[0]

    def divisor(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch head"]:
        """Return what the norm divides each head's queries or keys by, where attention reads `x`."""
        made = torch.einsum("...i,hid->...hd", x, self.weight.to(x))
        made = made if self.bias is None else made + self.bias.to(x)
        rms = self.norm.rms(self._joined(made))
        rms = rms if self.full else rms[..., 0]
        return rms.expand(made.shape[:-1]).repeat_interleave(self.group, -1)

    def _joined(self, heads: Float[Tensor, "*batch shared d_head"]) -> Tensor:
        """Put the heads together as the norm sees them."""
        return heads.flatten(-2) if self.full else heads

    def _split(self, joined: Tensor) -> Float[Tensor, "*batch head d_head"]:
        """Take them apart again, each for all heads that share it."""
        heads = joined.unflatten(-1, (-1, self.weight.shape[-1])) if self.full else joined
        return heads.repeat_interleave(self.group, -2)


def rotated(heads: Float[Tensor, "*batch head d_head"], angles: Angles) -> Float[Tensor, "*batch head d_head"]:
    """Rotate heads that all are at one position; `angles` are of that position, `[1, 1, half]`."""
    return rotate(heads.reshape(1, 1, -1, heads.shape[-1]), angles).view_as(heads)
