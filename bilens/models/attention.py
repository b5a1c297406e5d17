"""Causal attention with rotary positions: its shape, and the module with transformer_lens' hook points."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .hooks import Point
from .rotary import Angles, Rope, rotate

# Keys are twice as wide as values in bilinear attention; more positions go out than came in.
KeyValue = tuple[Float[Tensor, "batch _past head _width"], Float[Tensor, "batch _past head d_head"]]
KINDS = ("softmax", "bilinear")


@dataclass(frozen=True)
class AttentionConfig:
    """The shape of `Attention`; `of_width` makes one whose heads share the residual stream's width evenly."""

    n_heads: int
    d_head: int
    kind: Literal["softmax", "bilinear"] = "softmax"
    scale: float = 1.0  # factor on the output: 1/sqrt(2 n_layers) in the published models
    n_key_value_heads: int | None = None  # keys and values that groups of heads share; None: n_heads
    bias: tuple[bool, bool] = (False, False)  # on queries, keys and values; on the output
    window: int | None = None  # how many positions each attends to, itself included; None: all before it
    rope: Rope = field(default_factory=Rope)

    def __post_init__(self):
        if self.n_key_value_heads is None:
            object.__setattr__(self, "n_key_value_heads", self.n_heads)
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)} for attention, got {self.kind!r}")
        for name in ("n_heads", "n_key_value_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 or None, got {self.window}")
        if self.d_head < 2 or self.d_head % 2:
            raise ValueError(f"d_head must be even (rotary embedding rotates pairs), got {self.d_head}")
        if self.n_heads % self.n_key_value_heads:
            raise ValueError(
                f"n_key_value_heads must divide n_heads={self.n_heads}, got n_key_value_heads={self.n_key_value_heads}"
            )
        if self.kind == "bilinear" and self.n_key_value_heads != self.n_heads:
            raise ValueError(
                f"n_key_value_heads must be None or n_heads={self.n_heads} for bilinear attention, got "
                f"n_key_value_heads={self.n_key_value_heads}"
            )

    @classmethod
    def of_width(cls, d_model: int, n_heads: int, **fields: Any) -> "AttentionConfig":
        """Return the shape with heads of width `d_model / n_heads`."""
        if n_heads < 1:
            raise ValueError(f"n_heads must be at least 1, got {n_heads}")
        if d_model % n_heads or (d_model // n_heads) % 2:
            raise ValueError(
                f"d_model must be an even multiple of n_heads (rotary embedding rotates pairs), "
                f"got d_model={d_model}, n_heads={n_heads}"
            )
        return cls(n_heads, d_model // n_heads, **fields)


def geometry(
    config: AttentionConfig, mask: Bool[Tensor, "batch keys"] | None, keys: int, new: int, like: Tensor
) -> tuple[Angles, Bool[Tensor, "batch new keys"] | None]:
    """Return the rotary angles of the last `new` of `keys` positions, and which positions they attend to.

    Args:
        config: The attention's shape.
        mask: False at padding, which takes no position; `None` if there is none.
        keys: How many positions there are.
        new: How many of them attend.
        like: The residual stream, `[batch, ...]`, whose dtype and device these have.

    Returns:
        Angles, and the mask of keys for each query; `None` if each attends to itself and all before it.
    """
    batch, index = len(like), torch.arange(keys, device=like.device)
    positions, attend = index.expand(batch, keys), None
    if mask is not None:
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    cut = config.window is not None and keys > config.window
    if mask is not None or new != keys or cut:
        back = index[keys - new :, None] - index[None, :]
        attend = ((back >= 0) & (back < config.window) if cut else back >= 0).expand(batch, new, keys)
        if mask is not None:  # padding sees itself, so that no row of the softmax is empty
            attend = attend & (mask[:, None, :] | (index[None, :] == index[keys - new :, None]))
    return config.rope.angles(positions[:, keys - new :], config.d_head, like.dtype), attend


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions; softmax, or bilinear (two score matrices multiplied).

    The softmax form is `softmax(q·k / sqrt(d_head)) v`; the bilinear form has no softmax: its pattern is
    `(q·k)(q2·k2) / d_head`, masked with zeros. The module's output carries the published attention scale, so it is
    exactly what is added to the residual stream.

    With fewer key-value heads than heads (grouped queries, arXiv 2305.13245), neighbouring heads share one. As in
    transformer_lens, `hook_k`, `hook_rot_k` and `hook_v` then see one row per key-value head, while `W_K` and `W_V`
    repeat it for every head that reads it.

    Args:
        config: Its shape.
        d_model: Width of the residual stream.
    """

    def __init__(self, config: AttentionConfig, d_model: int):
        super().__init__()
        self.config = config
        n_heads, shared, d_head = config.n_heads, config.n_key_value_heads, config.d_head
        self.group = n_heads // shared  # heads that share a key-value head
        counts = (n_heads, shared, shared) if config.kind == "softmax" else (n_heads,) * 5
        self.widths = [count * d_head for count in counts]  # of q, k, v in `qkv`; bilinear q, k, q2, k2, v
        self.qkv = nn.Linear(d_model, sum(self.widths), bias=config.bias[0])
        self.o = nn.Linear(n_heads * d_head, d_model, bias=config.bias[1])
        self.hook_q, self.hook_k, self.hook_v = Point(), Point(), Point()
        self.hook_rot_q, self.hook_rot_k = Point(), Point()
        if config.kind == "bilinear":
            self.hook_q2, self.hook_k2, self.hook_rot_q2, self.hook_rot_k2 = (Point() for _ in range(4))
        self.hook_attn_scores, self.hook_pattern = Point(), Point()
        self.hook_z, self.hook_result = Point(), Point()

    def _head_weights(self, part: int) -> Float[Tensor, "head d_model d_head"]:
        weights = self.qkv.weight.split(self.widths)[part]
        weights = rearrange(weights, "(head d_head) d_model -> head d_model d_head", d_head=self.config.d_head)
        return weights if len(weights) == self.config.n_heads else weights.repeat_interleave(self.group, 0)

    def _head_biases(self, part: int) -> Float[Tensor, "head d_head"]:
        if self.qkv.bias is None:
            return self.qkv.weight.new_zeros(self.config.n_heads, self.config.d_head)
        biases = self.qkv.bias.split(self.widths)[part].unflatten(0, (-1, self.config.d_head))
        return biases if len(biases) == self.config.n_heads else biases.repeat_interleave(self.group, 0)

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
        weights = rearrange(self.o.weight, "d_model (head d_head) -> head d_head d_model", d_head=self.config.d_head)
        return self.config.scale * weights

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
        return self.o.weight.new_zeros(self.o.out_features) if self.o.bias is None else self.config.scale * self.o.bias

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
            rearrange(part, "batch seq (head d_head) -> batch seq head d_head", d_head=self.config.d_head)
            for part in self.qkv(x).split(self.widths, dim=-1)
        ]
        q = self.hook_rot_q(rotate(self.hook_q(heads[0]), rotary))
        k = self.hook_rot_k(rotate(self.hook_k(heads[1]), rotary))
        if self.config.kind == "bilinear":
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
        if self.config.kind == "softmax" and not (self.hook_attn_scores.has_hooks() or self.hook_pattern.has_hooks()):
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            attn_mask = None if mask is None else mask[:, None]
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=mask is None)
            return z.transpose(1, 2)
        d_head = v.shape[-1]
        if mask is None:
            mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()[None]
        if self.config.kind == "softmax":
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
        return out if self.config.scale == 1 else out * self.config.scale


def _dot(q: Tensor, k: Tensor) -> Tensor:
    return einsum(q, k, "batch seq head d_head, batch keys head d_head -> batch head seq keys")
