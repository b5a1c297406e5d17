"""Measure what `bilens circuits` takes at the published sizes, on random weights: time, memory, kills and resumes.

    OMP_NUM_THREADS=1 python scripts/measure_circuits.py --folder runs/circuits --shapes ts-medium fw-medium

Writes a random model and random SAEs of each shape, and texts of random words; runs the command to its end, then once
more with `--resume`, killed (SIGKILL) in the ranking and in the search, and compares the two reports.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

STAGES = ("rank-0-of-1", "null-readers")  # killed when their first state is there


@dataclass(frozen=True)
class Shape:
    """Sizes of a model with SAEs of x features to a dimension at one layer."""

    layers: int
    d: int
    hidden: int
    heads: int
    n_ctx: int
    layer: int
    x: int
    k: int = 30


SHAPES = {
    "tiny": Shape(2, 64, 128, 2, 64, 1, 4, 8),
    "ts-medium": Shape(6, 512, 2048, 8, 256, 4, 4),
    "fw-medium": Shape(16, 1024, 4096, 16, 512, 12, 8),
}


def make(shape: Shape, folder: Path, n_texts: int) -> None:
    """Write the model, its SAEs and the texts."""
    from sae_lens import TopKSAE, TopKSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    import bilens
    from bilens import AttentionConfig, BilinearConfig, BilinearTransformer, MLPConfig, NormConfig, UnembedConfig, saes

    generator = torch.Generator().manual_seed(0)
    mini = bilens.load("bilens-mini")
    config = BilinearConfig(
        n_layers=shape.layers, d_model=shape.d, n_ctx=shape.n_ctx, d_vocab=mini.cfg.d_vocab,
        attention=AttentionConfig.of_width(shape.d, shape.heads), mlp=MLPConfig(shape.hidden),
        norm=NormConfig(1e-8), unembed=UnembedConfig(),
    )  # fmt: skip
    model = BilinearTransformer(config, mini.tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    bilens.save(model, folder / "model")
    for place in ("hook_mlp_in", "hook_mlp_out"):
        hook, n = f"blocks.{shape.layer}.{place}", shape.x * shape.d
        sae = TopKSAE(TopKSAEConfig(d_in=shape.d, d_sae=n, k=shape.k, metadata=SAEMetadata(hook_name=hook)))
        with torch.no_grad():
            sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(n, shape.d, generator=generator), dim=1))
            sae.W_enc.copy_(sae.W_dec.T)
        saes.save(sae, folder / "saes" / hook)
    ids = torch.randint(10, mini.cfg.d_vocab, (n_texts, 190), generator=generator)
    lines = [json.dumps({"text": text}) for text in mini.tokenizer.batch_decode(ids)]
    (folder / "texts.jsonl").write_text("\n".join(lines))


def run(folder: Path, shape: Shape, name: str, *options: str, until: Path | None = None) -> dict[str, float]:
    """Run the command to its end, or until a state is there; return processor's and wall seconds, and peak GiB."""
    command = [sys.executable, "-m", "bilens", "circuits", "model", "--saes", "saes", "--layer", str(shape.layer)]
    command += ["--text", "texts.jsonl", "--tests", "2", "--out", f"{name}.html", *options]
    began = time.monotonic()
    with (folder / f"{name}.log").open("a") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
        while until is not None and not until.exists() and process.poll() is None:
            time.sleep(0.05)
        if until is not None and process.returncode is None:
            process.send_signal(signal.SIGKILL)
        _, status, used = os.wait4(process.pid, 0) if process.returncode is None else (0, process.returncode, None)
    if until is None and status:
        raise RuntimeError(f"{' '.join(command)} failed; its output is in {folder / name}.log")
    if used is None:
        raise RuntimeError(f"it ended before {until} was there; its output is in {folder / name}.log")
    spent = {"cpu": used.ru_utime + used.ru_stime, "wall": time.monotonic() - began, "GiB": used.ru_maxrss / 2**20}
    return spent | {"killed": float(os.WIFSIGNALED(status))}


def measure(name: str, folder: Path, options: list[str]) -> str:
    """Return the rows of one shape."""
    shape = SHAPES[name]
    whole = run(folder, shape, "whole", *options)
    state = folder / "state"
    kept = [*options, "--resume", "state"]
    for stage in STAGES:
        run(folder, shape, "resumed", *kept, until=state / f"layer-{shape.layer}" / f"{stage}.safetensors")
    run(folder, shape, "resumed", *kept)
    same = (folder / "whole.html").read_bytes() == (folder / "resumed.html").read_bytes()
    told = f"{whole['cpu']:.0f} | {whole['wall']:.0f} | {whole['GiB']:.2f} | {'the same' if same else 'ANOTHER'}"
    return f"| {name} | {shape.d} | {shape.x * shape.d} | {' '.join(options) or '-'} | {told} |"


def main(arguments: list[str] | None = None) -> None:
    """Make what is not there yet, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for models, SAEs, reports and states (1.5 GB)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["ts-medium", "fw-medium"])
    parser.add_argument("--texts", type=int, default=100)
    parser.add_argument("--out", type=Path, help="markdown file")
    args, options = parser.parse_known_args(arguments)
    rows = []
    for name in args.shapes:
        folder = args.folder / name
        if not (folder / "texts.jsonl").exists():
            make(SHAPES[name], folder, args.texts)
        rows.append(measure(name, folder, options))
    about = (
        f"Random weights, {args.texts} texts of 190 tokens, {torch.get_num_threads()} thread(s), {platform.machine()}."
    )
    head = ("shape", "d_model", "features a side", "options", "CPU s", "wall s", "peak GiB", "report after two kills")
    text = "\n".join([about, "", f"| {' | '.join(head)} |", "|" + "---|" * len(head), *rows, ""])
    print(text)
    if args.out is not None:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
