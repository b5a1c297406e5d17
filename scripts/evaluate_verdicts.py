"""Measure how a model judges held-out text by the next token after ` verdict :`, beside a bag of words.

    python scripts/evaluate_verdicts.py runs/mini/model --data rated-sentences.train.parquet \
        --opinions opinions.parquet --reviews movie-reviews.train.parquet --out verdicts.json

The readout is the log-odds of great and good against bad and terrible. The bag of words, ridge on tf-idf of words and
pairs, learns from the training sentences of the same split, and from the labelled reviews too.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from bag_of_words import read_columns, ridge
from corpora import is_held_out
from jaxtyping import Float, Int
from make_verdicts import STARS, film_scores, rated_rows
from rich.console import Console
from rich.table import Table
from torch import Tensor

import bilens
from bilens.models.transformer import BilinearTransformer

PROMPT = " verdict :"
GOOD, BAD = ("great", "good"), ("bad", "terrible")
SIMPLE = ("adjective", "clause", "noun", "verb", "effect", "feeling")  # kinds of opinions with one negator or none
BEHAVIOUR = [
    f"the {subject} {verb} {predicate}"
    for subject, verb in (("movie", "was"), ("food", "is"))
    for word in ("good", "bad", "funny", "boring", "beautiful", "terrible")
    for predicate in (word, f"not {word}", f"not a very {word} one")
] + [
    "i liked it",
    "i did n't like it",
    "i didn't like it",
    "i hated it",
    "i didn't hate it",
    "nobody liked it",
    "nothing about it was good",
    "nothing about it was bad",
    "it was never boring",
    "nobody said it was not good",
    "it was funny but stupid",
    "it was stupid but funny",
    "not only smart but funny",
    "it is better than the first one",
    "it is not as good as the first one",
]

Judge = Callable[[list[str]], np.ndarray]


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="bilens-mini, a folder or a Hub repository")
    parser.add_argument("--data", type=Path, required=True, help="parquet with columns source, sentiment, text")
    parser.add_argument("--opinions", type=Path, help="parquet made by make_opinions.py")
    parser.add_argument("--reviews", type=Path, help="parquet with columns rating, text: the baseline learns from them")
    parser.add_argument("--holdout", type=float, default=0.1, help="fraction of the rated sentences, as for training")
    parser.add_argument("--all", action="store_true", help="judge every rated sentence; the baseline is left out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path, help="json file")
    return parser.parse_args(arguments)


# -- the readout ------------------------------------------------------------------------------------------------------


def verdict_ids(model: BilinearTransformer, words: tuple[str, ...]) -> Int[Tensor, " word"]:
    """Return the ids of the verdicts.

    Raises:
        ValueError: A verdict is not a single token.
    """
    ids = model.token_rows(words)
    if any(len(some) != 1 for some in ids):
        raise ValueError(f"verdicts must be single tokens, {words} are {ids}")
    return torch.tensor([some[0] for some in ids], device=model.W_E.device)


def prompt_ids(model: BilinearTransformer, sentence: str) -> list[int]:
    """Return BOS, the sentence's last tokens that fit, and the prompt."""
    prompt, tokens = model.token_rows([PROMPT, sentence])
    room = model.cfg.n_ctx - 1 - len(prompt)
    return [model.bos_id, *tokens[-room:], *prompt]


