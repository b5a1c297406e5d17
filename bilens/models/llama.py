"""The layouts of Llama and its relatives, as transformers writes them: how `FAMILIES` is read off a checkpoint."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .attention import AttentionConfig, Local
from .embedding import EmbedConfig, UnembedConfig
from .families import FAMILIES, FULL, SLIDING, Family
from .layers import NormConfig
from .layouts import UNREAD, CheckpointError, Keys, Layout, blaming
from .mlp import MLPConfig
from .ropes import read_ropes, write_ropes
from .tokenization import StoredTokenizer
from .transformer import BilinearConfig

# A "linear" gate is no gate: left and right are multiplied as they are.
ACTS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"} | {
    "relu": "relu",
    "relu2": "relu2",
    "linear": None,
}
WRITTEN = {"gelu_tanh": "gelu_pytorch_tanh", "identity": "linear", None: "linear"}  # where our name is not theirs
NORMS = {  # our norms' names in transformers, by where the norms are
    "before": {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"},
    "after": {"ln1_post": "post_attention_layernorm", "ln2_post": "post_feedforward_layernorm"},
    "both": {"ln1": "input_layernorm", "ln1_post": "post_attention_layernorm"}
    | {"ln2": "pre_feedforward_layernorm", "ln2_post": "post_feedforward_layernorm"},
}
MATRICES = {  # the tensors, one above the other, that an MLP's weights are made of
    "gated": {"w": ("gate_proj", "up_proj"), "p": ("down_proj",)},
    "plain": {"w": ("fc1",), "p": ("fc2",)},
}
SIZES = {
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_ctx": "max_position_embeddings",
    "d_model": "hidden_size",
    "d_hidden": "intermediate_size",
}
READ = {
    *(*SIZES.values(), "vocab_size", "num_key_value_heads", "head_dim", "rms_norm_eps"),
    *("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "tie_word_embeddings"),
    *("attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
}
WITHOUT_EFFECT = {  # on what the model computes in evaluation
    *("attention_dropout", "initializer_range", "pretraining_tp", "use_cache", "chunk_size_feed_forward", "is_decoder"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "id2label", "label2id", "problem_type"),
    *("output_attentions", "output_hidden_states", "return_dict", "is_encoder_decoder", "_attn_implementation"),
    *("cache_implementation", "_sliding_window_pattern"),
}
REFUSED = {  # each changes what the model computes, wherever it is set
    "quantization_config": "quantised weights",
    "num_local_experts": "a mixture of experts",
    "num_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "attn_logit_softcapping": "soft-capped attention scores",
    "final_logit_softcapping": "soft-capped logits",
    "use_qk_norm": "normalised queries and keys",
    "qk_norm": "normalised queries and keys",
    "qk_layernorm": "normalised queries and keys",
    "clip_qkv": "clipped queries, keys and values",
    "parallel_attn": "parallel blocks",
    "use_parallel_residual": "parallel blocks",
    "logit_scale": "scaled logits",
    "logits_scaling": "scaled logits",
    "attention_multiplier": "scaled attention scores",
    "embedding_multiplier": "scaled embeddings",
    "residual_multiplier": "scaled blocks",
    "attention_chunk_size": "attention in chunks",
    "no_rope_layers": "layers without rotary positions",
    "rope_interleaved": "rotary positions that turn neighbours",
    "use_mrope": "rotary positions along several axes",
}
OTHERS = {  # whose tensors have Llama's names or nearly so, and mean something else
    "gemma": "its activation has had two meanings under one name",
    "gemma3": "it reads images too",
    "mixtral": "it is a mixture of experts",
    "qwen2_moe": "it is a mixture of experts",
    "qwen3_moe": "it is a mixture of experts",
    "olmo": "its norms have no gain and subtract the mean",
    "olmo3": "its local layers turn otherwise than its others",
    "granite": "its embeddings, blocks and logits are scaled",
    "cohere": "its attention and MLP run in parallel",
    "gpt_neox": "its attention and MLP run in parallel",
    "falcon": "its attention and MLP run in parallel",
    "phi3": "its projections are fused",
    "llama4_text": "it is a mixture of experts",
}


class Llama(Layout):
    """The layout of one `model_type` in `FAMILIES`.

    `gate_proj` is the left factor (`hook_pre`), `up_proj` the right one (`hook_pre_linear`), `down_proj` reads their
    product. A bilinear MLP is written as the activation `"linear"`, which transformers' own classes load and run.
    """

    embedding = "model.embed_tokens.weight"

    def __init__(self, model_type: str):
        self.family: Family = FAMILIES[model_type]
        self.labels = {"architectures": [self.family.architecture], "model_type": model_type}
        self.known = frozenset(READ | WITHOUT_EFFECT | UNREAD | {*self.family.read, *REFUSED, *self.family.refused})

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        """Tell whether a config is in transformers' words rather than in those of the published bilinear models."""
        words = {"hidden_size", "num_hidden_layers", "n_embd", "text_config"}
        return not words.isdisjoint(config) or config.get("model_type") in [*FAMILIES, *OTHERS]

    @classmethod
    def of_config(cls, config: Mapping[str, Any], path: Path) -> "Llama":
        """Return the layout of a config, or raise with what in it the hooked model cannot represent."""
        kind = config.get("model_type")
        if not isinstance(kind, str) or kind not in FAMILIES:
            got = (
                repr(kind) + (f": {OTHERS[kind]}" if kind in list(OTHERS) else "")
                if "model_type" in config
                else "nothing"
            )
            choices = ", ".join(map(repr, FAMILIES))
            raise CheckpointError(f"{path}: model_type must be one of {choices}, got {got}")
        layout = cls(kind)
        for key, meaning in (REFUSED | layout.family.refused).items():
            if config.get(key) and key not in layout.family.read:
                raise CheckpointError(
                    f"{path}: {key} must be absent, since {meaning} cannot be represented, got {config[key]!r}"
                )
        return layout

    def has_bos(self, tokenizer: StoredTokenizer) -> bool:
        """Tell whether the tokenizer itself puts a special token before a text: Llama's does, Qwen's does not."""
        return tokenizer.starts_texts

    def parts(self, name: str, rows: int, cfg: BilinearConfig) -> dict[str, int]:
        """Return the tensors that a parameter is made of: queries, keys and values; gate and up; itself."""
        if not name.startswith("blocks."):
            top = {"embed.weight": self.embedding, "unembed.weight": "lm_head.weight"}
            return {top.get(name, name.replace("ln_final.", "model.norm.")): rows}
        _, layer, module, *inner, kind = name.split(".")
        at = f"model.layers.{layer}"
        if not inner:
            return {f"{at}.{NORMS[self.family.norm.place][module]}.{kind}": rows}
        if inner == ["qkv"]:
            shared = cfg.attention.n_key_value_heads
            heads = {"q": cfg.n_heads, "k": shared, "v": shared}
            return {f"{at}.self_attn.{part}_proj.{kind}": n * cfg.d_head for part, n in heads.items()}
        if module == "attn":
            return {f"{at}.self_attn.{'o_proj' if inner == ['o'] else inner[0]}.{kind}": rows}
        names = MATRICES[self.family.mlp][inner[0]]
        return {f"{at}.mlp.{part}.{kind}": rows // len(names) for part in names}

    def shape(self, config: Mapping[str, Any], d_vocab: int, path: Path) -> BilinearConfig:
        """Read the model's shape off a config; the arguments are those of `Layout.shape`."""
        read, family = Keys(config, path), self.family
        sizes = {ours: read.size(theirs) for ours, theirs in SIZES.items()}
        if read.size("vocab_size") != d_vocab:
            raise CheckpointError(
                f"{path}: vocab_size is {read.size('vocab_size')}, but the embedding has {d_vocab} rows"
            )
        eps = read.number("rms_norm_eps", family.eps)
        with blaming(path):
            return BilinearConfig(
                *(sizes[name] for name in ("n_layers", "d_model", "n_ctx")),
                d_vocab,
                attention=self._attention(read, sizes, eps),
                mlp=self._mlp(read, sizes["d_hidden"]),
                norm=_with_eps(family.norm, eps),
                unembed=UnembedConfig(
                    tied=read.flag("tie_word_embeddings", family.tied), cap=_number_or_none(read, family.logit_cap)
                ),
                embed=EmbedConfig(
                    scale=math.sqrt(sizes["d_model"]) if family.scaled_embedding else 1.0,
                    norm=_with_eps(family.embed_norm, eps),
                ),
            )

    def _attention(self, read: Keys, sizes: Mapping[str, int], eps: float) -> AttentionConfig:
        family, n_heads = self.family, sizes["n_heads"]
        fields: dict[str, Any] = {
            "n_key_value_heads": read.size("num_key_value_heads", family.n_key_value_heads or n_heads),
            "bias": (read.flag("attention_bias", False),) * 2 if family.bias is None else family.bias,
            "qk_norm": family.qk_norm and replace(family.qk_norm, norm=_with_eps(family.qk_norm.norm, eps)),
            "cap": _number_or_none(read, family.attention_cap),
        }
        fields |= self._reach(read, sizes["n_layers"], sizes["n_ctx"])
        if read.config.get("head_dim", family.d_head) is None:
            shape = AttentionConfig.of_width(sizes["d_model"], n_heads, **fields)
        else:
            shape = AttentionConfig(n_heads, read.size("head_dim", family.d_head), **fields)
        divisor = read.number(*family.score_scale) if family.score_scale else shape.d_head
        return shape if divisor == shape.d_head else replace(shape, score_scale=divisor**-0.5)

    def _reach(self, read: Keys, n_layers: int, n_ctx: int) -> dict[str, Any]:
        """Return how far attention sees, and its rotary positions: of all layers, and of the local ones."""
        family, local = self.family, self.family.sliding(read, n_layers)
        rope, local_rope = read_ropes(read, n_ctx, family.theta, family.local_theta)
        if family.reverse:  # these normalise after the rotation, which undoes its gain
            rope = replace(rope, reverse=True, gain=1.0)
        if not local:
            return {"rope": rope}
        if read.config.get("sliding_window", ...) is None:
            raise CheckpointError(f"{read.path}: sliding_window must be a number, since some layers slide, got None")
        window = read.size("sliding_window", 4096)
        if len(local) == n_layers:
            return {"window": window, "rope": local_rope or rope}
        return {"rope": rope, "local": Local(tuple(local), window, local_rope)}

    def _mlp(self, read: Keys, d_hidden: int) -> MLPConfig:
        key, default = self.family.act
        act = read.one_of(key, ACTS, default)
        bias = (self.family.mlp_bias and read.flag("mlp_bias", False),) * 2
        if self.family.mlp == "plain":
            return MLPConfig(d_hidden, "plain", act or "identity", bias)
        return MLPConfig(d_hidden, "bilinear" if act is None else "gated", act, bias)

    def keys(self, cfg: BilinearConfig) -> dict[str, Any]:
        """Return the config keys that say what the model computes, for transformers 4 (`rope_scaling`) and later."""
        keys: dict[str, Any] = {theirs: getattr(cfg, ours) for ours, theirs in SIZES.items()}
        attention, family = cfg.attention, self.family
        keys |= {
            "vocab_size": cfg.d_vocab,
            "num_key_value_heads": attention.n_key_value_heads,
            "head_dim": attention.d_head,
            family.act[0]: WRITTEN.get(cfg.mlp.act, cfg.mlp.act),
            "rms_norm_eps": cfg.eps,
            "tie_word_embeddings": cfg.unembed.tied,
        }
        keys |= {"attention_bias": attention.bias[0]} if family.bias is None else {}
        keys |= {"mlp_bias": cfg.mlp.bias[0]} if family.mlp_bias else {}
        keys |= {family.attention_cap[0]: attention.cap} if family.attention_cap else {}
        keys |= {family.logit_cap[0]: cfg.unembed.cap} if family.logit_cap else {}
        if family.score_scale:
            keys[family.score_scale[0]] = round(attention.factor**-2)
        return keys | self._window_keys(cfg) | write_ropes(cfg, family.theta, family.local_theta)

    def _window_keys(self, cfg: BilinearConfig) -> dict[str, Any]:
        """Return the keys that say which layers slide, and how far they see."""
        windows = [cfg.attention.at(layer).window for layer in range(cfg.n_layers)]
        sliding = [layer for layer, window in enumerate(windows) if window is not None]
        keys = {
            "sliding_window": windows[sliding[0]] if sliding else None,
            "layer_types": [FULL if window is None else SLIDING for window in windows],
            "use_sliding_window": bool(sliding),
            "max_window_layers": sliding[0] if sliding else cfg.n_layers,
        }
        if "layer_types" in self.family.window_keys and not sliding:
            del keys["sliding_window"]  # without meaning, but transformers' classes may want it
        return {key: value for key, value in keys.items() if key in self.family.window_keys}


def _with_eps(norm: NormConfig | None, eps: float) -> NormConfig | None:
    return None if norm is None else replace(norm, eps=eps)


def _number_or_none(read: Keys, pair: tuple[str, float | None] | None) -> float | None:
    """Return the number of a key that may be null; its default where the config is silent, None for no key."""
    if pair is None or read.config.get(*pair) is None:
        return None
    return read.number(*pair)
