"""What a checkpoint's config means, and how its tensors are named: the published bilinear formats."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

if TYPE_CHECKING:
    from .transformer import BilinearConfig, BilinearTransformer


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded as what it claims to be; nothing was loaded."""


class Layout(ABC):
    """A family of checkpoints: what its config keys mean, and which tensors make up each parameter of the model."""

    embedding: str  # the published name of the token embedding
    labels: dict[str, Any]  # config keys that name the format
    known: frozenset[str]  # config keys that are read, or that change nothing of what the model computes

    @abstractmethod
    def shape(self, config: Mapping[str, Any], d_vocab: int, path: Path) -> "BilinearConfig":
        """Read the model's shape off a config.

        Args:
            config: The published keys.
            d_vocab: Rows of the embedding, which decide the vocabulary.
            path: The file, for error messages.

        Raises:
            CheckpointError: A key that contradicts itself, the embedding, or what the hooked model can compute.
        """

    @abstractmethod
    def keys(self, cfg: "BilinearConfig") -> dict[str, Any]:
        """Return the config keys that say what the model computes; `shape` reads them back."""

    @abstractmethod
    def parts(self, name: str, rows: int, cfg: "BilinearConfig") -> dict[str, int]:
        """Return the tensors that a parameter of so many rows is made of, one above the other, each with its rows."""

    def has_bos(self, tokenizer: Tokenizer) -> bool:
        """Tell whether models of this format were trained on texts that start with BOS; the published ones were."""
        return True

    def expresses(self, cfg: "BilinearConfig") -> bool:
        """Tell whether a config of this format can say what the model computes."""
        try:
            return self.shape(self.keys(cfg), cfg.d_vocab, Path("config.json")) == cfg
        except CheckpointError:  # an activation that no model of this format has
            return False

    def config(self, model: "BilinearTransformer") -> dict[str, Any]:
        """Return the config of a model: what it came with, updated by what it is."""
        dtype = str(model.W_E.dtype).removeprefix("torch.")
        return {**model.source, **self.labels, "dtype": dtype, **self.keys(model.cfg)}


UNREAD = {  # written by transformers or by training; without effect on what the model computes
    *("architectures", "transformers_version", "dtype", "torch_dtype", "model_type", "auto_map", "_name_or_path"),
    *("repo", "modifier", "noise", "attn_dropout", "embed_dropout", "mlp_dropout", "resid_dropout"),
}
SIZES = {"n_layers": "n_layer", "n_heads": "n_head", "n_ctx": "n_ctx", "d_model": "d_model", "d_hidden": "d_hidden"}
READ = {*SIZES.values(), "n_vocab", "mlp", "normalization", "norm_bias", "mlp_bias", "bilinear", "gate", "bias"} | {
    *("scale_attn", "attention2", "tokenizer", "vocab_size")
}


