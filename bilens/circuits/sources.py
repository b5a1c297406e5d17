"""What made up the residual stream before an MLP, and a target as a sum over pairs of that."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from bilens.models.text import Text
from bilens.models.transformer import BilinearTransformer
from bilens.tensor.records import Record

from .places import Places, check_adds, check_layer, locate
from .targets import Reading, Target
from .terms import Terms, in_pieces, with_unit


@dataclass(frozen=True, repr=False, eq=False)
class Sources(Record, rows="position", along=("places",)):
    """What made up the residual stream before an MLP: `values.sum(1)` is `hook_resid_mid`.

    The norm that follows is `factor * resid_mid + shift`, exactly, with `factor` the norm's gain over the root mean
    square of resid_mid, so that `entering.sum(1) + shift` is `hook_mlp_in`.
    """

    model: BilinearTransformer
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

    def columns(self) -> dict[str, Any]:
        """Return the positions, and the norm of what each source wrote there."""
        norms = self.values.norm(dim=2).T
        return self.places.columns() | dict(zip(self.names, norms, strict=True))

    def facts(self) -> dict[str, Any]:
        """Return the layer."""
        return {"layer": self.layer}

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
    attention has output biases, their sum over l is one more source, `"attention biases"`. Where blocks scale the
    stream and mix in its start, each source is what is left of it after that. Works for every kind of MLP.
    Cost: one run of the model, and `sources · d_model` numbers per position.

    Args:
        model: The model.
        text: As for `locate`.
        layer: Which block.
        position: As for `locate`.

    Raises:
        ValueError: No such layer, no text, no such position.
    """
    check_layer(model, layer)
    return split_residual(model, locate(model, text, position), layer)[0]


def split_residual(
    model: BilinearTransformer, places: Places, layer: int, hooks: Sequence[str] = ()
) -> tuple[Sources, dict[str, Float[Tensor, "position ..."]]]:
    """Return the sources, and what `hooks` see in the same run, as `Places.observe` does."""
    check_adds(model)
    heads = [f"blocks.{i}.attn.hook_z" for i in range(layer + 1)]
    mlps = [f"blocks.{i}.hook_mlp_out" for i in range(layer)]
    mid = f"blocks.{layer}.hook_resid_mid"
    begun = model.cfg.start_hook
    found = places.observe(model, [begun, *heads, *mlps, mid, *hooks])
    start = found[begun][:, None]
    names, values = ["embedding"], [start]
    if model.cfg.attention.bias[1]:
        names.append("attention biases")
        values.append(torch.zeros_like(start))
    for i, block in enumerate(model.blocks[: layer + 1]):
        if block.lambdas is not None:
            kept, again = block.lambdas.detach().double()
            values = [kept * value for value in values]
            values[0] = values[0] + again * start
        if model.cfg.attention.bias[1]:
            values[1] = values[1] + block.attn.b_O.detach().double()
        W_O = block.attn.W_O.detach().double()
        written = einsum(found[heads[i]], W_O, "position head d_head, head d_head d_model -> position head d_model")
        values.append(written)
        names += [f"head {i}.{head}" for head in range(model.cfg.n_heads)]
        if i < layer:
            values.append(found[mlps[i]][:, None])
            names.append(f"MLP {i}")
    factor, shift = model.blocks[layer].ln2.linear(found[mid])
    return Sources(model, layer, places, tuple(names), torch.cat(values, 1), factor, shift), found


@dataclass(frozen=True, repr=False, eq=False)
class SourceAttribution(Terms):
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

    @property
    def sums(self) -> dict[str, Float[Tensor, " position"]]:
        """The kinds of terms, which sum to `total`."""
        pairs, linear = self.pairs.sum((1, 2)), self.source_bias.sum(1)
        return {"source × source": pairs, "source × bias": linear, "bias": self.bias}

    def part(self, n: int, index: int) -> tuple[int, str]:
        """Return number and name of a source."""
        return index, self.names[index]


@torch.no_grad()
def attribute_sources(
    model: BilinearTransformer,
    text: Text | Int[Tensor, "text seq"] | Int[Tensor, " seq"],
    layer: int,
    target: Target,
    position: int | None = None,
) -> SourceAttribution:
    """Write what a target reads as an exact sum over pairs of sources: head × head, head × embedding, ...

    The same sum as in `attribute`, over the parts of `sources` instead of features: nothing is left over, so there is
    no error. Cost: one run of the model, and `sources · d_model²` per position.

    Args:
        model: The model; the layer's MLP must be bilinear.
        text: As for `locate`.
        layer: Which block.
        target: `Target.feature(out, 7)`, `Target.token(model, "good")` or `Target.direction(vector)`.
        position: As for `locate`.

    Raises:
        ValueError: No such layer, a target that does not fit it, no text, no such position.
        TypeError: The layer is not bilinear.
    """
    read = Reading.of(model, layer, target)
    came, found = split_residual(model, locate(model, text, position), layer, read.hooks)
    scale, table = read.scale(found), []
    for some in in_pieces(came.values):
        parts = F.pad(came.values[some], (0, 0, 1, 0))  # nothing of the stream is bias
        parts = with_unit(parts, came.factor[some], came.shift)
        table.append(read.terms(parts, scale[some]))
    return SourceAttribution(target, layer, came.places, torch.cat(table), read.measure(found), came.names)
