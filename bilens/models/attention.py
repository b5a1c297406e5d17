"""Causal attention with rotary positions: its shape, and the module with transformer_lens' hook points."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from bilens.tensor.forms import BilinearForm, LinearMap

from .hooks import Point
from .layers import NormConfig, make_norm
from .projections import Projection, rotated
from .rotary import Angles, Rope, rotate

# Keys are twice as wide as values in bilinear attention; more positions go out than came in.
KeyValue = tuple[Float[Tensor, "batch _past head _width"], Float[Tensor, "batch _past head d_head"]]
KINDS = ("softmax", "bilinear", "squared", "differential")
ROW_EPS = 1e-8  # added to the sums that rows of squared scores are divided by: that of the published models
PAIRED = ("bilinear", "differential")  # with second queries and keys


@dataclass(frozen=True)
class Local:
    """The layers of a model that attend to near positions only, while the others see all (Gemma 2, 2408.00118)."""

    layers: tuple[int, ...]
    window: int  # how many positions each attends to, itself included
    rope: Rope | None = None  # their own rotary positions (Gemma 3); None: those of the other layers

    def __post_init__(self):
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")
        if not self.layers or self.layers[0] < 0 or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers must be at least one layer, in ascending order, got {self.layers}")


@dataclass(frozen=True)
class QKNormConfig:
    """How queries and keys are normalised, before they are rotated."""

    over: Literal["head", "full"] = "head"  # each head by itself; or all heads as one vector (OLMo2)
    norm: NormConfig = field(default_factory=NormConfig)

    def __post_init__(self):
        if self.over not in ("head", "full"):
            raise ValueError(f"over must be 'head' or 'full' for a norm of queries and keys, got {self.over!r}")


@dataclass(frozen=True)
class AttentionConfig:
    """The shape of `Attention`; `of_width` makes one whose heads share the residual stream's width evenly."""

    n_heads: int
    d_head: int
    kind: Literal["softmax", "bilinear", "squared", "differential"] = "softmax"
    scale: float = 1.0  # factor on the output: 1/sqrt(2 n_layers) in the published models
    n_key_value_heads: int | None = None  # keys and values that groups of heads share; None: n_heads
    bias: tuple[bool | Literal["qk"], bool] = (
        False,
        False,
    )  # on queries, keys and values ("qk": not on values); output
    window: int | None = None  # how many positions each attends to, itself included; None: all before it
    rope: Rope = field(default_factory=Rope)
    score_scale: float | None = None  # factor on the scores, of each branch; None: 1/sqrt(d_head)
    qk_norm: QKNormConfig | None = None  # of queries and keys before rotation; None: there is none
    local: Local | None = None  # the layers with a window, where others have none
    cap: float | None = None  # scores s become cap·tanh(s / cap) before the softmax; None: they stay
    normalize: bool = False  # whether the rows of a squared pattern are divided by their sums
    value_residual: bool = False  # whether values are mixed with the first block's: (1 - λ) v + λ v₀

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
        for name in ("score_scale", "cap"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive or None, got {getattr(self, name)}")
        if self.cap is not None and self.kind != "softmax":
            raise ValueError(f"cap must be None for {self.kind} attention, got {self.cap}")
        if self.local is not None and self.window is not None:
            raise ValueError(f"window must be None where only some layers are local, got {self.window}")
        if self.d_head < 2 or self.d_head % 2:
            raise ValueError(f"d_head must be even (rotary embedding rotates pairs), got {self.d_head}")
        if self.n_heads % self.n_key_value_heads:
            raise ValueError(
                f"n_key_value_heads must divide n_heads={self.n_heads}, got n_key_value_heads={self.n_key_value_heads}"
            )
        if self.normalize and self.kind != "squared":
            raise ValueError(f"normalize must be False for {self.kind} attention: it is for the rows of squared scores")
        if self.kind in PAIRED and self.n_key_value_heads != self.n_heads:
            raise ValueError(
                f"n_key_value_heads must be None or n_heads={self.n_heads} for {self.kind} attention, got "
                f"n_key_value_heads={self.n_key_value_heads}"
            )

    @property
    def factor(self) -> float:
        """What the scores are multiplied by, those of each branch."""
        return 1 / math.sqrt(self.d_head) if self.score_scale is None else self.score_scale

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

    def at(self, layer: int) -> "AttentionConfig":
        """Return the shape of one layer's attention: that of all, with the window of the local ones if it is one."""
        if self.local is None:
            return self
        if layer not in self.local.layers:
            return replace(self, local=None)
        return replace(self, local=None, window=self.local.window, rope=self.local.rope or self.rope)


@dataclass(frozen=True)
class Frame:
    """What all blocks of one run are told beside the residual stream."""

    rotary: Angles
    attend: Bool[Tensor, "batch new keys"] | None  # the keys of each query; None: itself and all before it
    near: "Frame | None" = None  # the same for the local layers, if there are any
    start: Float[Tensor, "batch new d_model"] | None = None  # the start of the stream, where blocks read it again
    values: Float[Tensor, "batch new head d_head"] | None = None  # the first block's, where later ones mix them in


def geometry(
    config: AttentionConfig, mask: Bool[Tensor, "batch keys"] | None, keys: int, new: int, like: Tensor
) -> Frame:
    """Return the rotary angles of the last `new` of `keys` positions, and which positions they attend to.

    The shape is that of the whole model's attention: layers that are local find theirs in the frame.

    Args:
        config: The attention's shape.
        mask: False at padding, which takes no position; `None` if there is none.
        keys: How many positions there are.
        new: How many of them attend.
        like: The residual stream, `[batch, ...]`, whose dtype and device these have.
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
    near = None if config.local is None else geometry(config.at(config.local.layers[0]), mask, keys, new, like)
    return Frame(config.rope.angles(positions[:, keys - new :], config.d_head, like.dtype), attend, near)


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions: a pattern from scores `s = factor q·k`, times the values.

    The pattern, `hook_pattern`, is `softmax(s)`, of scores that are softly capped if the config says so; or without a
    softmax, masked with zeros, `s s2` (`"bilinear"`) or `s²` (`"squared"`, its rows perhaps divided by their sums); or
    `softmax(s) - λ softmax(s2)` (`"differential"`). The factor is 1/sqrt(d_head) unless the config has another. The
    module's output carries the published attention scale, so it is exactly what is added to the residual stream, or
    what a norm before that addition reads.

    With fewer key-value heads than heads (grouped queries, arXiv 2305.13245), neighbouring heads share one. As in
    transformer_lens, `hook_k`, `hook_rot_k` and `hook_v` then see one row per key-value head, while `W_K` and `W_V`
    repeat it for every head that reads it.

    Args:
        config: Its shape, or that of a model whose layers differ.
        d_model: Width of the residual stream.
        layer: Which layer of the model it is in.
    """

    def __init__(self, config: AttentionConfig, d_model: int, layer: int = 0):
        super().__init__()
        self.is_local = config.local is not None and layer in config.local.layers
        self.config = config = config.at(layer)
        n_heads, shared, d_head = config.n_heads, config.n_key_value_heads, config.d_head
        self.group = n_heads // shared  # heads that share a key-value head
        counts = (n_heads,) * 5 if config.kind in PAIRED else (n_heads, shared, shared)
        self.widths = [count * d_head for count in counts]  # of q, k, v in `qkv`; of a pair q, k, q2, k2, v
        self.qkv = nn.Linear(d_model, sum(self.widths), bias=config.bias[0] is True)
        self.qk_bias = nn.Parameter(torch.zeros(sum(self.widths[:-1]))) if config.bias[0] == "qk" else None
        self.lamb = nn.Parameter(torch.zeros(())) if config.value_residual else None
        self.lamb2 = nn.Parameter(torch.zeros(())) if config.kind == "differential" else None
        self.o = nn.Linear(n_heads * d_head, d_model, bias=config.bias[1])
        sides = ("q", "k", "q2", "k2") if config.kind in PAIRED else ("q", "k")
        for side, width in zip(sides, self.widths, strict=False):
            self._add_side(side, width)
        if config.value_residual:
            self.hook_v_own = Point()
        self.hook_v = Point()
        self.hook_attn_scores, self.hook_pattern = Point(), Point()
        if config.kind == "differential":
            self.hook_attn_scores2 = Point()
        self.hook_z, self.hook_result = Point(), Point()

    def _add_side(self, side: str, width: int) -> None:
        """Add the hook points, and the norm if there is one, of queries or keys."""
        norm = self.config.qk_norm
        names = [f"hook_{side}", f"hook_rot_{side}"] + ([] if norm is None else [f"hook_{side}_normalized"])
        for name in names:
            setattr(self, name, Point())
        if norm is not None:
            setattr(self, f"{side}_norm", make_norm(norm.norm, self.config.d_head if norm.over == "head" else width))

    def _placed(self, side: str, heads: Tensor, rotary: Angles) -> Tensor:
        """Return queries or keys as their scores read them: normalised if they are to be, and rotated."""
        heads = getattr(self, f"hook_{side}")(heads)
        if self.config.qk_norm is not None:
            norm = getattr(self, f"{side}_norm")
            whole = self.config.qk_norm.over == "full"
            heads = norm(heads.flatten(2)).view_as(heads) if whole else norm(heads)
            heads = getattr(self, f"hook_{side}_normalized")(heads)
        return getattr(self, f"hook_rot_{side}")(rotate(heads, rotary))

    def _head_weights(self, part: int) -> Float[Tensor, "head d_model d_head"]:
        weights = self.qkv.weight.split(self.widths)[part]
        weights = rearrange(weights, "(head d_head) d_model -> head d_model d_head", d_head=self.config.d_head)
        return weights if len(weights) == self.config.n_heads else weights.repeat_interleave(self.group, 0)

    def _head_biases(self, part: int) -> Float[Tensor, "head d_head"]:
        biases = self._biases()
        if biases is None:
            return self.qkv.weight.new_zeros(self.config.n_heads, self.config.d_head)
        biases = biases.split(self.widths)[part].unflatten(0, (-1, self.config.d_head))
        return biases if len(biases) == self.config.n_heads else biases.repeat_interleave(self.group, 0)

    def _biases(self) -> Float[Tensor, " widths"] | None:
        return self.qkv.bias if self.qk_bias is None else F.pad(self.qk_bias, (0, self.widths[-1]))

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

    @property
    def branches(self) -> int:
        """How many different scores there are: two where there are second queries and keys."""
        return 2 if self.config.kind in PAIRED else 1

    def projections(self, branch: int = 0) -> tuple[Projection, Projection]:
        """Return how the heads make queries and keys, those of one branch.

        Raises:
            ValueError: There is no such branch.
        """
        if not 0 <= branch < self.branches:
            raise ValueError(f"branch must lie between 0 and {self.branches - 1}, got {branch}")
        biases, made = self._biases(), []
        for part, side in enumerate(("q2", "k2") if branch else ("q", "k"), 2 * branch):
            weight = self.qkv.weight.split(self.widths)[part].unflatten(0, (-1, self.config.d_head)).mT
            bias = None if biases is None else biases.split(self.widths)[part].unflatten(0, (-1, self.config.d_head))
            norm = self.config.qk_norm
            own = make_norm(None, 1) if norm is None else getattr(self, f"{side}_norm")
            full = norm is not None and norm.over == "full"
            made.append(Projection(weight, bias, own, full, self.config.n_heads // len(weight)))
        return made[0], made[1]

    def score_tensor(self, head: int, distance: int | None = 0, branch: int = 0) -> BilinearForm:
        """Return a head's score as a bilinear form of what attention reads at two positions, `distance` apart.

        `score = x_queryᵀ W_Q R W_Kᵀ x_key · factor`, with R the rotation between the two positions: exactly
        `hook_attn_scores` of a softmax without a cap. Where queries and keys are normalised, the form is over the two
        roots that they are divided by, `Projection.divisor`; their gains are in it. Biases are constant legs.

        The pattern of `"bilinear"` heads is the product of the forms of branches 0 and 1, that of `"squared"` heads the
        square of their form, that of `"differential"` ones a difference of the two softmaxes.

        Args:
            head: Which head.
            distance: Position of the query less that of the key; `None` leaves out the rotation: the content alone.
                Where rotary tables are rounded, it is the query's position, with the key at 0.
            branch: Which scores, where there are two.

        Raises:
            ValueError: No such head or branch, a negative distance, or a norm of queries and keys with a shift.
        """
        self._check_head(head)
        if distance is not None and distance < 0:
            raise ValueError(f"distance must not be negative (a key lies before its query), got {distance}")
        sides, config = [], self.config
        for projection, position in zip(self.projections(branch), (distance, 0), strict=True):
            if projection.shift() is not None:
                raise ValueError("the norm of queries and keys must have no shift for score_tensor, but it has one")
            weight, bias = projection.folded()
            rows = torch.cat((weight[head], bias[head][None]))
            if distance is not None:
                where = torch.full((1, 1), position, device=rows.device)
                rows = rotated(rows, config.rope.angles(where, config.d_head, rows.dtype))
            sides += [rows[:-1].T, rows[-1]]
        query, query_bias, key, key_bias = sides
        biases = () if self._biases() is None else (config.factor * query_bias, key_bias)
        return BilinearForm.from_weights(config.factor * query, key, *biases)

    def ov(self, head: int, first: "Attention | None" = None) -> LinearMap:
        """Return what a head writes of what attention reads where it attends to, as a linear map: `W_O (W_V x + b_V)`.

        `hook_result` of the head is the sum of this over positions, weighed by `hook_pattern`. With a value residual
        that is the share of the head's own values, `1 - λ` of them; the rest is `ov(head, first)` of what the first
        block's attention reads there.

        Args:
            head: Which head.
            first: The first block's attention, for the share of its values.

        Raises:
            ValueError: No such head, or `first` without a value residual.
        """
        self._check_head(head)
        if first is not None and self.lamb is None:
            raise ValueError("first must be None: values are not mixed with the first block's in this model")
        source, share = (self, 1.0) if self.lamb is None else (self, 1 - self.lamb)
        if first is not None:
            source, share = first, self.lamb
        bias = None if source.qkv.bias is None else share * source.b_V[head]
        return LinearMap.from_weights(self.W_O[head].T, share * source.W_V[head].T, bias)

    def _check_head(self, head: int) -> None:
        if not 0 <= head < self.config.n_heads:
            raise ValueError(f"head must lie between 0 and {self.config.n_heads - 1}, got {head}")

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], frame: Frame, past: KeyValue | None = None
    ) -> tuple[Float[Tensor, "batch seq d_model"], KeyValue, Frame]:
        """Attend from each position of `x` to the positions that `frame` allows.

        `past` holds the keys and values of earlier positions, per key-value head. Returns the output, the keys and
        values of all positions so far, and the frame for the next block. Second keys are kept beside the first, along
        the last axis; values as they are mixed.
        """
        seen = frame.near if self.is_local else frame
        read = self.qkv(x) if self.qk_bias is None else F.linear(x, self.qkv.weight, self._biases())
        heads = [part.unflatten(-1, (-1, self.config.d_head)) for part in read.split(self.widths, dim=-1)]
        q, k = self._placed("q", heads[0], seen.rotary), self._placed("k", heads[1], seen.rotary)
        if self.config.kind in PAIRED:
            q2, k2 = self._placed("q2", heads[2], seen.rotary), self._placed("k2", heads[3], seen.rotary)
            q, k = torch.cat((q, q2), -1), torch.cat((k, k2), -1)
        v, frame = self._valued(heads[-1], frame)
        if past is not None:
            k, v = torch.cat((past[0], k), 1), torch.cat((past[1], v), 1)
        past = k, v
        if self.group > 1:
            k, v = k.repeat_interleave(self.group, 2), v.repeat_interleave(self.group, 2)
        z = self.hook_z(self._mix(q, k, v, seen.attend))
        return self._project(z), past, frame

    def own_values(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq head d_head"]:
        """Return the values of what attention reads, before they are mixed with any; no hook sees them."""
        biases = self._biases()
        bias = None if biases is None else biases.split(self.widths)[-1]
        values = F.linear(x, self.qkv.weight.split(self.widths)[-1], bias)
        return values.unflatten(-1, (-1, self.config.d_head))

    def _valued(self, v: Tensor, frame: Frame) -> tuple[Tensor, Frame]:
        """Return the values to average, and the frame that holds those of the first block."""
        if self.lamb is None:
            return self.hook_v(v), frame
        v = self.hook_v_own(v)
        if frame.values is None:
            frame = replace(frame, values=v)
        return self.hook_v((1 - self.lamb) * v + self.lamb * frame.values), frame

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Sum the values by the pattern; fused unless the scores or the pattern are looked at, or capped."""
        looked_at = self.hook_attn_scores.has_hooks() or self.hook_pattern.has_hooks()
        if self.config.kind == "softmax" and self.config.cap is None and not looked_at:
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            how = {"attn_mask": None if mask is None else mask[:, None], "scale": self.config.factor}
            return F.scaled_dot_product_attention(q, k, v, is_causal=mask is None, **how).transpose(1, 2)
        if mask is None:
            mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()[None]
        pattern = self.hook_pattern(self._pattern(q, k, ~mask[:, None]))
        return einsum(pattern, v, "batch head seq keys, batch keys head d_head -> batch seq head d_head")

    def _pattern(self, q: Tensor, k: Tensor, hidden: Tensor) -> Tensor:
        """Return what multiplies the values; the scores of a pair lie beside one another in `q` and `k`."""
        d_head, kind = self.config.d_head, self.config.kind
        branches = zip(q.split(d_head, -1), k.split(d_head, -1), strict=True)
        first, *second = (_dot(*branch) * self.config.factor for branch in branches)
        if self.config.cap is not None:
            first = self.config.cap * torch.tanh(first / self.config.cap)
        if kind in ("softmax", "differential"):
            pattern = self.hook_attn_scores(first.masked_fill(hidden, -torch.inf)).softmax(-1)
            if kind == "differential":
                scores = self.hook_attn_scores2(second[0].masked_fill(hidden, -torch.inf))
                pattern = pattern - self.lamb2 * scores.softmax(-1)
            return pattern
        scores = first * (second[0] if second else first)
        pattern = self.hook_attn_scores(scores).masked_fill(hidden, 0)
        return pattern / (pattern.sum(-1, keepdim=True) + ROW_EPS) if self.config.normalize else pattern

    def _project(self, z: Tensor) -> Tensor:
        """Write the heads to the residual stream; head by head when `hook_result` is looked at."""
        if self.hook_result.has_hooks():
            result = einsum(z, self.W_O, "batch seq head d_head, head d_head d_model -> batch seq head d_model")
            return self.hook_result(result).sum(2) + self.b_O
        out = self.o(rearrange(z, "batch seq head d_head -> batch seq (head d_head)"))
        return out if self.config.scale == 1 else out * self.config.scale


def _dot(q: Tensor, k: Tensor) -> Tensor:
    return einsum(q, k, "batch seq head d_head, batch keys head d_head -> batch head seq keys")
