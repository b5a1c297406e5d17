"""Dictionaries that normalise what they read: the factors, position by position, between them and the model."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bilens.tensor.records import tabular

if TYPE_CHECKING:  # sae_lens takes seconds to import, and nothing here needs it
    from .stored import SAE

_EPS = 1e-5  # SAELens' own, beside the standard deviation
PER_POSITION = ("none", "constant_norm_rescale", "layer_norm")
_UNREADABLE = {  # what is not in an SAE, so that its features cannot be computed
    "expected_average_only_in": "the mean norm of its activations was never folded into its weights: measure "
    "sqrt(d_in) / mean(‖x‖) on text and call sae.fold_activation_norm_scaling_factor(it)",
    "covariance_whitening": "the whitening was never folded into its weights (sae.fold_activation_whitening)",
}


@tabular()
class Scale(NamedTuple):
    """What an SAE divides by when it reads, and multiplies by when it writes, at each position.

    `pre = readers · (x - centre) / read + offsets` and `x̂ = written · (z · writers + b_dec) + centre`; the centre is
    the same for all dimensions. Without normalisation `read` and `written` are 1 and the centre is 0.
    """

    read: Float[Tensor, "*batch 1"]
    written: Float[Tensor, "*batch 1"]
    centre: Float[Tensor, "*batch 1"]


def scale_of(sae: "SAE", x: Float[Tensor, "*batch d_in"]) -> Scale:
    """Return the factors of an SAE at some activations, by its `normalize_activations` (`check_scheme`).

    `constant_norm_rescale` divides by `‖x‖ / sqrt(d_in)` and multiplies by the same. `layer_norm` subtracts the mean
    and divides by the standard deviation (of a sample) plus 1e-5; SAELens multiplies by the deviation alone.

    Args:
        sae: The SAE.
        x: What it reads.
    """
    ones = torch.ones_like(x[..., :1])
    if sae.cfg.normalize_activations == "constant_norm_rescale":
        size = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        return Scale(size, size, torch.zeros_like(ones))
    if sae.cfg.normalize_activations == "layer_norm":
        deviation = x.std(dim=-1, keepdim=True)
        return Scale(deviation + _EPS, deviation, x.mean(-1, keepdim=True))
    return Scale(ones, ones, torch.zeros_like(ones))


def check_scheme(sae: "SAE", name: str) -> None:
    """Make sure that what an SAE reads can be computed from its activations alone.

    Raises:
        ValueError: It cannot, or is normalised in a way that is not known.
    """
    scheme = sae.cfg.normalize_activations
    if scheme not in PER_POSITION:
        why = _UNREADABLE.get(scheme, f"of its normalisations only {', '.join(PER_POSITION)} are known")
        raise ValueError(f"{name} must say how it reads its input, got normalize_activations={scheme!r}: {why}")
