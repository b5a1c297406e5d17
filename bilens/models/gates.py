"""What an annealed gate or norm computes, between what it was and a linear map."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .mlp import ACTIVATIONS

# The switch s of z and β, between 0 and 1: z s is the activation at β = 1 and z/2 at β = 0. It is not written with the
# activation, as act(βz)/β, which half precision cannot represent for a small β.
SWITCHES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda z, beta: torch.sigmoid(beta * z),
    "gelu": lambda z, beta: torch.erfc(beta * z * -math.sqrt(0.5)) / 2,
    "gelu_tanh": lambda z, beta: torch.sigmoid(beta * z * (1 + 0.044715 * (beta * z) ** 2) * math.sqrt(8 / math.pi)),
    "relu": lambda z, beta: (1 + beta * z.sign()) / 2,
}


def _switched(z: Tensor, switch: Callable[[Tensor, Tensor], Tensor], beta: Tensor, c: Tensor) -> Tensor:
    return c * z * switch(z, beta)


class Gate(nn.Module):
    """An activation on its way to a linear map, `c z s(βz)` with β = 1 - alpha (2410.08417, appendix J).

    The switch s is `σ(βz)` for SiLU, `Φ(βz)` for GELU (approximated by tanh where the model's is) and
    `(1 + β sign z)/2` for ReLU: at β = 1 the gate is the activation (c starts at 1), at β = 0 it is `c z / 2`.

    Args:
        act: The activation, a name in `SWITCHES`.
    """

    def __init__(self, act: str):
        super().__init__()
        if act not in SWITCHES:
            raise ValueError(f"act must be one of {', '.join(SWITCHES)} (those have a path to linear), got {act!r}")
        self.act = act
        self.c = nn.Parameter(torch.ones(()))
        self.register_buffer("beta", torch.ones(()))

    def forward(self, z: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
        """Apply the gate to the left factor; for the backward pass nothing is kept but z."""
        switch = SWITCHES[self.act]
        return checkpoint(_switched, z, switch, self.beta, self.c, use_reentrant=False, preserve_rng_state=False)

    def set_alpha(self, alpha: int | float) -> None:
        """Go to β = 1 - alpha."""
        self.beta.fill_(1 - alpha)

    @property
    def alpha(self) -> float:
        """How far the gate is."""
        return 1 - self.beta.item()

    def fold_into(self, weight: Float[Tensor, "hidden *inp"]) -> Float[Tensor, "hidden *inp"]:
        """Return the weight (or bias) of the left factor times the gate's slope at β = 0, `c / 2`."""
        return weight * (self.c / 2).to(weight)


class Blend(nn.Module):
    """A gate or a norm on its way to a fitted linear map, `(1 - alpha) f(x) + alpha M x` (2410.08417, appendix J).

    Args:
        original: f: an activation's name, or the norm itself.
        weight: M, `[width, width]`; or `[width]`, its diagonal.
    """

    def __init__(self, original: str | nn.Module, weight: Float[Tensor, "..."]):
        super().__init__()
        self.original = original
        self.register_buffer("weight", weight)
        self.register_buffer("beta", weight.new_ones(()))

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Apply the blend."""
        before = ACTIVATIONS[self.original](x) if isinstance(self.original, str) else self.original(x)
        after = x * self.weight if self.weight.ndim == 1 else F.linear(x, self.weight)
        return torch.lerp(after.to(before), before, self.beta.to(before))

    def set_alpha(self, alpha: int | float) -> None:
        """Go to a weight of `alpha` for the linear map."""
        self.beta.fill_(1 - alpha)

    @property
    def alpha(self) -> float:
        """Weight of the linear map."""
        return 1 - self.beta.item()

    def fold_into(self, weight: Float[Tensor, "width *inp"]) -> Float[Tensor, "width *inp"]:
        """Return the weight (or bias) of the layer before a gate, followed by M."""
        own = self.weight.to(weight)
        return own @ weight if own.ndim == 2 else own.view(-1, *(1 for _ in weight.shape[1:])) * weight

    def fold_before(self, weight: Float[Tensor, "out width"]) -> Float[Tensor, "out width"]:
        """Return the weight of the layer after a norm, preceded by M."""
        own = self.weight.to(weight)
        return weight * own if own.ndim == 1 else weight @ own
