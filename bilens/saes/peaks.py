"""Where the features of an SAE are most active: short contexts, and names made of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens.models.texts import Texts
from bilens.models.transformer import BilinearTransformer
from bilens.models.windows import Windows, observed
from bilens.tensor.records import Record
from bilens.tensor.tables import Made

from .directions import hook_of
from .scaling import check_scheme

if TYPE_CHECKING:
    from .stored import SAE


@dataclass(frozen=True, eq=False, repr=False)
class Contexts(Record, rows="feature"):
    """Where each feature of an SAE is most active: short token windows, and the activation at each token.

    The window's peak is at `peak`; padding is token -1.
    """

    tokens: Int[Tensor, "feature n width"]
    values: Float[Tensor, "feature n width"]
    density: Float[Tensor, " feature"]  # fraction of the positions at which the feature is active
    peak: int
    model: BilinearTransformer | None = None  # owner of the tokenizer, where it is known

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the model."""
        return self.__dict__ | {"model": None}

    def columns(self) -> dict[str, Any]:
        """Return how often each feature is active, its largest activation, and the window where that is."""
        found = {"density": self.density, "largest": self.values[:, 0, self.peak]}
        if self.model is not None:
            found["context"] = Made(lambda feature: self.snippet(feature, 0, self.model), range(len(self)))
        return found | {"activations": self.values[:, 0]}

    def facts(self) -> dict[str, Any]:
        """Return how many windows there are for each feature."""
        return {"windows": self.tokens.shape[1]}

    def __repr__(self) -> str:
        return f"Contexts({len(self.tokens)} features, {self.tokens.shape[1]} windows of {self.tokens.shape[2]} tokens)"

    def top_tokens(
        self,
        features: int | Sequence[int],
        model: BilinearTransformer,
        n: int = 4,
        weights: Sequence[float] | None = None,
    ) -> list[str]:
        """Return the tokens with the largest share of the activation at the strongest positions of features.

        Args:
            features: A feature, or several.
            model: Owner of the tokenizer.
            n: How many tokens.
            weights: Of the features; equal if `None`, and the sign does not matter.
        """
        return model.labels(self.top_ids(features, n, weights))

    def top_ids(self, features: int | Sequence[int], n: int = 4, weights: Sequence[float] | None = None) -> list[int]:
        """Return the ids of the tokens that `top_tokens` names."""
        counted: dict[int, float] = {}
        for window, weight in self._windows(features, weights):
            counted[window[self.peak]] = counted.get(window[self.peak], 0.0) + weight
        return sorted(counted, key=counted.get, reverse=True)[:n]

    def label(
        self,
        features: int | Sequence[int],
        model: BilinearTransformer,
        n: int = 3,
        weights: Sequence[float] | None = None,
    ) -> str:
        """Name a feature, or several together, by top tokens, and the word before that most contexts share, if any.

        Arguments are those of `top_tokens`.
        """
        windows = list(self._windows(features, weights))
        if not windows:
            return "(never active)"
        words = self.top_tokens(features, model, n, weights)
        if isinstance(features, int) and len(words) == 1:
            # always the same token: show the words before it, which tell such features apart
            return self.snippet(features, 0, model, before=3, after=0)
        cue = self.cue(features, 0.7, weights)
        return (
            " / ".join(map(str.strip, words))
            if cue is None
            else f"{model.label(cue).strip()} … {' / '.join(map(str.strip, words))}"
        )

    def cue(self, features: int | Sequence[int], share: float, weights: Sequence[float] | None = None) -> int | None:
        """Return the token that most of the contexts of features have up to three tokens before their peaks, if any.

        Args:
            features: A feature, or several.
            share: Of the activation at the strongest positions, more than which must have the token before them.
            weights: Of the features; equal if `None`, and the sign does not matter.
        """
        before: dict[int, float] = {}
        windows = list(self._windows(features, weights))
        for window, weight in windows:
            for token in {*window[self.peak - 3 : self.peak]} - {-1}:
                before[token] = before.get(token, 0.0) + weight
        shared, total = max(before, key=before.get, default=None), sum(weight for _, weight in windows)
        return shared if shared is not None and before[shared] > share * total else None

    def _windows(
        self, features: int | Sequence[int], weights: Sequence[float] | None
    ) -> Iterator[tuple[list[int], float]]:
        """Yield the windows of features, and each one's share of its feature's activation times the weight."""
        features = [features] if isinstance(features, int) else features
        for feature, weight in zip(features, [1.0] * len(features) if weights is None else weights, strict=True):
            peaks = self.values[feature, :, self.peak]
            for window, value in zip(self.tokens[feature].tolist(), peaks.tolist(), strict=True):
                if window[self.peak] >= 0:
                    yield window, abs(weight) * value / peaks.sum().item()

    def snippet(self, feature: int, n: int, model: BilinearTransformer, before: int = 8, after: int = 4) -> str:
        """Return one window as text, the peak in square brackets."""
        window = self.tokens[feature, n].tolist()
        left = [t for t in window[max(0, self.peak - before) : self.peak] if t >= 0]
        right = [t for t in window[self.peak + 1 : self.peak + 1 + after] if t >= 0]
        peak = model.label(window[self.peak]).strip() if window[self.peak] >= 0 else ""
        return f"{model.text_of(left)} [{peak}] {model.text_of(right).lstrip()}".strip()


