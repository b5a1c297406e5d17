r"""Make the feature cards of all SAEs of a model, on text that neither was trained on.

    python scripts/make_cards.py runs/mini/model --saes runs/mini/saes --out runs/mini/cards \
        --data movie-reviews.train.parquet tinystories.train.parquet --label label --unlabelled unlabelled \
        --rated rated-sentences.train.parquet --opinions opinions.parquet --lexicon sentiment-lexicon.csv

Each SAE's `cards.safetensors` goes into a subfolder named by its hook point; put it beside the SAE. Read are the texts
that `train_language.py` held out, the rated sentences that `make_verdicts.py` did, with their verdicts, and the
opinions that `make_opinions.py` did; a quarter of each but the labelled, by a hash of the text, is spared for
`measure_names.py`. At most 250 of each file are read, labelled ones first. The features are tested for roles: sentiment
words by the lexicon, names by the capitals of the first 4,000 texts of each file. Kill it at any time: the same command
resumes.
"""

import argparse
import csv
import hashlib
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from bag_of_words import read_columns
from corpora import is_held_out
from make_verdicts import rated_rows

import bilens
from bilens import saes
from bilens.__main__ import read_rows

HOLDOUT_RATED = 0.1  # of the rated sentences, as for make_verdicts.py
SPARED = 0.25
NAMES_FROM = 4000  # texts of each file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says which SAEs, and which text."""
    parser.add_argument("model", help="bilens-mini, a folder or a Hub repository")
    parser.add_argument("--saes", help="folder of SAEs (default: the model's own)")
    parser.add_argument("--layers", type=int, nargs="+", help="which layers (default: all)")
    parser.add_argument("--data", nargs="+", required=True, help="files with a column `text`, or Hub datasets")
    parser.add_argument("--rated", type=Path, help="parquet with columns source, sentiment, text")
    parser.add_argument("--opinions", type=Path, help="parquet made by make_opinions.py")
    parser.add_argument(
        "--lexicon", type=Path, help="csv with columns word, mean: which words are positive or negative"
    )
    parser.add_argument("--label", help="column of the labels; rows without it have none")
    parser.add_argument("--unlabelled", help="value of that column that stands for no label")
    parser.add_argument("--holdout", type=float, default=0.01, help="fraction held out in training")
    parser.add_argument("--most", type=int, default=250, help="texts of each source")


def main() -> None:
    """Read the held-out texts once, for all SAEs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder for progress and cards")
    args = parser.parse_args()
    model, folder = bilens.load(args.model), args.saes or args.model
    fitted = {hook: saes.load(folder, hook) for hook in hooks_of(model, args.layers)}
    found = saes.collect(
        model, fitted, rows_of(args, spared=False), folder=args.out, label=args.label, roles=roles_of(args)
    )
    print("\n".join(map(repr, found.values())))


def hooks_of(model: bilens.BilinearTransformer, layers: list[int] | None) -> list[str]:
    """Return the hook points before and after the MLPs of some layers, or of all."""
    layers = range(model.cfg.n_layers) if layers is None else layers
    return [f"blocks.{i}.{point}" for i in layers for point in ("hook_mlp_in", "hook_mlp_out")]


def roles_of(args: argparse.Namespace) -> saes.Roles:
    """Return the roles, with the words that the lexicon rates, and the names in the files."""
    lexicon = {}
    if args.lexicon:
        with args.lexicon.open(encoding="utf-8") as file:
            lexicon = {row["word"].lower(): float(row["mean"]) for row in csv.DictReader(file)}
    texts = (row["text"] for name in args.data for row in islice(read_rows(name), NAMES_FROM))
    return saes.Roles(lexicon, saes.names_of(texts))


def is_spared(row: dict, label: str | None) -> bool:
    """Decide by a hash of the text that is independent of the one that holds it out; labelled rows are not spared."""
    digest = hashlib.sha256(f"spared {row['text']}".encode()).hexdigest()
    return row.get(label) is None and int(digest[:12], 16) < SPARED * 16**12


def rows_of(args: argparse.Namespace, spared: bool) -> Iterator[dict]:
    """Yield the held-out rows of every source, those spared or the others, with the label None where there is none."""
    sources = [held_out(name, args) for name in args.data]
    if args.rated:
        rated = rated_rows(args.rated, HOLDOUT_RATED)
        sources.append([{"text": row["text"], args.label: None} for row in rated if row["split"] == "held-out"])
    if args.opinions:
        opinions = zip(*read_columns(args.opinions, "text", "split"), strict=True)
        sources.append([{"text": text, args.label: None} for text, split in opinions if split == "held-out"])
    chosen = ([row for row in source if is_spared(row, args.label) == spared] for source in sources)
    return chain.from_iterable(some[: args.most] for some in chosen)


def held_out(name: str, args: argparse.Namespace) -> list[dict]:
    """Return the rows that training left out, labelled ones first."""
    rows = []
    for row in read_rows(name):
        if is_held_out(row["text"], args.holdout):
            label = row.get(args.label)
            rows.append({"text": row["text"], args.label: None if label == args.unlabelled else label})
    return sorted(rows, key=lambda row: row[args.label] is None)


if __name__ == "__main__":
    main()
