"""Rank the strongest pairwise interactions of a whole layer between two SAEs, exactly; write the table and a manifest.

    python scripts/rank_layer.py bilens-mini --layer 2 --out runs/layer-2
    python scripts/rank_layer.py tdooms/fw-medium --layer 4 --scope tdooms/fw-medium-scope \
        --inp-sae 4-mlp-in-x8-k30 --out-sae 4-mlp-out-x8-k30 --out runs/fw-4
    torchrun --nproc-per-node 2 scripts/rank_layer.py bilens-mini --layer 2 --out runs/layer-2

Kill it at any time: the same command resumes, and ends in the same table. `manifest.json` holds the hashes of the
weights, the SAEs and the table, the arguments and the versions; a folder that was begun with others is refused.
"""

import argparse
import csv
import hashlib
import os
import platform
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
import torch.distributed as dist

import bilens
from bilens import saes
from bilens.models.files import fingerprint
from bilens.tensor.keeping import atomic_write, read_record, write_record

ARGUMENTS = ("layer", "k", "per_output", "exclude_self", "format")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="bilens-mini, a folder or a Hub repository")
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for table, manifest and checkpoints")
    parser.add_argument("--saes", default="bilens-mini", help="bilens-mini, or a folder that fit_saes.py wrote")
    parser.add_argument("--scope", help="a Hub repository or folder of published -scope SAEs, instead of --saes")
    parser.add_argument("--inp-sae", help="with --scope: name of the SAE at the MLP's input")
    parser.add_argument("--out-sae", help="with --scope: name of the SAE at the MLP's output")
    parser.add_argument("-k", type=int, default=1000, help="how many pairs")
    parser.add_argument("--per-output", type=int, help="also the strongest so many of each output feature")
    parser.add_argument("--exclude-self", action="store_true", help="leave out a feature with itself")
    parser.add_argument("--memory", type=float, default=1.0, help="GiB to use beyond the weights")
    parser.add_argument("--format", choices=("parquet", "csv"), default="parquet")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if (args.scope is None) != (args.inp_sae is None) or (args.scope is None) != (args.out_sae is None):
        parser.error("--scope, --inp-sae and --out-sae go together")
    return args


def own_device(name: str) -> str:
    """Return this process's own of the devices of a machine that its processes share."""
    if name == "cpu" or ":" in name:
        return name
    index = int(os.environ["LOCAL_RANK"])
    torch.accelerator.set_device_index(index)
    return f"{name}:{index}"


def load(args: argparse.Namespace) -> tuple:
    """Load the model and the SAEs before and after one of its MLPs."""
    model = bilens.load(args.model, device=args.device)
    if not 0 <= args.layer < model.cfg.n_layers:
        raise SystemExit(f"--layer must lie between 0 and {model.cfg.n_layers - 1}, got {args.layer}")
    hooks = [f"blocks.{args.layer}.hook_mlp_in", f"blocks.{args.layer}.hook_mlp_out"]
    if args.scope is None:
        pair = [saes.load(args.saes, hook) for hook in hooks]
    else:
        pair = [saes.load_scope(args.scope, name) for name in (args.inp_sae, args.out_sae)]
        for sae, hook, flag in zip(pair, hooks, ("--inp-sae", "--out-sae"), strict=True):
            if sae.cfg.metadata.hook_name != hook:
                raise SystemExit(f"{flag} must be an SAE of {hook}, got one of {sae.cfg.metadata.hook_name}")
    return model, *(sae.to(args.device) for sae in pair)


def make_manifest(args: argparse.Namespace, model, inp, out) -> dict:
    """Return what the table depends on."""
    return {
        "model": {"name": args.model, "sha256": fingerprint(model)},
        "input SAE": {"hook": inp.cfg.metadata.hook_name, "sha256": fingerprint(inp)},
        "output SAE": {"hook": out.cfg.metadata.hook_name, "sha256": fingerprint(out)},
        "arguments": {name: getattr(args, name) for name in ARGUMENTS},
        "versions": {"bilens": bilens.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def differences(one: dict, other: dict) -> list[str]:
    """Name the entries in which two manifests differ."""
    return [
        f"{part}.{name}: {one.get(part, {}).get(name)} there, {value} now"
        for part, entries in other.items()
        for name, value in entries.items()
        if one.get(part, {}).get(name) != value
    ]


def check_folder(folder: Path, manifest: dict) -> None:
    """Refuse a folder that was begun with other weights, SAEs, arguments or versions."""
    path = folder / "manifest.json"
    if path.exists() and (found := differences(read_record(path), manifest)):
        raise SystemExit(
            f"{folder} was begun with something else; remove it or name another folder:\n  " + "\n  ".join(found)
        )


def write_table(path: Path, found: bilens.Interactions) -> str:
    """Write a ranking as parquet or csv; return its hash."""
    columns = found.to_dict()
    with atomic_write(path) as partial:
        if path.suffix == ".csv":
            with partial.open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(columns)
                writer.writerows(zip(*columns.values(), strict=True))
        else:
            pyarrow.parquet.write_table(pyarrow.table(columns), partial)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    """Rank, and write what was found."""
    args = parse_args()
    shared = "WORLD_SIZE" in os.environ
    if shared:
        args.device = own_device(args.device)
        dist.init_process_group()
    group = dist.group.WORLD if shared else None
    first = not shared or dist.get_rank() == 0
    model, inp, out = load(args)
    manifest = make_manifest(args, model, inp, out)
    check_folder(args.out, manifest)
    if shared:
        dist.barrier()  # every rank has looked before one writes
    if first:
        args.out.mkdir(parents=True, exist_ok=True)
        write_record(args.out / "manifest.json", manifest)
    found = bilens.top_interactions(
        model.blocks[args.layer].mlp.tensor().detach(), args.k, out=saes.readers(out), inp=saes.writers(inp),
        per_output=args.per_output, exclude_self=args.exclude_self, memory=int(args.memory * 2**30), progress=first,
        group=group, checkpoint=args.out / "state",
    )  # fmt: skip
    if first:
        tables = {"pairs": found} | ({} if found.per_output is None else {"per-output": found.per_output})
        hashes = {name: write_table(args.out / f"{name}.{args.format}", table) for name, table in tables.items()}
        certificate = {name: str(value) for name, value in vars(found.certificate).items()}
        write_record(args.out / "manifest.json", {**manifest, "tables": hashes, "certificate": certificate})
        shutil.rmtree(args.out / "state")
        print(f"{found}\n{found.certificate}\n{', '.join(f'{n}.{args.format}' for n in tables)} in {args.out}")
    if shared:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
