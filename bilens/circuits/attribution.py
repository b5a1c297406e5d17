"""Exact attribution on a prompt: an output feature's pre-activation as a sum over pairs of what enters the MLP."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from bilens.models.layers import RMSNorm
from bilens.models.transformer import BilinearTransformer, Text
from bilens.saes.directions import offsets, readers, writers
from bilens.saes.rows import Rows, activations, to_rows
from bilens.saes.stored import SAE

_ROWS, _POSITIONS = 32, 256  # texts that run at a time, and positions whose parts are held at a time


class Target(NamedTuple):
    """What is attributed: an output feature, the logit of a token, or a residual direction."""

    kind: Literal["feature", "token", "direction"]
    index: int | None
    name: str


class Places(NamedTuple):
    """The texts of an attribution and the positions that it is about, `row[n], position[n]` for the n-th of them."""

    tokens: Int[Tensor, "text seq"]
    attend: Bool[Tensor, "text seq"]
    row: Int[Tensor, " position"]
    position: Int[Tensor, " position"]  # BOS is position 0
    words: tuple[tuple[str, ...], ...]  # the tokens of each text, without padding
    texts: tuple[str, ...]


class Term(NamedTuple):
    """One pair of parts at one position, and what it adds to the target."""

    row: int
    position: int
    word: str
    left: int
    right: int
    labels: tuple[str, str]
    value: float

    def __repr__(self) -> str:
        return f"{self.labels[0]} × {self.labels[1]} at {self.position} {self.word!r}: {self.value:+.4g}"


@dataclass(frozen=True, repr=False)
class _Table(ABC):
    """A target as a sum over unordered pairs of parts, position by position; the first part is the bias.

    `table[n, a, b]` with `a <= b` is the term of parts a and b; below the diagonal is zero. Terms are float64: they sum
    to the model's own value up to the rounding of the model's own arithmetic.
    """

    target: Target
    layer: int
    places: Places
    table: Float[Tensor, "position part part"]
    pre_activation: Float[Tensor, " position"]  # what the running model gives

    @property
    @abstractmethod
    def pairs(self) -> Float[Tensor, "position n n"]:
        """Terms of two named parts."""

    @abstractmethod
    def _part(self, n: int, index: int) -> tuple[int, str]:
        """Return id and label of a named part at the n-th position."""

    @property
    def bias(self) -> Float[Tensor, " position"]:
        """What is there without any input: bias × bias, the layer's output bias, the target's offset."""
        return self.table[:, 0, 0]

    @property
    def total(self) -> Float[Tensor, " position"]:
        """Sum of all terms."""
        return self.table.sum((1, 2))

    @property
    def miss(self) -> Float[Tensor, " position"]:
        """How far the sum is from the running model, relative to the terms: `|total - pre_activation| / Σ |term|`."""
        scale = self.table.abs().sum((1, 2)).clamp(min=torch.finfo(self.table.dtype).tiny)
        return (self.total - self.pre_activation).abs() / scale

    def top(self, k: int = 10) -> list[Term]:
        """Return the k pairs that add or take away most, over all positions, strongest first; fewer if there are fewer.

        Raises:
            ValueError: `k` is below 1.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        pairs = self.pairs
        best = pairs.flatten().abs().topk(min(k, pairs.numel()))
        best = best.indices[best.values > 0]
        where = zip(*(index.tolist() for index in torch.unravel_index(best, pairs.shape)), strict=True)
        return [self._term(*index, value) for index, value in zip(where, pairs.flatten()[best].tolist(), strict=True)]

    def _term(self, n: int, a: int, b: int, value: float) -> Term:
        (left, one), (right, other) = self._part(n, a), self._part(n, b)
        row, position = self.places.row[n].item(), self.places.position[n].item()
        return Term(row, position, self.places.words[row][position], left, right, (one, other), value)

    def __repr__(self) -> str:
        strongest = self.top(1)
        first = f"; first: {strongest[0]!r}" if strongest else ""
        return (
            f"{type(self).__name__}({self.target.name} in layer {self.layer}, {len(self.table)} positions, "
            f"{self.pairs.shape[1]} parts, sum within {self.miss.max().item():.1e}{first})"
        )


@dataclass(frozen=True, repr=False)
class Attribution(_Table):
    """A target as a sum over pairs of input features, the dictionary's error, and biases.

    `features` holds the ids of the features that are active at a position, ascending, then -1; `activations` their
    activations, then 0. All named terms together are `total`.
    """

    features: Int[Tensor, "position active"]
    activations: Float[Tensor, "position active"]
    label: Callable[[int], str]
    n_features: int

    @property
    def pairs(self) -> Float[Tensor, "position active active"]:
        """Feature × feature: `2 Q_ij z_i z_j` above the diagonal, `Q_ii z_i²` on it, zero below."""
        return self.table[:, 2:, 2:]

    @property
    def feature_bias(self) -> Float[Tensor, "position active"]:
        """Feature × bias, the linear terms: decoder bias of the input SAE, left and right bias, shift of the norm."""
        return self.table[:, 0, 2:]

    @property
    def feature_error(self) -> Float[Tensor, "position active"]:
        """Feature × error, with the error what the input SAE does not reconstruct."""
        return self.table[:, 1, 2:]

    @property
    def error(self) -> Float[Tensor, " position"]:
        """Error × error."""
        return self.table[:, 1, 1]

    @property
    def error_bias(self) -> Float[Tensor, " position"]:
        """Error × bias."""
        return self.table[:, 0, 1]

    def _part(self, n: int, index: int) -> tuple[int, str]:
        feature = self.features[n, index].item()
        return feature, self.label(feature)


