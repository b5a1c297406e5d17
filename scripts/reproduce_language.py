"""Set the published numbers on bilinear against gated language models beside numbers measured here.

    python scripts/reproduce_language.py --out runs/language \
        --data tinystories.train.parquet movie-reviews.train.parquet --tokenizer runs/mini/tokenizer.json \
        --converted swiglu runs/annealed runs/control

trains, for each of three seeds, small models that differ in their MLP alone (2410.08417, appendix I): at equal
tokens, and at equal time by the step times measured in turn within one process. It converts the gated ones by
annealing with 30 % of their tokens, beside a control (appendix J), measures what annealing costs against plain
finetuning, and prints one table of (claimed, measured). `--converted` adds larger conversions: the folders of
`scripts/anneal.py` runs, annealed and control. About half an hour on one core; what is in `--out` is not done again.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median, stdev
from typing import NamedTuple

import torch
import train_language
from accelerate import Accelerator
from accelerate.utils import set_seed
from anneal import leave, walker
from corpora import Ends, Windows, encode, held_out_rows, read_corpora
from scipy.stats import t as student
from tokenizers import Tokenizer
from train_language import make_optimizers, new_model, optimise, training_step

import bilens
from bilens.models import annealing
from bilens.tensor.keeping import read_record, write_record

KINDS = ("bilinear", "reglu", "swiglu")
NAMES = {"bilinear": "bilinear", "reglu": "ReGLU", "swiglu": "SwiGLU"}
CLAIMED = {"tokens": (1.337, 1.332, 1.321), "time": (1.337, 1.337, 1.336)}  # 2410.08417, table 6
SHARE = 0.3  # of the training tokens, for a conversion


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="files with a column `text`, or Hub datasets")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and results")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer.json with [BOS] and [EOS]")
    parser.add_argument("--tokens", type=float, default=1e6, help="for each model")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--eval-texts", type=int, default=200, help="held-out texts of each corpus")
    parser.add_argument("--size", default=SIZE, help=f"further arguments of train_language.py (default: {SIZE})")
    parser.add_argument("--converted", nargs=3, action="append", default=[], metavar=("KIND", "ANNEALED", "CONTROL"))
    parser.add_argument("--note", type=Path, help="a file with what else there is to say, to end the table with")
    parser.add_argument("--write", type=Path, help="write the table to this file too")
    args = parser.parse_args(arguments)
    if args.seeds < 2:
        parser.error(f"--seeds must be at least 2 for an interval, got {args.seeds}")
    return args


SIZE = "--layers 2 --d-model 128 --d-hidden 512 --heads 4 --context 128 --batch 32"


class Interval(NamedTuple):
    """A mean over seeds and its 95 % interval by Student's t."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Interval":
        """Take the mean of independent values."""
        half = student.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values))
        return cls(mean(values), mean(values) - half, mean(values) + half)

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


# -- runs -------------------------------------------------------------------------------------------------------------