CONTEXT = (10, 5)  # tokens kept before and after a peak
MOST = 10_000  # contexts of a feature


@torch.no_grad()
def contexts(
    model: BilinearTransformer,
    sae: "SAE",
    dataset: Texts,
    hook: str | None = None,
    n: int = 8,
    batch: int = 32,
) -> Contexts:
    """Find the n positions at which each feature is most active, at most one per window of text.

    Args:
        model: The model the SAE belongs to.
        sae: The SAE, on any device and in any dtype.
        dataset: Texts, or windows of token ids.
        hook: Where the SAE goes; by default where it says it was fitted.
        n: Positions per feature.
        batch: Windows at a time.
    """
    hook = hook_of(sae, hook)
    check_scheme(sae, f"the SAE at {hook}")
    found = ContextTally.empty(sae.cfg.d_sae, n)
    for _, some, seen in observed(model, Windows.of(model, dataset), [hook], batch):
        found.add(some, sae.encode(seen[hook].to(sae.W_dec)))
    return replace(found.contexts(), model=model)


@dataclass(eq=False)
class ContextTally:
    """The strongest contexts seen so far, while text is streamed; the order of the windows decides ties alone."""

    tokens: Int[Tensor, "feature n width"]
    values: Float[Tensor, "feature n width"]
    active: Int[Tensor, " feature"]  # positions at which the feature was active
    positions: int = 0

    @classmethod
    def empty(cls, d_sae: int, n: int) -> "ContextTally":
        """Return the tally of no text, to hold n windows per feature."""
        if not 1 <= n <= MOST:
            raise ValueError(f"n must lie between 1 and {MOST} contexts of a feature, got {n}")
        width = sum(CONTEXT) + 1
        tokens, values = torch.full((d_sae, n, width), -1), torch.zeros(d_sae, n, width)
        return cls(tokens, values, torch.zeros(d_sae, dtype=torch.int64))

    def add(self, windows: Windows, z: Float[Tensor, "row seq feature"]) -> Float[Tensor, "row seq feature"]:
        """Take in windows of text and the features' activations there, which are returned as they were counted.

        They are counted on the tally's device, and as zero where a position does not count.
        """
        before, after = CONTEXT
        windows = windows.to(self.tokens.device)
        z = z.to(self.values).masked_fill(~windows.counts[..., None], 0)
        around = torch.arange(-before, after + 1, device=z.device)
        self.active += (z != 0).sum((0, 1))
        self.positions += int(windows.counts.sum())
        row = torch.arange(len(z), device=z.device)[:, None, None]
        feature = torch.arange(z.shape[2], device=z.device)[None, :, None]
        position = z.argmax(1)[..., None] + around  # [row, feature, width]
        inside = (position >= 0) & (position < z.shape[1])
        position = position.clamp(0, z.shape[1] - 1)
        inside &= windows.counts[row, position]
        found = (
            windows.tokens[row, position].masked_fill(~inside, -1),
            z[row, position, feature].masked_fill(~inside, 0),
        )
        tokens, values = (
            torch.cat((old, new.transpose(0, 1)), 1) for old, new in zip((self.tokens, self.values), found, strict=True)
        )
        strongest = values[:, :, before].topk(self.tokens.shape[1], dim=1).indices[..., None]
        strongest = strongest.expand(-1, -1, len(around))
        self.tokens, self.values = tokens.gather(1, strongest), values.gather(1, strongest)
        return z

    def contexts(self) -> Contexts:
        """Return what was found."""
        before = CONTEXT[0]
        tokens = self.tokens.masked_fill(self.values[:, :, before, None] <= 0, -1)
        return Contexts(tokens, self.values, self.active / self.positions, peak=before)
