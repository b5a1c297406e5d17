"""The next token, chosen by its logits."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the arguments of `generate`, and their meaning, are transformer_lens'."""

    do_sample: bool = True
    top_k: int | None = None
    top_p: float | None = None
    temperature: int | float = 1.0
    freq_penalty: int | float = 0.0
    generator: torch.Generator | None = None  # torch's default one if `None`

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 (greedy) or positive, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 or None, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, or None, got {self.top_p}")
        if not 0 <= self.freq_penalty < math.inf:
            raise ValueError(f"freq_penalty must be finite and not be negative, got {self.freq_penalty}")

    def choose(
        self, logits: Float[Tensor, "batch vocab"], tokens: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch all"]
    ) -> Int[Tensor, " batch"]:
        """Return a token for each text.

        Args:
            logits: Of the next token.
            tokens: The text so far, where it is known.
            mask: False at padding; of the embeddings that come before the tokens too.
        """
        if not self.do_sample or self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.float() / float(self.temperature)
        if self.freq_penalty:
            there = mask[:, mask.shape[1] - tokens.shape[1] :].to(logits)
            logits = logits - self.freq_penalty * torch.zeros_like(logits).scatter_add_(1, tokens, there)
        return torch.multinomial(self._kept(logits).softmax(-1), 1, generator=self.generator)[:, 0]

    def _kept(self, logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, "batch vocab"]:
        """Return the logits of the tokens to sample among, minus infinity for the others."""
        if self.top_k is not None:
            kept = logits.topk(min(self.top_k, logits.shape[-1]))
            return torch.full_like(logits, -torch.inf).scatter(-1, kept.indices, kept.values)
        if self.top_p is not None:
            best = logits.sort(dim=-1, descending=True)
            before = best.values.softmax(-1).cumsum(-1).roll(1, -1)
            before[..., 0] = 0  # the first is always kept
            values = best.values.masked_fill(before > self.top_p, -torch.inf)
            return torch.full_like(logits, -torch.inf).scatter(-1, best.indices, values)
        return logits
