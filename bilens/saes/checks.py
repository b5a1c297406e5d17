"""What the files of a stored SAE must hold, before anything is made of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bilens.models.layouts import Keys
from bilens.models.sources import DTYPES, CheckpointError, read_json, read_safetensors

LENS_FILES = ("cfg.json", "sae_weights.safetensors")
_DTYPES = [name for one in sorted(map(str, DTYPES)) for name in (one.removeprefix("torch."), one)]


_KINDS = {"architecture": str, "dtype": str, "metadata": dict, "device": str} | {
    "reshape_activations": str,
    "apply_b_dec_to_input": bool,
    "rescale_acts_by_decoder_norm": bool,
    "activation": str,
}
_WRITTEN = {  # what SAELens writes since 6.0, and reads as something else where it is missing
    "": ("architecture", "dtype", "apply_b_dec_to_input", "normalize_activations"),
    "topk": ("k",),
    "bilens_signed_topk": ("k",),
    "bilens_arrays": ("k", "activation"),
}
_CALLED = {str: "text", dict: "an object", bool: "true or false"}


def check_lens_folder(folder: Path) -> None:
    """Make sure that a folder holds an SAE in SAELens' format whose config and tensors agree and are finite.

    Raises:
        FileNotFoundError: A file is missing.
        CheckpointError: One is damaged, or a key or tensor is not what it must be; it says which.
    """
    config, path = read_json(folder / LENS_FILES[0]), folder / LENS_FILES[1]
    read = Keys(config, folder / LENS_FILES[0])
    d_in, d_sae = read.size("d_in"), read.size("d_sae")
    check_k(read, d_sae)
    for key, kind in _KINDS.items():
        if type(config.get(key, kind())) is not kind:
            raise CheckpointError(f"{read.path}: {key} must be {_CALLED[kind]}, got {config[key]!r:.80}")
    for kind in ("", config.get("architecture", "")):
        missing = [key for key in _WRITTEN.get(kind, ()) if key not in config]
        if missing and "sae_lens_version" in config.get("metadata", {}):
            raise CheckpointError(f"{read.path}: {missing[0]} must be there, got nothing")
    if config.get("dtype", _DTYPES[0]) not in _DTYPES:
        raise CheckpointError(f"{read.path}: dtype must be one of {', '.join(_DTYPES)}, got {config['dtype']!r:.80}")
    hook = config.get("metadata", {}).get("hook_name")
    if hook is not None and not isinstance(hook, str):
        raise CheckpointError(f"{read.path}: metadata.hook_name must be text, got {hook!r:.80}")
    tensors = dict(read_safetensors(path))
    shapes = {"W_dec": (d_sae, read.size("d_out", d_in)), "W_enc": (d_in, d_sae), "b_enc": (d_sae,)}
    check_shapes(tensors, {name: shape for name, shape in shapes.items() if name == "W_dec" or name in tensors}, path)


def check_k(read: Keys, d_sae: int) -> int | None:
    """Return how many features an SAE keeps, by its config, None if it does not say.

    Raises:
        CheckpointError: It is not a number from 1 to the number of features.
    """
    k = read.config.get("k")
    if k is not None and (isinstance(k, float) and k.is_integer()):  # SAELens' batch top-k allows a mean
        k = int(k)
    if k is not None and (isinstance(k, bool) or not isinstance(k, int | float) or not 0 < k <= d_sae):
        raise CheckpointError(f"{read.path}: k must lie between 1 and {d_sae}, the number of features, got {k!r:.80}")
    return k


def check_shapes(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Make sure that tensors are there and of some shapes.

    Raises:
        CheckpointError: One is not, says which.
    """
    for name, shape in sorted(shapes.items()):
        found: Any = list(tensors[name].shape) if name in tensors else "nothing"
        if found != list(shape):
            raise CheckpointError(f"{path}: tensor {name} must be {list(shape)} by its config, got {found}")
