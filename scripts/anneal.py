"""Turn a gated language model into a bilinear one: finetune it while its gates go to linear maps, fold, save.

    python scripts/anneal.py runs/swiglu/model --out runs/annealed --tokens 2.4e6 --compile \
        --data tinystories.train.parquet movie-reviews.train.parquet
    python scripts/anneal.py runs/swiglu/model --out runs/control --tokens 2.4e6 --compile --control \
        --data tinystories.train.parquet movie-reviews.train.parquet

The second command is the control: the same finetuning on the same tokens with the gates as they are. The model is a
folder or a Hub repository that `bilens.load` reads. Corpora as for `train_language.py`, and the same texts are held
out; with `--streaming` they are read as they are needed, never whole. Kill it at any time: the same command resumes
from the last checkpoint and ends in bit-identical weights. Several devices: `accelerate launch scripts/anneal.py`, then
the arguments. `log.csv` holds loss, beta and tokens; `model` the result, in the format the gated model had.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from corpora import Ends, Windows, encode, held_out_rows, is_held_out, open_corpus, read_corpora, stack
from tokenizers import Tokenizer
from torch import Tensor
from train_language import UNSEEN, add_training_arguments, export, optimise

import bilens
from bilens.models import annealing, fits, schedules


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a Hub repository: a model with gated MLPs")
    add_training_arguments(parser, tokens=2.4e6, lr=0.01, lr_embed=0.002)
    parser.set_defaults(context=None, batch=32)
    parser.add_argument("--control", action="store_true", help="leave the gates as they are")
    parser.add_argument("--schedule", default="linear", choices=tuple(schedules.SCHEDULES))
    parser.add_argument("--anneal", type=float, default=0.35, help="fraction of the steps until the gates are linear")
    parser.add_argument(
        "--method", default="path", choices=("path", "least-squares"), help="of the activation itself, or a fitted map"
    )
    parser.add_argument("--norms", action="store_true", help="replace the norms by fitted linear maps too")
    parser.add_argument("--fit-windows", type=int, default=64, help="windows to fit linear maps on")
    parser.add_argument("--streaming", action="store_true", help="read the corpora as they are needed, in their order")
    parser.add_argument("--held-out-texts", type=int, default=200, help="of each corpus, with --streaming")
    args = parser.parse_args(arguments)
    if not 0 < args.anneal <= 1:
        parser.error(f"--anneal must be above 0 and at most 1, got {args.anneal:g}")
    return args


# -- data -------------------------------------------------------------------------------------------------------------


class Stream:
    """Windows of corpora that are read as they are needed: documents of each in turn, in the order they come in.

    What ends starts again. The place in the stream is a small text, so a run can stop and resume anywhere.
    """

    def __init__(self, names: list[str], tokenizer: Tokenizer, context: int, ends: Ends, holdout: float):
        self.names, self.tokenizer, self.context, self.ends, self.holdout = names, tokenizer, context, ends, holdout
        self.restore("")

    def batch(self, numbers: range) -> Tensor:
        """Stack the windows of these numbers; those before them are passed over, and do not come back."""
        if numbers.start < self.window:
            raise ValueError(
                f"numbers must start at {self.window} or later, got {numbers.start}: a stream only goes on"
            )
        while self.window < numbers.start:
            self._next()
        return stack(torch.stack([self._next() for _ in numbers]), self.ends)

    def state(self) -> str:
        """Return the place after the last window."""
        places = [dataset.state_dict() for dataset in self.datasets]
        return json.dumps(
            {"window": self.window, "turn": self.turn, "tokens": self.tokens.tolist(), "datasets": places}
        )

    def restore(self, state: str) -> None:
        """Go to a place, or to the start if there is none."""
        place = json.loads(state) if state else {"window": 0, "turn": 0, "tokens": [], "datasets": []}
        self.window, self.turn = place["window"], place["turn"]
        self.tokens = torch.tensor(place["tokens"], dtype=torch.int32)
        self.datasets = [open_corpus(name, streaming=True) for name in self.names]
        for dataset, where in zip(self.datasets, place["datasets"], strict=False):
            dataset.load_state_dict(where)
        self.texts = [iter(dataset) for dataset in self.datasets]

    def _next(self) -> Tensor:
        size = self.context - 1
        while len(self.tokens) < size:
            self.tokens = torch.cat((self.tokens, *encode(self.tokenizer, [self._text()], self.ends)))
        window, self.tokens, self.window = self.tokens[:size], self.tokens[size:], self.window + 1
        return window

    def _text(self) -> str:
        which = self.turn % len(self.names)
        self.turn += 1
        for _ in range(2):
            for row in self.texts[which]:
                if row["text"].strip() and not is_held_out(row["text"], self.holdout):
                    return row["text"]
            self.datasets[which] = open_corpus(self.names[which], streaming=True)
            self.texts[which] = iter(self.datasets[which])
        raise SystemExit(f"--data {self.names[which]}: no text that is neither empty nor held out")


def held_out_of(name: str, holdout: float, n: int) -> Iterator[str]:
    """Yield the first `n` held-out texts of a corpus."""
    for row in open_corpus(name, streaming=True):
        if n and row["text"].strip() and is_held_out(row["text"], holdout):
            n -= 1
            yield row["text"]
        if not n:
            return


def read(
    args: argparse.Namespace, tokenizer: Tokenizer, ends: Ends
) -> tuple[Windows | Stream, dict[str, tuple[Tensor, Tensor]], dict[str, str]]:
    """Return where windows come from, the held-out rows of each corpus, and hashes for the fingerprint."""
    if args.streaming:
        windows = Stream(args.data, tokenizer, args.context, ends, args.holdout)
        texts = {Path(name).name: list(held_out_of(name, args.holdout, args.held_out_texts)) for name in args.data}
        digests = {name: hashlib.sha256("\0".join(some).encode()).hexdigest() for name, some in texts.items()}
    else:
        corpora = read_corpora(args.data, args.holdout)
        kept = [text for corpus in corpora.values() for text in corpus.kept]
        texts = {name: corpus.held_out for name, corpus in corpora.items()}
        digests = {name: corpus.digest for name, corpus in corpora.items()}
        windows = Windows(encode(tokenizer, kept, ends), args.context, args.seed, ends)
    rows = {
        name: held_out_rows(encode(tokenizer, some, ends), args.context, ends) for name, some in texts.items() if some
    }
    return windows, rows, digests


# -- model ------------------------------------------------------------------------------------------------------------


def load(args: argparse.Namespace) -> bilens.BilinearTransformer:
    """Load the model and check that it can be annealed on text."""
    try:
        model = bilens.load(args.model, dtype=torch.float32)
        with annealing.annealed(model, 0):  # raises where the gates have no way to linear, and copies nothing
            pass
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"{args.model}: {error}") from error
    if model.tokenizer is None:
        raise SystemExit(f"{args.model} has no tokenizer.json: put the one that its embedding belongs to beside it")
    args.context = args.context or model.cfg.n_ctx
    if args.context > model.cfg.n_ctx:
        raise SystemExit(f"--context must be at most {model.cfg.n_ctx}, the model's own, got {args.context}")
    return model.train()


def soften(
    args: argparse.Namespace, model: bilens.BilinearTransformer, windows: Windows | Stream
) -> tuple[bilens.BilinearTransformer, dict[str, float]]:
    """Return the model to train and the R² of what was fitted to make it."""
    if args.control:
        return model, {}
    gates = norms = None
    if args.method == "least-squares" or args.norms:
        rows = windows.batch(range(args.fit_windows)).to(model.W_E.device)
        windows.restore("")
        gates = fits.fit_gates(model, rows) if args.method == "least-squares" else None
        norms = fits.fit_norms(model, rows) if args.norms else None
    r2 = {f"blocks.{layer}.mlp.gate": fit.r2 for layer, fit in enumerate(gates or [])}
    return annealing.prepare(model, gates=gates, norms=norms), r2 | {
        name: fit.r2 for name, fit in (norms or {}).items()
    }


def walker(model: bilens.BilinearTransformer, schedule: str, fraction: float) -> Callable[[int, int], dict[str, str]]:
    """Return what moves the gates before each step: along the schedule for a fraction of the steps, then linear."""

    def walk(step: int, steps: int) -> dict[str, str]:
        alpha = schedules.alpha_at(schedule, min(1.0, step / (fraction * steps)))
        annealing.set_alpha(model, alpha)
        return {"beta": f"{1 - alpha:.4f}"}

    return walk


def leave(step: int, steps: int) -> dict[str, str]:
    """Leave the gates as they are."""
    return {"beta": "1.0000"}


def main(arguments: list[str] | None = None) -> None:
    """Read, anneal, fold, save."""
    args = parse_args(arguments)
    accelerator = Accelerator(mixed_precision=args.precision, log_with="wandb" if args.wandb else None)
    set_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    model = load(args)
    digest = hashlib.sha256(b"".join(w.cpu().numpy().tobytes() for w in model.state_dict().values())).hexdigest()
    start = model.bos_id if model.has_bos else model.eos_id  # which then parts texts (Qwen, SimpleStories)
    windows, held_out, digests = read(args, model.tokenizer.backend_tokenizer, Ends(start, model.eos_id))
    model, r2 = soften(args, model.to(accelerator.device), windows)
    for name, value in r2.items():
        accelerator.print(f"{name}: a linear map explains R² {value:.3f}")
    settings = {k: v for k, v in vars(args).items() if k not in UNSEEN}
    settings |= {"data": digests, "model": digest, "devices": accelerator.num_processes}
    if args.wandb:
        accelerator.init_trackers(args.wandb, settings)
    walk = leave if args.control else walker(model, args.schedule, args.anneal)
    curve = optimise(args, accelerator, model, windows, held_out, settings, walk)
    if accelerator.is_main_process:
        record = {"settings": settings, "r2": r2, "curve": curve}
        if not args.control:
            annealing.set_alpha(model, 1)
            record["c"] = [block.mlp.gate.c.item() for block in model.blocks] if args.method == "path" else None
            model = annealing.fold(model)
        export(args.out / "model", model, held_out, record)
    accelerator.end_training()


if __name__ == "__main__":
    main()
