"""Why a head attends where it does: its scores as exact sums over pairs of features at query and key."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from bilens.models.attention import Attention
from bilens.models.layers import Norm
from bilens.models.projections import Projection
from bilens.models.rotary import rotate
from bilens.models.texts import Texts
from bilens.models.transformer import BilinearTransformer
from bilens.saes.stored import SAE
from bilens.tensor.records import Record, Rows, tabular

from .attribution import active_features, feature_parts
from .places import Places, check_layer, locate
from .targets import fitting_hook
from .terms import strongest


@tabular()
class ScoreTerm(NamedTuple):
    """One part at the query with one at the key, and what the two add to a head's score."""

    branch: int
    head: int
    row: int
    query: int
    key: int
    words: tuple[str, str]
    features: tuple[int, int]
    labels: tuple[str, str]
    value: float

    def __repr__(self) -> str:
        (left, right), (at, to) = self.labels, self.words
        branch = f" (branch {self.branch})" if self.branch else ""
        return (
            f"head {self.head}{branch}: {left} at {self.query} {at!r} × {right} at {self.key} {to!r}: {self.value:+.4g}"
        )


@tabular(rows="pair")
class Side(NamedTuple):
    """The query or the key of each pair: where, which features are active there, and what its norm divides by."""

    position: Int[Tensor, " pair"]
    features: Int[Tensor, "pair active"]  # ascending, then -1
    activations: Float[Tensor, "pair active"]
    divisor: Float[Tensor, "branch pair head"]  # 1 where queries and keys are not normalised


@dataclass(frozen=True, repr=False, eq=False)
class Attending(Record, rows="pair", along=("query", "key")):
    """The scores of heads between pairs of positions, as sums over parts at the query and parts at the key.

    `terms[b, n, h, i, j]` is what part i at the n-th pair's query and part j at its key add to the score of head
    `heads[h]` in branch b: part 0 is the bias, part 1 the error (what the SAE does not reconstruct), then come the
    features of `query` and `key`. The norm before attention, and the norms of queries and keys, divide by what was
    measured there, so each term is what is there while those roots are held; `query.divisor` and `key.divisor` hold the
    latter. All is float64: the terms sum to the model's own scores up to the rounding of its own arithmetic.
    """

    layer: int
    heads: tuple[int, ...]
    kind: str  # of attention: how scores make a pattern
    places: Places
    row: Int[Tensor, " pair"]
    query: Side
    key: Side
    terms: Float[Tensor, "branch pair head query_part key_part"]
    measured: Float[Tensor, "branch pair head"]  # scores of the running model: factor · hook_rot_q · hook_rot_k
    label: Callable[[int], str]

    def columns(self) -> dict[str, Any]:
        """Return query and key of each pair, and the scores of the heads (branch 0) between them."""
        at = {"row": self.row, "query": self.query.position, "key": self.key.position}
        words = [self.places.words[row] for row in self.row.tolist()]
        told = {
            f"{side}_word": [word[place] for word, place in zip(words, at[side].tolist(), strict=True)]
            for side in ("query", "key")
        }
        return at | told | {f"head_{head}": self.scores[0, :, index] for index, head in enumerate(self.heads)}

    def facts(self) -> dict[str, Any]:
        """Return the layer, how far the sums are off at most, and the strongest terms."""
        return {"layer": self.layer, "kind": self.kind, "miss": self.miss.max().item(), "strongest": self.top(10)}

    @property
    def scores(self) -> Float[Tensor, "branch pair head"]:
        """The sums of all terms: each branch's scores, the factor on scores included, before any soft cap."""
        return self.terms.sum((3, 4))

    @property
    def total(self) -> Float[Tensor, "pair head"]:
        """What `hook_attn_scores` sees there: the score, the product of two, or the square of one.

        Of a difference of two softmaxes it is the first one's score; of scores with a soft cap, what the cap is put on.
        """
        scores = self.scores
        if self.kind == "bilinear":
            return scores[0] * scores[1]
        return scores[0].square() if self.kind == "squared" else scores[0]

    @property
    def pairs(self) -> Float[Tensor, "branch pair head query_feature key_feature"]:
        """Feature × feature."""
        return self.terms[..., 2:, 2:]

    @property
    def sums(self) -> dict[str, Float[Tensor, "branch pair head"]]:
        """The kinds of terms, the query's part first; they sum to `scores`."""
        names = ("bias", "error", "feature")
        cuts = (slice(0, 1), slice(1, 2), slice(2, None))
        return {
            f"{left} × {right}": self.terms[..., at, to].sum((3, 4))
            for left, at in zip(names, cuts, strict=True)
            for right, to in zip(names, cuts, strict=True)
        }

    @property
    def miss(self) -> Float[Tensor, "branch pair head"]:
        """How far the sums are from the running model, relative to the terms: `|score - measured| / Σ |term|`."""
        scale = self.terms.abs().sum((3, 4)).clamp(min=torch.finfo(self.terms.dtype).tiny)
        return (self.scores - self.measured).abs() / scale

    def top(self, k: int = 10) -> Rows[ScoreTerm]:
        """Return the k pairs of features that add or take away most, over all that was asked for, strongest first.

        Raises:
            ValueError: `k` is below 1.
        """
        return Rows(self._term(*index, value) for index, value in strongest(self.pairs, k))

    def _term(self, branch: int, n: int, head: int, i: int, j: int, value: float) -> ScoreTerm:
        row, query, key = (int(index[n]) for index in (self.row, self.query.position, self.key.position))
        features = int(self.query.features[n, i]), int(self.key.features[n, j])
        words = self.places.words[row][query], self.places.words[row][key]
        labels = self.label(features[0]), self.label(features[1])
        return ScoreTerm(branch, self.heads[head], row, query, key, words, features, labels, value)

    def __repr__(self) -> str:
        branches, pairs, heads = self.measured.shape
        strongest = self.top(1)
        first = f"; first: {strongest[0]!r}" if strongest else ""
        what = f"layer {self.layer}, {heads} heads, {pairs} pairs of positions, {branches} branches"
        return f"Attending({what}, sum within {self.miss.max().item():.1e}{first})"


