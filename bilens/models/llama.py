"""The Llama family's layout, as transformers writes it: Llama (and TinyLlama), Mistral, Qwen2."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from .attention import AttentionConfig
from .embedding import UnembedConfig
from .layers import NormConfig
from .layouts import UNREAD, CheckpointError, Keys, Layout, blaming
from .mlp import MLPConfig
from .rotary import Rope
from .transformer import BilinearConfig

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
# A "linear" gate is no gate: left and right are multiplied as they are.
ACTS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu", "linear": None}
SIZES = {
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_ctx": "max_position_embeddings",
    "d_model": "hidden_size",
    "d_hidden": "intermediate_size",
}
KEY_VALUE_HEADS = {"mistral": 8, "qwen2": 32}  # what transformers takes where the config is silent
READ = {
    *(*SIZES.values(), "vocab_size", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps"),
    *("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "tie_word_embeddings"),
    *("attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
}
WITHOUT_EFFECT = {  # on what the model computes in evaluation
    *("attention_dropout", "initializer_range", "pretraining_tp", "use_cache", "chunk_size_feed_forward", "is_decoder"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "id2label", "label2id", "problem_type"),
    *("output_attentions", "output_hidden_states", "return_dict", "is_encoder_decoder", "_attn_implementation"),
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
    "gemma": "its norms scale by 1 + weight",
    "gemma2": "its attention scores are soft-capped",
    "gemma3_text": "its queries and keys are normalised",
    "mixtral": "it is a mixture of experts",
    "qwen2_moe": "it is a mixture of experts",
    "qwen3_moe": "it is a mixture of experts",
    "qwen3": "its queries and keys are normalised",
    "olmo2": "its norms come after attention and MLP",
    "granite": "its embeddings, blocks and logits are scaled",
    "cohere": "its attention and MLP run in parallel",
    "gpt_neox": "its attention and MLP run in parallel",
    "falcon": "its attention and MLP run in parallel",
    "phi3": "its projections are fused",
    "llama4_text": "it is a mixture of experts",
}


class Llama(Layout):
    """The layout of one `model_type` of the Llama family.

    `gate_proj` is the left factor (`hook_pre`), `up_proj` the right one (`hook_pre_linear`), `down_proj` reads their
    product. A bilinear MLP is written as `hidden_act: "linear"`, which transformers' own classes load and run.
    """

    embedding = "model.embed_tokens.weight"
    known = frozenset(READ | WITHOUT_EFFECT | UNREAD)

    def __init__(self, model_type: str):
        self.model_type = model_type
        self.labels = {"architectures": [ARCHITECTURES[model_type]], "model_type": model_type}

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        """Tell whether a config is in transformers' words rather than in those of the published bilinear models."""
        words = {"hidden_size", "num_hidden_layers", "n_embd", "text_config"}
        return not words.isdisjoint(config) or config.get("model_type") in {*ARCHITECTURES, *OTHERS}

    @classmethod
    def of_config(cls, config: Mapping[str, Any], path: Path) -> "Llama":
        """Return the layout of a config, or raise with what in it the hooked model cannot represent."""
        kind = config.get("model_type")
        if kind not in ARCHITECTURES:
            got = repr(kind) + (f": {OTHERS[kind]}" if kind in OTHERS else "") if "model_type" in config else "nothing"
            choices = ", ".join(map(repr, ARCHITECTURES))
            raise CheckpointError(f"{path}: model_type must be one of {choices}, got {got}")
        for key, meaning in REFUSED.items():
            if config.get(key):
                raise CheckpointError(
                    f"{path}: {key} must be absent, since {meaning} cannot be represented, got {config[key]!r}"
                )
        return cls(kind)

    def has_bos(self, tokenizer: Tokenizer) -> bool:
        """Tell whether the tokenizer itself puts a special token before a text: Llama's does, Qwen's does not."""
        bare, full = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
        return full[:1] != bare[:1]

    def parts(self, name: str, rows: int, cfg: BilinearConfig) -> dict[str, int]:
        """Return the tensors that a parameter is made of: queries, keys and values; gate and up; itself."""
        if not name.startswith("blocks."):
            top = {"embed.weight": self.embedding, "unembed.weight": "lm_head.weight"}
            return {top.get(name, name.replace("ln_final.", "model.norm.")): rows}
        _, layer, module, rest = name.split(".", 3)
        at, kind = f"model.layers.{layer}", rest.rsplit(".")[-1]
        if rest.startswith("qkv"):
            shared = cfg.attention.n_key_value_heads
            heads = {"q": cfg.n_heads, "k": shared, "v": shared}
            return {f"{at}.self_attn.{part}_proj.{kind}": n * cfg.d_head for part, n in heads.items()}
        if rest.startswith("w."):
            return {f"{at}.mlp.{part}_proj.{kind}": rows // 2 for part in ("gate", "up")}
        names = {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"}
        names |= {"attn": "self_attn.o_proj", "mlp": "mlp.down_proj"}
        return {f"{at}.{names[module]}.{kind}": rows}

    def shape(self, config: Mapping[str, Any], d_vocab: int, path: Path) -> BilinearConfig:
        """Read the model's shape off a config; the arguments are those of `Layout.shape`."""
        read = Keys(config, path)
        sizes = {ours: read.size(theirs) for ours, theirs in SIZES.items()}
        if read.size("vocab_size") != d_vocab:
            raise CheckpointError(
                f"{path}: vocab_size is {read.size('vocab_size')}, but the embedding has {d_vocab} rows"
            )
        with blaming(path):
            return BilinearConfig(
                *(sizes[name] for name in ("n_layers", "d_model", "n_ctx")),
                d_vocab,
                attention=self._attention(read, sizes),
                mlp=self._mlp(read, sizes["d_hidden"]),
                norm=NormConfig(read.number("rms_norm_eps", 1e-6), gain=True),
                unembed=UnembedConfig(tied=read.flag("tie_word_embeddings", False)),
            )

    def _attention(self, read: Keys, sizes: Mapping[str, int]) -> AttentionConfig:
        n_heads = sizes["n_heads"]
        fields: dict[str, Any] = {
            "n_key_value_heads": read.size("num_key_value_heads", KEY_VALUE_HEADS.get(self.model_type, n_heads)),
            "bias": (self.model_type == "qwen2", False),
            "window": self._window(read, sizes["n_layers"]),
            "rope": read_rope(read.config, sizes["n_ctx"], read.path),
        }
        if self.model_type == "llama":
            fields["bias"] = (read.flag("attention_bias", False),) * 2
        if read.config.get("head_dim") is None:
            return AttentionConfig.of_width(sizes["d_model"], n_heads, **fields)
        return AttentionConfig(n_heads, read.size("head_dim"), **fields)

    def _mlp(self, read: Keys, d_hidden: int) -> MLPConfig:
        act = read.one_of("hidden_act", ACTS, "silu")
        bias = (self.model_type == "llama" and read.flag("mlp_bias", False),) * 2
        return MLPConfig(d_hidden, "bilinear" if act is None else "gated", act, bias)

    def _window(self, read: Keys, n_layers: int) -> int | None:
        """Return how far attention sees; Llama has no window, whatever its config says."""
        if self.model_type == "mistral":
            return None if read.config.get("sliding_window", 4096) is None else read.size("sliding_window", 4096)
        if self.model_type == "llama" or not read.flag("use_sliding_window", False):
            return None
        full = read.config.get("max_window_layers", 28)
        types = read.config.get("layer_types") or [
            "full_attention" if layer < full else "sliding_attention" for layer in range(n_layers)
        ]
        if len(set(types)) > 1:
            raise CheckpointError(
                f"{read.path}: layer_types (or max_window_layers) must make all layers alike, since a window in some "
                f"only cannot be represented, got {types}"
            )
        return read.size("sliding_window", 4096) if types[0] == "sliding_attention" else None

    def keys(self, cfg: BilinearConfig) -> dict[str, Any]:
        """Return the config keys that say what the model computes, for transformers 4 (`rope_scaling`) and later."""
        keys: dict[str, Any] = {theirs: getattr(cfg, ours) for ours, theirs in SIZES.items()}
        attention, rope = cfg.attention, write_rope(cfg.attention.rope)
        keys |= {
            "vocab_size": cfg.d_vocab,
            "num_key_value_heads": attention.n_key_value_heads,
            "head_dim": attention.d_head,
            "hidden_act": cfg.mlp.act or "linear",
            "rms_norm_eps": cfg.eps,
            "tie_word_embeddings": cfg.unembed.tied,
            "rope_theta": attention.rope.base,
            "rope_scaling": rope if len(rope) > 1 else None,
            "rope_parameters": {**rope, "rope_theta": attention.rope.base},
        }
        if self.model_type == "llama":
            keys |= {"attention_bias": attention.bias[0], "mlp_bias": cfg.mlp.bias[0]}
        if self.model_type == "mistral":
            keys["sliding_window"] = attention.window
        if self.model_type == "qwen2":
            slides = attention.window is not None
            kind = "sliding_attention" if slides else "full_attention"
            keys |= {"use_sliding_window": slides, "max_window_layers": 0 if slides else cfg.n_layers}
            keys |= {"layer_types": [kind] * cfg.n_layers, "sliding_window": attention.window}
        return keys


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
