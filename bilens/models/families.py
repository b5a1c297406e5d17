"""The families that transformers writes in Llama's words, and where each departs from Llama: one table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from .attention import QKNormConfig
from .layers import NormConfig
from .layouts import CheckpointError, Keys

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Family:
    """What the config of one `model_type` says and leaves unsaid, as transformers' own classes read it.

    Norms are given without their eps, which every config has; a pair is a key and what its absence means.
    """

    architecture: str
    mlp: Literal["gated", "plain"] = "gated"
    act: tuple[str, str] = ("hidden_act", "silu")
    eps: float = 1e-6  # where the config is silent, as are the next four
    n_key_value_heads: int | None = None  # None: as many as heads
    d_head: int | None = None  # None: d_model / n_heads
    tied: bool = False
    theta: float = 10000.0
    bias: tuple[bool, bool] | None = (False, False)  # of attention; None: `attention_bias` says
    mlp_bias: bool = False  # whether `mlp_bias` is read
    norm: NormConfig = field(default_factory=lambda: NormConfig(gain=True))
    qk_norm: QKNormConfig | None = None
    embed_norm: NormConfig | None = None
    scaled_embedding: bool = False  # by sqrt(d_model)
    reverse: bool = False  # whether positions turn the other way
    sliding: Callable[[Keys, int], list[int]] = lambda read, n_layers: []  # the layers with a window
    window_keys: tuple[str, ...] = ()  # which say so
    local_theta: float | None = None  # of layers with a window, where those have rotary positions of their own
    score_scale: tuple[str, float] | None = None  # what q·k is divided by the root of; None: d_head
    attention_cap: tuple[str, float | None] | None = None
    logit_cap: tuple[str, float | None] | None = None
    refused: Mapping[str, str] = field(default_factory=dict)  # keys that change what it computes, and to what

    @property
    def read(self) -> set[str]:
        """The config keys that this family reads and Llama does not."""
        pairs = (self.act, self.score_scale, self.attention_cap, self.logit_cap)
        keys = {pair[0] for pair in pairs if pair is not None}
        return keys if self.local_theta is None else {*keys, "rope_local_base_freq", "sliding_window_pattern"}


def layer_types(read: Keys, n_layers: int, default: Callable[[int], bool]) -> list[int]:
    """Return the layers that a config says slide; `default` tells of each layer where the config is silent.

    Raises:
        CheckpointError: Not one type for each layer, or one that is neither full nor sliding.
    """
    told = read.config.get("layer_types")
    if told is None:
        return [layer for layer in range(n_layers) if default(layer)]
    if not isinstance(told, list) or len(told) != n_layers or any(kind not in (FULL, SLIDING) for kind in told):
        raise CheckpointError(
            f"{read.path}: layer_types must hold {FULL!r} or {SLIDING!r} for each of {n_layers} layers, got {told!r}"
        )
    return [layer for layer, kind in enumerate(told) if kind == SLIDING]


def _mistral(read: Keys, n_layers: int) -> list[int]:
    return [] if read.config.get("sliding_window", 4096) is None else list(range(n_layers))


def _qwen(read: Keys, n_layers: int) -> list[int]:
    if not read.flag("use_sliding_window", False):
        return []
    full = read.config.get("max_window_layers", 28)
    return layer_types(read, n_layers, lambda layer: layer >= full)


def _gemma2(read: Keys, n_layers: int) -> list[int]:
    return layer_types(read, n_layers, lambda layer: layer % 2 == 0)


def _gemma3(read: Keys, n_layers: int) -> list[int]:
    every = read.size("sliding_window_pattern", 6)
    return layer_types(read, n_layers, lambda layer: (layer + 1) % every != 0)


_GAIN, _PLUS_ONE = NormConfig(gain=True), NormConfig(gain=True, plus_one=True)
_QWEN = ("sliding_window", "layer_types", "use_sliding_window", "max_window_layers")
_GEMMA = {
    "act": ("hidden_activation", "gelu_pytorch_tanh"),
    "n_key_value_heads": 4,
    "d_head": 256,
    "tied": True,
    "bias": None,
    "norm": NormConfig(gain=True, plus_one=True, place="both"),
    "scaled_embedding": True,
    "score_scale": ("query_pre_attn_scalar", 256.0),
    "window_keys": ("sliding_window", "layer_types"),
    "refused": {"use_bidirectional_attention": "attention to later positions"},
}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", bias=None, mlp_bias=True),
    "mistral": Family("MistralForCausalLM", n_key_value_heads=8, sliding=_mistral, window_keys=("sliding_window",)),
    "qwen2": Family("Qwen2ForCausalLM", n_key_value_heads=32, bias=(True, False), sliding=_qwen, window_keys=_QWEN),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        n_key_value_heads=32,
        d_head=128,
        bias=None,
        qk_norm=QKNormConfig("head", _GAIN),
        sliding=_qwen,
        window_keys=_QWEN,
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        eps=1e-5,
        bias=None,
        norm=NormConfig(gain=True, place="after"),
        qk_norm=QKNormConfig("full", _GAIN),
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        **_GEMMA,
        sliding=_gemma2,
        attention_cap=("attn_logit_softcapping", 50.0),
        logit_cap=("final_logit_softcapping", 30.0),
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        **_GEMMA,
        qk_norm=QKNormConfig("head", _PLUS_ONE),
        sliding=_gemma3,
        theta=1e6,
        local_theta=1e4,
        logit_cap=("final_logit_softcapping", None),
    ),
    "nanochat": Family(
        "NanoChatForCausalLM",
        mlp="plain",
        act=("hidden_act", "relu2"),
        bias=None,
        norm=NormConfig(),
        qk_norm=QKNormConfig("head", NormConfig()),
        embed_norm=NormConfig(),
        reverse=True,
        logit_cap=("final_logit_softcapping", 15.0),
    ),
}
