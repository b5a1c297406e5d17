"""The feed-forward layer: its shape, and the module with transformer_lens' hook points."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bilens.tensor.bilinear import BilinearTensor

from .hooks import Point

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "identity": lambda x: x,
}
KINDS = ("bilinear", "squared", "gated", "plain")
SINGLE = ("squared", "plain")  # without a right factor of their own


@dataclass(frozen=True)
class MLPConfig:
    """The shape of an `MLP`."""

    d_hidden: int
    kind: Literal["bilinear", "squared", "gated", "plain"] = "bilinear"
    act: str | None = None  # activation on the left factor, a name in ACTIVATIONS; None if bilinear or squared
    bias: tuple[bool, bool] = (False, False)  # on the way in (left and right), on the way out

    def __post_init__(self):
        if self.d_hidden < 1:
            raise ValueError(f"d_hidden must be at least 1, got {self.d_hidden}")
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)} for an MLP, got {self.kind!r}")
        if self.quadratic != (self.act is None):
            raise ValueError(
                f"act must be None for a bilinear MLP (or a squared one) and named otherwise, got kind={self.kind!r}, "
                f"act={self.act!r}"
            )
        if self.act is not None and self.act not in ACTIVATIONS:
            raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)} for a {self.kind} MLP, got {self.act!r}")

    @property
    def quadratic(self) -> bool:
        """Whether the layer is a third-order tensor."""
        return self.kind in ("bilinear", "squared")


class MLP(nn.Module):
    """Feed-forward layer: bilinear `W_p((Lx) ⊙ (Rx))`, gated `W_p(act(Lx) ⊙ (Rx))` or plain `W_p act(Lx)`.

    Squared, `W_p((Lx) ⊙ (Lx))`, is bilinear with one matrix as both factors, and without `hook_pre_linear`. Otherwise
    left and right weights are fused, `w = [left; right]`, as in the published checkpoints.

    Args:
        config: Its shape.
        d_model: Width of the residual stream.
    """

    def __init__(self, config: MLPConfig, d_model: int):
        super().__init__()
        self.config, d_hidden = config, config.d_hidden
        self.w = nn.Linear(d_model, d_hidden if config.kind in SINGLE else 2 * d_hidden, bias=config.bias[0])
        self.p = nn.Linear(d_hidden, d_model, bias=config.bias[1])
        self.gate: nn.Module | None = None  # in place of the activation, while that is being annealed
        self.hook_pre, self.hook_post = Point(), Point()
        if config.kind not in SINGLE:
            self.hook_pre_linear = Point()

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """Return what the layer adds to the residual stream."""
        if self.config.kind in SINGLE:
            left = self.hook_pre(self.w(x))
            left = left.square() if self.config.act is None else ACTIVATIONS[self.config.act](left)
            return self.p(self.hook_post(left))
        left, right = self.w(x).chunk(2, dim=-1)
        left, right = self.hook_pre(left), self.hook_pre_linear(right)
        if self.gate is not None:
            left = self.gate(left)
        elif self.config.act is not None:
            left = ACTIVATIONS[self.config.act](left)
        return self.p(self.hook_post(left * right))

    @property
    def left(self) -> Float[Tensor, "hidden d_model"]:
        """Weights of the left factor."""
        return self.w.weight if self.config.kind in SINGLE else self.w.weight.chunk(2)[0]

    @property
    def right(self) -> Float[Tensor, "hidden d_model"]:
        """Weights of the right factor: of a squared layer the left ones; a plain layer has none."""
        if self.config.kind == "squared":
            return self.left
        if self.config.kind == "plain":
            raise AttributeError("a plain MLP (act(Lx) without a product) has no right weights")
        return self.w.weight.chunk(2)[1]

    @property
    def down(self) -> Float[Tensor, "d_model hidden"]:
        """Weights from the hidden units to the residual stream."""
        return self.p.weight

    @property
    def W_gate(self) -> Float[Tensor, "d_model hidden"]:
        """Left weights in transformer_lens' orientation."""
        return self.left.T

    @property
    def W_in(self) -> Float[Tensor, "d_model hidden"]:
        """Right weights (of a plain or squared layer, its only ones) in transformer_lens' orientation."""
        return (self.left if self.config.kind == "plain" else self.right).T

    @property
    def W_out(self) -> Float[Tensor, "hidden d_model"]:
        """Output weights in transformer_lens' orientation."""
        return self.p.weight.T

    @property
    def b_gate(self) -> Float[Tensor, " hidden"]:
        """Bias of the left factor, before the product; zero if the layer has none."""
        return self._side_bias(0)

    @property
    def b_in(self) -> Float[Tensor, " hidden"]:
        """Bias of the right factor (of a plain or squared layer, its only one), before the product; zero if none."""
        return self._side_bias(-1)

    def _side_bias(self, side: int) -> Tensor:
        if self.w.bias is None:
            return self.w.weight.new_zeros(self.config.d_hidden)
        return self.w.bias if self.config.kind in SINGLE else self.w.bias.chunk(2)[side]

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        """Output bias, zero if the layer has none."""
        return self.p.weight.new_zeros(self.p.out_features) if self.p.bias is None else self.p.bias

    def tensor(self) -> BilinearTensor:
        """Return the layer as a third-order tensor, `MLP(x)_o = Σ_ij B[o,i,j] x_i x_j` (2410.08417, section 3).

        The factors are views of the weights. Biases become a constant leg, so the tensor of a layer with biases is
        exact too: see `BilinearTensor`.

        Raises:
            TypeError: The layer is gated or plain, so no such tensor exists.
        """
        if not self.config.quadratic:
            raise TypeError(
                f"only a bilinear MLP is a third-order tensor; this one is {self.config.kind} with activation "
                f"{self.config.act!r}"
            )
        left_bias, right_bias = (None, None) if self.w.bias is None else (self.b_gate, self.b_in)
        return BilinearTensor.from_weights(self.down, self.left, self.right, left_bias, right_bias, self.p.bias)


class NoMLP(nn.Module):
    """What stands where a model of attention only has no MLP: it says so when it is asked for its tensor."""

    config = gate = None

    def tensor(self) -> BilinearTensor:
        """Refuse.

        Raises:
            TypeError: Always: there is no layer.
        """
        raise TypeError("only a bilinear MLP is a third-order tensor; this model has attention only, and no MLPs")


def make_mlp(config: MLPConfig | None, d_model: int) -> MLP | NoMLP:
    """Return the MLP of that shape, or what stands in its place."""
    return NoMLP() if config is None else MLP(config, d_model)
