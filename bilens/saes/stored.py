"""Sparse autoencoders on disk: published ones, and SAELens' own format, in which fitted ones are kept."""

import copy
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from sae_lens import SAE, TopKSAE, TopKSAEConfig, TrainingSAE, register_sae_class
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bilens.models.layouts import Keys
from bilens.models.sources import CheckpointError, Source, read_json, read_safetensors, regular
from bilens.tensor.keeping import atomic_write, user_path

from .arrays import ArraySAE  # noqa: F401 - SAELens must know the kind to load one
from .checks import LENS_FILES, check_k, check_lens_folder, check_shapes
from .listing import list_files, no_sae

SCOPE_FILES = ("config.json", "model.safetensors")
FOLDER = "saes"  # where they lie in the folder or repository of a model
POINTS = {  # names of the published layout, and what they are called here
    "resid-pre": "hook_resid_pre",
    "resid-mid": "hook_resid_mid",
    "resid-post": "hook_resid_post",
    "mlp-in": "hook_mlp_in",
    "mlp-out": "hook_mlp_out",
    "attn-out": "hook_attn_out",
}


class UnitTopKSAE(TopKSAE):
    """SAELens' top-k SAE, whose decoder rows are known to have norm 1 up to the rounding of its weights.

    So its norms may be folded, which SAELens otherwise refuses a top-k SAE: a feature changes by that rounding.
    """

    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        """Make the norm of each decoder row exactly 1, and multiply the encoder's by what it was.

        Raises:
            NotImplementedError: A norm is not 1 any more.
        """
        if _is_unit(self.W_dec):
            SAE.fold_W_dec_norm(self)
        else:
            super().fold_W_dec_norm()


def unit_rows(sae: SAE) -> SAE:
    """Return a top-k SAE with unit decoder rows as one whose norms may be folded, any other as it is."""
    if type(sae) is not TopKSAE or sae.cfg.rescale_acts_by_decoder_norm or not _is_unit(sae.W_dec):
        return sae
    with torch.random.fork_rng(devices=[]):  # SAELens draws weights, which are overwritten
        made = UnitTopKSAE(sae.cfg)
    made.load_state_dict(sae.state_dict())
    return made


def _is_unit(rows: Tensor) -> bool:
    return bool((rows.detach().norm(dim=-1) - 1).abs().max() < 2**-7)  # bfloat16 has eight bits


class SignedTopK(nn.Module):
    """Keep the k largest entries, whatever their sign: no ReLU, as in the published SAEs."""

    def __init__(self, k: int):
        super().__init__()
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with all but the k largest entries of the last axis set to zero."""
        top = x.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(x).scatter_(-1, top.indices, top.values)


@dataclass
class ScopeSAEConfig(TopKSAEConfig):
    """SAELens' top-k configuration under the name of the published architecture."""

    @classmethod
    def architecture(cls) -> str:
        """Return the name SAELens registers the architecture by."""
        return "bilens_signed_topk"


class ScopeSAE(TopKSAE):
    """A published top-k SAE: `z = TopK(W_enc (x - b_dec) [+ b_enc])` without a ReLU, so a feature can be negative."""

    def get_activation_fn(self) -> nn.Module:
        """Return the activation: the k largest, of either sign."""
        return SignedTopK(self.cfg.k)


register_sae_class("bilens_signed_topk", ScopeSAE, ScopeSAEConfig)