class Bench:
    """Corpora, tokenizer and results that are there already: everything that the runs have in common."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.training = self.arguments("bilinear", args.tokens, args.out)
        self.accelerator = Accelerator(mixed_precision=self.training.precision)
        args.out.mkdir(parents=True, exist_ok=True)
        self.file = args.out / "results.json"
        self.results = read_record(self.file)
        self.tokenizer = Tokenizer.from_file(str(args.tokenizer))
        corpora = read_corpora(args.data, self.training.holdout)
        self.digests = {name: corpus.digest for name, corpus in corpora.items()}
        self.documents = encode(self.tokenizer, [text for some in corpora.values() for text in some.kept], Ends())
        some = [text for corpus in corpora.values() for text in corpus.held_out[: args.eval_texts]]
        self.held_out = {"loss": held_out_rows(encode(self.tokenizer, some, Ends()), self.training.context, Ends())}

    def arguments(self, kind: str, tokens: float, out: Path, seed: int = 0) -> argparse.Namespace:
        """Return what `train_language.py` would have as arguments."""
        words = f"--data - --micro-batch 32 --eval-every 1000000 --mlp {kind} --tokens {tokens} --seed {seed}"
        return train_language.parse_args([*words.split(), "--out", str(out), *self.args.size.split()])

    def once(self, key: str, measure: Callable[[], object]) -> object:
        """Return a result, measured if it is not there yet."""
        if key not in self.results:
            self.results[key] = measure()
            write_record(self.file, self.results)
        return self.results[key]

    def train(self, kind: str, seed: int, tokens: float) -> float:
        """Train a model, store it, and return its held-out loss."""
        name = f"{kind}-{seed}-{tokens:.0f}"
        args = self.arguments(kind, tokens, self.args.out / name, seed)
        set_seed(seed)
        model = new_model(args, self.tokenizer)
        loss = self._optimise(args, model, Windows(self.documents, args.context, seed, Ends()))
        bilens.save(model, args.out / "model")
        return loss

    def convert(self, kind: str, seed: int, control: bool) -> float:
        """Finetune a stored gated model while its gates become linear, or as it is; return its held-out loss."""
        source = self.args.out / f"{kind}-{seed}-{self.args.tokens:.0f}" / "model"
        out = self.args.out / f"{kind}-{seed}-{'control' if control else 'annealed'}"
        args = self.arguments(kind, SHARE * self.args.tokens, out, seed)
        gated = bilens.load(source).train()
        model = gated if control else annealing.prepare(gated)
        walk = leave if control else walker(model, "linear", 0.35)
        loss = self._optimise(args, model, Windows(self.documents, args.context, seed + 1000, Ends()), walk)
        if not control:
            bilens.save(annealing.fold(model), out / "model")
        return loss

    def _optimise(
        self,
        args: argparse.Namespace,
        model: bilens.BilinearTransformer,
        windows: Windows,
        walk: Callable[[int, int], dict[str, str]] = lambda step, steps: {},
    ) -> float:
        args.out.mkdir(parents=True, exist_ok=True)
        settings = {name: str(value) for name, value in vars(args).items()} | self.digests
        rows = optimise(args, self.accelerator, model, windows, self.held_out, settings, walk)
        return float(rows[-1]["held-out loss"])


# -- time and memory --------------------------------------------------------------------------------------------------


def seconds_in_turn(
    accelerator: Accelerator, args: argparse.Namespace, models: dict[str, torch.nn.Module], rounds: int
) -> dict[str, float]:
    """Return the median seconds of a training step of each model, taken in turn: of the processor, if it is one."""
    on_cpu = accelerator.device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    vocab = next(iter(models.values())).cfg.d_vocab
    windows = Windows([torch.randint(3, vocab, (100_000,))], args.context, 0, Ends())
    times: dict[str, list[float]] = {name: [] for name in models}
    optimizers = {name: make_optimizers(model, args) for name, model in models.items()}
    for step in range(rounds + 2):
        for name, model in models.items():
            start = clock()
            float(training_step(args, accelerator, model, optimizers[name], windows, step, rounds + 2))  # waits for it
            times[name].append(clock() - start)
    return {name: median(some[2:]) for name, some in times.items()}


def step_times(bench: Bench, rounds: int = 40) -> dict[str, float]:
    """Return the seconds of a training step of each kind of MLP, at the size of the comparison."""
    device = bench.accelerator.device
    models = {kind: new_model(bench.arguments(kind, 1, bench.args.out), bench.tokenizer).to(device) for kind in KINDS}
    return seconds_in_turn(bench.accelerator, bench.training, models, rounds)


MINI = "--data - --out - --batch 16 --micro-batch 16"  # the defaults of train_language.py: bilens-mini's size


def mini(kind: str, tokenizer: Tokenizer) -> tuple[argparse.Namespace, dict[str, bilens.BilinearTransformer]]:
    """Return a gated model of bilens-mini's size, and the same one half-way to a bilinear one."""
    args = train_language.parse_args([*MINI.split(), "--mlp", kind])
    plain = new_model(args, tokenizer)
    soft = annealing.prepare(plain)
    annealing.set_alpha(soft, 0.5)
    return args, {"plain": plain, "annealed": soft}


