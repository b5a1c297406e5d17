"""Train a bilinear image classifier: weights, config and a record of the run in one folder.

    python scripts/train_image.py --data digits --d-hidden 64 --batch 256 --out runs/digits
    python scripts/train_image.py --data mnist --input-noise 0.4 --out runs/mnist

`--data` is "digits" (scikit-learn's, offline), a file .npz, a folder of idx files, or a dataset on the Hub ("mnist",
"fashion-mnist", or a repository). Kill it at any time: the same command goes on from the last epoch and ends in
bit-identical weights. A folder that holds another run is refused.
"""

import argparse
import json
from dataclasses import asdict, fields
from pathlib import Path

import torch

from bilens.images import classifiers
from bilens.images import sets as imagesets
from bilens.images.classifiers import ImageClassifier, Recipe
from bilens.images.sets import ImageSet
from bilens.tensor.keeping import read_record, write_record


def parse_args() -> argparse.Namespace:
    """Read the command line; every field of `Recipe` is an option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, mnist, fashion-mnist, a file, folder or Hub dataset")
    parser.add_argument("--out", type=Path, required=True, help="folder for model, checkpoint and record")
    parser.add_argument("--d-hidden", type=int, default=512)
    parser.add_argument("--n-layers", type=int, default=1)
    parser.add_argument("--bias", action="store_true")
    parser.add_argument("--residual", action="store_true")
    parser.add_argument("--device", default="cpu")
    for field in fields(Recipe):
        kind = {"epochs": int, "batch": int, "seed": int, "noise_unit": str, "precision": str}.get(field.name, float)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    return parser.parse_args()


def run(data: str, train: ImageSet, test: ImageSet, out: Path, recipe: Recipe, **shape: object) -> ImageClassifier:
    """Train a classifier into a folder, or load it if the folder already holds this very run."""
    asked = {"data": data, "recipe": asdict(recipe), "shape": shape}
    record_file = out / "record.json"
    if done := read_record(record_file):
        if {key: done.get(key) for key in asked} != asked:
            raise SystemExit(f"--out {out} holds another run: {done.get('recipe')}, {done.get('shape')}")
        return classifiers.load(out, train.x.device)
    model, history = classifiers.train(train, recipe, checkpoint=out / "checkpoint.safetensors", **shape)
    classifiers.save(model, out)
    record = asked | {
        "test accuracy": classifiers.accuracy(model, test),
        "train accuracy": classifiers.accuracy(model, train),
        "seconds": round(history.seconds, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "loss by epoch": [round(loss, 5) for loss in history.loss],
        "noisy train accuracy by epoch": [round(part, 5) for part in history.accuracy],
    }
    write_record(record_file, record)
    (out / "checkpoint.safetensors").unlink()
    return model


def main() -> None:
    """Train as the command line says and print what came out."""
    args = parse_args()
    recipe = Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)})
    train, test = (imagesets.load(args.data, split).to(args.device) for split in ("train", "test"))
    shape = {"d_hidden": args.d_hidden, "n_layers": args.n_layers, "bias": args.bias, "residual": args.residual}
    run(args.data, train, test, args.out, recipe, **shape)
    record = json.loads((args.out / "record.json").read_text())
    print(f"test accuracy {record['test accuracy']:.4f}, train {record['train accuracy']:.4f}", end=", ")
    print(f"{record['seconds']:.0f} s -> {args.out}")


if __name__ == "__main__":
    main()