def load_scope(repo_or_folder: str | Path, name: str, *, revision: str | None = None) -> ScopeSAE:
    """Load an SAE of the published -scope layout as a SAELens SAE with the same features, negative values included.

    Args:
        repo_or_folder: A Hub repository such as `"tdooms/ts-medium-scope"`, or a folder laid out like one.
        name: `{layer}-{point}-x{expansion}-k{k}[-tag]`, e.g. `"4-mlp-out-x4-k30"`.
        revision: Branch, tag or commit on the Hub.

    Returns:
        The SAE in float32; `sae.cfg.metadata.hook_name` says where it goes.

    Raises:
        FileNotFoundError: No such SAE; the message lists the nearest names that there are.
        CheckpointError: A config that contradicts the tensors, or a variant whose features are not a top-k of a linear
            map (bilinear encoder, token lookup), that divides what it reads, or that writes to another point.
    """
    folder = _scope_folder(repo_or_folder, name, revision)
    config = read_json(folder / "config.json")
    tensors = dict(read_safetensors(folder / "model.safetensors"))
    for key in ("bilinear_encoder", "token_lookup"):
        if config.get(key):
            raise CheckpointError(f"{folder / 'config.json'}: {key} is set, which is not a linear top-k SAE")
    if config.get("normalize") is not None:
        raise CheckpointError(
            f"{folder / 'config.json'}: normalize must be null, got {config['normalize']}: whether the features are of "
            "activations divided by it is not written down anywhere"
        )
    read = Keys(config, folder / "config.json")
    point, layer = _point(read)
    if config.get("target") not in (None, config["point"]):
        raise CheckpointError(f"{read.path}: target must be null or the point, got {config['target']}")
    d_in, d_sae = read.size("d_model"), read.size("expansion") * read.size("d_model")
    if (k := check_k(read, d_sae)) is None:
        raise CheckpointError(f"{read.path}: k must lie between 1 and {d_sae}, the number of features, got nothing")
    shapes = {"w_enc.weight": (d_sae, d_in), "w_dec.weight": (d_in, d_sae), "b_dec": (d_in,)}
    if read.flag("encoder_bias", "w_enc.bias" in tensors):
        shapes["w_enc.bias"] = (d_sae,)
    check_shapes(tensors, shapes, folder / "model.safetensors")
    if unknown := sorted(set(tensors) - set(shapes)):
        raise CheckpointError(f"{folder / 'model.safetensors'}: tensor {unknown[0]} must be absent by its config")
    hook = scope_hook(point, layer)
    metadata = SAEMetadata(model_name=str(repo_or_folder), hook_name=hook, context_size=config.get("n_ctx"))
    with torch.random.fork_rng(devices=[]):  # SAELens draws weights, which are overwritten
        sae = ScopeSAE(ScopeSAEConfig(d_in=d_in, d_sae=d_sae, k=k, metadata=metadata))
    zero = torch.zeros(d_sae)
    state = {
        "W_enc": tensors["w_enc.weight"].T.contiguous(),
        "W_dec": tensors["w_dec.weight"].T.contiguous(),
        "b_enc": tensors.get("w_enc.bias", zero),
        "b_dec": tensors["b_dec"],
    }
    sae.load_state_dict(state)
    return sae.eval()


def _point(read: Keys) -> tuple[str, int]:
    """Return the point that a config names, and its layer."""
    match read.config.get("point"):
        case [str(point), int(layer)] if layer >= 0:
            return point, layer
    raise CheckpointError(f"{read.path}: point must be a name and a layer, got {read.config.get('point')!r:.80}")


def _scope_folder(repo_or_folder: str | Path, name: str, revision: str | None) -> Path:
    """Return the local folder of one SAE, downloaded if need be."""
    source = Source.find(repo_or_folder, revision)
    paths = [source.optional(f"{name}/{file}") for file in SCOPE_FILES]
    if None not in paths:
        return paths[0].parent
    files, where = list_files(source, ("/model.safetensors",))
    names = sorted({Path(file).parent.name for file in files})
    raise FileNotFoundError(no_sae(name, where, names))


def scope_hook(point: str, layer: int) -> str:
    """Return the hook point of a point of the published layout, `mlp-out` or `mlp_out`.

    Raises:
        CheckpointError: No such point.
    """
    name = point.replace("_", "-")
    if name not in POINTS:
        raise CheckpointError(f"point must be one of {', '.join(POINTS)}, got {point!r}")
    return f"blocks.{layer}.{POINTS[name]}"


def load(name: str | Path, hook: str, *, revision: str | None = None) -> SAE:
    """Load an SAE in SAELens' own format: of the embedded model, a folder that `fit` wrote, or a model's own.

    Args:
        name: `"bilens-mini"`; a folder with one subfolder per hook point, or with such a folder `saes` in it, as
            `publish` writes; or a Hub repository laid out like one, as `push_to_hub` makes.
        hook: The hook point, e.g. `"blocks.2.hook_mlp_out"`.
        revision: Branch, tag or commit on the Hub.

    Raises:
        FileNotFoundError: No such place, or no SAE of that hook point in it; the message lists those there are.
        CheckpointError: A file of it is damaged: a key or tensor that is missing, misshapen, not finite or not
            floating point, a `k` beyond the features.
    """
    return load_folder(sae_folder(name, hook, revision=revision))


