"""What is attributed, and how it is read of a layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bilens.models.layers import Norm
from bilens.models.logits import logit_directions, token_ids
from bilens.models.transformer import BilinearTransformer
from bilens.saes.directions import Which, check_sae, offsets, readers, reading, writes_at
from bilens.saes.scaling import scale_of
from bilens.saes.stored import SAE
from bilens.tensor.records import Record

from .places import check_layer

_ROWS = 256  # whose logits are held at a time


@dataclass(frozen=True, repr=False, eq=False)
class Target(Record):
    """A number that is read of what an MLP writes, `reader · mlp_out + offset`: an output feature's pre-activation, ...

    A token's is the direct path to its logit: `reader · mlp_out` over the root mean square that the final norm measures
    at that position, with its gain in the reader. So it is what the MLP adds to that logit directly.
    """

    kind: Literal["feature", "token", "direction"]
    name: str
    index: int | None  # of the feature or token
    reader: Float[Tensor, " d_model"]
    offset: Float[Tensor, ""]
    out: SAE | None = None  # which has the feature
    scaled: SAE | None = None  # by whose scale what is read is divided
    word: str | None = None  # the token, as text or else its id

    @classmethod
    def feature(cls, out: SAE, feature: int, read: Which | None = None) -> "Target":
        """Read a feature of an SAE at the layer's `hook_mlp_out`, or of a transcoder around the MLP.

        Args:
            out: The SAE.
            feature: Which.
            read: With its encoder or its decoder, as for `bilens.saes.readers`. With the former, of an SAE that divides
                by the size of what it reads, the target is divided by that too, as it is measured.

        Raises:
            ValueError: It has no such feature, or no such reader.
        """
        if not 0 <= feature < out.cfg.d_sae:
            raise ValueError(f"feature must lie between 0 and {out.cfg.d_sae - 1}, got {feature}")
        reader, offset = readers(out, read)[feature], offsets(out, read)[feature]
        name = f"feature {feature}" if reading(out, read) == "encoder" else f"feature {feature} (decoder)"
        scaled = out if reading(out, read) == "encoder" else None
        return cls("feature", name, feature, reader, offset, out, scaled)

    @classmethod
    def token(cls, model: BilinearTransformer, token: str | int) -> "Target":
        """Read the direct path to the logit of a token, given as text or id.

        Raises:
            ValueError: A text that is not one token, or an id outside the vocabulary.
        """
        (index,) = token_ids(model, [token])
        name = index if model.tokenizer is None else model.label(index)
        (reader,) = logit_directions(model, [index])
        return cls("token", f"logit of {name!r}", index, reader, reader.new_zeros(()), word=str(name))

    @classmethod
    def direction(cls, direction: Float[Tensor, " d_model"]) -> "Target":
        """Read along a residual direction."""
        direction = direction.detach()
        return cls("direction", "a direction", None, direction, direction.new_zeros(()))

    def __repr__(self) -> str:
        return f"Target({self.name})"


@dataclass(frozen=True, repr=False, eq=False)
class Reading:
    """A target of one layer as a quadratic form on what enters the MLP and a constant 1, and how to measure it."""

    target: Target
    matrix: Float[Tensor, "leg leg"]  # float64
    hook: str
    final: str | None  # the last residual stream, if the final norm's root mean square counts
    norm: Norm

    @classmethod
    def of(cls, model: BilinearTransformer, layer: int, target: Target) -> "Reading":
        """Read a target of a layer.

        Raises:
            ValueError: No such layer, a feature of an SAE that does not fit, a direction of another width.
            TypeError: The layer is not bilinear.
        """
        check_layer(model, layer)
        d_model, hook = model.cfg.d_model, f"blocks.{layer}.hook_mlp_out"
        if target.out is not None:
            fitting_hook(model, target.out, "out", [hook])
        if target.reader.shape != (d_model,):
            raise ValueError(f"{target.kind} must have shape [{d_model}] (d_model), got {list(target.reader.shape)}")
        tensor = model.blocks[layer].mlp.tensor().detach().to(torch.float64)
        matrix = tensor.matrix(target.reader.to(tensor.down))
        matrix = matrix if tensor.constant else F.pad(matrix, (0, 1, 0, 1))
        final = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post" if target.kind == "token" else None
        return cls(target, matrix, hook, final, model.ln_final)

    @property
    def hooks(self) -> list[str]:
        """What `scale` and `measure` need to have been observed."""
        return [self.hook] if self.final is None else [self.hook, self.final]

    def scale(self, found: Mapping[str, Tensor]) -> Float[Tensor, " position"]:
        """Return what is read is multiplied by: one over the final root mean square, of a token; else 1.

        Of a feature of an SAE that divides by the size of what it reads, one over that.
        """
        if self.target.scaled is not None:
            return scale_of(self.target.scaled, found[self.hook]).read[:, 0].reciprocal()
        if self.final is None:
            return torch.ones_like(found[self.hook][:, 0])
        return self.norm.rms(found[self.final])[:, 0].reciprocal()

    def probability(self, model: BilinearTransformer, found: Mapping[str, Tensor]) -> Float[Tensor, " position"] | None:
        """Return the probability that the model gives the token as the next one; None of another target."""
        if self.final is None:
            return None
        rows = found[self.final].to(model.W_E).split(_ROWS)
        return torch.cat(
            [model.unembed(model.ln_final(row)).double().softmax(-1)[:, self.target.index] for row in rows]
        )

    def terms(
        self, parts: Float[Tensor, "position part leg"], scale: Float[Tensor, " position"]
    ) -> Float[Tensor, "position part part"]:
        """Return the terms of what enters the MLP, split into parts of which the first holds the bias."""
        table = pair_terms(self.matrix, parts) * scale[:, None, None]
        table[:, 0, 0] += self.target.offset.to(table)
        return table

    def measure(self, found: Mapping[str, Tensor]) -> Float[Tensor, " position"]:
        """Return what the running model gives."""
        y = found[self.hook]
        return y @ self.target.reader.to(y) * self.scale(found) + self.target.offset.to(y)


def pair_terms(
    matrix: Float[Tensor, "leg leg"], parts: Float[Tensor, "position part leg"]
) -> Float[Tensor, "position part part"]:
    """Return the term of each unordered pair of parts, `(2 - δ_ab) p_a Q p_b` for `a <= b`, zero below."""
    full = parts @ matrix @ parts.mT
    return 2 * full.triu(1) + torch.diag_embed(full.diagonal(dim1=1, dim2=2))


def fitting_hook(model: BilinearTransformer, sae: SAE, name: str, hooks: Sequence[str]) -> str:
    """Return the hook point of an SAE, which must be one of `hooks` and fit the model (`check_sae`).

    Raises:
        ValueError: It is at another hook point, or does not fit.
    """
    hook = writes_at(sae)
    if hook not in hooks:
        raise ValueError(f"{name} must be an SAE at {' or '.join(hooks)} (cfg.metadata.hook_name), got {hook!r}")
    check_sae(model, sae, hook, name)
    return hook