@dataclass(frozen=True, repr=False)
class SourceAttribution(_Table):
    """A target as a sum over pairs of sources: embedding, attention heads, earlier MLPs."""

    names: tuple[str, ...]

    @property
    def pairs(self) -> Float[Tensor, "position source source"]:
        """Source × source, each unordered pair once: above the diagonal both orders, zero below."""
        return self.table[:, 1:, 1:]

    @property
    def source_bias(self) -> Float[Tensor, "position source"]:
        """Source × bias, the linear terms: left and right bias of the layer, shift of the norm."""
        return self.table[:, 0, 1:]

    def _part(self, n: int, index: int) -> tuple[int, str]:
        return index, self.names[index]


# -- from features ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def attribute(
    model: BilinearTransformer,
    text: Text | Int[Tensor, "text seq"] | Int[Tensor, " seq"],
    layer: int,
    feature: int | None = None,
    *,
    inp: SAE,
    out: SAE | None = None,
    direction: Float[Tensor, " d_model"] | None = None,
    token: str | int | None = None,
    position: int | None = None,
    label: Callable[[int], str] = "#{}".format,
) -> Attribution:
    """Write what an output feature reads at a position as an exact sum over pairs of input features and the rest.

    With `x = Σ_i z_i d_i + b_dec + e` (which defines the error e) and `Q` the target's interaction matrix, biases
    included as a constant leg, the pre-activation `reader · mlp_out + offset` is `Σ_{a≤b}` over features, error and
    bias (2410.08417, section 3.1, with the biases and the error that are left out there). At `hook_resid_mid` the norm
    divides by the root mean square, measured at that position: every part is multiplied by the norm's gain over it, and
    a shift belongs to the bias. There the terms are what an intervention measures while that root mean square is held.

    Give one of `feature`, `direction`, `token`. A token's target is the direct path to its logit: `mlp_out` times the
    gain of the final norm and the token's unembedding, over the root mean square that the final norm measures at that
    position. So it is exactly what this layer's MLP adds to that logit directly.

    Cost: one run of the model, `hidden · d_model²` for Q, and `active · d_model²` and `active²` numbers per position.

    Args:
        model: The model; the layer's MLP must be bilinear.
        text: A text, a list of texts, or token ids: with BOS, without padding, as `model.to_tokens(text)` gives them.
        layer: Which block.
        feature: Feature of `out`.
        inp: SAE at the layer's `hook_mlp_in` or `hook_resid_mid`.
        out: SAE at the layer's `hook_mlp_out`; needed for `feature` only.
        direction: A residual direction, `direction · mlp_out` is attributed.
        token: A token, as text or id.
        position: Where, BOS being 0, and -1 the last token of each text; `None` for all but BOS.
        label: Name of an input feature, e.g. `lambda i: contexts.label(i, model)`.

    Raises:
        ValueError: An SAE of another hook point or width, a feature that does not exist, no text, no such position.
        TypeError: The layer is not bilinear.
    """
    read = _reading(model, layer, feature, out, direction, token)
    hook = _checked_input(model, layer, inp)
    places = locate(model, text, position)
    found = observe(model, places, {hook, *read.hooks})
    x, scale, measured = found[hook], read.scale(found), read.measure(found)
    norm = nn.Identity() if hook.endswith("mlp_in") else model.blocks[layer].ln2
    pieces = []
    for some in torch.arange(len(x), device=x.device).split(_POSITIONS):
        features, z = _active(inp, x[some])
        parts = with_unit(_feature_parts(inp, x[some], features, z), *norm_parts(norm, x[some]))
        pieces.append((features, z, _terms(read.matrix, parts) * scale[some, None, None]))
    n = max(features.shape[1] for features, _, _ in pieces)
    missing = [n - features.shape[1] for features, _, _ in pieces]
    features, z, table = (list(parts) for parts in zip(*pieces, strict=True))
    return Attribution(
        target=read.target,
        layer=layer,
        places=places,
        table=torch.cat([F.pad(one, (0, m, 0, m)) for one, m in zip(table, missing, strict=True)]),
        pre_activation=measured,
        features=torch.cat([F.pad(one, (0, m), value=-1) for one, m in zip(features, missing, strict=True)]),
        activations=torch.cat([F.pad(one, (0, m)) for one, m in zip(z, missing, strict=True)]),
        label=label,
        n_features=inp.cfg.d_sae,
    )


