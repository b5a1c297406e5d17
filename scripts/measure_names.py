r"""Measure how often the names of features are right, as rules on text that the cards were not made from.

    python scripts/measure_names.py runs/mini/model --saes runs/mini/saes --data movie-reviews.train.parquet \
        tinystories.train.parquet --rated rated-sentences.train.parquet --opinions opinions.parquet \
        --lexicon sentiment-lexicon.csv --out names.json

Takes 100 random features of all SAEs, less those with fewer than 10 activations in the spared text (`make_cards.py`),
which the next of the draw replace. A label states a rule: "negator ..." that there is a negator at the position;
`"movie" / "film"` one of these tokens; `after "not"` that token before; `the … [movie / film]` one of the tokens in
brackets at the position, or the word before them up to three tokens before it. Told is the share of the feature's
positive activations, each counted once however weak, at which the rule holds (and of those at or above the mean on its
card); chance is the share of all positions of text at which it holds, which is what random positions come to. Balanced
accuracy is `(told + 1 - chance) / 2`, which is one half for a rule that knows nothing. Before: the three tokens with
the largest share of the activation at the eight strongest positions, as the names were until roles were tested, by the
last rule above. After: the labels of the cards.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from make_cards import add_arguments, hooks_of, roles_of, rows_of
from rich.console import Console
from rich.table import Table
from torch import Tensor

import bilens
from bilens import saes
from bilens.models.windows import Windows, observed

LEAST = 10  # activations
ENOUGH = 0.75  # balanced accuracy


class Drawn(NamedTuple):
    """A feature and its two labels."""

    hook: str
    feature: int
    before: saes.Label
    after: saes.Label


class Score(NamedTuple):
    """How often a label is right."""

    told: float
    told_strong: float
    chance: float

    @property
    def accuracy(self) -> float:
        """Balanced accuracy at all activations."""
        return (self.told + 1 - self.chance) / 2

    @property
    def accuracy_strong(self) -> float:
        """Balanced accuracy at activations at or above the mean of the card."""
        return (self.told_strong + 1 - self.chance) / 2


def old_label(cards: saes.FeatureCards, feature: int) -> saes.Label:
    """Return the name by the tokens at the strongest positions alone, as a rule."""
    contexts = cards.contexts
    tokens = contexts.top_ids(feature, 3)
    cue = contexts.cue(feature, 0.7) if len(tokens) > 1 else None
    return saes.Label(contexts.label(feature, cards.model), None, tuple(tokens), () if cue is None else (cue,), 3)


def draw(cards: dict[str, saes.FeatureCards], seed: int) -> list[Drawn]:
    """Return all features in random order that have a context."""
    pairs = [(hook, i) for hook, one in cards.items() for i in range(len(one)) if one.contexts.density[i] > 0]
    random.Random(seed).shuffle(pairs)
    return [Drawn(hook, i, old_label(cards[hook], i), cards[hook].label(i)) for hook, i in pairs]


@torch.no_grad()
def activations(
    model: bilens.BilinearTransformer, fitted: dict[str, saes.SAE], windows: Windows, drawn: Sequence[Drawn]
) -> Float[Tensor, "row seq n"]:
    """Return the activations of the features drawn, zero where there is no text."""
    found = torch.zeros(*windows.tokens.shape, len(drawn))
    for rows, _, seen in observed(model, windows, list(fitted)):
        for hook, sae in fitted.items():
            mine = [i for i, one in enumerate(drawn) if one.hook == hook]
            z = sae.encode(seen[hook].to(sae.W_dec))[:, :, [drawn[i].feature for i in mine]]
            found[rows[:, None, None], torch.arange(z.shape[1])[:, None], torch.tensor(mine, dtype=torch.long)] = z
    return found.masked_fill(~windows.counts[..., None], 0)


def score(
    label: saes.Label,
    z: Float[Tensor, "row seq"],
    mean: float,
    windows: Windows,
    marks: Bool[Tensor, "row seq role"],
) -> Score:
    """Return how often a rule holds where the feature is active, and anywhere."""
    holds = label.holds(windows, marks)
    told, strong = (holds[where].double().mean().item() for where in (z > 0, z >= max(mean, 1e-9)))
    return Score(told, strong, holds[windows.counts].double().mean().item())


def measure(args: argparse.Namespace) -> list[dict]:
    """Return a row for each feature."""
    model, folder = bilens.load(args.model), args.saes or args.model
    cards = {hook: saes.FeatureCards.load(folder, hook, model) for hook in hooks_of(model, args.layers)}
    windows = Windows.of(model, rows_of(args, spared=True))
    drawn = draw(cards, args.seed)[: 2 * args.features]
    fitted = {hook: saes.load(folder, hook) for hook in dict.fromkeys(one.hook for one in drawn)}
    z, marks = activations(model, fitted, windows, drawn), roles_of(args).of(model, windows)
    rows = []
    for i, one in enumerate(drawn):
        if (z[:, :, i] > 0).sum() < LEAST or len(rows) == args.features:
            continue
        mean = cards[one.hook].mean[one.feature].item()
        row = {"hook": one.hook, "feature": one.feature, "activations": int((z[:, :, i] > 0).sum())}
        for when, label in (("before", one.before), ("after", one.after)):
            found = score(label, z[:, :, i], mean, windows, marks)
            row[when] = {"name": label.text, "role": label.role and label.role.name, **found._asdict()}
            row[when] |= {"accuracy": found.accuracy, "accuracy_strong": found.accuracy_strong}
        rows.append(row)
    return rows


def summary(rows: Sequence[dict]) -> Table:
    """Return means, and how many features are told."""
    table = Table(
        "", "balanced accuracy", f"features >= {ENOUGH}", "at strong activations", f"features >= {ENOUGH}", "told",
        "chance", title=f"{len(rows)} random features",
    )  # fmt: skip
    for when in ("before", "after"):
        some = {key: [row[when][key] for row in rows] for key in ("accuracy", "accuracy_strong", "told", "chance")}
        mean = {key: f"{sum(values) / len(values):.3f}" for key, values in some.items()}
        many = {key: str(sum(value >= ENOUGH for value in values)) for key, values in some.items()}
        first, second = ((mean[key], many[key]) for key in ("accuracy", "accuracy_strong"))
        table.add_row(when, *first, *second, mean["told"], mean["chance"])
    return table


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--features", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="json file: every feature's names and numbers")
    args = parser.parse_args()
    rows = measure(args)
    Console(width=140).print(summary(rows))
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
