r"""Compare kinds, widths and k of SAEs at a few hook points, by what they keep and by what their features tell.

    python scripts/compare_saes.py bilens-mini --data tinystories.train.parquet movie-reviews.train.parquet \
        --rated rated-sentences.train.parquet --opinions opinions.parquet --lexicon sentiment-lexicon.csv \
        --runs runs/compare --out scripts/results/saes.md

Every SAE sees the same activations in the same order, from texts that the model was trained on; FVU, L0, dead features
and the loss recovered (by setting the point to zero) are of texts that it was not. Sensitivity is the largest AUROC
that a single feature reaches for a role (`bilens.saes.ROLES`) on the held-out texts, sentences and opinions that
`make_cards.py` reads; it is the best of all features, so wider SAEs have more tries. Kill it at any time: the same
command resumes.
"""

import argparse
import json
import random
from pathlib import Path

from corpora import is_held_out, read_corpus
from make_cards import add_arguments, roles_of, rows_of
from tqdm import tqdm

import bilens
from bilens import saes

GRID = [(kind, k, x) for kind in ("topk", "batchtopk") for k in (16, 32) for x in (4, 8)]
GRID += [(kind, k, 4) for kind in ("matryoshka", "jumprelu") for k in (16, 32)]
SHOWN = (
    "negator", "negated positive word", "negated negative word", "positive word", "negative word",
    "slot of a good verdict", "name", "inside a quotation", "pronoun she",
)  # fmt: skip


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--hooks", nargs="+", default=["blocks.2.hook_mlp_in", "blocks.2.hook_mlp_out"])
    parser.add_argument("--tokens", type=float, default=5e5, help="activations to train each SAE on")
    parser.add_argument("--batch", type=int, default=1024, help="activations to a step")
    parser.add_argument("--texts", type=int, default=8000, help="texts to draw them from")
    parser.add_argument("--test", type=int, default=60, help="held-out texts of each corpus to evaluate on")
    parser.add_argument("--runs", type=Path, required=True, help="folder for SAEs and progress")
    parser.add_argument("--out", type=Path, help="markdown file")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Fit, evaluate and question the SAEs of the grid, then write the table."""
    args = parse_args()
    model = bilens.load(args.model)
    corpora = [read_corpus(name)[0] for name in args.data]
    train = [text for texts in corpora for text in texts if not is_held_out(text, args.holdout)]
    random.Random(args.seed).shuffle(train)
    test = [text for texts in corpora for text in [t for t in texts if is_held_out(t, args.holdout)][: args.test]]
    rows = []
    for kind, k, x in tqdm(GRID, unit="SAEs"):
        recipe = saes.Recipe(x, k, int(args.tokens), args.batch, 1e-3, args.seed, kind=kind)
        rows += compared(args, model, recipe, train[: args.texts], test)
    text = report(args, rows)
    print(text)
    if args.out:
        args.out.write_text(text)


def compared(
    args: argparse.Namespace, model: bilens.BilinearTransformer, recipe: saes.Recipe, train: list[str], test: list[str]
) -> list[dict]:
    """Return a row for each hook point; those of an earlier run as they were."""
    folder = args.runs / f"{recipe.kind}-k{recipe.k}-x{recipe.expansion}"
    done = folder / "rows.json"
    if done.exists():
        return json.loads(done.read_text())
    fitted = saes.fit(model, train, args.hooks, folder, recipe)
    cards = saes.collect(model, fitted, rows_of(args, spared=False), folder=folder / "cards", roles=roles_of(args))
    rows = []
    for hook, sae in fitted.items():
        found = saes.evaluate(model, sae, test)
        scores = cards[hook].roles
        told = dict(zip(scores.places, scores.auroc.nan_to_num(0.5).max(0).values.tolist(), strict=True))
        rows.append({"hook": hook, "kind": recipe.kind, "k": recipe.k, "x": recipe.expansion, "told": told})
        rows[-1] |= {"fvu": found.fvu, "l0": found.l0, "dead": found.dead, "recovered": found.recovered}
    done.write_text(json.dumps(rows, indent=1))
    return rows


def report(args: argparse.Namespace, rows: list[dict]) -> str:
    """Return the tables, one for each hook point."""
    head = ["kind", "k", "features", "FVU", "L0", "dead", "loss recovered", *SHOWN]
    lines = ["# Kinds, widths and k of SAEs", ""]
    lines.append(f"By `scripts/compare_saes.py`: {args.model}, {args.tokens:.3g} activations each.")
    for hook in args.hooks:
        lines += ["", f"## {hook}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for row in (row for row in rows if row["hook"] == hook):
            numbers = [f"{row['fvu']:.3f}", f"{row['l0']:.1f}", f"{100 * row['dead']:.1f} %", f"{row['recovered']:.3f}"]
            numbers += [f"{row['told'][role]:.3f}" for role in SHOWN]
            lines.append("| " + " | ".join([row["kind"], str(row["k"]), f"{row['x']}x", *numbers]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
