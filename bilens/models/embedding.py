"""The two ends of the residual stream: from tokens, and to logits."""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor, nn

from .hooks import Point
from .layers import NormConfig


@dataclass(frozen=True)
class EmbedConfig:
    """The shape of an `Embed`, and of what follows it."""

    scale: float = 1.0  # factor on the embeddings: sqrt(d_model) in Gemma
    norm: NormConfig | None = None  # of the embeddings, before the first block; None: there is none

    def __post_init__(self):
        if not self.scale > 0:
            raise ValueError(f"scale must be positive, got {self.scale}")


@dataclass(frozen=True)
class UnembedConfig:
    """The shape of an `Unembed`."""

    tied: bool = False  # whether its weight is the embedding's
    cap: float | None = None  # logits become `cap tanh(logits / cap)`; None: they stay
    norm: NormConfig | None = None  # the last norm, where it is another than the blocks'; None: it is as theirs

    def __post_init__(self):
        if self.cap is not None and not self.cap > 0:
            raise ValueError(f"cap must be positive or None, got {self.cap}")


class Embed(nn.Embedding):
    """Token embedding: a row of the weight, times the scale if there is one.

    Args:
        config: Its shape.
        d_vocab: How many tokens.
        d_model: Width of the residual stream.
    """

    def __init__(self, config: EmbedConfig, d_vocab: int, d_model: int):
        super().__init__(d_vocab, d_model)
        self.scale = config.scale

    @property
    def W_E(self) -> Float[Tensor, "vocab d_model"]:
        """Embedding matrix, the scale included: the weight itself if there is none, else a new tensor of its size."""
        return self.weight if self.scale == 1 else self.weight * self.scale

    def forward(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch d_model"]:
        """Return the embeddings of tokens."""
        rows = super().forward(tokens)
        return rows if self.scale == 1 else rows * self.scale


class Unembed(nn.Linear):
    """Map from the residual stream to logits, which it caps if it is to: `cap tanh(W x / cap)`.

    Args:
        config: Its shape.
        d_model: Width of the residual stream.
        d_vocab: How many logits.
        before_cap: Sees the logits before they are capped; the model's own hook point.
    """

    def __init__(self, config: UnembedConfig, d_model: int, d_vocab: int, before_cap: Point | None = None):
        super().__init__(d_model, d_vocab, bias=False)
        self.cap, self.before_cap = config.cap, before_cap

    @property
    def W_U(self) -> Float[Tensor, "d_model vocab"]:
        """Unembedding matrix."""
        return self.weight.T

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... vocab"]:
        """Return logits."""
        logits = super().forward(x)
        if self.cap is None:
            return logits
        return self.cap * (self.before_cap(logits) / self.cap).tanh()