class Published(Layout):
    """One generation of the published bilinear format.

    `"2025"` is that of the ts-* and fw-* models (2410.08417), `"2024-06"` that of 2406.03947, `"2024-05"` its
    predecessor. They differ in the config keys, in the name of the down projection and in the norms.
    """

    generations = ("2025", "2024-06", "2024-05")
    embedding = "transformer.wte.weight"
    known = frozenset(READ | UNREAD)

    def __init__(self, generation: str):
        self.generation, self.labels = generation, {"architectures": ["Transformer"]}
        self.down = "p" if generation == "2025" else "o"

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> "Published":
        """Tell the generation by the keys that only it has."""
        if "mlp" in config or "norm_bias" in config:
            return cls("2024-05")
        return cls("2024-06" if "n_vocab" in config else "2025")

    def parts(self, name: str, rows: int, cfg: "BilinearConfig") -> dict[str, int]:
        """Return the one tensor that holds a parameter, with its rows; names as in the authors' code."""
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            rest = rest.replace("ln1.", "n1.norm.").replace("ln2.", "n2.norm.").replace("mlp.p.", f"mlp.{self.down}.")
            return {f"transformer.h.{layer}.{rest}": rows}
        top = {"embed.weight": self.embedding, "unembed.weight": "lm_head.weight"}
        return {top.get(name, name.replace("ln_final.", "transformer.n_f.norm.")): rows}

    def keys(self, cfg: "BilinearConfig") -> dict[str, Any]:
        """Return the config keys that say what the model computes."""
        keys: dict[str, Any] = {theirs: getattr(cfg, ours) for ours, theirs in SIZES.items()}
        act = None if cfg.act == "identity" else cfg.act
        if self.generation == "2025":
            scaled = cfg.attn_scale != 1
            keys |= {"bilinear": cfg.mlp != "plain", "gate": act, "bias": cfg.mlp_bias[0]}
            keys |= {"normalization": cfg.norm != "none", "scale_attn": scaled}
            return keys | {"attention2": cfg.attention == "bilinear"}
        keys["n_vocab"] = cfg.d_vocab
        if self.generation == "2024-06":
            return keys | {
                "bilinear": cfg.mlp != "plain",
                "gate": act is not None,
                "bias": cfg.mlp_bias[0],
                "normalization": cfg.norm != "none",
            }
        names = {"bilinear": "blp", "gated": "glp", "plain": "mlp"}
        return keys | {
            "mlp": names[cfg.mlp],
            "normalization": None if cfg.norm == "none" else "rms",
            "norm_bias": "shift" in cfg.norm,
            "mlp_bias": cfg.mlp_bias[0],
        }

    def shape(self, config: Mapping[str, Any], d_vocab: int, path: Path) -> "BilinearConfig":
        """Read the model's shape off a config; the arguments are those of `Layout.shape`."""
        read = Keys(config, path)
        fields: dict[str, Any] = {ours: read.size(theirs) for ours, theirs in SIZES.items()}
        if self.generation == "2024-05":
            mlps = {"blp": ("bilinear", None), "glp": ("gated", "gelu"), "mlp": ("plain", "gelu")}
            fields["mlp"], fields["act"] = read.one_of("mlp", mlps)
            fields["mlp_bias"] = (read.flag("mlp_bias", False) or fields["mlp"] == "plain", False)
            gained = "rms_gain_shift" if read.flag("norm_bias", False) else "rms_gain"
            fields["norm"] = read.one_of("normalization", {"rms": gained, None: "none"}, "rms")
        else:
            gates = {None: None, False: None, True: "relu", "relu": "relu", "silu": "silu", "gelu": "gelu"}
            gate = read.one_of("gate", gates, None)
            bilinear = read.flag("bilinear", True)
            fields["mlp"] = ("bilinear" if gate is None else "gated") if bilinear else "plain"
            fields["act"] = gate if bilinear else gate or "identity"
            fields["mlp_bias"] = (read.flag("bias", False),) * 2
            rms = "rms" if self.generation == "2025" else "rms_gain_shift"
            fields["norm"] = rms if read.flag("normalization", True) else "none"
        if self.generation == "2025":
            scaled = read.flag("scale_attn", True)
            fields["attn_scale"] = 1 / math.sqrt(2 * fields["n_layers"]) if scaled else 1.0
            fields["attention"] = "bilinear" if read.flag("attention2", False) else "softmax"
        elif read.size("n_vocab") != d_vocab:
            raise CheckpointError(f"{path}: n_vocab is {read.size('n_vocab')}, but the embedding has {d_vocab} rows")
        return build_config(path, **fields, d_vocab=d_vocab)


def build_config(path: Path, **fields: Any) -> "BilinearConfig":
    """Return the `BilinearConfig` of these fields; a field it refuses is the config file's fault."""
    from .transformer import BilinearConfig

    try:
        return BilinearConfig(**fields)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


class Keys:
    """Typed access to a config, with errors that name the file and the key."""

    def __init__(self, config: Mapping[str, Any], path: Path):
        self.config, self.path = config, path

    def size(self, key: str, default: int | None = None) -> int:
        """Return a positive integer; `default`, if there is one, also where the config says null."""
        value = self.config.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            got = repr(value) if key in self.config else "nothing"
            raise CheckpointError(f"{self.path}: {key} must be a positive integer, got {got}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a positive finite number; `default`, if there is one, also where the config says null."""
        value = self.config.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            got = repr(value) if key in self.config else "nothing"
            raise CheckpointError(f"{self.path}: {key} must be a positive number, got {got}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return a boolean."""
        return self.one_of(key, {True: True, False: False}, default)

    def one_of(self, key: str, allowed: Mapping[Any, Any], default: Any = ...) -> Any:
        """Return what the key's value means, by a table."""
        value = self.config.get(key, default)
        for choice, meaning in allowed.items():
            if value == choice and type(value) is type(choice):
                return meaning
        choices = ", ".join(repr(choice) for choice in allowed)
        got = "nothing" if value is ... else repr(value)
        raise CheckpointError(f"{self.path}: {key} must be one of {choices}, got {got}")