def cost(bench: Bench, kind: str) -> dict[str, dict[str, float]]:
    """Return seconds and peak memory (MiB, each in a process of its own) of plain and annealed finetuning."""
    args, models = mini(kind, bench.tokenizer)
    models = {name: model.to(bench.accelerator.device) for name, model in models.items()}
    seconds = seconds_in_turn(bench.accelerator, args, models, 12)
    peaks = {}
    for name in models:
        command = [sys.executable, __file__, "--peak", kind, name, str(bench.args.tokenizer)]
        runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(3)]
        peaks[name] = median(map(float, runs))
    return {"seconds": seconds, "MiB": peaks}


def print_peak(kind: str, name: str, tokenizer: str) -> None:
    """Print the peak memory of a process that takes three training steps, in MiB."""
    accelerator = Accelerator(mixed_precision="bf16")
    args, models = mini(kind, Tokenizer.from_file(tokenizer))
    model = models.pop(name).to(accelerator.device)
    models.clear()
    seconds_in_turn(accelerator, args, {name: model}, 1)
    if accelerator.device.type == "cpu":
        status = Path("/proc/self/status").read_text().splitlines()
        print(next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM")))
    else:
        print(torch.accelerator.max_memory_allocated() / 2**20)


# -- the table --------------------------------------------------------------------------------------------------------


def comparison(bench: Bench) -> list[str]:
    """Compare the kinds of MLP at equal tokens and at equal time (appendix I, table 6)."""
    args, seeds = bench.args, range(bench.args.seeds)
    seconds = bench.once("step times", lambda: step_times(bench))
    steps = math.ceil(args.tokens / (bench.training.batch * bench.training.context))
    lines = [
        "## Bilinear against gated MLPs (appendix I, table 6)",
        "",
        f"Models of `{args.size}`, {args.tokens:,.0f} tokens, held-out loss in nats per token over "
        f"{len(bench.held_out['loss'][0])} texts: mean over {args.seeds} seeds, 95 % interval. Differences are paired: "
        "the same seed, so the same initial weights and batches. Equal time: as many steps as the bilinear model's "
        "time allows, by the seconds of a step measured in turn within one process.",
        "",
        "| | " + " | ".join(NAMES[kind] for kind in KINDS) + " |",
        "|---|---|---|---|",
    ]
    for equal in ("tokens", "time"):
        number = {
            kind: steps if equal == "tokens" else round(steps * seconds["bilinear"] / seconds[kind]) for kind in KINDS
        }
        tokens = {kind: n * bench.training.batch * bench.training.context for kind, n in number.items()}
        tokens = {kind: args.tokens if n == steps else tokens[kind] for kind, n in number.items()}
        losses = {
            kind: [
                bench.once(f"{kind} {seed} {number[kind]}", lambda k=kind, s=seed, t=tokens[kind]: bench.train(k, s, t))
                for seed in seeds
            ]
            for kind in KINDS
        }
        gaps = {kind: [a - b for a, b in zip(losses[kind], losses["bilinear"], strict=True)] for kind in KINDS}
        lines += [
            f"| claimed, equal {equal} | " + " | ".join(f"{value:.3f}" for value in CLAIMED[equal]) + " |",
            f"| measured, equal {equal} | " + " | ".join(str(Interval.of(losses[kind])) for kind in KINDS) + " |",
            f"| difference claimed, equal {equal} | 0 | "
            + " | ".join(f"{value - CLAIMED[equal][0]:+.3f}" for value in CLAIMED[equal][1:])
            + " |",
            f"| difference measured, equal {equal} | 0 | "
            + " | ".join(str(Interval.of(gaps[kind])) for kind in KINDS[1:])
            + " |",
            f"| steps, equal {equal} | " + " | ".join(str(number[kind]) for kind in KINDS) + " |",
        ]
    return [*lines, "| ms per step | " + " | ".join(f"{1000 * seconds[kind]:.1f}" for kind in KINDS) + " |"]


def conversion(bench: Bench) -> list[str]:
    """Convert gated models, beside a control with fixed gates (appendix J, figure 25)."""
    args = bench.args
    lines = [
        "## Gated models become bilinear (appendix J, figure 25)",
        "",
        "Gates annealed linearly over the first 35 % of the finetuning; the control has the same tokens and rates, "
        f"its gates as they were. Small models: those above, {100 * SHARE:.0f} % of their training tokens. Published: "
        "TinyLlama-1.1B, 400M tokens.",
        "",
        "| | gated control | annealed, bilinear | gap |",
        "|---|---|---|---|",
        "| claimed, SwiGLU, TinyLlama-1.1B | 2.168 | 2.217 | about 0.05 |",
    ]
    for kind in ("swiglu", "reglu"):
        control, annealed = (
            [
                bench.once(f"{name} {kind} {seed}", lambda k=kind, s=seed, c=name == "control": bench.convert(k, s, c))
                for seed in range(args.seeds)
            ]
            for name in ("control", "annealed")
        )
        gap = [a - b for a, b in zip(annealed, control, strict=True)]
        lines.append(
            f"| measured, {NAMES[kind]}, small, {args.seeds} seeds | {Interval.of(control)} | {Interval.of(annealed)} "
            f"| {Interval.of(gap)} |"
        )
    for kind, *folders in args.converted:
        annealed, control = (json.loads((Path(f) / "model" / "training.json").read_text()) for f in folders)
        for corpus, loss in annealed["held-out loss"].items():
            held = control["held-out loss"][corpus]
            lines.append(
                f"| measured, {NAMES[kind]}, {annealed['settings']['tokens']:,.0f} tokens, {corpus.split('.')[0]} "
                f"| {held:.3f} | {loss:.3f} | {loss - held:+.3f} |"
            )
    for kind, *folders in args.converted:
        lines += ["", *_curves(kind, *folders)]
    return lines


def _curves(kind: str, annealed: str, control: str) -> list[str]:
    """Set the two curves of a larger conversion side by side."""
    curves = [json.loads((Path(f) / "model" / "training.json").read_text())["curve"] for f in (annealed, control)]
    columns = [name for name in curves[0][0] if name == "train" or name.startswith("held-out")]
    lines = [
        f"{NAMES[kind]}: `{Path(annealed).name}` / `{Path(control).name}`",
        "",
        "| step | tokens | beta | " + " | ".join(columns) + " |",
        "|---" * (3 + len(columns)) + "|",
    ]
    for a, b in zip(*curves, strict=True):
        values = " | ".join(f"{a[name]} / {b[name]}" for name in columns)
        lines.append(f"| {a['step']} | {int(a['tokens']):,} | {a['beta']} | {values} |")
    return lines


def costs(bench: Bench) -> list[str]:
    """Compare annealing with plain finetuning in speed and memory."""
    lines = [
        "## What annealing costs",
        "",
        "A finetuning step of a model of bilens-mini's size, 16 windows of 256 tokens, half-way to bilinear against as "
        "it is: median seconds of steps taken in turn within one process, and peak memory of a process, median of 3.",
        "",
        "| | plain | annealed | ratio |",
        "|---|---|---|---|",
    ]
    for kind in ("swiglu", "reglu"):
        for what, values in bench.once(f"cost {kind}", lambda k=kind: cost(bench, k)).items():
            plain, soft = values["plain"], values["annealed"]
            lines.append(f"| {NAMES[kind]}, {what} | {plain:.4g} | {soft:.4g} | {soft / plain:.3f} |")
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing and print the table."""
    bench = Bench(parse_args(arguments))
    device = f"{bench.accelerator.device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    lines = ["# Language models: claimed and measured", "", f"2410.08417; measured on {device}.", ""]
    for part in (comparison, conversion, costs):
        lines += [*part(bench), ""]
    if bench.args.note:
        lines += [bench.args.note.read_text()]
    table = "\n".join(lines)
    print(table)
    if bench.args.write:
        bench.args.write.parent.mkdir(parents=True, exist_ok=True)
        bench.args.write.write_text(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print_peak(*sys.argv[2:])
    else:
        main()
