"""The paths of a transformer's last layer, from embedding or heads through the bilinear MLP to the logits, exactly."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bilens.models.layers import RMSNorm
from bilens.models.transformer import BilinearTransformer, Text
from bilens.tensor.bilinear import BilinearTensor

from .attribution import Places, locate, logit_direction, norm_parts, split_residual, with_unit

_POSITIONS = 256  # whose hidden units and logits are held at a time

Group = Literal["direct", "head", "direct × direct", "head × direct", "direct × head", "head × head", "bias"]
GROUPS: tuple[Group, ...] = get_args(Group)


@dataclass(frozen=True, repr=False, eq=False)
class Paths:
    """The logits of a transformer as a sum over paths through its last layer.

    Without a product: "direct" (the stream that enters the layer, straight to the logits) and "head". Through the MLP,
    left × right factor: "direct × direct", "head × direct", "direct × head", "head × head". "bias" is every path on
    which a bias lies: of the MLP, of attention's output, or as the shift of a norm. All is float64.
    """

    layer: int
    places: Places
    names: tuple[str, ...]  # "direct", then the heads
    written: Float[Tensor, "group position d_model"]  # what each of GROUPS adds to the last residual stream
    entering: Float[Tensor, "position entry leg"]  # what of each part enters the MLP; bias first, constant leg last
    tensor: BilinearTensor
    W_U: Float[Tensor, "d_model vocab"]
    factor: Float[Tensor, "position d_model"]  # final norm: factor * resid_post + shift
    shift: Float[Tensor, " d_model"]
    resid_post: Float[Tensor, "position d_model"]  # of the running model

    def logits(
        self, group: Group | None = None, tokens: Int[Tensor, " token"] | None = None
    ) -> Float[Tensor, "position token"]:
        """Return what a group adds to the logits; of all groups together, if `None`: the model's logits.

        Args:
            group: One of `GROUPS`.
            tokens: Which logits; all of the vocabulary if `None`.

        Raises:
            ValueError: There is no such group.
        """
        if group is not None and group not in GROUPS:
            raise ValueError(f"group must be one of {', '.join(GROUPS)}, got {group!r}")
        written = self.written.sum(0) if group is None else self.written[GROUPS.index(group)]
        read = written * self.factor + (self.shift if group in (None, "bias") else 0)
        return read @ (self.W_U if tokens is None else self.W_U[:, tokens])

    @property
    def miss(self) -> float:
        """How far the sum of all groups is from the model's last residual stream, relative to its largest entry.

        Of a model in float64 it is rounding; one in float32 misses by its own.
        """
        return ((self.written.sum(0) - self.resid_post).abs().max() / self.resid_post.abs().max()).item()

    def table(self, token: int) -> Float[Tensor, "position part part"]:
        """Return a logit's paths through the MLP by left part and right part, the bias first, then `names`.

        `table[n, a, b] = Σ_h (u·down_h) (left_h·p_a) (right_h·p_b)`: it is not symmetric, since the two factors are
        told apart (2305.03452). The entries sum to what the MLP adds to the logit.

        Args:
            token: Id of the token.

        Raises:
            ValueError: No such token.
        """
        if not 0 <= token < self.W_U.shape[1]:
            raise ValueError(f"token must lie between 0 and {self.W_U.shape[1] - 1}, got {token}")
        tables = []
        for some in torch.arange(len(self.factor), device=self.factor.device).split(_POSITIONS):
            weight = (self.factor[some] * self.W_U[:, token]) @ self.tensor.down
            left, right = (self.entering[some] @ side.T for side in (self.tensor.left, self.tensor.right))
            tables.append((left * weight[:, None]) @ right.mT)
        return torch.cat(tables)

    def shares(self) -> dict[str, float]:
        """Return each group's share of the variance of the logits: `Σ cov(group, logit) / Σ var(logit)`.

        Variance over positions, summed over the vocabulary, after the mean over the vocabulary is taken from each
        position's logits, which softmax does not see. The shares sum to one; that of a group that counteracts the
        others is negative.

        Raises:
            ValueError: Fewer than two positions.
        """
        if len(self.factor) < 2:
            raise ValueError(f"shares need a variance over at least two positions, got {len(self.factor)}")
        W_U = self.W_U - self.W_U.mean(1, keepdim=True)
        gram = W_U @ W_U.T  # logits enter through their inner products only: none is built
        reads = self.written * self.factor
        reads = reads - reads.mean(1, keepdim=True)
        total = reads.sum(0)
        weighted = total @ gram
        shares = (reads * weighted).sum((1, 2)) / (total * weighted).sum()
        return dict(zip(GROUPS, shares.tolist(), strict=True))

    def __repr__(self) -> str:
        n_heads = len(self.names) - 1
        return f"Paths(layer {self.layer}, {len(self.factor)} positions, {n_heads} heads, sum within {self.miss:.1e})"


@torch.no_grad()
def expand(
    model: BilinearTransformer,
    text: Text | Int[Tensor, "text seq"] | Int[Tensor, " seq"],
    layer: int | None = None,
    position: int | None = None,
) -> Paths:
    """Expand the last layer of a transformer into paths that sum to its logits, for the attention patterns at hand.

    With `x = f (direct + Σ_h head_h) + shift` what enters the MLP, the logits are
    `(g (direct + Σ_h head_h + down (Lx ⊙ Rx)) + shift') W_U`: a sum over the groups of `Paths` (2305.03452, path
    expansion of a one-layer transformer). The norms' factors f and g are measured at each position, one number times
    the norm's gain. In a one-layer transformer "direct" is the embedding; of a deeper one only the last layer expands
    exactly, and "direct" is the residual stream that enters it.

    Other patterns: call it within `model.hooks([("blocks.0.attn.hook_pattern", f)])`.

    Cost: one run of the model, three times the layer's, and `(heads + 10) · d_model` float64 numbers per position.

    Args:
        model: The model; the layer's MLP must be bilinear.
        text: A text, a list of texts, or token ids: with BOS, without padding.
        layer: The last one, which is also what `None` means.
        position: Where, BOS being 0, and -1 the last token of each text; `None` for all but BOS.

    Raises:
        ValueError: Another layer, no text, no such position.
        TypeError: The layer is not bilinear.
    """
    last = model.cfg.n_layers - 1
    if layer is not None and layer != last:
        raise ValueError(
            f"layer must be the last one, {last}: what an earlier layer writes goes through later ones, so its paths "
            f"do not sum to the logits; got {layer}"
        )
    tensor = model.blocks[last].mlp.tensor().detach().to(torch.float64)
    hook = f"blocks.{last}.hook_resid_post"
    came, found = split_residual(model, locate(model, text, position), last, {hook})
    n_heads = model.cfg.n_heads
    bias = model.blocks[last].attn.b_O.detach().double().expand_as(came.values[:, :1])
    direct, heads = came.values[:, :-n_heads].sum(1, keepdim=True) - bias, came.values[:, -n_heads:]
    entering = with_unit(torch.cat((bias, direct, heads), 1), came.factor, came.shift)
    entering = entering if tensor.constant else entering[..., :-1]
    through = torch.cat([_through_mlp(tensor, some) for some in entering.split(_POSITIONS)], 1)
    through[-1] += bias[:, 0]
    factor, shift = norm_parts(model.ln_final, found[hook])
    return Paths(
        layer=last,
        places=came.places,
        names=("direct", *came.names[-n_heads:]),
        written=torch.cat((direct[None, :, 0], heads.sum(1)[None], through)),
        entering=entering,
        tensor=tensor,
        W_U=model.W_U.detach().double(),
        factor=factor,
        shift=shift,
        resid_post=found[hook],
    )


def _through_mlp(
    tensor: BilinearTensor, entering: Float[Tensor, "position entry leg"]
) -> Float[Tensor, "group position out"]:
    """Return what the groups that go through the MLP write, in the order of `GROUPS`."""
    sides = torch.stack((entering[:, 0], entering[:, 1], entering[:, 2:].sum(1)))
    (bias, direct, head), (bias_r, direct_r, head_r) = sides @ tensor.left.T, sides @ tensor.right.T
    biased = bias * (bias_r + direct_r + head_r) + (direct + head) * bias_r
    hidden = torch.stack((direct * direct_r, head * direct_r, direct * head_r, head * head_r, biased))
    return hidden @ tensor.down.T


# -- virtual tokens ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False, eq=False)
class VirtualTokens:
    """The first MLP as a tensor over virtual tokens: each token's embedding, and what each head makes of it.

    Input legs are those of `legs`, each with all of `tokens`: embedding, then heads. If the first norm has a shift,
    what each head makes of that follows, one input per head; the constant is last, if the tensor has one.
    """

    tensor: BilinearTensor
    writers: Float[Tensor, "virtual d_model"]  # what one unit of each input is at the MLP's input
    legs: tuple[str, ...]
    tokens: Int[Tensor, " token"]  # ids
    words: tuple[str, ...]

    def index(self, leg: str, token: int) -> int:
        """Return the input that stands for a token, by its id, in a leg.

        Raises:
            ValueError: No such leg or token.
        """
        if leg not in self.legs:
            raise ValueError(f"leg must be one of {', '.join(self.legs)}, got {leg!r}")
        place = (self.tokens == token).nonzero().flatten().tolist()
        if not place:
            raise ValueError(f"token must be the id of one of these {len(self.words)} tokens, got {token}")
        return self.legs.index(leg) * len(self.words) + place[0]

    def name(self, index: int) -> str:
        """Return leg and token of an input: `"head 0.1 of 'girl'"`.

        Raises:
            ValueError: No such input.
        """
        if not 0 <= index < self.tensor.inp:
            raise ValueError(f"index must lie between 0 and {self.tensor.inp - 1}, got {index}")
        if index >= len(self.writers):
            return "constant"
        leg, place = divmod(index, len(self.words))
        if index >= len(self.legs) * len(self.words):
            return f"{self.legs[1 + index - len(self.legs) * len(self.words)]} of the norm's shift"
        return f"{self.legs[leg]} of {self.words[place]!r}"

    def nearest(self, direction: Float[Tensor, " d_model"], k: int = 10) -> list[tuple[str, float]]:
        """Return the virtual tokens whose cosine with a direction at the MLP's input is largest in size.

        Args:
            direction: For example an eigenvector of the layer (of a layer with biases, without its last entry).
            k: How many.

        Raises:
            ValueError: A direction of another width.
        """
        if direction.shape != self.writers.shape[1:]:
            raise ValueError(f"direction must have shape {list(self.writers.shape[1:])}, got {list(direction.shape)}")
        cosines = F.normalize(self.writers, dim=1) @ F.normalize(direction.to(self.writers), dim=0)
        best = cosines.abs().topk(min(k, len(cosines))).indices
        return [(self.name(i), value) for i, value in zip(best.tolist(), cosines[best].tolist(), strict=True)]

    def __repr__(self) -> str:
        return f"VirtualTokens({len(self.words)} tokens in {len(self.legs)} legs; {self.tensor!r})"


@torch.no_grad()
def virtual_tokens(
    model: BilinearTransformer,
    out: Float[Tensor, "n_out d_model"] | None = None,
    tokens: Int[Tensor, " token"] | None = None,
) -> VirtualTokens:
    """Return the first layer's MLP over virtual tokens, `E` and `E W_V W_O` of each head (2305.03452, path expansion).

    The inputs of a prompt are in `virtual_input`: `tensor.apply` of them is what the MLP writes, read by `out`. The
    gains of both norms are in the writers, their root mean squares in the inputs. Kept in factors: of the pairs of
    virtual tokens, `((heads + 1) · vocab)²` for each output, none is computed before `tensor.matrix` or
    `top_interactions` asks for it; for the latter, choose some hundred `tokens`.

    Cost: `hidden · (heads + 1) · vocab` numbers, twice.

    Args:
        model: The model; its first MLP must be bilinear.
        out: Readers of what the MLP writes; the tokens' logit directions if `None`. In a model of one layer those give
            the MLP's part of the logits, times the root mean square of the last residual stream.
        tokens: Ids of the tokens to take; the vocabulary if `None`.

    Raises:
        ValueError: `out` of another width, a token outside the vocabulary, or attention biases, which belong to no
            token.
        TypeError: The layer is not bilinear.
    """
    if any(model.cfg.attention.bias):
        raise ValueError(
            f"model must have no attention biases, which belong to no token, got {model.cfg.attention.bias}"
        )
    tokens = torch.arange(model.cfg.d_vocab) if tokens is None else _checked_tokens(model, tokens)
    block, E = model.blocks[0], model.W_E.detach()[tokens.to(model.W_E.device)]
    W_OV = block.attn.W_V.detach() @ block.attn.W_O.detach()
    (gain_1, shift_1), (gain_2, shift_2) = _gain(block.ln1, E), _gain(block.ln2, E)
    writers = torch.cat((E[None], (E * gain_1) @ W_OV)).flatten(0, 1)
    if shift_1.any():
        writers = torch.cat((writers, shift_1 @ W_OV))
    writers = writers * gain_2
    out = model.W_U.detach().T * _gain(model.ln_final, E)[0] if out is None else out
    tensor = block.mlp.tensor().detach().project(out, writers, inp_bias=shift_2 if shift_2.any() else None)
    legs = ("embedding", *(f"head 0.{head}" for head in range(model.cfg.n_heads)))
    return VirtualTokens(tensor, writers, legs, tokens, tuple(_word(model, token) for token in tokens.tolist()))


@torch.no_grad()
def virtual_input(
    model: BilinearTransformer, text: Text | Int[Tensor, "text seq"] | Int[Tensor, " seq"], position: int = -1
) -> Float[Tensor, "text virtual"]:
    """Return how much of each virtual token, of the whole vocabulary, enters the first MLP at one position of a text.

    `1 / rms_2` of the position's own token in the embedding leg, and `pattern[position, s] / (rms_1(s) rms_2)` of the
    token at s in a head's leg. Cost: `(heads + 1) · vocab` numbers per text.

    Args:
        model: The model.
        text: As for `expand`.
        position: As for `expand`.

    Raises:
        ValueError: No text, or no such position.
    """
    places, block = locate(model, text, position), model.blocks[0]
    scales = [f"blocks.0.{name}.hook_scale" for name in ("ln1", "ln2") if isinstance(getattr(block, name), RMSNorm)]
    pattern = "blocks.0.attn.hook_pattern"
    _, cache = model.run_with_cache(
        places.tokens, attention_mask=places.attend, names_filter=[pattern, *scales], stop_at_layer=1
    )
    weight = cache[pattern][places.row, :, places.position].masked_fill(~places.attend[:, None], 0)  # text head key
    one = torch.ones_like(places.tokens, dtype=weight.dtype)
    rms_1, rms_2 = (cache[name][..., 0] for name in scales) if scales else (one, one)
    own = rms_2[places.row, places.position]
    n_vocab, n_heads = model.cfg.d_vocab, model.cfg.n_heads
    z = weight.new_zeros(len(weight), 1 + n_heads, n_vocab)
    z[:, 0].scatter_(1, places.tokens[places.row, places.position][:, None], 1)
    keys = places.tokens[places.row, None].expand(-1, n_heads, -1)
    z[:, 1:].scatter_add_(2, keys, weight / rms_1[places.row, None])
    shifted = _gain(block.ln1, model.W_E)[1].any()
    z = torch.cat((z.flatten(1), weight.sum(2)), 1) if shifted else z.flatten(1)
    return z / own[:, None]


def _gain(norm: torch.nn.Module, like: Tensor) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
    """Return gain and shift of a norm, one and zero where it has none."""
    weight, bias = (norm.weight, norm.bias) if isinstance(norm, RMSNorm) else (None, None)
    one, zero = like.new_ones(like.shape[1]), like.new_zeros(like.shape[1])
    return one if weight is None else weight.detach(), zero if bias is None else bias.detach()


# -- unembedding, layer, embedding ------------------------------------------------------------------------------------


class Bigram(NamedTuple):
    """A token that follows, and its logit."""

    token: str
    score: float


@torch.no_grad()
def bigram_scores(
    model: BilinearTransformer, tokens: Int[Tensor, " token"], layer: int = 0
) -> Float[Tensor, "token vocab"]:
    """Return the diagonal of unembedding, layer and embedding: what each token alone predicts without attention.

    `score(in -> out) = Σ_h (U_out·down_h)(left_h·e_in)(right_h·e_in) + U_out·e_in` (2406.03947, language part). A model
    with norms has them here too, each measured on what it then sees: the scores are the model's logits with attention
    and the other layers switched off.

    Cost: `tokens · (hidden · d_model + d_model · vocab)`.

    Args:
        model: The model.
        tokens: Ids of the tokens that are read.
        layer: Which MLP.

    Raises:
        ValueError: No such layer, no tokens, or one outside the vocabulary.
        TypeError: The layer is not bilinear.
    """
    if not 0 <= layer < model.cfg.n_layers:
        raise ValueError(f"layer must lie between 0 and {model.cfg.n_layers - 1}, got {layer}")
    block, embedded = model.blocks[layer], model.embed(_checked_tokens(model, tokens).to(model.W_E.device))
    return model.unembed(model.ln_final(embedded + block.mlp.tensor().apply(block.ln2(embedded))))


def bigrams(model: BilinearTransformer, token: str | int, k: int = 10, layer: int = 0) -> list[Bigram]:
    """Return the k tokens that a token predicts most by itself, strongest first: see `bigram_scores`.

    Args:
        model: The model.
        token: As text or id.
        k: How many.
        layer: Which MLP.

    Raises:
        ValueError: A text that is not one token, no such layer, or `k` below 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    index = model.to_single_token(token) if isinstance(token, str) else token
    best = bigram_scores(model, torch.tensor([index]), layer)[0].topk(min(k, model.cfg.d_vocab))
    return [
        Bigram(_word(model, i), value) for i, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def contrast(model: BilinearTransformer, token: str | int, others: Sequence[str | int]) -> Float[Tensor, " d_model"]:
    """Return the output direction of one token against the mean of others: "swim" minus run, climb, eat, ...

    What the tokens have in common, as being verbs, drops out (2406.03947, language part). Eigenvectors of the layer
    for it are named by `virtual_tokens(model).nearest`, and the pairs of virtual tokens that tell "swim" apart are

        direction = contrast(model, "swim", ["run", "climb", "eat", "see", "walk", "fly", "sit", "sleep"])
        virtual = virtual_tokens(model, direction[None], tokens=frequent)
        pairs = bilens.top_interactions(virtual.tensor, 10)  # virtual.name(pairs.left[0].item()), ...

    Args:
        model: The model.
        token: As text or id.
        others: The same, at least one.

    Raises:
        ValueError: No others, or a text that is not one token.
    """
    if not others:
        raise ValueError("others must hold at least one token, got none")
    return logit_direction(model, token) - torch.stack([logit_direction(model, other) for other in others]).mean(0)


def _checked_tokens(model: BilinearTransformer, tokens: Int[Tensor, " token"]) -> Int[Tensor, " token"]:
    if not len(tokens) or not 0 <= tokens.min() <= tokens.max() < model.cfg.d_vocab:
        raise ValueError(f"tokens must hold ids from 0 to {model.cfg.d_vocab - 1}, got {tokens.tolist()}")
    return tokens


def _word(model: BilinearTransformer, token: int) -> str:
    return str(token) if model.tokenizer is None else (model.tokenizer.id_to_token(token) or str(token))
