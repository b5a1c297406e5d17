"""What the features of an SAE read and write, and whether an SAE belongs to a model."""

from typing import TYPE_CHECKING, Literal

from jaxtyping import Float
from torch import Tensor

from bilens.models.files import fingerprint
from bilens.models.transformer import BilinearTransformer

if TYPE_CHECKING:  # sae_lens takes seconds to import, and nothing here needs it
    from .stored import SAE


def readers(sae: "SAE", which: Literal["encoder", "decoder"] = "encoder") -> Float[Tensor, "feature d_in"]:
    """Return the output directions that a bilinear tensor is read with, one row per feature.

    Args:
        sae: An SAE at the MLP's output.
        which: `"encoder"` rows give the features' pre-activations (what the paper uses), `"decoder"` rows the overlap
            with what a feature writes.
    """
    if which not in ("encoder", "decoder"):
        raise ValueError(f"which must be 'encoder' or 'decoder', got {which!r}")
    if which == "decoder":
        return sae.W_dec.detach()
    rows = sae.W_enc.detach().T
    return rows * sae.W_dec.detach().norm(dim=1, keepdim=True) if _rescales(sae) else rows


def writers(sae: "SAE") -> Float[Tensor, "feature d_in"]:
    """Return what each feature of an SAE at the MLP's input writes at activation 1: its decoder row."""
    rows = sae.W_dec.detach()
    return rows / rows.norm(dim=1, keepdim=True) if _rescales(sae) else rows


def offsets(sae: "SAE") -> Float[Tensor, " feature"]:
    """Return the constant of each pre-activation: `pre = readers(sae) · x + offset`."""
    bias = sae.b_enc.detach() if getattr(sae, "b_enc", None) is not None else sae.W_enc.new_zeros(sae.cfg.d_sae)
    if _rescales(sae):
        bias = bias * sae.W_dec.detach().norm(dim=1)
    return bias - readers(sae) @ sae.b_dec.detach() if sae.cfg.apply_b_dec_to_input else bias


def _rescales(sae: "SAE") -> bool:
    return bool(getattr(sae.cfg, "rescale_acts_by_decoder_norm", False))


def hook_of(sae: "SAE", hook: str | None = None) -> str:
    """Return the hook point that is named, or else the one that an SAE says it was fitted at.

    Raises:
        ValueError: None is named, and the SAE does not say.
    """
    found = hook or sae.cfg.metadata.hook_name
    if found is None:
        raise ValueError(
            "hook must name a hook point for an SAE that does not say where it was fitted (cfg.metadata.hook_name), "
            "got None"
        )
    return found


def check_sae(model: BilinearTransformer, sae: "SAE", hook: str, name: str | None = None) -> None:
    """Make sure that an SAE belongs to a hook point of a model, as far as it says where it was fitted.

    Whoever takes an SAE to a model's weights or text asks here.

    Args:
        model: The model; its device and dtype do not matter.
        sae: The SAE.
        hook: The hook point.
        name: What to call the SAE in errors.

    Raises:
        ValueError: It is of another width or another hook point, was fitted to a model with other weights, or
            normalises what it reads, so that `readers` and `writers` are not what it computes with.
    """
    name = name or f"the SAE at {hook}"
    if sae.cfg.d_in != model.cfg.d_model:
        raise ValueError(
            f"{name} must read {model.cfg.d_model} dimensions (d_model), got an SAE with d_in={sae.cfg.d_in}"
        )
    own = sae.cfg.metadata.hook_name
    if own not in (None, hook):
        raise ValueError(f"{name} must be one that was fitted at {hook}, got one of {own}")
    scheme = sae.cfg.normalize_activations
    if scheme != "none":
        raise ValueError(f"{name} must not normalise what it reads, got normalize_activations={scheme!r}")
    fitted = (sae.cfg.metadata.settings or {}).get("model")
    if fitted is not None and fitted != fingerprint(model):
        raise ValueError(f"{name} must be one of this model, but it was fitted to one with other weights")
