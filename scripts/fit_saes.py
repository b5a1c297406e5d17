"""Fit SAEs around every MLP of a bilinear language model, and evaluate them on held-out text.

The embedded SAEs were made by

    python scripts/fit_saes.py runs/mini/model --out runs/mini/saes \
        --data tinystories.train.parquet movie-reviews.train.parquet

Corpora as for `train_language.py`, and the same texts are held out. Kill it at any time: the same command resumes.
"""

import argparse
import random
from dataclasses import asdict
from pathlib import Path

import torch
from corpora import is_held_out, read_corpus

import bilens
from bilens import saes
from bilens.saes.tuning import TUNED
from bilens.tensor.keeping import read_record, write_record


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="bilens-mini, a folder or a Hub repository")
    parser.add_argument("--data", nargs="+", required=True, help="files with a column `text`, or Hub datasets")
    parser.add_argument("--out", type=Path, required=True, help="folder: one subfolder per hook point")
    parser.add_argument("--layers", type=int, nargs="+", help="which layers (default: all)")
    parser.add_argument("--expansion", type=int, default=4)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--kind", default="topk", help="topk (the only one that is fine-tuned), or another of Recipe")
    parser.add_argument("--tokens", type=float, default=5e6, help="activations to train on")
    parser.add_argument("--finetune-below", type=float, default=0.92, help="fine-tune SAEs that recover less loss")
    parser.add_argument("--finetune-tokens", type=float, default=2.5e5, help="tokens to fine-tune them on")
    parser.add_argument("--finetune-windows", type=int, default=4, help="windows per step of the fine-tuning")
    parser.add_argument("--finetune-lr", type=float, default=3e-4)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--texts", type=int, default=40_000, help="texts to draw the activations from")
    parser.add_argument("--held-out-texts", type=int, default=120, help="per corpus, for the evaluation")
    parser.add_argument("--holdout", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Fit, evaluate, and fine-tune those SAEs that recover too little of the model's loss."""
    args = parse_args()
    model = bilens.load(args.model)
    layers = args.layers or range(model.cfg.n_layers)
    hooks = [f"blocks.{layer}.{point}" for layer in layers for point in ("hook_mlp_in", "hook_mlp_out")]
    corpora = {Path(name).name: read_corpus(name)[0] for name in args.data}
    kept = {name: [t for t in texts if not is_held_out(t, args.holdout)] for name, texts in corpora.items()}
    held_out = {name: [t for t in texts if is_held_out(t, args.holdout)] for name, texts in corpora.items()}
    shuffled = [text for texts in kept.values() for text in texts]
    random.Random(args.seed).shuffle(shuffled)
    fitted = saes.fit(
        model,
        shuffled[: args.texts],
        hooks,
        args.out,
        saes.Recipe(args.expansion, args.k, int(args.tokens), args.batch, args.lr, args.seed, True, args.kind),
    )
    evaluation_file = args.out / "evaluation.json"
    done = read_record(evaluation_file)
    test = [text for texts in held_out.values() for text in texts[: args.held_out_texts]]
    for hook in fitted:
        if hook not in done:
            done[hook] = finish(model, fitted[hook], args.out / hook, test)
            write_record(evaluation_file, done)
        if args.kind == "topk" and done[hook]["recovered"] < args.finetune_below and "fine-tuned" not in done[hook]:
            sae = saes.load(args.out, hook)
            if TUNED not in sae.cfg.metadata.settings:  # else it was killed while it was evaluated
                tuning = saes.Tuning(int(args.finetune_tokens), args.finetune_windows, args.finetune_lr, autocast=True)
                saes.finetune(model, sae, shuffled[: args.texts // 8], tuning=tuning, checkpoint=args.out / "tuning")
            again = finish(model, sae, args.out / hook, test)
            done[hook] = again | {"fine-tuned": int(args.finetune_tokens), "recovered before": done[hook]["recovered"]}
            write_record(evaluation_file, done)


def finish(model: bilens.BilinearTransformer, sae: saes.SAE, folder: Path, test: list[str]) -> dict:
    """Store an SAE rounded to bfloat16, and evaluate what was stored."""
    saes.save(sae, folder, torch.bfloat16)
    sae = saes.load(folder.parent, folder.name)
    result = saes.evaluate(model, sae, test)
    print(
        f"{folder.name}: FVU {result.fvu:.3f}, L0 {result.l0:.1f}, dead {100 * result.dead:.1f} %, loss recovered "
        f"{result.recovered:.3f} (against mean ablation {result.recovered_mean:.3f})",
        flush=True,
    )
    return asdict(result) | {"recovered": result.recovered, "recovered_mean": result.recovered_mean}


if __name__ == "__main__":
    main()
