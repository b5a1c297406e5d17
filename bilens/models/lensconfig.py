"""transformer_lens' names for the shape of a model, with its meanings."""

from collections.abc import Mapping
from typing import NoReturn

NO_CAP = -1.0  # transformer_lens' word for a cap that is not there
_ROPE = "cfg.attention.rope"
_NONE = "no model here has it"
_SOURCE = "model.source is the config that the model came with"
LEFT_OUT = {  # transformer_lens' other names, and what to use
    **dict.fromkeys(
        (
            "NTK_by_parts_factor",
            "NTK_by_parts_high_freq_factor",
            "NTK_by_parts_low_freq_factor",
            "NTK_original_ctx_len",
        ),
        _ROPE,
    ),
    **dict.fromkeys(("use_NTK_by_parts_rope", "use_dynamic_ntk_rope", "use_yarn_rope", "rotary_scaling_factor"), _ROPE),
    **dict.fromkeys(
        ("yarn_attention_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_factor", "yarn_truncate"), _ROPE
    ),
    **dict.fromkeys(("yarn_global_attn_only", "yarn_original_max_position_embeddings"), _ROPE),
    "rotary_base_local": "cfg.attention.local.rope",
    **dict.fromkeys(("clip_qkv", "use_logn_attn", "train_seq_length", "norm_topk_prob", "quantization_method"), _NONE),
    **dict.fromkeys(("relative_attention_max_distance", "relative_attention_num_buckets"), _NONE),
    "decoder_start_token_id": _NONE,
    **dict.fromkeys(("from_checkpoint", "checkpoint_index", "checkpoint_label_type", "checkpoint_value"), _SOURCE),
    **dict.fromkeys(("model_name", "tokenizer_name"), _SOURCE),
    "tokenizer_prepends_bos": "model.has_bos",
    **dict.fromkeys(
        ("init_mode", "init_weights", "initializer_range", "seed", "set_seed_everywhere"),
        "pass a torch.Generator to what draws numbers",
    ),
    "layer_norm_folding": "model.process_weights_()",
    "is_layer_norm_activation": "cfg.norm",
    **dict.fromkeys(("from_dict", "unwrap"), "BilinearConfig(...)"),
    "to_dict": "dataclasses.asdict(cfg)",
}


def explain(owner: str, name: str, table: Mapping[str, str]) -> str:
    """Return the message of an AttributeError: that a name is not there, and what to use if it is transformer_lens'."""
    missing = f"{owner!r} object has no attribute {name!r}"
    return missing if name not in table else f"{missing}, which transformer_lens has: {table[name]}"