def load_folder(folder: Path) -> SAE:
    """Load the SAE of a folder in SAELens' own format, once its files have been checked.

    Raises:
        FileNotFoundError: A file is missing.
        CheckpointError: One is damaged, or not what SAELens reads; it says which key or tensor.
    """
    check_lens_folder(folder)
    try:
        return unit_rows(SAE.load_from_disk(folder, device="cpu")).eval()
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder} must hold an SAE that SAELens reads, but it does not: {error}") from error


def sae_folder(name: str | Path, hook: str, files: Sequence[str] = LENS_FILES, *, revision: str | None = None) -> Path:
    """Return the folder on this machine that holds the SAE of a hook point.

    Args:
        name: As for `load`.
        hook: The hook point.
        files: What is fetched from the Hub; the folder may hold more.
        revision: Branch, tag or commit on the Hub.

    Raises:
        FileNotFoundError: There is none; the message lists those there are.
    """
    source = Source.find(name, revision)
    if source.folder is None:
        return _on_hub(source, hook, files)
    root = source.folder / FOLDER if (source.folder / FOLDER).is_dir() else source.folder
    if regular(root / hook / LENS_FILES[0]) is None:
        there = sorted(path.parent.name for path in root.glob(f"*/{LENS_FILES[0]}"))
        raise FileNotFoundError(no_sae(hook, root, there))
    return root / hook


def _on_hub(source: Source, hook: str, files: Sequence[str]) -> Path:
    """Return the folder of an SAE in the cache, with those of its files that there are."""
    for inside in (f"{FOLDER}/{hook}", hook):
        config = source.optional(f"{inside}/{LENS_FILES[0]}")
        if config is not None:
            for file in files:
                source.optional(f"{inside}/{file}")
            return config.parent
    there = sorted(Path(file).parent.name for file in list_files(source, (f"/{LENS_FILES[0]}",))[0])
    raise FileNotFoundError(no_sae(hook, source.name, there))


def load_release(release: str, name: str) -> SAE:
    """Load an SAE of a SAELens release, as SAELens does.

    Raises:
        FileNotFoundError: The release has no such SAE; the message lists the nearest.
    """
    there = releases().get(release, ())
    if name not in there:
        raise FileNotFoundError(no_sae(name, f"SAELens' release {release!r}", sorted(there)))
    return SAE.from_pretrained(release, name, device="cpu").eval()


def releases() -> dict[str, tuple[str, ...]]:
    """Return the names of the SAEs of each release that SAELens knows."""
    return {name: tuple(one.saes_map) for name, one in get_pretrained_saes_directory().items()}


def as_inference(sae: SAE) -> SAE:
    """Return the inference SAE that one in training is saved as (top-k over a batch becomes a jump), others as is.

    Raises:
        ValueError: Not an SAE of SAELens.
    """
    if not isinstance(sae, SAE):
        raise ValueError(f"an SAE must be one of SAELens (bilens.saes.of_arrays makes one of arrays), got {type(sae)}")
    if not isinstance(sae, TrainingSAE):
        return sae
    trained = copy.deepcopy(sae)  # the conversion folds norms in place
    state = trained.state_dict()
    trained.process_state_dict_for_saving_inference(state)
    with torch.random.fork_rng(devices=[]):  # SAELens draws weights, which are overwritten
        made = SAE.from_dict(trained.cfg.get_inference_sae_cfg_dict())
    made.load_state_dict(state)
    return made.to(sae.W_dec.device, sae.W_dec.dtype).eval()


def save(sae: SAE, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write an SAE in SAELens' format, to be read with `SAE.load_from_disk`; a kill leaves no part of a file.

    Args:
        sae: The SAE.
        folder: Where to.
        dtype: Round the stored weights to it; they are widened again on loading.
    """
    folder = user_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
        weights, config = sae.save_model(partial)
        if dtype is not None:
            save_file({name: weight.to(dtype) for name, weight in load_file(weights).items()}, weights)
        for path in (weights, config):  # the config last: where it is, the SAE is whole
            with atomic_write(folder / path.name) as whole:
                os.replace(path, whole)
