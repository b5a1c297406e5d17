"""Small random models of transformers' own classes, one for each thing in which the families differ."""

import torch

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
GEMMA = {"num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 7}
FAMILIES = {  # model_type and what differs from SMALL
    "llama": ("llama", {}),
    "tinyllama": ("llama", {"num_key_value_heads": 2, "rms_norm_eps": 1e-5}),
    "simplestories": ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True, "intermediate_size": 85}),
    "llama3": (
        "llama",
        {"num_key_value_heads": 1, "tie_word_embeddings": True}
        | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, **LLAMA3}},
    ),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "yarn": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}
        | {"original_max_position_embeddings": 32},
    ),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16, "hidden_act": "gelu"}),
    "mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": 7}),
    "mistral without window": ("mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2 with window": (
        "qwen2",
        {"num_key_value_heads": 4, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    ),
    "qwen2 with some windows": (
        "qwen2",
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    "qwen3 tied": ("qwen3", {"num_key_value_heads": 4, "head_dim": 8, "tie_word_embeddings": True}),
    "olmo2": ("olmo2", {"num_key_value_heads": 2}),
    "olmo2 tied": ("olmo2", {"tie_word_embeddings": True, "attention_bias": True}),
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2 without caps": (
        "gemma2",
        GEMMA
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False}
        | {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "query_pre_attn_scalar": 16},
    ),
    "gemma3": (
        "gemma3_text",
        GEMMA
        | {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    ),
    "gemma3 local": (
        "gemma3_text",
        GEMMA | {"tie_word_embeddings": False, "final_logit_softcapping": 4.0, "attention_bias": True},
    ),
    "nanochat": ("nanochat", {"num_key_value_heads": 2, "final_logit_softcapping": 3.0}),
    "nanochat without cap": ("nanochat", {"final_logit_softcapping": None, "tie_word_embeddings": True}),
    "bilinear": ("llama", {"num_key_value_heads": 2, "hidden_act": "linear"}),
    "bilinear gemma3": ("gemma3_text", GEMMA | {"hidden_activation": "linear"}),
}


def build(transformers, name):
    """Return transformers' model of that name, every weight random, those of norms and biases too."""
    kind, changes = FAMILIES[name]
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **changes})
    original = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in original.named_parameters():
            spread = 0.5 if parameter.ndim == 1 else 0.7 * parameter.shape[-1] ** -0.5
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(spread * noise + (key.endswith("norm.weight") and not kind.startswith("gemma")))
    return original
