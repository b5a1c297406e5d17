"""The cards of features, as the report shows them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from bilens.circuits.findings import Finding
from bilens.circuits.layer import FeatureLayer
from bilens.saes.cards import Card, FeatureCards

from .parts import Word

_HIGH = 38  # of the tallest bar of a histogram


class Shown(NamedTuple):
    """One card, of a feature of which there may be none stored."""

    side: str
    feature: int
    card: Card | None = None
    bars: Sequence[float] = ()
    contexts: Sequence[Sequence[Word]] = ()


def cards(lens: FeatureLayer, findings: Sequence[Finding], others: Sequence[int]) -> dict[str, object]:
    """Return the cards of every feature that the findings link to, and of some other input features."""
    inputs = dict.fromkeys(others)
    for one in findings:
        inputs |= dict.fromkeys(_legs(lens, one))
    shown = [_shown("out", one.feature, lens.out_cards) for one in findings]
    shown += [_shown("inp", i, lens.inp_cards) for i in sorted(inputs)]
    about = next((some.provenance for some in (lens.inp_cards, lens.out_cards) if some is not None), None)
    return {"provenance": about, "shown": shown}


def _legs(lens: FeatureLayer, one: Finding) -> list[int]:
    """Return every input feature that a finding links to."""
    legs = [*one.pairs.left.tolist(), *one.pairs.right.tolist()]
    legs += [i for found in one.discoveries for group in found.groups for i in group.features.tolist()]
    return [i for i in dict.fromkeys(legs) if i < len(lens.writers)]


def _shown(side: str, feature: int, stored: FeatureCards | None) -> Shown:
    if stored is None:
        return Shown(side, feature)
    card = stored[feature]
    return Shown(side, feature, card, _bars(card.histogram), list(_contexts(stored, feature)))


def _bars(counts: Sequence[int]) -> list[float]:
    """Return the bars of a histogram of activations, the first those below zero; by square root, so rare ones show."""
    most = max(max(counts), 1) ** 0.5
    return [_HIGH * count**0.5 / most for count in counts]


def _contexts(stored: FeatureCards, feature: int, n: int = 6) -> Iterator[list[Word]]:
    contexts, model = stored.contexts, stored.model
    strongest = contexts.values[feature].max().item() or 1.0
    windows = zip(contexts.tokens[feature, :n].tolist(), contexts.values[feature, :n].tolist(), strict=True)
    for tokens, values in windows:
        there = [at for at, token in enumerate(tokens) if token >= 0]
        texts = model.spellings(tokens[at] for at in there)
        words = [
            Word(text, max(values[at], 0) / strongest, at == contexts.peak, f"{values[at]:.2f}")
            for at, text in zip(there, texts, strict=True)
        ]
        if words:
            yield words