def logit_direction(model: BilinearTransformer, token: str | int) -> Float[Tensor, " d_model"]:
    """Return the residual direction that raises a token's logit: its unembedding times the final norm's gain.

    `logit_t = direction_t · resid_post / rms + const`, with `rms` the root mean square of the last residual stream.

    Raises:
        ValueError: A text that is not one token, or an id outside the vocabulary.
    """
    index = _token_id(model, token)
    column = model.W_U[:, index].detach()
    gain = model.ln_final.weight if isinstance(model.ln_final, RMSNorm) else None
    return column if gain is None else column * gain.detach()


def _token_id(model: BilinearTransformer, token: str | int) -> int:
    index = model.to_single_token(token) if isinstance(token, str) else token
    if not 0 <= index < model.cfg.d_vocab:
        raise ValueError(f"token must be an id from 0 to {model.cfg.d_vocab - 1}, or a text, got {token}")
    return index


def _active(sae: SAE, x: Tensor) -> tuple[Int[Tensor, "position active"], Float[Tensor, "position active"]]:
    """Return the ids (ascending, then -1) and activations (then 0) of the features that are active."""
    z = sae.encode(x.to(sae.W_dec)).to(x)
    n = int((z != 0).sum(1).max())
    strongest = z.abs().topk(n, dim=1).indices
    beyond = z.shape[1]
    ids = strongest.masked_fill(z.gather(1, strongest) == 0, beyond).sort(1).values
    padding = ids == beyond
    return ids.masked_fill(padding, -1), z.gather(1, ids.clamp(max=beyond - 1)).masked_fill(padding, 0)


def _feature_parts(sae: SAE, x: Tensor, features: Tensor, z: Tensor) -> Float[Tensor, "position part d_model"]:
    """Write x as a sum of decoder bias, error and one part per active feature, in this order."""
    written = writers(sae).to(x.device)[features.clamp(min=0)].to(x) * z[..., None]
    bias = sae.b_dec.detach().to(x).expand_as(x)
    return torch.cat((torch.stack((bias, x - bias - written.sum(1)), 1), written), 1)


# -- from the residual stream -----------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Sources:
    """What made up the residual stream before an MLP: `values.sum(1)` is `hook_resid_mid`.

    The norm that follows is `factor * resid_mid + shift`, exactly, with `factor` the norm's gain over the root mean
    square of resid_mid, so that `entering.sum(1) + shift` is `hook_mlp_in`.
    """

    layer: int
    places: Places
    names: tuple[str, ...]  # embedding (attention biases), heads 0.0, 0.1, ..., MLP 0, heads 1.0, ...
    values: Float[Tensor, "position source d_model"]
    factor: Float[Tensor, "position d_model"]
    shift: Float[Tensor, " d_model"]

    @property
    def entering(self) -> Float[Tensor, "position source d_model"]:
        """Each source's share of what enters the MLP."""
        return self.values * self.factor[:, None]

    def __repr__(self) -> str:
        largest = self.values.norm(dim=2).mean(0).argmax()
        return (
            f"Sources(layer {self.layer}, {len(self.values)} positions, {len(self.names)} sources; "
            f"largest on average: {self.names[largest]})"
        )


@torch.no_grad()
def sources(
    model: BilinearTransformer,
    text: Text | Int[Tensor, "text seq"] | Int[Tensor, " seq"],
    layer: int,
    position: int | None = None,
) -> Sources:
    """Split the residual stream before an MLP into embedding, attention heads and earlier MLPs.

    `resid_mid_L = embed + Σ_{l≤L} Σ_h z_lh W_O,lh + Σ_{l<L} mlp_out_l`; an MLP's output bias belongs to it. Where
    attention has output biases, their sum over l is one more source, `"attention biases"`. Works for every kind of MLP.
    Cost: one run of the model, and `sources · d_model` numbers per position.

    Args:
        model: The model.
        text: As for `attribute`.
        layer: Which block.
        position: As for `attribute`.

    Raises:
        ValueError: No such layer, no text, no such position.
    """
    _check_layer(model, layer)
    return split_residual(model, locate(model, text, position), layer, set())[0]


def split_residual(
    model: BilinearTransformer, places: Places, layer: int, hooks: set[str]
) -> tuple[Sources, dict[str, Float[Tensor, "position ..."]]]:
    """Return the sources, and what `hooks` see in the same run, as `observe` does."""
    heads = [f"blocks.{i}.attn.hook_z" for i in range(layer + 1)]
    mlps = [f"blocks.{i}.hook_mlp_out" for i in range(layer)]
    mid = f"blocks.{layer}.hook_resid_mid"
    found = observe(model, places, {"hook_embed", *heads, *mlps, mid, *hooks})
    names, values = ["embedding"], [found["hook_embed"][:, None]]
    if model.cfg.attn_bias[1]:
        bias = sum(block.attn.b_O.detach().double() for block in model.blocks[: layer + 1])
        names.append("attention biases")
        values.append(bias.expand_as(values[0]))
    for i, block in enumerate(model.blocks[: layer + 1]):
        W_O = block.attn.W_O.detach().double()
        written = einsum(found[heads[i]], W_O, "position head d_head, head d_head d_model -> position head d_model")
        values.append(written)
        names += [f"head {i}.{head}" for head in range(model.cfg.n_heads)]
        if i < layer:
            values.append(found[mlps[i]][:, None])
            names.append(f"MLP {i}")
    factor, shift = norm_parts(model.blocks[layer].ln2, found[mid])
    return Sources(layer, places, tuple(names), torch.cat(values, 1), factor, shift), found


