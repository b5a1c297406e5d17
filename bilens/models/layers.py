"""The parts of a transformer block, each with transformer_lens' hook points.

A module's hook points see exactly the quantity that their name says, in transformer_lens' shapes: a hook that returns
a tensor replaces that quantity for everything downstream.
"""

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from bilens.tensor.bilinear import BilinearTensor

from .rotary import Angles, rotate

# Keys are twice as wide as values in bilinear attention; more positions go out than came in.
KeyValue = tuple[Float[Tensor, "batch _past head _width"], Float[Tensor, "batch _past head d_head"]]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "identity": lambda x: x,
}


class RMSNorm(nn.Module):
    """Divide by the root mean square, `x / sqrt(mean(x²) + eps)`, then optionally scale and shift.

    The mean square of half precision is taken in float32, where it neither overflows nor swallows eps.

    Args:
        d_model: Width of the residual stream.
        eps: Added to the mean square.
        gain: Whether the norm has a gain `weight` (the 2024 checkpoints do).
        shift: Whether it has a shift `bias` too.
    """

    def __init__(self, d_model: int, eps: float, gain: bool = False, shift: bool = False):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model)) if gain else None
        self.bias = nn.Parameter(torch.zeros(d_model)) if shift else None
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """Return the normalised `x`; `hook_scale` sees the root mean square, `hook_normalized` the ratio."""
        x = self.hook_normalized(x / self.hook_scale(self.rms(x)))
        x = x if self.weight is None else x * self.weight
        return x if self.bias is None else x + self.bias

    def rms(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... 1"]:
        """Return what `x` is divided by, `sqrt(mean(x²) + eps)`; no hook sees it."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide.pow(2).mean(-1, keepdim=True) + self.eps).sqrt().to(x.dtype)

    def affine(self, like: Float[Tensor, "... d_model"]) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
        """Return gain and shift, ones and zeros where the norm has none, of the dtype and device of `like`."""
        gain = like.new_ones(like.shape[-1]) if self.weight is None else self.weight.to(like)
        return gain, torch.zeros_like(gain) if self.bias is None else self.bias.to(like)

    def linear(self, x: Float[Tensor, "... d_model"]) -> tuple[Float[Tensor, "... d_model"], Float[Tensor, " d_model"]]:
        """Return factor and shift: `norm(x) = factor * x + shift` exactly, `factor = gain / rms(x)`."""
        gain, shift = self.affine(x)
        return gain / self.rms(x), shift


class NoNorm(nn.Module):
    """What stands where a model has no norm: it answers as a norm does."""

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """Return `x` itself."""
        return x

    def rms(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... 1"]:
        """Return ones: `x` is divided by nothing."""
        return torch.ones_like(x[..., :1])

    def affine(self, like: Float[Tensor, "... d_model"]) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
        """Return a gain of one and a shift of zero."""
        return like.new_ones(like.shape[-1]), like.new_zeros(like.shape[-1])

    def linear(self, x: Float[Tensor, "... d_model"]) -> tuple[Float[Tensor, "... d_model"], Float[Tensor, " d_model"]]:
        """Return a factor of one and a shift of zero."""
        return torch.ones_like(x), self.affine(x)[1]


Norm: TypeAlias = RMSNorm | NoNorm


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions; softmax, or bilinear (two score matrices multiplied).

    The softmax form is `softmax(q·k / sqrt(d_head)) v`; the bilinear form has no softmax: its pattern is
    `(q·k)(q2·k2) / d_head`, masked with zeros. The module's output carries the published attention scale, so it is
    exactly what is added to the residual stream.

    With fewer key-value heads than heads (grouped queries, arXiv 2305.13245), neighbouring heads share one. As in
    transformer_lens, `hook_k`, `hook_rot_k` and `hook_v` then see one row per key-value head, while `W_K` and `W_V`
    repeat it for every head that reads it.

    Args:
        d_model: Width of the residual stream.
        n_heads: Number of heads.
        scale: Factor on the output, `1/sqrt(2 n_layers)` in the published models.
        kind: `"softmax"` or `"bilinear"`.
        d_head: Width of a head; `d_model / n_heads` if `None`.
        n_key_value_heads: Number of key-value heads, a divisor of `n_heads`; as many if `None`.
        bias: Whether queries, keys and values have a bias; whether the output has one.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        scale: float,
        kind: Literal["softmax", "bilinear"],
        d_head: int | None = None,
        n_key_value_heads: int | None = None,
        bias: tuple[bool, bool] = (False, False),
    ):
        super().__init__()
        self.n_heads, self.scale, self.kind = n_heads, scale, kind
        self.d_head = d_head or d_model // n_heads
        shared = n_key_value_heads or n_heads
        self.group = n_heads // shared  # heads that share a key-value head
        counts = (n_heads, shared, shared) if kind == "softmax" else (n_heads,) * 5
        self.widths = [count * self.d_head for count in counts]  # of q, k, v in `qkv`; bilinear q, k, q2, k2, v
        self.qkv = nn.Linear(d_model, sum(self.widths), bias=bias[0])
        self.o = nn.Linear(n_heads * self.d_head, d_model, bias=bias[1])
        self.hook_q, self.hook_k, self.hook_v = HookPoint(), HookPoint(), HookPoint()
        self.hook_rot_q, self.hook_rot_k = HookPoint(), HookPoint()
        if kind == "bilinear":
            self.hook_q2, self.hook_k2, self.hook_rot_q2, self.hook_rot_k2 = (HookPoint() for _ in range(4))
        self.hook_attn_scores, self.hook_pattern = HookPoint(), HookPoint()
        self.hook_z, self.hook_result = HookPoint(), HookPoint()

    def _head_weights(self, part: int) -> Float[Tensor, "head d_model d_head"]:
        weights = self.qkv.weight.split(self.widths)[part]
        weights = rearrange(weights, "(head d_head) d_model -> head d_model d_head", d_head=self.d_head)
        return weights if len(weights) == self.n_heads else weights.repeat_interleave(self.group, 0)

    def _head_biases(self, part: int) -> Float[Tensor, "head d_head"]:
        if self.qkv.bias is None:
            return self.qkv.weight.new_zeros(self.n_heads, self.d_head)
        biases = rearrange(self.qkv.bias.split(self.widths)[part], "(head d_head) -> head d_head", d_head=self.d_head)
        return biases if len(biases) == self.n_heads else biases.repeat_interleave(self.group, 0)

    @property
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        """Query weights."""
        return self._head_weights(0)

    @property
    def W_K(self) -> Float[Tensor, "head d_model d_head"]:
        """Key weights of each head."""
        return self._head_weights(1)

    @property
    def W_V(self) -> Float[Tensor, "head d_model d_head"]:
        """Value weights of each head."""
        return self._head_weights(-1)

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """Output weights, the attention scale included: `hook_z` times `W_O`, summed over heads, plus `b_O`."""
        return self.scale * rearrange(self.o.weight, "d_model (head d_head) -> head d_head d_model", head=self.n_heads)

    @property
    def b_Q(self) -> Float[Tensor, "head d_head"]:
        """Query biases, zero if there are none."""
        return self._head_biases(0)

    @property
    def b_K(self) -> Float[Tensor, "head d_head"]:
        """Key biases of each head, zero if there are none."""
        return self._head_biases(1)

    @property
    def b_V(self) -> Float[Tensor, "head d_head"]:
        """Value biases of each head, zero if there are none."""
        return self._head_biases(-1)

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:
        """Output bias, the attention scale included; zero if there is none."""
        return self.o.weight.new_zeros(self.o.out_features) if self.o.bias is None else self.scale * self.o.bias

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        rotary: Angles,
        mask: Bool[Tensor, "batch seq keys"] | None = None,
        past: KeyValue | None = None,
    ) -> tuple[Float[Tensor, "batch seq d_model"], KeyValue]:
        """Attend from each position of `x` to the positions `mask` allows (`None`: itself and those before it).

        `past` holds the keys and values of earlier positions, per key-value head. Returns the output and the keys and
        values of all positions so far. Bilinear attention keeps its second keys beside the first, along the last axis.
        """
        heads = [
            rearrange(part, "batch seq (head d_head) -> batch seq head d_head", d_head=self.d_head)
            for part in self.qkv(x).split(self.widths, dim=-1)
        ]
        q, k = (
            self.hook_rot_q(rotate(self.hook_q(heads[0]), rotary)),
            self.hook_rot_k(rotate(self.hook_k(heads[1]), rotary)),
        )
        if self.kind == "bilinear":
            q2 = self.hook_rot_q2(rotate(self.hook_q2(heads[2]), rotary))
            k2 = self.hook_rot_k2(rotate(self.hook_k2(heads[3]), rotary))
            q, k = torch.cat((q, q2), -1), torch.cat((k, k2), -1)
        v = self.hook_v(heads[-1])
        if past is not None:
            k, v = torch.cat((past[0], k), 1), torch.cat((past[1], v), 1)
        past = k, v
        if self.group > 1:
            k, v = k.repeat_interleave(self.group, 2), v.repeat_interleave(self.group, 2)
        z = self.hook_z(self._mix(q, k, v, mask))
        return self._project(z), past

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Average (or sum) the values by the pattern; fused unless the scores or the pattern are looked at."""
        if self.kind == "softmax" and not (self.hook_attn_scores.has_hooks() or self.hook_pattern.has_hooks()):
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            attn_mask = None if mask is None else mask[:, None]
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=mask is None)
            return z.transpose(1, 2)
        d_head = v.shape[-1]
        if mask is None:
            mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()[None]
        if self.kind == "softmax":
            scores = _dot(q, k) / math.sqrt(d_head)
            scores = self.hook_attn_scores(scores.masked_fill(~mask[:, None], -torch.inf))
            pattern = scores.softmax(-1)
        else:
            (q, q2), (k, k2) = q.split(d_head, -1), k.split(d_head, -1)
            scores = self.hook_attn_scores(_dot(q, k) * _dot(q2, k2) / d_head)
            pattern = scores.masked_fill(~mask[:, None], 0)
        pattern = self.hook_pattern(pattern)
        return einsum(pattern, v, "batch head seq keys, batch keys head d_head -> batch seq head d_head")

    def _project(self, z: Tensor) -> Tensor:
        """Write the heads to the residual stream; head by head when `hook_result` is looked at."""
        if self.hook_result.has_hooks():
            result = einsum(z, self.W_O, "batch seq head d_head, head d_head d_model -> batch seq head d_model")
            return self.hook_result(result).sum(2) + self.b_O
        out = self.o(rearrange(z, "batch seq head d_head -> batch seq (head d_head)"))
        return out if self.scale == 1 else out * self.scale


