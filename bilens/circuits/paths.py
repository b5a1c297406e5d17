"""The paths of a transformer's last layer, from embedding or heads through the bilinear MLP to the logits, exactly."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens.models.texts import Texts
from bilens.models.transformer import BilinearTransformer
from bilens.tensor.bilinear import BilinearTensor
from bilens.tensor.records import Record

from .places import Places, locate
from .sources import split_residual
from .terms import in_pieces, with_unit

Group = Literal["direct", "head", "direct × direct", "head × direct", "direct × head", "head × head", "bias"]
GROUPS: tuple[Group, ...] = get_args(Group)


@dataclass(frozen=True, repr=False, eq=False)
class Paths(Record, rows="position", along=("places",), tells=("miss",)):
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
        for some in in_pieces(self.factor):
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

    def columns(self) -> dict[str, Any]:
        """Return the positions, and the norm of what the last layer leaves there."""
        return self.places.columns() | {"resid_post_norm": self.resid_post.norm(dim=1)}

    def facts(self) -> dict[str, Any]:
        """Return the layer, how far the sum is off, and the share of each kind of path."""
        return {"layer": self.layer, "miss": self.miss, "shares": self.shares()}

    def __repr__(self) -> str:
        n_heads = len(self.names) - 1
        return f"Paths(layer {self.layer}, {len(self.factor)} positions, {n_heads} heads, sum within {self.miss:.1e})"


@torch.no_grad()
def expand(
    model: BilinearTransformer,
    text: Texts,
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
    came, found = split_residual(model, locate(model, text, position), last, [hook])
    n_heads = model.cfg.n_heads
    bias = model.blocks[last].attn.b_O.detach().double().expand_as(came.values[:, :1])
    direct, heads = came.values[:, :-n_heads].sum(1, keepdim=True) - bias, came.values[:, -n_heads:]
    entering = with_unit(torch.cat((bias, direct, heads), 1), came.factor, came.shift)
    entering = entering if tensor.constant else entering[..., :-1]
    through = torch.cat([_through_mlp(tensor, entering[some]) for some in in_pieces(entering)], 1)
    through[-1] += bias[:, 0]
    factor, shift = model.ln_final.linear(found[hook])
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