@torch.no_grad()
def attribute_sources(
    model: BilinearTransformer,
    text: Text | Int[Tensor, "text seq"] | Int[Tensor, " seq"],
    layer: int,
    feature: int | None = None,
    *,
    out: SAE | None = None,
    direction: Float[Tensor, " d_model"] | None = None,
    token: str | int | None = None,
    position: int | None = None,
) -> SourceAttribution:
    """Write what an output feature reads as an exact sum over pairs of sources: head × head, head × embedding, ...

    The same sum as in `attribute`, over the parts of `sources` instead of features: nothing is left over, so there is
    no error. Cost: one run of the model, and `sources · d_model²` per position.

    Args:
        model: The model; the layer's MLP must be bilinear.
        text: As for `attribute`.
        layer: Which block.
        feature: As for `attribute`.
        out: As for `attribute`.
        direction: As for `attribute`.
        token: As for `attribute`.
        position: As for `attribute`.

    Raises:
        ValueError: As for `attribute`.
        TypeError: The layer is not bilinear.
    """
    read = _reading(model, layer, feature, out, direction, token)
    came, found = split_residual(model, locate(model, text, position), layer, set(read.hooks))
    scale, table = read.scale(found), []
    for some in torch.arange(len(came.values), device=scale.device).split(_POSITIONS):
        parts = F.pad(came.values[some], (0, 0, 1, 0))
        parts = with_unit(parts, came.factor[some], came.shift)
        table.append(_terms(read.matrix, parts) * scale[some, None, None])
    return SourceAttribution(read.target, layer, came.places, torch.cat(table), read.measure(found), came.names)


@dataclass(frozen=True, repr=False)
class Trace:
    """Where the pre-activations of input features came from: `values.sum(2) + bias` is `pre_activation`."""

    names: tuple[str, ...]
    places: Places
    features: Int[Tensor, "position feature"]
    values: Float[Tensor, "position feature source"]
    bias: Float[Tensor, "position feature"]  # the encoder's offset, and what a shift of the norm adds

    @property
    def pre_activation(self) -> Float[Tensor, "position feature"]:
        """What the encoder gives before its top-k or ReLU: of an active feature, the activation."""
        return self.values.sum(2) + self.bias

    def __repr__(self) -> str:
        return f"Trace({self.features.shape[1]} features at {len(self.features)} positions, {len(self.names)} sources)"


@torch.no_grad()
def trace(
    came: Sources, inp: SAE, features: Int[Tensor, " feature"] | Int[Tensor, "position feature"] | Sequence[int]
) -> Trace:
    """Trace input features one step back: how much of each pre-activation came from which source.

    `pre_i = Σ_s readers_i · source_s + offset_i`. An active feature's activation is its pre-activation, so a pair's
    term is a table over sources as well: `2 Q_ij pre_i[s] pre_j[t]`.

    Args:
        came: The sources.
        inp: SAE at the same layer's `hook_mlp_in` or `hook_resid_mid`.
        features: Which features: the same at all positions, or for each position its own, such as the `features` of an
            attribution. The -1 that fills those up has values of zero.

    Raises:
        ValueError: An SAE of another hook point or width, a feature that does not exist.
    """
    hook = _hook_of(inp, "inp", came.layer, ("hook_mlp_in", "hook_resid_mid"), came.shift.shape[0])
    ids = torch.atleast_2d(torch.as_tensor(features, device=came.values.device)).expand(len(came.values), -1)
    if ids.numel() and not -1 <= ids.min() <= ids.max() < inp.cfg.d_sae:
        bad = ids[(ids < -1) | (ids >= inp.cfg.d_sae)][0].item()
        raise ValueError(f"features must hold ids from 0 to {inp.cfg.d_sae - 1} (or -1 for none), got {bad}")
    after_norm = hook.endswith("mlp_in")
    rows = readers(inp).to(came.values.device)[ids.clamp(min=0)].to(came.values)
    bias = offsets(inp).to(came.values)[ids.clamp(min=0)]
    parts = came.entering if after_norm else came.values
    values = einsum(rows, parts, "position feature d, position source d -> position feature source")
    if after_norm:
        bias = bias + rows @ came.shift
    none = ids == -1
    return Trace(came.names, came.places, ids, values.masked_fill(none[..., None], 0), bias.masked_fill(none, 0))