def _dot(q: Tensor, k: Tensor) -> Tensor:
    return einsum(q, k, "batch seq head d_head, batch keys head d_head -> batch head seq keys")


class MLP(nn.Module):
    """Feed-forward layer: bilinear `W_p((Lx) ⊙ (Rx))`, gated `W_p(act(Lx) ⊙ (Rx))` or plain `W_p act(Lx)`.

    Left and right weights are fused, `w = [left; right]`, as in the published checkpoints.

    Args:
        d_model: Width of the residual stream.
        d_hidden: Number of hidden units.
        kind: `"bilinear"`, `"gated"` or `"plain"`.
        act: Name of the activation (`"relu"`, `"silu"`, `"gelu"`, `"identity"`); `None` for a bilinear layer.
        bias_in: Whether `w` has a bias.
        bias_out: Whether `p` has a bias.
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        kind: Literal["bilinear", "gated", "plain"],
        act: str | None,
        bias_in: bool,
        bias_out: bool,
    ):
        super().__init__()
        self.kind, self.act = kind, act
        self.w = nn.Linear(d_model, d_hidden if kind == "plain" else 2 * d_hidden, bias=bias_in)
        self.p = nn.Linear(d_hidden, d_model, bias=bias_out)
        self.gate: nn.Module | None = None  # in place of the activation, while that is being annealed
        self.hook_pre, self.hook_post = HookPoint(), HookPoint()
        if kind != "plain":
            self.hook_pre_linear = HookPoint()

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """Return what the layer adds to the residual stream."""
        if self.kind == "plain":
            return self.p(self.hook_post(ACTIVATIONS[self.act](self.hook_pre(self.w(x)))))
        left, right = self.w(x).chunk(2, dim=-1)
        left, right = self.hook_pre(left), self.hook_pre_linear(right)
        if self.gate is not None:
            left = self.gate(left)
        elif self.act is not None:
            left = ACTIVATIONS[self.act](left)
        return self.p(self.hook_post(left * right))

    @property
    def left(self) -> Float[Tensor, "hidden d_model"]:
        """Weights of the left factor."""
        return self.w.weight if self.kind == "plain" else self.w.weight.chunk(2)[0]

    @property
    def right(self) -> Float[Tensor, "hidden d_model"]:
        """Weights of the right factor; a plain layer has none."""
        if self.kind == "plain":
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
        """Right weights (of a plain layer, its only ones) in transformer_lens' orientation."""
        return (self.left if self.kind == "plain" else self.right).T

    @property
    def W_out(self) -> Float[Tensor, "hidden d_model"]:
        """Output weights in transformer_lens' orientation."""
        return self.p.weight.T

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
        if self.kind != "bilinear":
            raise TypeError(
                f"only a bilinear MLP is a third-order tensor; this one is {self.kind} with activation {self.act!r}"
            )
        left_bias, right_bias = (None, None) if self.w.bias is None else self.w.bias.chunk(2)
        return BilinearTensor.from_weights(self.down, self.left, self.right, left_bias, right_bias, self.p.bias)


class Block(nn.Module):
    """One pre-norm transformer block; every `hook_*_out` is exactly what is added to the residual stream."""

    def __init__(self, ln1: Norm, attn: Attention, ln2: Norm, mlp: MLP):
        super().__init__()
        self.ln1, self.attn, self.ln2, self.mlp = ln1, attn, ln2, mlp
        self.hook_resid_pre, self.hook_attn_out, self.hook_resid_mid = HookPoint(), HookPoint(), HookPoint()
        self.hook_mlp_in, self.hook_mlp_out, self.hook_resid_post = HookPoint(), HookPoint(), HookPoint()

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        rotary: Angles,
        mask: Bool[Tensor, "batch seq keys"] | None = None,
        past: KeyValue | None = None,
    ) -> tuple[Float[Tensor, "batch seq d_model"], KeyValue]:
        """Return the residual stream after the block, and the keys and values of all positions so far."""
        x = self.hook_resid_pre(x)
        attn_out, past = self.attn(self.ln1(x), rotary, mask, past)
        x = self.hook_resid_mid(x + self.hook_attn_out(attn_out))
        mlp_out = self.mlp(self.hook_mlp_in(self.ln2(x)))
        return self.hook_resid_post(x + self.hook_mlp_out(mlp_out)), past