# eight parameters: what is looked at is a layer, heads, and two positions
@torch.no_grad()
def why_attend(
    model: BilinearTransformer,
    text: Texts,
    layer: int,
    head: int | Sequence[int] | None = None,
    query: int | Sequence[int] | None = None,
    key: int | Sequence[int] | None = None,
    *,
    inp: SAE,
    label: Callable[[int], str] = "#{}".format,
) -> Attending:
    """Write a head's scores as exact sums over pairs of features, one at the query and one at the key.

    A score is bilinear in the two positions' inputs, `factor (R_t q_t)·(R_s k_s)` with `q = W_Q x + b_Q`, and so a sum
    over what makes up either: `x = Σ_i z_i d_i + b_dec + e` (which defines the error e). The norm before attention
    divides by the root mean square at that position, and so may a norm of queries and keys: both are measured, and each
    part is divided by them. Rotation is that of the two positions.

    Attention may have any pattern: softmax (the terms are of what the softmax reads), a product of two scores, a
    square, a difference of two softmaxes.

    Args:
        model: The model.
        text: A text, a list of texts, or token ids, without padding on the left.
        layer: Which block.
        head: A head, or several; all of the layer if `None`.
        query: A position, or several, one of each pair; -1 is the last of each text.
        key: As many, none after its query. Neither `query` nor `key`: all pairs that attention allows.
        inp: SAE at the layer's `hook_resid_pre`, or at its `ln1.hook_normalized`.
        label: Name of a feature.

    Raises:
        ValueError: An SAE that does not fit, no such layer, head or position, a key that its query does not attend to,
            only one of `query` and `key`.

    Cost: one run of the model, `branches · pairs · heads · active²` numbers in float64.
    """
    check_layer(model, layer)
    block, hooks = model.blocks[layer], attention_hooks(layer)
    hook = fitting_hook(model, inp, "inp", hooks)
    heads = _heads(block.attn, head)
    places = locate(model, text)
    row, *ends = _pairs(places, query, key, block.attn.config.window)
    here, index = _compact(places, row, *ends)
    sides = ("q", "k", "q2", "k2")[: 2 * block.attn.branches]
    placed = [f"blocks.{layer}.attn.hook_rot_{side}" for side in sides]
    found = here.observe(model, [hook, hooks[0], *placed])
    features, z = active_features(inp, found[hook])
    parts = _entering(
        block.ln1, feature_parts(inp, found[hook], found[hook], features, z), found[hooks[0]], hook == hooks[0]
    )
    read = _Reading(block.attn, parts, here.position, heads, model.W_E.dtype)
    made = [read.side(side, branch) for branch in range(block.attn.branches) for side in (0, 1)]
    divisors, legs = zip(*made, strict=True)
    factor, terms, measured = block.attn.config.factor, [], []
    for branch in range(block.attn.branches):
        two = [leg[some] for leg, some in zip(legs[2 * branch :], index, strict=False)]
        terms.append(factor * einsum(*two, "pair a head d, pair b head d -> pair head a b"))
        seen = [_of_heads(found[name], block.attn)[:, heads] for name in placed[2 * branch : 2 * branch + 2]]
        two = [one[some] for one, some in zip(seen, index, strict=True)]
        measured.append(factor * einsum(*two, "pair head d, pair head d -> pair head"))
    ends = [
        Side(here.position[some], features[some], z[some], torch.stack([one[some] for one in divisors[side::2]]))
        for side, some in enumerate(index)
    ]
    return Attending(
        layer=layer,
        heads=tuple(heads),
        kind=block.attn.config.kind,
        places=places,
        row=row,
        query=ends[0],
        key=ends[1],
        terms=torch.stack(terms),
        measured=torch.stack(measured),
        label=label,
    )


