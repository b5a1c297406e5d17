"""Measure what a model of the size of bilin18 takes: 545,902,902 random parameters, two-branch attention, 18 layers.

    python scripts/measure_large.py --folder runs/large --out scripts/results/large.md

Writes the model in its publishers' format, then loads it in a fresh process, whose peak memory is what is reported:
after loading, after a forward pass, after one that keeps what every hook point sees. The plain modules beside it are
the same sums without hook points. Ranking is timed for one head of one layer, and multiplied.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

SIZES = {"vocab_size": 50304, "n_layer": 18, "n_head": 9, "n_embd": 1152, "expansion_factor": 4}
FLAGS = {"bilinear": True, "squared_attn": True, "bilinear_attn": True, "gated": False, "squared_mlp": False}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the model (2 GB, and a copy as large)")
    parser.add_argument("--tokens", type=int, default=256, help="of one sequence")
    parser.add_argument("--features", type=int, default=4608, help="on either side of a ranking")
    parser.add_argument("--step", choices=("all", "write", "measure"), default="all")
    parser.add_argument("--out", type=Path, help="markdown file")
    return parser.parse_args(arguments)


def random_tensors(sizes: dict[str, int], generator: torch.Generator) -> dict[str, Tensor]:
    """Return random weights under the publishers' names, in their dtypes."""
    d, m, vocab = sizes["n_embd"], sizes["expansion_factor"] * sizes["n_embd"], sizes["vocab_size"]

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    tensors = {"transformer.wte.weight": matrix(vocab, d).bfloat16(), "lm_head.weight": matrix(vocab, d)}
    for layer in range(sizes["n_layer"]):
        start = f"transformer.h.{layer}"
        for part in ("q", "k", "v", "proj", "q2", "k2"):
            tensors[f"{start}.attn.c_{part}.weight"] = matrix(d, d)
        tensors |= {f"{start}.mlp.{side}.weight": matrix(m, d) for side in ("Left", "Right")}
        tensors |= {f"{start}.mlp.Down.weight": matrix(d, m), f"{start}.mlp.Down_bias": torch.zeros(d).bfloat16()}
        tensors |= {
            f"{start}.lambdas": torch.tensor([1.0, 0.0]).bfloat16(),
            f"{start}.attn.lamb": torch.tensor(0.5).bfloat16(),
        }
    return tensors


def write(folder: Path) -> None:
    """Write a random model as its publishers do."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(random_tensors(SIZES, torch.Generator().manual_seed(0)), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(SIZES | FLAGS))


def peak() -> float:
    """Return the most memory that this process has held, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def timed(of: Callable[[], object], times: int = 2) -> float:
    """Return the least of a few runs, in seconds of the processor's time, which other programs do not take from."""
    found = []
    for _ in range(times):
        start = time.process_time()
        of()
        found.append(time.process_time() - start)
    return min(found)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Load, run, run with a cache, rank; report seconds, and the peak of memory after each."""
    import bilens
    from bilens.circuits import top_attention

    found = {}
    start = time.process_time()
    model = bilens.load(args.folder)
    found |= {"load s": time.process_time() - start, "load GiB": peak()}
    found["parameters"] = sum(weight.numel() for weight in model.parameters())
    tokens = torch.randint(SIZES["vocab_size"], (1, args.tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = plain_forward(model)
        found["threads"] = torch.get_num_threads()
        difference = (plain(tokens) - model(tokens)).abs().max().item()
        found |= {"plain s": timed(lambda: plain(tokens)), "forward s": timed(lambda: model(tokens))}
        found |= {"difference": difference, "forward GiB": peak()}
        found["cache s"] = timed(lambda: model.run_with_cache(tokens))
        found["cache GiB"] = peak()
        rows = torch.randn(args.features, SIZES["n_embd"], generator=torch.Generator().manual_seed(2))
        rows /= rows.norm(dim=1, keepdim=True)
        found["rank a head s"] = timed(lambda: top_attention(model, 9, 1000, rows, head=0, distance=1), 1)
        found["rank GiB"] = peak()
    return found


def plain_forward(model) -> Callable[[Tensor], Tensor]:
    """Return the same sums in torch's own functions, on the same weights, without hook points."""
    eps, heads, d_head = 2.0**-23, model.cfg.n_heads, model.cfg.d_head

    def norm(x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=eps)

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = norm(x).chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def forward(tokens: Tensor) -> Tensor:
        n = tokens.shape[1]
        where = torch.arange(n)[None]
        cos, sin = (one[0, :, None] for one in model.cfg.attention.rope.angles(where, d_head, torch.float32))
        x0 = x = norm(torch.nn.functional.embedding(tokens, model.W_E))
        first = None
        for block in model.blocks:
            x = block.lambdas[0] * x + block.lambdas[1] * x0
            q, k, q2, k2, v = block.attn.qkv(norm(x)).view(1, n, 5, heads, d_head).unbind(2)
            first = v if first is None else first
            v = (1 - block.attn.lamb) * v + block.attn.lamb * first
            q, k, q2, k2 = (turned(one, cos, sin).transpose(1, 2) for one in (q, k, q2, k2))
            pattern = ((q @ k.mT) * (q2 @ k2.mT) / d_head**2).tril()
            x = x + block.attn.o((pattern @ v.transpose(1, 2)).transpose(1, 2).flatten(2))
            left, right = block.mlp.w(norm(x)).chunk(2, -1)
            x = x + block.mlp.p(left * right)
        return 30 * torch.tanh(norm(x) @ model.W_U / 30)

    return forward