@torch.no_grad()
def last_log_probs(model: BilinearTransformer, rows: list[list[int]]) -> Float[Tensor, "row vocab"]:
    """Return the log-probabilities of the token after each row."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=model.W_E.device)
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    mask = torch.arange(longest, device=ids.device) < lengths[:, None]
    logits = model(ids, attention_mask=mask)[torch.arange(len(rows), device=ids.device), lengths - 1]
    return logits.float().log_softmax(-1)


def log_odds(model: BilinearTransformer, sentences: list[str], batch: int = 64) -> np.ndarray:
    """Return the log-odds of great and good against bad and terrible after each sentence and the prompt."""
    good, bad = verdict_ids(model, GOOD), verdict_ids(model, BAD)
    rows = [prompt_ids(model, sentence) for sentence in sentences]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    odds = np.zeros(len(rows))
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        scores = last_log_probs(model, [rows[i] for i in some])
        odds[some] = (scores[:, good].logsumexp(-1) - scores[:, bad].logsumexp(-1)).cpu().numpy()
    return odds


# -- what is measured -------------------------------------------------------------------------------------------------


def flips(rows: list[dict], odds: np.ndarray) -> dict[str, dict[str, float]]:
    """Return by polarity, distance and kind how many minimal pairs flip, turn, and are right on each side.

    A pair turns if its two log-odds differ in sign, whichever comes first: what the negator does. It flips if the plain
    statement's have the word's sign too: what the model knows of the word counts as well.
    """
    sides: dict[str, dict[bool, tuple[dict, float]]] = {}
    for row, value in zip(rows, odds, strict=True):
        if row["kind"] in SIMPLE:
            sides.setdefault(row["pair"], {})[row["negated"]] = (row, float(value))
    groups: dict[str, list[tuple[bool, bool]]] = {}
    for pair in sides.values():
        (row, plain), (turned, negated) = pair[False], pair[True]
        right = (plain * row["polarity"] > 0, negated * row["polarity"] < 0)
        word = "good" if row["polarity"] > 0 else "bad"
        for name in (word, f"{word}, distance {distance_name(turned['distance'])}", f"{word}, {row['kind']}"):
            groups.setdefault(name, []).append(right)
    return {
        name: {
            "pairs": len(found),
            "flips": float(np.mean([a and b for a, b in found])),
            "turns": float(np.mean([a == b for a, b in found])),
            "plain": float(np.mean([a for a, _ in found])),
            "negated": float(np.mean([b for _, b in found])),
        }
        for name, found in sorted(groups.items())
    }


def distance_name(distance: int) -> str:
    """Return the bin of a distance."""
    return str(distance) if distance < 4 else "4 or more"


def opinion_scores(rows: list[dict], odds: np.ndarray) -> dict[str, float]:
    """Return how many statements of each kind have a log-odds of the verdict's sign; okay is left out."""
    groups: dict[str, list[bool]] = {}
    for row, value in zip(rows, odds, strict=True):
        if row["verdict"] != "okay":
            groups.setdefault(row["kind"], []).append((row["verdict"] in GOOD) == (value > 0))
    return {kind: float(np.mean(right)) for kind, right in sorted(groups.items())}


def baselines(rated: list[dict], reviews: Path | None) -> dict[str, Judge]:
    """Return the bags of words: of the training sentences, and of these and the labelled reviews."""
    train = [(row["sentence"], row["rating"]) for row in rated if row["split"] == "train"]
    sets = {"bag of words": train}
    if reviews:
        columns = zip(*read_columns(reviews, "text", "rating"), strict=True)
        sets["bag of words, reviews too"] = train + [
            (text, STARS[mark]) for text, mark in columns if mark and not is_held_out(text, 0.01)
        ]
    return {name: ridge().fit(*zip(*some, strict=True)).predict for name, some in sets.items()}


def read_opinions(path: Path) -> list[dict]:
    """Return the held-out opinions."""
    names = ("statement", "verdict", "polarity", "negated", "distance", "kind", "pair", "split")
    rows = [dict(zip(names, row, strict=True)) for row in zip(*read_columns(path, *names), strict=True)]
    return [row for row in rows if row["split"] == "held-out"]


def evaluate(args: argparse.Namespace) -> dict:
    """Measure everything."""
    model = bilens.load(args.model, device=args.device)

    def judge(sentences: list[str]) -> np.ndarray:
        return log_odds(model, sentences, args.batch)

    rated = rated_rows(args.data, args.holdout)
    unseen = [row for row in rated if args.all or row["split"] == "held-out"]
    sentences = [row["sentence"] for row in unseen]
    judges = {"model": judge} | ({} if args.all else baselines(rated, args.reviews))
    result = {"sentences": {name: film_scores(unseen, scores(sentences)) for name, scores in judges.items()}}
    if args.opinions:
        opinions = read_opinions(args.opinions)
        odds = judge([row["statement"] for row in opinions])
        result |= {"opinions": opinion_scores(opinions, odds), "flips": flips(opinions, odds)}
    result["behaviour"] = dict(zip(BEHAVIOUR, judge(BEHAVIOUR).tolist(), strict=True))
    return result


# -- output -----------------------------------------------------------------------------------------------------------


def table(title: str, rows: dict[str, dict[str, float]]) -> Table:
    """Return a table of named rows with the same columns."""
    columns = list(next(iter(rows.values())))
    shown = Table("", *columns, title=title)
    for name, row in rows.items():
        shown.add_row(name, *(f"{row[c]:.0f}" if c == "pairs" else f"{row[c]:.3f}" for c in columns))
    return shown


def main() -> None:
    """Measure, print, and store."""
    args = parse_args()
    result = evaluate(args)
    console = Console(width=150)
    console.print(table("film sentences, held out", result["sentences"]))
    if args.opinions:
        console.print(table("minimal pairs of unseen words and frames", result["flips"]))
        console.print(table("right sign by kind of opinion", {k: {"right": v} for k, v in result["opinions"].items()}))
    console.print(table("log-odds of good over bad", {k: {"log-odds": v} for k, v in result["behaviour"].items()}))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
