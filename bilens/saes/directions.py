"""What the features of an SAE of any kind read and write, and whether an SAE belongs to a model."""

import logging
from typing import TYPE_CHECKING, Literal

from jaxtyping import Float
from torch import Tensor

from bilens.models.files import known_as
from bilens.models.splicing import own_name
from bilens.models.transformer import BilinearTransformer

from .scaling import check_scheme

if TYPE_CHECKING:  # sae_lens takes seconds to import, and nothing here needs it
    from .stored import SAE

logger = logging.getLogger(__name__)

Which = Literal["encoder", "decoder"]
_LINEAR = ("standard", "topk", "abstopk", "jumprelu", "bilens_signed_topk", "bilens_arrays")
_TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
KINDS = (*_LINEAR, "gated", "matching_pursuit", *_TRANSCODERS)
_REFUSED = {
    "temporal": "its features depend on the positions before",
    "batchtopk": "while it is trained its features depend on the batch: save_inference_model makes a jumprelu SAE",
    "matryoshka_batchtopk": "while it is trained its features depend on the batch: save_inference_model makes a "
    "jumprelu SAE",
}


def is_transcoder(sae: "SAE") -> bool:
    """Tell whether an SAE reads the MLP's input and writes its output."""
    return sae.cfg.architecture() in _TRANSCODERS


def readers(sae: "SAE", which: Which | None = None) -> Float[Tensor, "feature d"]:
    """Return the output directions that a bilinear tensor is read with, one row per feature.

    A gated SAE's are those of its magnitudes; one that rescales by decoder norms, or subtracts the mean (`layer_norm`),
    has that in its rows.

    Args:
        sae: An SAE at the MLP's output, or a transcoder around the MLP.
        which: `"encoder"` rows give the features' pre-activations (what the paper uses), `"decoder"` rows the overlap
            with what a feature writes. `None` is the encoder; of a transcoder, whose encoder does not read the MLP's
            output, and of matching pursuit, which has none, the decoder.

    Raises:
        ValueError: The encoder of one that has none at the output, or another word.
    """
    if reading(sae, which) == "decoder":
        return sae.W_dec.detach()
    return encoders(sae)


def encoders(sae: "SAE") -> Float[Tensor, "feature d_in"]:
    """Return what each feature reads where its SAE reads: encoder rows; of matching pursuit, without any, decoder rows.

    They are the `readers` of an SAE that is no transcoder.
    """
    rows = _encoder(sae)
    return rows - rows.mean(1, keepdim=True) if sae.cfg.normalize_activations == "layer_norm" else rows


def reading(sae: "SAE", which: Which | None) -> Which:
    """Return what an SAE is read with, where `None` leaves it to its kind (`readers`).

    Raises:
        ValueError: As `readers`.
    """
    if which not in (None, "encoder", "decoder"):
        raise ValueError(f"which must be 'encoder' or 'decoder', got {which!r}")
    kind = sae.cfg.architecture()
    blind = is_transcoder(sae) or kind == "matching_pursuit"
    if blind and which == "encoder":
        raise ValueError(f"which must be 'decoder' for a {kind}: no encoder of it reads the MLP's output")
    return "decoder" if blind else which or "encoder"


def offsets(sae: "SAE", which: Which | None = None) -> Float[Tensor, " feature"]:
    """Return the constant of each pre-activation: `pre = readers(sae) · x + offset`, zero for decoder rows.

    With normalisation it is `pre = readers(sae) · x / read + offset` (`scale_of`).
    """
    if reading(sae, which) == "decoder":
        return sae.W_dec.new_zeros(sae.cfg.d_sae)
    rows = _encoder(sae)
    bias = sae.b_mag if sae.cfg.architecture() == "gated" else getattr(sae, "b_enc", None)
    bias = rows.new_zeros(sae.cfg.d_sae) if bias is None else bias.detach()
    if _rescales(sae):
        bias = bias * sae.W_dec.detach().norm(dim=1)
    return bias - rows @ sae.b_dec.detach() if sae.cfg.apply_b_dec_to_input else bias


def writers(sae: "SAE") -> Float[Tensor, "feature d"]:
    """Return what each feature of an SAE writes at activation 1: its decoder row.

    A transcoder writes to the MLP's output, every other SAE where it reads.
    """
    rows = sae.W_dec.detach()
    return rows / rows.norm(dim=1, keepdim=True) if _rescales(sae) else rows


