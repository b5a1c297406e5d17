"""The layout of the attention-only models of tdooms/tensor-similarity: products of two score matrices, and no MLPs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .attention import AttentionConfig
from .blocks import StreamConfig
from .embedding import UnembedConfig
from .layers import NormConfig
from .layouts import UNREAD, CheckpointError, Keys, Layout, blaming
from .rotary import Rope
from .transformer import BilinearConfig, BilinearTransformer

SIDES = ("q1", "k1", "q2", "k2")
NORMS = {
    "layernorm": NormConfig(1e-5, gain=True, shift=True, kind="layer"),
    "tok0_batch": NormConfig(1e-6, kind="constant"),
}
BATCH_EPS = 1e-5
STATISTICS = ("weight", "bias", "running_mean", "running_var")
READ = {
    *("vocab_size", "n_ctx", "d_model", "n_head", "n_layers", "attn_scale", "rope_base", "norm_type", "residual")
} | {*("attn_type", "norm_places", "use_rmsnorm_qk", "use_bias_qk", "model", "data")}


class AttentionOnly(Layout):
    """The layout of `Elriggs/bilinear_atnn_only_2L_Pile` and of `melephant/2l-bilinear-attn-normalised-v2`.

    The config of the latter has the same keys one level down, under `model`. Where no `use_bias_qk` is set, queries and
    keys are batch-normed; with the statistics that training left this is a scale and a bias, and is folded into them.
    Blocks add, unless `residual` is `"lerp"`.
    """

    embedding = "embed.weight"
    overridable = ("residual",)
    known = frozenset(READ | UNREAD)
    attention_only = archived = True

    def __init__(self):
        self.labels = {}

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        """Tell whether a config is in the words of these models."""
        return {"n_layers", "n_head", "d_model"} <= set(_inner(config))

    def override(self, config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config with fields that a user sets, beside the others of the model."""
        merged = super().override(_inner(config), overrides)
        return {**config, "model": merged} if _nested(config) else merged

    def tokenizer(self, config: Mapping[str, Any]) -> str | None:
        """Return the repository of the tokenizer that the data's part of the config names."""
        data = config.get("data")
        named = data.get("tokenizer") if isinstance(data, Mapping) else None
        return named if isinstance(named, str) else None

    def undecodable(self, config: Mapping[str, Any]) -> str | None:
        """Return why the ids of a model whose config names no tokenizer cannot be decoded."""
        if _nested(config):
            return None
        return (
            f"this model has no tokenizer: the ids of the published one are GPT-2's modulo {config.get('vocab_size')}, "
            f"each of several tokens, so they cannot be decoded; give token ids"
        )

    def prepare(
        self, tensors: dict[str, tuple[Tensor, Path]], config: Mapping[str, Any]
    ) -> dict[str, tuple[Tensor, Path]]:
        """Fold batch norms into weights and biases: `W' = g W`, `b' = b - g mean`, `g = weight / sqrt(var + eps)`."""
        if "use_bias_qk" in _inner(config):
            return tensors
        tensors = dict(tensors)
        normed = [name for name in tensors if name.split(".")[2:] in [[side, "weight"] for side in SIDES]]
        for name in normed:
            at, side, _ = name.rsplit(".", 2)
            W, path = tensors[name]
            weight, bias, mean, var = (_statistic(tensors, f"{at}.bn_{side}.{part}", W, path) for part in STATISTICS)
            g = weight / (var + BATCH_EPS).sqrt()
            tensors[name] = (g[:, None] * W.double()).to(W.dtype), path
            tensors[f"{at}.{side}.bias"] = (bias - g * mean).to(W.dtype), path
        return tensors

    def parts(self, name: str, rows: int, cfg: BilinearConfig) -> dict[str, int]:
        """Return the tensors that a parameter is made of, with their rows; names as in the authors' code."""
        if not name.startswith("blocks."):
            name = name.replace("ln_final.energy", "final_norm.running_mean_energy")
            return {name.replace("ln_final.", "final_norm."): rows}
        _, layer, rest = name.split(".", 2)
        many = {"attn.qkv.weight": ((*SIDES, "v"), "weight"), "attn.qk_bias": (SIDES, "bias")}
        sides, kind = many.get(rest, (("o",), "weight"))
        return {f"layers.{layer}.{side}.{kind}": rows // len(sides) for side in sides}

    def shape(self, config: Mapping[str, Any], d_vocab: int, path: Path) -> BilinearConfig:
        """Read the model's shape off a config; the arguments are those of `Layout.shape`."""
        read = Keys(_inner(config), path)
        if read.size("vocab_size") != d_vocab:
            raise CheckpointError(
                f"{path}: vocab_size is {read.size('vocab_size')}, but the embedding has {d_vocab} rows"
            )
        read.one_of("attn_type", {"bilinear": None}, "bilinear")
        read.one_of("use_rmsnorm_qk", {False: None}, False)
        if read.config.get("norm_places", ["pre_unembed"]) != ["pre_unembed"]:
            raise CheckpointError(f"{path}: norm_places must be ['pre_unembed'], got {read.config['norm_places']!r}")
        with blaming(path):
            return BilinearConfig(
                *(read.size(key) for key in ("n_layers", "d_model", "n_ctx")),
                d_vocab,
                attention=_attention(read),
                mlp=None,
                norm=None,
                unembed=UnembedConfig(norm=read.one_of("norm_type", NORMS, "layernorm")),
                stream=StreamConfig(interpolate=read.one_of("residual", {"add": False, "lerp": True}, "add")),
            )

    def keys(self, cfg: BilinearConfig) -> dict[str, Any]:
        """Return the config keys that say what the model computes."""
        attention = cfg.attention
        return {
            "vocab_size": cfg.d_vocab,
            "n_ctx": cfg.n_ctx,
            "d_model": cfg.d_model,
            "n_head": cfg.n_heads,
            "n_layers": cfg.n_layers,
            "attn_scale": attention.scale,
            "rope_base": attention.rope.base,
            "norm_type": next((name for name, norm in NORMS.items() if norm == cfg.unembed.norm), None),
            "use_bias_qk": attention.bias[0] == "qk",
            "residual": "lerp" if cfg.stream.interpolate else "add",
        }

    def config(self, model: BilinearTransformer) -> dict[str, Any]:
        """Return the config of a model: what it came with, its model's part updated by what it is."""
        config = super().config(model)
        if not _nested(model.source):
            return config
        keys = self.keys(model.cfg)
        own = {key: value for key, value in config.items() if key not in keys}
        return {**own, "model": {**model.source["model"], **keys}}


def _statistic(tensors: dict[str, tuple[Tensor, Path]], name: str, W: Tensor, path: Path) -> Tensor:
    if name not in tensors:
        raise CheckpointError(
            f"{path}: tensor {name} of shape [{len(W)}] is missing, though the config has no use_bias_qk"
        )
    found, _ = tensors.pop(name)
    if found.shape != W.shape[:1]:
        raise CheckpointError(f"{path}: tensor {name} must have shape [{len(W)}], got {list(found.shape)}")
    return found.to(torch.float64)


def _nested(config: Mapping[str, Any]) -> bool:
    return isinstance(config.get("model"), Mapping)


def _inner(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config["model"] if _nested(config) else config


def _attention(read: Keys) -> AttentionConfig:
    d_model, n_heads = read.size("d_model"), read.size("n_head")
    biased = "use_bias_qk" not in read.config or read.flag("use_bias_qk", True)
    return AttentionConfig.of_width(
        d_model,
        n_heads,
        kind="bilinear",
        score_scale=n_heads / d_model,
        scale=read.number("attn_scale", 1.0),
        bias=("qk" if biased else False, False),
        rope=Rope(read.number("rope_base", 10000.0), "default"),
    )
