"""What adding a feature makes the model say next."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bilens.models.texts import Texts, list_of
from bilens.models.windows import Windows
from bilens.tensor.records import Record

from .edits import decoder_direction, push
from .layer import FeatureLayer


@dataclass(frozen=True, repr=False, eq=False)
class Steering(Record, rows="amount", along=("amounts",)):
    """What adding a feature does to the log-odds of one list of next tokens against another, on prompts.

    `log P(positive) - log P(negative)` after the prompt, each the sum over its list, averaged over prompts. Controls
    are random directions of the same norm.
    """

    amounts: tuple[float, ...]  # in units of the feature's activation
    log_odds: Float[Tensor, " amount"]
    controls: Float[Tensor, "direction amount"]
    before: float
    feature: int
    side: str
    n_prompts: int

    def __repr__(self) -> str:
        moved, spread = (self.log_odds[-1] - self.before).item(), (self.controls[:, -1] - self.before).abs().max()
        return (
            f"Steering({self.side} feature {self.feature}, {self.n_prompts} prompts: log-odds {moved:+.3f} at amount "
            f"{self.amounts[-1]:.3g}, random directions up to {spread.item():.3f})"
        )


# eight parameters: what is added, to which prompts, what is read, and against what
@torch.no_grad()
def steering(
    lens: FeatureLayer,
    feature: int,
    prompts: Texts,
    words: tuple[Sequence[str], Sequence[str]],
    amounts: Sequence[float],
    *,
    generator: torch.Generator,
    side: Literal["inp", "out"] = "out",
    n_directions: int = 20,
) -> Steering:
    """Add a feature at every position of prompts but BOS, and see which next tokens become more likely.

    Cost: `len(amounts) · (n_directions + 1) + 1` passes of the prompts from the layer on.

    Args:
        lens: The layer.
        feature: Input or output feature, by `side`.
        prompts: Texts to continue.
        words: Positive and negative next tokens, each word a single token.
        amounts: How much to add, in units of the feature's activation.
        generator: Source of the control directions.
        side: `"inp"` adds to the MLP's input, `"out"` to its output.
        n_directions: Random directions of the same norm.

    Raises:
        ValueError: A word that is not a single token, a prompt longer than the context, nothing to do.
    """
    hook, along = decoder_direction(lens, side, feature)
    if not (len(amounts) and all(map(len, words))):
        raise ValueError(f"amounts and both lists of words must not be empty, got {list(amounts)} and {words}")
    if n_directions < 1:
        raise ValueError(f"n_directions must be at least 1, got {n_directions}")
    windows = _windows(lens, prompts)
    model, last = lens.model, (torch.arange(len(windows)), windows.attend.sum(1) - 1)
    ids = [torch.tensor([model.to_single_token(word) for word in some]) for some in words]
    resid = model(windows.tokens, attention_mask=windows.attend, stop_at_layer=lens.layer)
    random = unit_directions(n_directions, len(along), generator).to(along) * along.norm()

    def log_odds(change: Tensor) -> float:
        with push(model, hook, change, windows.counts):
            span = {"tokens": windows.tokens, "start_at_layer": lens.layer, "stop_at_layer": model.cfg.n_layers}
            after = model(resid, attention_mask=windows.attend, **span)
        logits = model.unembed(model.ln_final(after[last]))
        positive, negative = (logits[:, some].logsumexp(1) for some in ids)
        return (positive - negative).mean().item()

    moved = torch.tensor([log_odds(amount * along) for amount in amounts])
    controls = torch.tensor([[log_odds(amount * one) for amount in amounts] for one in random])
    before = log_odds(torch.zeros_like(along))
    return Steering(tuple(amounts), moved, controls, before, feature, side, len(windows))


def _windows(lens: FeatureLayer, prompts: Texts) -> Windows:
    """Return the prompts, a window each."""
    prompts = list_of(prompts, "prompts")
    windows = Windows.of(lens.model, prompts)
    pieces = torch.bincount(windows.text, minlength=len(prompts))
    if (pieces != 1).any():
        bad, most = int((pieces != 1).nonzero()[0]), lens.model.cfg.n_ctx - 1
        raise ValueError(f"prompts must each have 1 to {most} tokens, got number {bad}: {prompts[bad][:40]!r}")
    return windows


def unit_directions(n: int, d: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
    """Draw directions of norm 1 uniformly."""
    return nn.functional.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)
