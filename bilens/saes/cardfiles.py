"""The file of feature cards: what it must hold."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bilens.models.sources import CheckpointError, open_safetensors

AS = "model as "  # before a dtype: key of the hash of the model's weights after that cast
_UNKNOWN = ("auroc", "roles", "share", "at.share", "at.base", "after.share", "after.base")  # NaN where nothing is told
_SHARES = ("density", "auroc", "roles")
_IDS = ("contexts.tokens", "tokens", "at.tokens", "after.tokens")


def read_card_file(path: Path, d_vocab: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what a file of cards says, and its tensors, once both have been checked.

    Raises:
        FileNotFoundError: No such file.
        CheckpointError: It is damaged, or a key or tensor is not what it must be; it says which.
    """
    with open_safetensors(path) as file:
        about = _about(path, (file.metadata() or {}).get("cards"))
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118, it is no dict
        _check_shapes(path, about, shapes)
        tensors = {name: file.get_tensor(name) for name in shapes}
    for name, tensor in tensors.items():
        _check_values(path, name, tensor, d_vocab)
    return about, tensors


def header(path: Path) -> dict[str, Any]:
    """Return what the header of a file of cards says, without its tensors; errors as for `read_card_file`."""
    with open_safetensors(path) as file:
        return _about(path, (file.metadata() or {}).get("cards"))


def casts_told(provenance: Mapping[str, str]) -> dict[str, str]:
    """Return the hashes of casts of the model, by dtype."""
    return {key.removeprefix(AS): digest for key, digest in provenance.items() if key.startswith(AS)}


def _about(path: Path, said: str | None) -> dict[str, Any]:
    """Return what the header says."""
    try:
        about = json.loads(said or "null")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header must be JSON, but does not parse: {error}") from error
    wanted = {"hook": str, "labels": dict, "provenance": dict, "peak": int}
    if isinstance(about, dict) and "roles" in about:
        wanted |= {"roles": dict, "positions": int}
    for key, kind in wanted.items():
        if not isinstance(about, dict) or type(about.get(key)) is not kind:
            raise CheckpointError(f"{path} must be a file of cards with {key} in its header, got {said!r:.80}")
    for key in ("labels", "roles"):
        if not all(type(n) is int and n >= 0 for n in about.get(key, {}).values()):
            raise CheckpointError(f"{path}: {key} must be counts, got {about[key]!r:.80}")
    if missing := {"model", "sae", "texts"} - set(about["provenance"]):
        raise CheckpointError(f"{path}: provenance must tell {', '.join(sorted(missing))}")
    if not all(isinstance(value, str) for value in about["provenance"].values()):
        raise CheckpointError(f"{path}: provenance must be texts, got {about['provenance']!r:.80}")
    return about


def _check_shapes(path: Path, about: Mapping[str, Any], shapes: Mapping[str, list[int]]) -> None:
    """Make sure that all tensors of cards are there and fit together."""
    n, width = (*shapes.get("contexts.tokens", []), 0, 0, 0)[1:3]
    kept, feature = (shapes.get("tokens", [0, 0])[-1:] or [0])[0], (shapes.get("mean") or [0])[0]
    wanted = {"contexts.tokens": [n, width], "contexts.values": [n, width], "density": [], "mean": []}
    wanted |= {"histogram": (shapes.get("histogram") or [0])[1:][:1], "tokens": [kept], "effects": [kept]}
    wanted |= {"auroc": [len(about["labels"])]}
    if "roles" in about:
        wanted |= {"roles": [len(about["roles"])], "share": [len(about["roles"])]}
        for name in ("at", "after"):
            some = (shapes.get(f"{name}.tokens") or [0])[1:][:1]
            wanted |= {f"{name}.{part}": some for part in ("tokens", "share", "base")}
    for name in sorted(wanted.keys() | shapes.keys()):
        must = [feature, *wanted[name]] if name in wanted else "absent"
        if list(shapes.get(name, ())) != must or name not in shapes:
            raise CheckpointError(f"{path}: tensor {name} must be {must}, got {shapes.get(name, 'nothing')}")
    if not feature or not 0 <= about["peak"] < width:
        raise CheckpointError(f"{path}: peak must lie in windows of {width} tokens of a feature, got {about['peak']}")


def _check_values(path: Path, name: str, tensor: Tensor, d_vocab: int) -> None:
    """Make sure that the numbers of a tensor can be what it holds."""
    low, high = 0.0, float("inf")
    if name in _IDS:
        low, high = (-1 if name == "contexts.tokens" else 0), d_vocab - 1
    elif name in _SHARES:
        high = 1.001  # rounded
    elif name != "histogram":
        low = -high
    whole = name in (*_IDS, "histogram")
    if tensor.is_floating_point() == whole or tensor.is_complex():
        raise CheckpointError(
            f"{path}: tensor {name} must hold {'integers' if whole else 'numbers'}, got {tensor.dtype}"
        )
    told = tensor[~tensor.isnan()] if name in _UNKNOWN else tensor
    bad = ~((told >= low) & (told <= high) & told.isfinite())
    if bad.any():
        worst = told[bad][0].item()
        raise CheckpointError(f"{path}: tensor {name} must lie between {low:g} and {high:g}, got {worst}")
