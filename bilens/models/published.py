"""The published bilinear formats: what their configs mean, and how their tensors are named."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .attention import AttentionConfig
from .layers import NormConfig
from .layouts import UNREAD, CheckpointError, Keys, Layout, blaming
from .mlp import MLPConfig
from .transformer import BilinearConfig

SIZES = {"n_layers": "n_layer", "n_heads": "n_head", "n_ctx": "n_ctx", "d_model": "d_model", "d_hidden": "d_hidden"}
READ = {*SIZES.values(), "n_vocab", "mlp", "normalization", "norm_bias", "mlp_bias", "bilinear", "gate", "bias"} | {
    *("scale_attn", "attention2", "tokenizer", "vocab_size")
}

MLPS = {"blp": ("bilinear", None), "glp": ("gated", "gelu"), "mlp": ("plain", "gelu")}  # of 2024-05
GATES = {None: None, False: None, True: "relu", "relu": "relu", "silu": "silu", "gelu": "gelu"}  # of the later ones


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

    def parts(self, name: str, rows: int, cfg: BilinearConfig) -> dict[str, int]:
        """Return the one tensor that holds a parameter, with its rows; names as in the authors' code."""
        if name.startswith("blocks."):
            _, layer, rest = name.split(".", 2)
            rest = rest.replace("ln1.", "n1.norm.").replace("ln2.", "n2.norm.").replace("mlp.p.", f"mlp.{self.down}.")
            return {f"transformer.h.{layer}.{rest}": rows}
        top = {"embed.weight": self.embedding, "unembed.weight": "lm_head.weight"}
        return {top.get(name, name.replace("ln_final.", "transformer.n_f.norm.")): rows}

    def keys(self, cfg: BilinearConfig) -> dict[str, Any]:
        """Return the config keys that say what the model computes."""
        keys: dict[str, Any] = {theirs: getattr(cfg, ours) for ours, theirs in SIZES.items()}
        act, bias = None if cfg.mlp.act == "identity" else cfg.mlp.act, cfg.mlp.bias[0]
        if self.generation == "2024-05":
            names = {meaning[0]: name for name, meaning in MLPS.items()}
            norm = {
                "normalization": None if cfg.norm is None else "rms",
                "norm_bias": bool(cfg.norm and cfg.norm.shift),
            }
            return keys | {"n_vocab": cfg.d_vocab, "mlp": names.get(cfg.mlp.kind), "mlp_bias": bias} | norm
        keys |= {"bilinear": cfg.mlp.kind != "plain", "bias": bias, "normalization": cfg.norm is not None}
        if self.generation == "2024-06":
            return keys | {"n_vocab": cfg.d_vocab, "gate": act is not None}
        scaled = cfg.attention.scale != 1
        return keys | {"gate": act, "scale_attn": scaled, "attention2": cfg.attention.kind == "bilinear"}

    def shape(self, config: Mapping[str, Any], d_vocab: int, path: Path) -> BilinearConfig:
        """Read the model's shape off a config; the arguments are those of `Layout.shape`."""
        read = Keys(config, path)
        sizes = {ours: read.size(theirs) for ours, theirs in SIZES.items()}
        with blaming(path):
            shape = BilinearConfig(
                *(sizes[name] for name in ("n_layers", "d_model", "n_ctx")),
                d_vocab,
                attention=self._attention(read, sizes),
                mlp=self._mlp(read, sizes["d_hidden"]),
                norm=self._norm(read),
            )
        if self.generation != "2025" and read.size("n_vocab") != d_vocab:
            raise CheckpointError(f"{path}: n_vocab is {read.size('n_vocab')}, but the embedding has {d_vocab} rows")
        if (told := read.size("vocab_size", d_vocab)) > d_vocab:  # fewer: an embedding may be padded
            raise CheckpointError(f"{path}: vocab_size is {told}, but the embedding has {d_vocab} rows")
        return shape

    def _attention(self, read: Keys, sizes: Mapping[str, int]) -> AttentionConfig:
        scale, kind = 1.0, "softmax"
        if self.generation == "2025":
            scale = 1 / math.sqrt(2 * sizes["n_layers"]) if read.flag("scale_attn", True) else 1.0
            kind = "bilinear" if read.flag("attention2", False) else "softmax"
        return AttentionConfig.of_width(sizes["d_model"], sizes["n_heads"], kind=kind, scale=scale)

    def _mlp(self, read: Keys, d_hidden: int) -> MLPConfig:
        if self.generation == "2024-05":
            kind, act = read.one_of("mlp", MLPS)
            return MLPConfig(d_hidden, kind, act, (read.flag("mlp_bias", False) or kind == "plain", False))
        gate = read.one_of("gate", GATES, None)
        bias = (read.flag("bias", False),) * 2
        if read.flag("bilinear", True):
            return MLPConfig(d_hidden, "bilinear" if gate is None else "gated", gate, bias)
        return MLPConfig(d_hidden, "plain", gate or "identity", bias)

    def _norm(self, read: Keys) -> NormConfig | None:
        if self.generation == "2024-05":
            gained = NormConfig(gain=True, shift=read.flag("norm_bias", False))
            return read.one_of("normalization", {"rms": gained, None: None}, "rms")
        affine = self.generation == "2024-06"
        return NormConfig(gain=affine, shift=affine) if read.flag("normalization", True) else None
