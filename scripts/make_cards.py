r"""Make the feature cards of all SAEs of a model, on text that neither was trained on.

The embedded cards were made by

    python scripts/make_cards.py bilens-mini --out runs/mini/cards --label label --unlabelled unlabelled \
        --data movie-reviews.train.parquet tinystories.train.parquet

Each SAE's `cards.safetensors` goes into a subfolder named by its hook point; put it beside the SAE. Corpora as for
`train_language.py`, of which only what that script holds out is read. Kill it at any time: the same command resumes.
"""

import argparse
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from train_language import is_held_out

import bilens
from bilens import saes
from bilens.__main__ import read_rows


def main() -> None:
    """Read the held-out texts once, for all SAEs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="bilens-mini, a folder or a Hub repository")
    parser.add_argument("--saes", help="folder of SAEs (default: the model's own)")
    parser.add_argument("--data", nargs="+", required=True, help="files with a column `text`, or Hub datasets")
    parser.add_argument("--label", help="column of the labels; rows without it have none")
    parser.add_argument("--unlabelled", help="value of that column that stands for no label")
    parser.add_argument("--holdout", type=float, default=0.01, help="fraction held out in training")
    parser.add_argument("--out", type=Path, required=True, help="folder for progress and cards")
    args = parser.parse_args()
    model, folder = bilens.load(args.model), args.saes or args.model
    points = [f"blocks.{i}.{point}" for i in range(model.cfg.n_layers) for point in ("hook_mlp_in", "hook_mlp_out")]
    fitted = {hook: saes.load(folder, hook) for hook in points}
    rows = chain.from_iterable(held_out(name, args) for name in args.data)
    found = saes.collect(model, fitted, rows, folder=args.out, label=args.label)
    print("\n".join(map(repr, found.values())))


def held_out(name: str, args: argparse.Namespace) -> Iterator[dict]:
    """Yield the rows that training left out, with the label None where there is none."""
    for row in read_rows(name):
        if is_held_out(row["text"], args.holdout):
            label = row.get(args.label)
            yield {"text": row["text"], args.label: None if label == args.unlabelled else label}


if __name__ == "__main__":
    main()
