"""Exact attribution on a prompt: an output feature's pre-activation as a sum over pairs of input features."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bilens.models.texts import Texts
from bilens.models.transformer import BilinearTransformer
from bilens.saes.directions import writers
from bilens.saes.scaling import scale_of
from bilens.saes.stored import SAE

from .entry import Entry, input_hooks
from .places import locate
from .targets import Reading, Target, fitting_hook
from .terms import Terms, in_pieces, with_unit


@dataclass(frozen=True, repr=False, eq=False)
class Attribution(Terms):
    """A target as a sum over pairs of input features, the dictionary's error, and biases.

    `features` holds the ids of the features that are active at a position, ascending, then -1; `activations` their
    activations, then 0. All named terms together are `total`.
    """

    features: Int[Tensor, "position active"]
    activations: Float[Tensor, "position active"]
    label: Callable[[int], str]
    n_features: int
    probability: Float[Tensor, " position"] | None = None  # of the token as the next one, where the target is a token

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

    @property
    def sums(self) -> dict[str, Float[Tensor, " position"]]:
        """The kinds of terms, which sum to `total`, and what the running model gives."""
        return {
            "feature × feature": self.pairs.sum((1, 2)),
            "feature × bias": self.feature_bias.sum(1),
            "feature × error": self.feature_error.sum(1),
            "error × error": self.error,
            "error × bias": self.error_bias,
            "bias": self.bias,
            "total": self.total,
            "model": self.pre_activation,
        }

    def part(self, n: int, index: int) -> tuple[int, str]:
        """Return id and label of a feature that is active at the n-th position."""
        feature = self.features[n, index].item()
        return feature, self.label(feature)


# ten parameters: one target of three kinds is asked for in one call
@torch.no_grad()
def attribute(
    model: BilinearTransformer,
    text: Texts,
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
    At `hook_resid_pre` what attention adds counts as error. An SAE that divides by the size of what it reads has its
    features and bias multiplied by it.

    Give one of `feature`, `direction`, `token`; the three kinds are explained at `Target`.

    Cost: one run of the model, `hidden · d_model²` for Q, and `active · d_model²` and `active²` numbers per position.

    Args:
        model: The model; the layer's MLP must be bilinear.
        text: A text, a list of texts, or token ids: with BOS, without padding, as `model.to_tokens(text)` gives them.
        layer: Which block.
        feature: Feature of `out`.
        inp: SAE at the layer's `hook_mlp_in`, `ln2.hook_normalized`, `hook_resid_mid` or `hook_resid_pre`.
        out: SAE at the layer's `hook_mlp_out`, or a transcoder to it, whose decoder is read; needed for `feature` only.
        direction: A residual direction, `direction · mlp_out` is attributed.
        token: A token, as text or id.
        position: Where, BOS being 0, and -1 the last token of each text; `None` for all but BOS.
        label: Name of an input feature, e.g. `lambda i: contexts.label(i, model)`.

    Raises:
        ValueError: An SAE that does not fit, a feature that does not exist, no text, no such position.
        TypeError: The layer is not bilinear.
    """
    read = Reading.of(model, layer, _target(model, feature, out, direction, token))
    hook = fitting_hook(model, inp, "inp", input_hooks(layer))
    places, entry = locate(model, text, position), Entry.of(model, layer, hook)
    found = places.observe(model, list({hook, entry.summed, *read.hooks}))
    seen, x, scale = found[hook], found[entry.summed], read.scale(found)
    pieces = []
    for some in in_pieces(x):
        features, z = active_features(inp, seen[some])
        parts = with_unit(feature_parts(inp, seen[some], x[some], features, z), *entry.linear(x[some]))
        pieces.append((features, z, read.terms(parts, scale[some])))
    n = max(features.shape[1] for features, _, _ in pieces)
    missing = [n - features.shape[1] for features, _, _ in pieces]
    features, z, table = (list(parts) for parts in zip(*pieces, strict=True))
    return Attribution(
        target=read.target,
        layer=layer,
        places=places,
        table=torch.cat([F.pad(one, (0, m, 0, m)) for one, m in zip(table, missing, strict=True)]),
        pre_activation=read.measure(found),
        features=torch.cat([F.pad(one, (0, m), value=-1) for one, m in zip(features, missing, strict=True)]),
        activations=torch.cat([F.pad(one, (0, m)) for one, m in zip(z, missing, strict=True)]),
        label=label,
        n_features=inp.cfg.d_sae,
        probability=read.probability(model, found),
    )


def _target(
    model: BilinearTransformer,
    feature: int | None,
    out: SAE | None,
    direction: Tensor | None,
    token: str | int | None,
) -> Target:
    """Return the target that the arguments name."""
    options = {"feature": feature, "direction": direction, "token": token}
    given = [name for name, one in options.items() if one is not None]
    if len(given) != 1:
        raise ValueError(f"give one of feature, direction and token, got {' and '.join(given) or 'none'}")
    if (out is None) != (feature is None):
        raise ValueError(f"out goes with feature, got {'no out' if out is None else 'out without a feature'}")
    if out is not None:
        return Target.feature(out, feature)
    return Target.direction(direction) if token is None else Target.token(model, token)


def active_features(sae: SAE, x: Tensor) -> tuple[Int[Tensor, "position active"], Float[Tensor, "position active"]]:
    """Return the ids (ascending, then -1) and activations (then 0) of the features that are active."""
    z = sae.encode(x.to(sae.W_dec)).to(x)
    n = int((z != 0).sum(1).max())
    strongest = z.abs().topk(n, dim=1).indices
    beyond = z.shape[1]
    ids = strongest.masked_fill(z.gather(1, strongest) == 0, beyond).sort(1).values
    padding = ids == beyond
    return ids.masked_fill(padding, -1), z.gather(1, ids.clamp(max=beyond - 1)).masked_fill(padding, 0)


def feature_parts(
    sae: SAE, seen: Tensor, x: Tensor, features: Tensor, z: Tensor
) -> Float[Tensor, "position part d_model"]:
    """Write x as a sum of decoder bias, error and one part per active feature, in this order; the SAE reads `seen`."""
    scale = scale_of(sae, seen)
    written = writers(sae).to(x.device)[features.clamp(min=0)].to(x) * (z * scale.written)[..., None]
    bias = sae.b_dec.detach().to(x) * scale.written + scale.centre
    return torch.cat((torch.stack((bias, x - bias - written.sum(1)), 1), written), 1)