def report(found: dict[str, float], args: argparse.Namespace) -> str:
    """Return the table."""
    rank, heads, layers = found["rank a head s"], SIZES["n_head"], SIZES["n_layer"]
    ratio = {name: found[f"{name} s"] / found["plain s"] for name in ("forward", "cache")}
    times = {name: f"{found[f'{name} s']:.2f}, {one:.2f} ×" for name, one in ratio.items()}
    rows = [
        ("load (a torch archive: its safetensors copy is written the first time)", f"{found['load s']:.1f}", "load"),
        ("forward, plain modules", f"{found['plain s']:.2f}", None),
        ("forward", times["forward"], "forward"),
        ("forward + cache of every hook point", times["cache"], "cache"),
        (f"exact ranking of one head, {args.features:,}² pairs, product of both scores", f"{rank:.1f}", "rank"),
        (f"the {heads} heads of a layer, extrapolated", f"{rank * heads:.0f}", None),
        (f"all {heads * layers} heads, extrapolated", f"{rank * heads * layers:.0f}", None),
    ]
    memory = [f"{found[f'{name} GiB']:.2f}" if name else "" for *_, name in rows]
    table = [f"| {what} | {seconds} | {size} |" for (what, seconds, _), size in zip(rows, memory, strict=True)]
    about = (
        f"{found['parameters']:,} parameters, float32, {args.tokens} tokens, {found['threads']} thread(s) of a shared "
        "machine; scripts/measure_large.py. Seconds are the processor's, memory is the peak of the process so far; × "
        "is beside the plain modules."
    )
    last = f"Logits differ from those of the plain modules by at most {found['difference']:.1e}."
    head = ["# A random model of the size of bilin18", "", about, "", "| what | seconds | GiB |", "|---|---|---|"]
    return "\n".join([*head, *table, "", last, ""])


def main(arguments: list[str] | None = None) -> None:
    """Write the model, measure it in a process of its own, and write the table."""
    args = parse_args(arguments)
    if args.step == "measure":
        print(json.dumps(measure(args)))
        return
    if args.step == "write" or not (args.folder / "pytorch_model.bin").exists():
        write(args.folder)
    if args.step == "all":
        command = [sys.executable, __file__, "--step", "measure", "--folder", str(args.folder)]
        command += ["--tokens", str(args.tokens), "--features", str(args.features)]
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
        text = report(json.loads(run.stdout.splitlines()[-1]), args)
        print(text)
        if args.out is not None:
            args.out.write_text(text)


if __name__ == "__main__":
    main()