def trace_pair(
    attribution: Attribution, traced: Trace, left: int, right: int, n: int = 0
) -> Float[Tensor, "part part"]:
    """Trace one pair of features one step back: its term as a table, bias and sources of `left` × those of `right`.

    `2 Q_ij pre_i[s] pre_j[t]` (`Q_ii` for a feature with itself), which sums to the pair's term exactly.

    Args:
        attribution: Where the pair is from.
        traced: Where its features came from: `trace(sources(...), inp, attribution.features)`.
        left: Feature id, gives the rows: bias first, then `traced.names`.
        right: Feature id, gives the columns.
        n: Which of the attribution's positions.

    Raises:
        ValueError: A trace of other features, or a feature that is not active there.
    """
    _check_trace(attribution, traced)
    active = attribution.features[n].tolist()
    for name, feature in (("left", left), ("right", right)):
        if feature not in active or feature < 0:
            raise ValueError(f"{name} must be a feature that is active at {n}, got {feature}")
    i, j = active.index(left), active.index(right)
    coefficient = attribution.pairs[n, min(i, j), max(i, j)] / attribution.activations[n, [i, j]].prod()
    shares = torch.cat((traced.bias[n, :, None], traced.values[n]), 1)
    return coefficient * torch.outer(shares[i], shares[j])


def _check_trace(attribution: Attribution, traced: Trace) -> None:
    if not torch.equal(traced.features, attribution.features):
        raise ValueError("traced must be a trace of attribution.features, at the same positions")


# -- a graph for other tools ------------------------------------------------------------------------------------------


FEATURE = "cross layer transcoder"  # what the format calls a node that is a feature


@dataclass(frozen=True)
class _Nodes:
    """Nodes by id, and links between them, of one graph."""

    nodes: dict[str, dict[str, Any]]
    links: list[dict[str, Any]]
    length: int

    def add(
        self, row: int | str, name: str | int, number: int, position: int, kind: str, clerp: str, **more: Any
    ) -> str:
        """Add a node unless it is there, and return its id; viewers want (row, number, position) to be unique."""
        key = f"{row}_{name}_{position}"
        node = {"node_id": key, "feature": number, "layer": str(row), "ctx_idx": position, "feature_type": kind}
        node |= {"jsNodeId": f"{row}_{name}-{position}", "clerp": clerp, "run_idx": 0}
        node |= {"reverse_ctx_idx": self.length - 1 - position, "is_target_logit": False, "token_prob": 0.0}
        self.nodes.setdefault(key, node | {"influence": None, "activation": None} | more)
        return key

    def link(self, source: str, target: str, weight: float) -> None:
        """Add a link unless it carries nothing."""
        if weight != 0:
            self.links.append({"source": source, "target": target, "weight": weight})


