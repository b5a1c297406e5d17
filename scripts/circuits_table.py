r"""Put what `bilens circuits --json` printed of some layers into one table.

    bilens circuits --layer 3 --tests 4 --features 4 --controls 100 --draws 1024 --text held-out.parquet \
        --json > layer-3.json
    python scripts/circuits_table.py layer-*.json --out scripts/results/circuits.md

The first command is run for each layer.
"""

import argparse
import json
from pathlib import Path
from typing import Any

KS = ("1", "2", "8", "64")
HEAD = (
    "layer", "output feature", "motif", "q", "pair", "positions", "KL", "percentile / at equal strength", "logits",
    "Δ loss", "percentile", *(f"r, k = {k}" for k in KS),
)  # fmt: skip


def row_of(layer: int, finding: dict[str, Any]) -> list[str]:
    """Return the cells of a tested finding: what its pair does, beside matched pairs, and the low-rank curve."""
    test, motif = finding["test"], finding["motifs"][0] if finding["motifs"] else None
    effect, rank, rescaled = (test[name] for name in ("effect", "percentile", "percentile_rescaled"))
    curve = [test["low_rank"][k] for k in KS]
    return [
        str(layer),
        f"{finding['feature']} {finding['label']}",
        *(("-", "-") if motif is None else (motif["motif"], f"{motif['q']:.1e}")),
        f"{test['left']} × {test['right']}",
        str(test["positions"]),
        f"{effect['kl']:.1e}",
        f"{rank['kl']:.0f} / {rescaled['kl']:.0f}",
        f"{rank['logits']:.0f}",
        f"{effect['loss']:+.1e}",
        f"{rank['loss']:.0f}",
        *(f"{one['pearson_active']:.2f} [{one['low']:.2f}, {one['high']:.2f}]" for one in curve),
    ]


def page_of(layers: list[dict[str, Any]]) -> str:
    """Return the page."""
    tested = [(one["layer"], finding) for one in layers for finding in one["findings"] if finding["test"]]
    tested.sort(key=lambda one: one[1]["motifs"][0]["q"] if one[1]["motifs"] else 1.0)
    name = f"{layers[0]['text'].split()[0]} texts"
    counts = ", ".join(f"{one['discoveries']} in layer {one['layer']}" for one in layers)
    rows = [HEAD, ["---"] * len(HEAD), *(row_of(*one) for one in tested)]
    above = sum(finding["test"]["percentile"]["kl"] > 97 for _, finding in tested)
    lower = sum(finding["test"]["percentile"]["loss"] < 3 for _, finding in tested)
    useful = sum(finding["test"]["percentile"]["loss"] > 97 for _, finding in tested)
    lines = [
        f"# Circuits of {layers[0]['model']}: searched, then tested",
        "",
        f"By `scripts/circuits_table.py`, from what `bilens circuits --json` says of each layer on {name} that "
        "neither the model nor its SAEs were trained on. Null model: random readers; q by Benjamini-Hochberg over all "
        f"outputs and motifs of a layer. Motifs found at a false discovery rate of {layers[0]['fdr']:g}: {counts}.",
        "",
        "Shown are the tested output features, each with the pair that its motif names. That removing the pair changes "
        "the feature as predicted is an identity. What is evidence is how much the predictions of the model change, "
        "beside 100 pairs with matched activity: the percentile of KL, also at equal strength, of the largest logit "
        "change, and of the loss. r is the correlation of the feature's activation with what k eigenvectors predict, "
        "where it is active, with 95 % bootstrap intervals over texts.",
        "",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        f"{above} of {len(tested)} pairs change the model's predictions more than 97 % of matched pairs do. Without "
        f"the pair the loss is higher than without 97 % of matched pairs in {useful} of them, lower in {lower}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the files and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="what `bilens circuits --json` printed")
    parser.add_argument("--out", type=Path, help="markdown file")
    args = parser.parse_args()
    text = page_of(sorted((json.loads(file.read_text()) for file in args.files), key=lambda one: one["layer"]))
    print(text) if args.out is None else args.out.write_text(text)


if __name__ == "__main__":
    main()
