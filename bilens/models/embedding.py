"""The two ends of the residual stream: from tokens, and to logits."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class UnembedConfig:
    """The shape of an `Unembed`."""

    tied: bool = False  # whether its weight is the embedding's


class Embed(nn.Embedding):
    """Token embedding."""

    @property
    def W_E(self) -> Float[Tensor, "vocab d_model"]:
        """Embedding matrix."""
        return self.weight


class Unembed(nn.Linear):
    """Map from the residual stream to logits."""

    @property
    def W_U(self) -> Float[Tensor, "d_model vocab"]:
        """Unembedding matrix."""
        return self.weight.T