def graph(
    attribution: Attribution,
    *,
    row: int = 0,
    pairs: int = 20,
    traced: Trace | None = None,
    slug: str = "bilens",
    scan: str = "bilens",
) -> dict[str, Any]:
    """Return one text's attribution as an attribution graph that circuit-tracer and Neuronpedia read.

    Nodes are input features, pairs of them, the target, and what is left: error, bias, the sum of the weaker pairs. A
    pair's link to the target weighs its term, and each of its two legs half of it, so what goes in comes out. A
    feature's own link to the target is its linear term. The links into the target sum to `attribution.total`. With
    `traced`, links from embedding, heads and earlier MLPs sum to each feature's pre-activation.

    The format is schema version 1 (`metadata`, `qParams`, `nodes`, `links`) with `layer` a row of the drawing: four
    rows to a layer l, heads in `4l`, input features in `4l + 1`, pairs in `4l + 2`, the MLP's output in `4l + 3`.
    `feature` is circuit-tracer's pairing of row and feature; of other nodes it is a number that tells them apart.
    `influence` is the share of all weight that nodes of at least this weight carry together, so that a threshold keeps
    the strongest.

    Args:
        attribution: What `attribute` returned, at one or several positions of the text.
        row: Which text, if there were several.
        pairs: How many pairs per position get a node.
        traced: Where the features came from: `trace(sources(...), inp, attribution.features)`.
        slug: Name of the graph.
        scan: Name of the model.

    Raises:
        ValueError: No position of that text, fewer than 0 pairs, or a trace of other features.
    """
    places = attribution.places
    here = (places.row == row).nonzero().flatten().tolist()
    if not here:
        raise ValueError(f"row must be a text of the attribution, from 0 to {len(places.texts) - 1}, got {row}")
    if pairs < 0:
        raise ValueError(f"pairs must not be negative, got {pairs}")
    if traced is not None:
        _check_trace(attribution, traced)
    drawn = _Nodes({}, [], len(places.words[row]))
    ends = [_draw_position(drawn, attribution, n, pairs, traced) for n in here]
    _set_influence(drawn, ends)
    metadata = {"slug": slug, "scan": scan, "transcoder_list": [], "prompt_tokens": list(places.words[row])}
    description = f"{attribution.target.name}, layer {attribution.layer}: exact terms of a bilinear MLP"
    metadata |= {"prompt": places.texts[row], "schema_version": 1}
    metadata |= {"info": {"description": description, "generator": {"name": "bilens"}}}
    state = {"pinnedIds": ends, "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    return {"metadata": metadata, "qParams": state, "nodes": list(drawn.nodes.values()), "links": drawn.links}


def write_graph(attribution: Attribution, path: str | Path, **options: Any) -> None:
    """Write `graph(attribution, **options)` as JSON; its slug is the file's name unless given.

    Args:
        attribution: What `attribute` returned.
        path: Where to.
        **options: As for `graph`.
    """
    drawn = graph(attribution, **{"slug": Path(path).stem, **options})
    Path(path).write_text(json.dumps(drawn, indent=1, allow_nan=False))


def _draw_position(drawn: _Nodes, found: Attribution, n: int, n_pairs: int, traced: Trace | None) -> str:
    """Add what happens at one position, and return the id of the target's node."""
    position, low = found.places.position[n].item(), 4 * found.layer + 1
    end = _draw_target(drawn, found, n)
    bias = drawn.add(low, "bias", -2, position, "bias", "biases")
    error = drawn.add(low, -1, -1, position, "mlp reconstruction error", "what the input SAE does not reconstruct")
    parts = [bias, error]
    for feature, z in zip(found.features[n].tolist(), found.activations[n].tolist(), strict=True):
        if feature >= 0:
            number, clerp = _pairing(low, feature), found.label(feature)
            parts.append(drawn.add(low, feature, number, position, FEATURE, clerp, activation=z))
    table = found.table[n, : len(parts), : len(parts)]
    for part, weight in zip(parts, table[0].tolist(), strict=True):
        drawn.link(part, end, weight)
    _draw_pairs(drawn, found, table[1:, 1:], parts[1:], position, n_pairs, end)
    if traced is not None:
        _draw_sources(drawn, found, traced, n, parts)
    return end


def _draw_target(drawn: _Nodes, found: Attribution, n: int) -> str:
    target, row = found.target, 4 * found.layer + 3
    position, value = found.places.position[n].item(), found.pre_activation[n].item()
    if target.kind == "token":
        more = {"is_target_logit": True, "activation": value}
        return drawn.add(row, target.index, target.index, position, "logit", target.name, **more)
    if target.kind == "direction":
        return drawn.add(row, "direction", -1, position, FEATURE, target.name, activation=value)
    number = _pairing(row, target.index)
    return drawn.add(row, target.index, number, position, FEATURE, target.name, activation=value)


def _draw_pairs(
    drawn: _Nodes, found: Attribution, table: Tensor, parts: list[str], position: int, n_pairs: int, end: str
) -> None:
    """Add the strongest pairs among error and features, and one node for all others."""
    row, base = 4 * found.layer + 2, found.n_features + 1  # the error counts as one more feature
    order = table.abs().flatten().argsort(descending=True, stable=True)
    strongest = order[: min(n_pairs, int((table != 0).sum()))]
    for flat, value in zip(strongest.tolist(), table.flatten()[strongest].tolist(), strict=True):
        legs = [parts[i] for i in divmod(flat, len(parts))]
        clerp = " × ".join(drawn.nodes[leg]["clerp"] for leg in legs)
        left, right = (int(leg.split("_")[1]) for leg in legs)
        number = left % base * base + right % base
        pair = drawn.add(row, f"{left}x{right}", number, position, "feature pair", clerp, activation=value)
        for leg in dict.fromkeys(legs):
            drawn.link(leg, pair, value / len(set(legs)))
        drawn.link(pair, end, value)
    others = table.flatten()[order[len(strongest) :]].sum().item()
    if others:
        drawn.link(drawn.add(row, "rest", -1, position, "feature pair", "all weaker pairs"), end, others)


def _draw_sources(drawn: _Nodes, found: Attribution, traced: Trace, n: int, parts: list[str]) -> None:
    """Add the sources of the features at one position, and the encoder's offset from the bias node."""
    position = found.places.position[n].item()
    row = found.places.row[n].item()
    vocab, word = found.places.tokens[row, position].item(), found.places.words[row][position]
    keys = []
    for name in traced.names:
        kind, _, at = name.partition(" ")
        if kind == "embedding":
            keys.append(drawn.add("E", vocab, position, position, "embedding", f"embedding of {word!r}"))
        elif kind == "MLP":
            keys.append(drawn.add(4 * int(at) + 3, "mlp", -1, position, "mlp", name))
        elif kind == "attention":
            keys.append(drawn.add("E", "attention-biases", -1, position, "bias", name))
        else:
            block, head = map(int, at.split("."))
            keys.append(drawn.add(4 * block, f"head{head}", head, position, "attention head", name))
    for i, feature in enumerate(parts[2:]):
        for key, weight in zip(keys, traced.values[n, i].tolist(), strict=True):
            drawn.link(key, feature, weight)
        drawn.link(parts[0], feature, traced.bias[n, i].item())


def _pairing(x: int, y: int) -> int:
    """Return Cantor's number of a pair of natural numbers."""
    return (x + y) * (x + y + 1) // 2 + y


def _set_influence(drawn: _Nodes, ends: Sequence[str]) -> None:
    """Give each node the share of the total weight that nodes at least as strong carry together; the targets none."""
    weight = dict.fromkeys(drawn.nodes, 0.0)
    for link in drawn.links:
        weight[link["source"]] += abs(link["weight"])
    total, so_far = sum(weight.values()) or 1.0, 0.0
    for key in sorted(weight, key=weight.get, reverse=True):
        so_far += weight[key]
        drawn.nodes[key]["influence"] = 0.0 if key in ends else min(so_far / total, 1.0)


# -- common parts -----------------------------------------------------------------------------------------------------


class _Reading(NamedTuple):
    """A target as a quadratic form on what enters the MLP and a constant 1, and how to measure it."""

    target: Target
    direction: Float[Tensor, " d_model"]
    offset: Float[Tensor, ""]
    matrix: Float[Tensor, "leg leg"]
    hook: str
    final: str | None  # the last residual stream, if the final norm's root mean square counts
    norm: nn.Module

    @property
    def hooks(self) -> list[str]:
        return [self.hook] if self.final is None else [self.hook, self.final]

    def scale(self, found: dict[str, Tensor]) -> Float[Tensor, " position"]:
        """Return what the target is multiplied by: one over the final root mean square, of a token, else 1."""
        y = found[self.hook if self.final is None else self.final]
        if self.final is None or not isinstance(self.norm, RMSNorm):
            return y.new_ones(len(y))
        return _rms(y, self.norm.eps)[:, 0].reciprocal()

    def measure(self, found: dict[str, Tensor]) -> Float[Tensor, " position"]:
        return (found[self.hook] @ self.direction + self.offset) * self.scale(found)


def _reading(
    model: BilinearTransformer,
    layer: int,
    feature: int | None,
    out: SAE | None,
    direction: Tensor | None,
    token: str | int | None,
) -> _Reading:
    """Return the target that the arguments name."""
    _check_layer(model, layer)
    options = {"feature": feature, "direction": direction, "token": token}
    given = [name for name, one in options.items() if one is not None]
    if len(given) != 1:
        raise ValueError(f"give one of feature, direction and token, got {' and '.join(given) or 'none'}")
    if (out is None) != (feature is None):
        raise ValueError(f"out goes with feature, got {'no out' if out is None else 'out without a feature'}")
    tensor = model.blocks[layer].mlp.tensor().detach().to(torch.float64)
    target, row, offset = _target(model, layer, feature, out, direction, token)
    row, offset = (one.to(tensor.down) for one in (row, offset))
    matrix = tensor.matrix(row)
    matrix = matrix if tensor.constant else F.pad(matrix, (0, 1, 0, 1))
    matrix[-1, -1] += offset
    final = None if token is None else f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    return _Reading(target, row, offset, matrix, f"blocks.{layer}.hook_mlp_out", final, model.ln_final)


def _target(
    model: BilinearTransformer,
    layer: int,
    feature: int | None,
    out: SAE | None,
    direction: Tensor | None,
    token: str | int | None,
) -> tuple[Target, Tensor, Tensor]:
    """Return name, direction and offset of what is read."""
    zero, d_model = torch.zeros(()), model.cfg.d_model
    if out is not None:
        _hook_of(out, "out", layer, ("hook_mlp_out",), d_model)
        if not 0 <= feature < out.cfg.d_sae:
            raise ValueError(f"feature must lie between 0 and {out.cfg.d_sae - 1}, got {feature}")
        return Target("feature", feature, f"feature {feature}"), readers(out)[feature], offsets(out)[feature]
    if token is not None:
        index = _token_id(model, token)
        name = model.tokenizer.id_to_token(index) if model.tokenizer is not None else index
        return Target("token", index, f"logit of {name!r}"), logit_direction(model, index), zero
    if direction.shape != (d_model,):
        raise ValueError(f"direction must have shape [{d_model}] (d_model), got {list(direction.shape)}")
    return Target("direction", None, "a direction"), direction.detach(), zero


def _check_layer(model: BilinearTransformer, layer: int) -> None:
    if not 0 <= layer < model.cfg.n_layers:
        raise ValueError(f"layer must lie between 0 and {model.cfg.n_layers - 1}, got {layer}")


def _checked_input(model: BilinearTransformer, layer: int, inp: SAE) -> str:
    return _hook_of(inp, "inp", layer, ("hook_mlp_in", "hook_resid_mid"), model.cfg.d_model)


def _hook_of(sae: SAE, name: str, layer: int, points: Sequence[str], d_model: int) -> str:
    """Return the hook point of an SAE, which must be one of the layer's `points`."""
    hook, allowed = sae.cfg.metadata.hook_name, [f"blocks.{layer}.{point}" for point in points]
    if hook not in allowed:
        raise ValueError(f"{name} must be an SAE at {' or '.join(allowed)} (cfg.metadata.hook_name), got {hook!r}")
    if sae.cfg.d_in != d_model:
        raise ValueError(f"{name} must read {d_model} dimensions (d_model), got an SAE with d_in={sae.cfg.d_in}")
    if sae.cfg.normalize_activations != "none":
        scheme = sae.cfg.normalize_activations
        raise ValueError(f"{name} must not normalise what it reads, got normalize_activations={scheme!r}")
    return hook


def locate(
    model: BilinearTransformer,
    text: Text | Int[Tensor, "text seq"] | Int[Tensor, " seq"],
    position: int | None = None,
) -> Places:
    """Tokenise, and find the positions that are asked for.

    Args:
        model: The model.
        text: As for `attribute`.
        position: As for `attribute`.

    Raises:
        ValueError: No text, or no such position.
    """
    if isinstance(text, Tensor):
        tokens = torch.atleast_2d(text)
        if not tokens.numel():
            raise ValueError(f"text must hold at least one token, got ids of shape {list(text.shape)}")
        tokens, attend, counts = to_rows(model, tokens)
    else:
        tokens, attend, counts = _tokenise(model, [text] if isinstance(text, str) else list(text))
    if position is not None:
        counts = _at(position, attend)
    row, where = counts.nonzero(as_tuple=True)
    if not len(row):
        raise ValueError("text must hold a token besides BOS, got none")
    kept = [one[mask] for one, mask in zip(tokens, attend, strict=True)]
    named = model.tokenizer is not None
    words = tuple(tuple(model.to_str_tokens(one) if named else map(str, one.tolist())) for one in kept)
    texts = tuple(model.to_string(one) if named else " ".join(map(str, one.tolist())) for one in kept)
    device = model.W_E.device
    return Places(tokens.to(device), attend.to(device), row.to(device), where.to(device), words, texts)


def _tokenise(model: BilinearTransformer, texts: list[str]) -> Rows:
    """Tokenise texts one by one, and pad them on the right."""
    if not texts:
        raise ValueError("text must hold at least one text, got an empty list")
    rows, first = [model.to_tokens(text)[0] for text in texts], int(model.has_bos)
    for index, one in enumerate(rows):
        if len(one) == first:
            raise ValueError(f"text must hold a token besides BOS, got {texts[index]!r} as text {index}")
    tokens = pad_sequence(rows, batch_first=True, padding_value=model.eos_id)
    index = torch.arange(tokens.shape[1], device=tokens.device)
    attend = index < torch.tensor([len(one) for one in rows], device=tokens.device)[:, None]
    return Rows(tokens, attend, attend & (index >= first))


def _at(position: int, attend: Bool[Tensor, "text seq"]) -> Bool[Tensor, "text seq"]:
    """Mark one position of each text, from its end if negative."""
    counts = torch.zeros_like(attend)
    for row, length in enumerate(attend.sum(1).tolist()):
        if not -length <= position < length:
            raise ValueError(f"position must lie between {-length} and {length - 1} in text {row}, got {position}")
        counts[row, position % length] = True
    return counts


def observe(model: BilinearTransformer, places: Places, hooks: set[str]) -> dict[str, Float[Tensor, "position ..."]]:
    """Run the model, and return in float64 what the hook points see at each place."""
    parts: dict[str, list[Tensor]] = {hook: [] for hook in hooks}
    for start in range(0, len(places.tokens), _ROWS):
        tokens, attend = (one[start : start + _ROWS] for one in places[:2])
        seen = activations(model, Rows(tokens, attend, attend), sorted(hooks))
        here = (places.row >= start) & (places.row < start + _ROWS)
        for hook in hooks:
            parts[hook].append(seen[hook][places.row[here] - start, places.position[here]].double())
    return {hook: torch.cat(some) for hook, some in parts.items()}


def _rms(x: Float[Tensor, "position d_model"], eps: float) -> Float[Tensor, "position 1"]:
    return (x.pow(2).mean(1, keepdim=True) + eps).sqrt()


def norm_parts(
    norm: nn.Module, x: Float[Tensor, "position d_model"]
) -> tuple[Float[Tensor, "position d_model"], Float[Tensor, " d_model"]]:
    """Return factor and shift such that `norm(x) = factor * x + shift`; without a norm, one and zero."""
    if not isinstance(norm, RMSNorm):
        return torch.ones_like(x), x.new_zeros(x.shape[1])
    gain = torch.ones_like(x[0]) if norm.weight is None else norm.weight.detach().to(x)
    shift = torch.zeros_like(x[0]) if norm.bias is None else norm.bias.detach().to(x)
    return gain / _rms(x, norm.eps), shift


def with_unit(
    parts: Float[Tensor, "position part d_model"],
    factor: Float[Tensor, "position d_model"],
    shift: Float[Tensor, " d_model"],
) -> Float[Tensor, "position part leg"]:
    """Take parts through the norm into homogeneous coordinates; its shift and the 1 go to the first part, the bias."""
    parts = F.pad(parts * factor[:, None], (0, 1))
    parts[:, 0, :-1] += shift
    parts[:, 0, -1] = 1
    return parts


def _terms(
    matrix: Float[Tensor, "leg leg"], parts: Float[Tensor, "position part leg"]
) -> Float[Tensor, "position part part"]:
    """Return the term of each unordered pair of parts, `(2 - δ_ab) p_a Q p_b` for `a <= b`, zero below."""
    full = parts @ matrix @ parts.mT
    return 2 * full.triu(1) + torch.diag_embed(full.diagonal(dim1=1, dim2=2))