def _encoder(sae: "SAE") -> Float[Tensor, "feature d_in"]:
    """Return encoder rows in units of the activations."""
    rows = sae.W_enc.detach().T
    if sae.cfg.architecture() == "gated":
        return rows * sae.r_mag.detach().exp()[:, None]
    return rows * sae.W_dec.detach().norm(dim=1, keepdim=True) if _rescales(sae) else rows


def _rescales(sae: "SAE") -> bool:
    return bool(getattr(sae.cfg, "rescale_acts_by_decoder_norm", False))


# -- where it belongs -------------------------------------------------------------------------------------------------


def hook_of(sae: "SAE", hook: str | None = None) -> str:
    """Return the hook point that is named, or else the one that an SAE says it was fitted at.

    Raises:
        ValueError: None is named, and the SAE does not say.
    """
    found = hook or reads_at(sae)
    if found is None:
        raise ValueError(
            "hook must name a hook point for an SAE that does not say where it was fitted (cfg.metadata.hook_name), "
            "got None"
        )
    return found


def reads_at(sae: "SAE") -> str | None:
    """Return the hook point that an SAE says it reads, by the name it has here; None if it does not say."""
    return here(sae.cfg.metadata.hook_name)


def writes_at(sae: "SAE") -> str | None:
    """Return the hook point that an SAE says it writes: of a transcoder the MLP's output, else where it reads."""
    return here(sae.cfg.metadata.hook_name_out) if is_transcoder(sae) else reads_at(sae)


def here(hook: str | None) -> str | None:
    """Return the name that a hook point has here; other libraries have others for some."""
    return own_name(hook)


def check_stands(model: BilinearTransformer, sae: "SAE", hook: str) -> None:
    """Make sure that an SAE can stand in for what a hook point sees.

    Raises:
        ValueError: It is a transcoder, which writes elsewhere, or normalises what it reads by what it does not hold.
    """
    model.check_hook_name(hook)
    check_scheme(sae, f"the SAE at {hook}")
    if is_transcoder(sae):
        raise ValueError(
            f"the SAE at {hook} must write where it reads, got a {sae.cfg.architecture()}: model.run_with_saes(tokens, "
            f"saes=sae) runs the model with it"
        )


def check_sae(model: BilinearTransformer, sae: "SAE", hook: str, name: str | None = None) -> None:
    """Make sure that an SAE belongs to a hook point of a model, as far as it says where it was fitted.

    Whoever takes an SAE to a model's weights or text asks here.

    Args:
        model: The model; its device does not matter, nor that it was cast since (values are compared after the cast).
        sae: The SAE.
        hook: The hook point: where it writes, which is where it reads but for a transcoder.
        name: What to call the SAE in errors.

    Raises:
        ValueError: It is of another width or another hook point, was fitted to a model with other weights, is of a
            kind whose features have no reader of their own, or normalises what it reads by what it does not hold.
    """
    name = name or f"the SAE at {hook}"
    kind = sae.cfg.architecture()
    if kind not in KINDS:
        why = _REFUSED.get(kind, f"the kinds are {', '.join(KINDS)}")
        raise ValueError(f"{name} must be of a kind whose features can be read off its weights, got {kind!r}: {why}")
    for width, said in ((sae.cfg.d_in, "d_in"), (getattr(sae.cfg, "d_out", model.cfg.d_model), "d_out")):
        if width != model.cfg.d_model:
            raise ValueError(
                f"{name} must read {model.cfg.d_model} dimensions (d_model), got an SAE with {said}={width}"
            )
    if sae.cfg.reshape_activations != "none":
        raise ValueError(f"{name} must read the stream, got reshape_activations={sae.cfg.reshape_activations!r}")
    own = writes_at(sae)
    if own not in (None, hook):
        raise ValueError(f"{name} must be one that was fitted at {hook}, got one of {own}")
    check_scheme(sae, name)
    told = sae.cfg.metadata.settings or {}
    if told.get("model") is None:
        return
    cast = known_as(model, told["model"], told.get("casts") or {})
    if cast is None:
        raise ValueError(f"{name} must be one of this model, but it was fitted to one with other weights")
    if cast:
        logger.info("%s was fitted to the weights of this model before they were cast to %s", name, cast)