class LensConfig:
    """What transformer_lens' tools ask of a `cfg`, answered from the parts of a `BilinearConfig`."""

    # what no model here does, or all do
    attention_dir = "causal"
    default_prepend_bos = True
    experts_per_token = None
    load_in_4bit = False
    n_devices = 1
    num_experts = None
    original_architecture = None
    parallel_attn_mlp = False
    positional_embedding_type = "rotary"
    rotary_adjacent_pairs = False
    scale_attn_by_inverse_layer_idx = False
    trust_remote_code = False
    ungroup_grouped_query_attention = False
    use_attention_sinks = False
    use_attn_in = False
    use_attn_result = True
    use_attn_scale = True
    use_hook_mlp_in = True
    use_hook_tokens = False
    use_split_qkv_input = False

    @property
    def n_heads(self) -> int:
        """Heads of queries."""
        return self.attention.n_heads

    @property
    def n_key_value_heads(self) -> int | None:
        """Heads of keys and values where groups of queries share them; `None` where each has its own."""
        shared = self.attention.n_key_value_heads
        return None if shared == self.attention.n_heads else shared

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return self.attention.d_head

    @property
    def d_mlp(self) -> int:
        """Hidden units of an MLP, 0 if there is none."""
        return 0 if self.mlp is None else self.mlp.d_hidden

    @property
    def d_vocab_out(self) -> int:
        """How many logits."""
        return self.d_vocab

    @property
    def n_params(self) -> int:
        """Weights of attention and MLPs: matrices only, without embeddings, biases and norms."""
        attention = self.attention
        halves = 2 if attention.kind in ("bilinear", "differential") else 1
        heads = attention.n_heads * (1 + halves) + attention.n_key_value_heads * (1 + halves)
        sides = 0 if self.mlp is None else 2 + self.gated_mlp
        return self.n_layers * self.d_model * (heads * attention.d_head + sides * self.d_mlp)

    @property
    def act_fn(self) -> str | None:
        """The activation's name, `None` of a bilinear or squared MLP."""
        return None if self.mlp is None else self.mlp.act

    @property
    def gated_mlp(self) -> bool:
        """Whether the MLP multiplies two sides, of which the left may have an activation: bilinear ones do."""
        return self.mlp is not None and self.mlp.kind in ("bilinear", "gated")

    @property
    def attn_only(self) -> bool:
        """Whether there are no MLPs."""
        return self.mlp is None

    @property
    def attn_scale(self) -> float:
        """What scores are divided by, `q·k / attn_scale`; `cfg.attention.scale` is the factor on attention's output."""
        return 1 / self.attention.factor

    @property
    def attn_scores_soft_cap(self) -> float:
        """The cap on scores, -1.0 if there is none."""
        return NO_CAP if self.attention.cap is None else self.attention.cap

    @property
    def output_logits_soft_cap(self) -> float:
        """The cap on logits, -1.0 if there is none."""
        return NO_CAP if self.unembed.cap is None else self.unembed.cap

    @property
    def use_qk_norm(self) -> bool:
        """Whether queries and keys are normalised."""
        return self.attention.qk_norm is not None

    @property
    def window_size(self) -> int | None:
        """How many positions attention sees, that of the local layers if only some are; `None`: all."""
        return self.attention.window if self.attention.local is None else self.attention.local.window

    @property
    def use_local_attn(self) -> bool:
        """Whether some layer has a window."""
        return self.window_size is not None

    @property
    def attn_types(self) -> list[str] | None:
        """`"local"` or `"global"` of each layer, where any has a window."""
        if not self.use_local_attn:
            return None
        windows = (self.attention.at(layer).window for layer in range(self.n_layers))
        return ["global" if window is None else "local" for window in windows]

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of a head are rotated: all."""
        return self.d_head

    @property
    def rotary_base(self) -> float:
        """The base of the rotary frequencies."""
        return self.attention.rope.base

    @property
    def normalization_type(self) -> str | None:
        """`"RMS"`, `"LN"`, with `Pre` where there is no gain (or it was folded away); `None` without norms."""
        if self.norm is None or self.norm.kind == "constant":
            return None
        return ("LN" if self.norm.kind == "layer" else "RMS") + ("" if self.norm.gain else "Pre")

    @property
    def uses_rms_norm(self) -> bool:
        """Whether blocks have norms that do not take the mean away."""
        return self.norm is not None and self.norm.kind == "rms"

    @property
    def final_rms(self) -> bool:
        """Whether the last norm alone is an RMS norm."""
        return self.unembed.norm is not None and self.unembed.norm.kind == "rms" and not self.uses_rms_norm

    @property
    def use_normalization_before_and_after(self) -> bool:
        """Whether attention and MLP have a norm on either side."""
        return self.norm is not None and self.norm.place == "both"

    @property
    def post_embedding_ln(self) -> bool:
        """Whether the embeddings are normalised."""
        return self.embed.norm is not None

    @property
    def eps(self) -> float | None:
        """What norms add to the mean square; `None` without norms."""
        return None if self.norm is None else self.norm.eps

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the unembedding is the embedding."""
        return self.unembed.tied

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(explain(type(self).__name__, name, LEFT_OUT))
