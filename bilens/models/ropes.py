"""Rotary positions in the words of transformers' configs, older and newer: read, and written."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .families import FULL, SLIDING
from .layouts import CheckpointError, Keys, blaming
from .rotary import Rope
from .transformer import BilinearConfig


def read_ropes(read: Keys, n_ctx: int, theta: float, local_theta: float | None) -> tuple[Rope, Rope | None]:
    """Read the rotary positions of the layers, and of the local ones where those have their own.

    Args:
        read: The config.
        n_ctx: The context.
        theta: The base where the config is silent.
        local_theta: The same for local layers; `None` if they turn as the others do.

    Raises:
        CheckpointError: As for `read_rope`; `rope_parameters` that are not by kind of layer where there are two.
    """
    config = dict(read.config)
    if local_theta is None:
        return read_rope({"rope_theta": theta} | config, n_ctx, read.path), None
    told = config.get("rope_parameters") or {}
    if not isinstance(told, Mapping) or not set(told) <= {FULL, SLIDING}:
        raise CheckpointError(f"{read.path}: rope_parameters must be by {FULL} and {SLIDING}, got {told!r}")
    own = {
        FULL: {"rope_theta": read.number("rope_theta", theta)} | (told.get(FULL) or {}),
        SLIDING: {"rope_theta": read.number("rope_local_base_freq", local_theta)} | (told.get(SLIDING) or {}),
    }
    own[FULL] |= config.get("rope_scaling") or {}
    return tuple(
        read_rope({**config, "rope_scaling": None, "rope_parameters": one}, n_ctx, read.path) for one in own.values()
    )


def write_ropes(cfg: BilinearConfig, theta: float, local_theta: float | None) -> dict[str, Any]:
    """Return the keys by which `read_ropes` finds a model's rotary positions again, in older and newer words."""
    if local_theta is None:
        rope = cfg.attention.rope
        keys = {"rope_parameters": {**write_rope(rope), "rope_theta": rope.base}}
    else:
        found = {FULL: Rope(theta, "default"), SLIDING: Rope(local_theta, "default")}  # of layers that are not there
        for layer in range(cfg.n_layers):
            shape = cfg.attention.at(layer)
            found[FULL if shape.window is None else SLIDING] = shape.rope
        rope = found[FULL]
        keys = {
            "rope_local_base_freq": found[SLIDING].base,
            "rope_parameters": {kind: {**write_rope(one), "rope_theta": one.base} for kind, one in found.items()},
        }
    stretch = write_rope(rope)
    return keys | {"rope_theta": rope.base, "rope_scaling": stretch if len(stretch) > 1 else None}


def read_rope(config: Mapping[str, Any], n_ctx: int, path: Path) -> Rope:
    """Read the rotary frequencies off a config: `rope_theta` and `rope_scaling`, or `rope_parameters`.

    Raises:
        CheckpointError: A kind of scaling that cannot be represented, or a number that makes no sense.
    """
    told = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(told, Mapping):
        raise CheckpointError(f"{path}: rope_scaling and rope_parameters must be objects, got {told!r}")
    if any(isinstance(value, Mapping) for value in told.values()):
        raise CheckpointError(f"{path}: rope_parameters must be alike in all layers, got {dict(told)!r}")
    for where in (told, config):
        if where.get("partial_rotary_factor", 1) not in (None, 1):
            raise CheckpointError(
                f"{path}: partial_rotary_factor must be 1, since heads that rotate in part cannot be represented, got "
                f"{where['partial_rotary_factor']!r}"
            )
    read = Keys(told, path)
    base = read.number("rope_theta", Keys(config, path).number("rope_theta", 10000.0))
    key = "rope_type" if "rope_type" in told else "type"
    kind = read.one_of(key, {name: name for name in ("default", "linear", "llama3", "yarn")}, "default")
    before = config.get("original_max_position_embeddings") or told.get("original_max_position_embeddings") or n_ctx
    before = Keys({"original_max_position_embeddings": before}, path).size("original_max_position_embeddings")
    with blaming(f"{path}: rope_scaling of kind {kind!r}"):
        if kind == "default":
            return Rope(base, kind)
        if kind == "linear":
            return Rope(base, kind, read.number("factor"))
        if kind == "llama3":
            turns = read.number("low_freq_factor"), read.number("high_freq_factor")
            return Rope(base, kind, read.number("factor"), before, turns)
        factor = read.number("factor", n_ctx / before)
        turns = read.number("beta_slow", 1.0), read.number("beta_fast", 32.0)
        gain = read.number("attention_factor", _yarn_gain(factor, told.get("mscale"), told.get("mscale_all_dim")))
        return Rope(base, kind, factor, before, turns, gain, read.flag("truncate", True))


def _yarn_gain(factor: float, scale: float | None, scale_all: float | None) -> float:
    """Return what yarn multiplies cosines and sines by (arXiv 2309.00071, section 3.4), or DeepSeek's ratio of two."""

    def gain(times: float) -> float:
        return 0.1 * times * math.log(factor) + 1 if factor > 1 else 1.0

    return gain(scale) / gain(scale_all) if scale and scale_all else gain(1.0)


def write_rope(rope: Rope) -> dict[str, Any]:
    """Return the keys by which `read_rope` finds these frequencies again, the base aside."""
    keys: dict[str, Any] = {"rope_type": rope.kind}
    if rope.kind not in ("default", "published"):
        keys["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn"):
        keys["original_max_position_embeddings"] = rope.original_ctx
        names = ("low_freq_factor", "high_freq_factor") if rope.kind == "llama3" else ("beta_slow", "beta_fast")
        keys |= dict(zip(names, rope.turns, strict=True))
    if rope.kind == "yarn":
        keys |= {"attention_factor": rope.gain, "truncate": rope.whole}
    return keys