def attention_hooks(layer: int) -> list[str]:
    """Return the hook points at which an SAE can split what a layer's attention reads."""
    return [f"blocks.{layer}.hook_resid_pre", f"blocks.{layer}.ln1.hook_normalized"]


def _heads(attn: Attention, head: int | Sequence[int] | None) -> list[int]:
    n = attn.config.n_heads
    heads = list(range(n)) if head is None else [head] if isinstance(head, int) else list(head)
    bad = [one for one in heads if not 0 <= one < n]
    if bad or not heads:
        raise ValueError(f"head must lie between 0 and {n - 1}, got {bad[0] if bad else 'none'}")
    return heads


def _pairs(
    places: Places, query: int | Sequence[int] | None, key: int | Sequence[int] | None, window: int | None
) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"], Int[Tensor, " pair"]]:
    """Return the row, the query's position and the key's of each pair that is asked for."""
    if (query is None) != (key is None):
        raise ValueError(f"query and key go together, got only {'query' if key is None else 'key'}")
    asked = None
    if query is not None:
        asked = [[one] if isinstance(one, int) else list(one) for one in (query, key)]
        if len(asked[0]) != len(asked[1]):
            raise ValueError(f"query and key must be as many, got {len(asked[0])} and {len(asked[1])}")
    found = []
    for row, length in enumerate(places.windows.attend.sum(1).tolist()):
        if asked is None:
            at, to = torch.ones(length, length).tril().nonzero().T
            near = at - to < (length if window is None else window)
            at, to = at[near], to[near]
        else:
            at, to = (
                torch.tensor([_position(name, one, length, row) for one in side])
                for name, side in zip(("query", "key"), asked, strict=True)
            )
            far = (to > at) | (at - to >= (length if window is None else window))
            if far.any():
                first = int(far.nonzero()[0])
                raise ValueError(
                    f"key must be a position that its query attends to, got query {at[first]} and key {to[first]} in "
                    f"text {row}"
                )
        found.append(torch.stack((torch.full_like(at, row), at, to)))
    row, at, to = torch.cat(found, 1).to(places.windows.tokens.device)
    return row, at, to


def _position(name: str, position: int, length: int, row: int) -> int:
    if not -length <= position < length:
        raise ValueError(f"{name} must lie between {-length} and {length - 1} in text {row}, got {position}")
    return position % length


def _compact(
    places: Places, row: Tensor, at: Tensor, to: Tensor
) -> tuple[Places, tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]]]:
    """Return the positions of all pairs, each once, and where each pair's query and key are among them."""
    width = places.windows.tokens.shape[1]
    once, where = torch.cat((row * width + at, row * width + to)).unique(return_inverse=True)
    here = Places(places.windows, once // width, once % width, places.words, places.texts)
    return here, where.chunk(2)


def _entering(
    norm: Norm, parts: Float[Tensor, "position part d_model"], resid: Float[Tensor, "position d_model"], before: bool
) -> Float[Tensor, "position part d_model"]:
    """Take parts through the norm before attention; what it shifts by goes to the first part, the bias."""
    gain, shift = norm.affine(resid)
    parts = norm.center(parts) * gain / norm.rms(resid)[:, None] if before else parts * gain
    parts[:, 0] += shift
    return parts


def _of_heads(
    placed: Float[Tensor, "position shared d_head"], attn: Attention
) -> Float[Tensor, "position head d_head"]:
    """Return what a hook point sees of each key-value head for every head that reads it."""
    return placed.repeat_interleave(attn.config.n_heads // placed.shape[1], 1)


@dataclass(frozen=True, eq=False)
class _Reading:
    """Parts of what attention reads, and how the heads make parts of queries and keys of them."""

    attn: Attention
    parts: Float[Tensor, "position part d_model"]
    position: Int[Tensor, " position"]
    heads: list[int]
    dtype: torch.dtype  # of the model, whose rotary tables it decides

    def side(self, side: int, branch: int) -> tuple[Float[Tensor, "position head"], Tensor]:
        """Return what queries (0) or keys (1) are divided by, and their parts, `[position, part, head, d_head]`."""
        projection: Projection = self.attn.projections(branch)[side]
        weight, bias = (one[self.heads].to(self.parts) for one in projection.folded())
        made = einsum(self.parts, weight, "position part i, head i d -> position part head d")
        made[:, 0] += bias
        divisor = projection.divisor(self.parts.sum(1))[:, self.heads]
        made /= divisor[:, None, :, None]
        shift = projection.shift()
        if shift is not None:
            made[:, 0] += shift[self.heads].to(made)
        config = self.attn.config
        angles = config.rope.angles(self.position[:, None], config.d_head, self.dtype)
        return divisor, rotate(made.flatten(1, 2)[:, None], angles).view_as(made)
