"""Train a bilinear (or gated, or plain) language model in the published format: tokenizer, training, export.

The embedded model was made by

    python scripts/train_language.py --out runs/mini \
        --data tinystories.train.parquet movie-reviews.train.parquet --compile

A corpus is a parquet/json/text file with a column `text`, or a dataset on the Hub (`roneneldan/TinyStories`, or
`stanfordnlp/imdb:train+unsupervised` to name the splits). Texts are held out by their hash, or as a column `split`
says (`corpora.py`). Kill it at any time: the same command resumes from the last checkpoint and ends in bit-identical
weights. Several devices: `torchrun --nproc-per-node 8 scripts/train_language.py`
or `accelerate launch scripts/train_language.py`, then the arguments. A tokenizer.json that is in the folder
already is used; training one anew breaks ties between rare pieces at random.
"""

import argparse
import csv
import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from corpora import Ends, Mixture, Windows, held_out_loss, held_out_rows, make_windows, tokenised_corpora
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

import bilens
from bilens import AttentionConfig, BilinearConfig, BilinearTransformer, MLPConfig
from bilens.tensor.keeping import atomic_write, read_state, write_state

VERDICT = "verdict :"  # the token after it says how a text judges: see --verdict-weight
MLPS = {  # kind, activation, hidden width relative to --d-hidden: every kind has the same number of parameters
    "bilinear": ("bilinear", None, 1.0),
    "swiglu": ("gated", "silu", 1.0),
    "reglu": ("gated", "relu", 1.0),
    "gelu": ("plain", "gelu", 1.5),
}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_arguments(parser, tokens=48e6, lr=0.02, lr_embed=0.004)
    parser.add_argument(
        "--share",
        action="append",
        default=[],
        metavar="NAME=FRACTION",
        help="fill that fraction of the windows with this corpus (its file's name); repeatable. The others share the "
        "rest in proportion to their size",
    )
    parser.add_argument(
        "--verdict-weight", type=float, default=1.0, help=f"weight in the loss of the token after `{VERDICT}`"
    )
    parser.add_argument(
        "--tokenised", type=Path, metavar="FILE", help="keep the tokenised corpora here; if it exists, read only it"
    )
    parser.add_argument(
        "--start",
        metavar="MODEL",
        help="train on from these weights (a folder, a Hub repository or bilens-mini): they "
        "give the tokenizer and the sizes",
    )
    parser.add_argument("--mlp", default="bilinear", choices=tuple(MLPS), help="kind of MLP, at equal parameters")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--d-hidden", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=4)
    return parser.parse_args(arguments)


def add_training_arguments(parser: argparse.ArgumentParser, tokens: float, lr: float, lr_embed: float) -> None:
    """Declare what every training run has: data, folder, length, batch, rates, how often to save."""
    parser.add_argument("--data", nargs="+", required=True, help="files with a column `text`, or Hub datasets")
    parser.add_argument("--out", type=Path, required=True, help="folder for tokenizer, checkpoints, log and model")
    parser.add_argument("--tokens", type=float, default=tokens, help="how many tokens to train on")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64, help="sequences per step, over all devices")
    parser.add_argument("--micro-batch", type=int, default=32, help="sequences per forward pass on one device")
    parser.add_argument("--lr", type=float, default=lr, help="peak rate of Muon (the blocks' matrices)")
    parser.add_argument("--lr-embed", type=float, default=lr_embed, help="peak rate of AdamW (all the rest)")
    parser.add_argument("--weight-decay", type=float, default=0.05, help="of Muon")
    parser.add_argument("--warmup", type=float, default=0.02, help="fraction of the steps")
    parser.add_argument("--decay", type=float, default=0.6, help="last fraction of the steps, linear to zero")
    parser.add_argument("--holdout", type=float, default=0.01, help="fraction of each corpus kept for evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "no"), help="autocast; weights stay float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile, 1.3 times faster on a CPU")
    parser.add_argument("--eval-every", type=int, default=500, help="steps")
    parser.add_argument("--eval-texts", type=int, help="held-out texts of each corpus on the way (default: all)")
    parser.add_argument("--checkpoint-every", type=int, default=100, help="steps")
    parser.add_argument("--wandb", metavar="PROJECT", help="log to Weights & Biases too")


# Arguments without effect on the weights.
UNSEEN = ("out", "eval_every", "eval_texts", "checkpoint_every", "tokenised", "wandb")


# -- model and optimisation -------------------------------------------------------------------------------------------


def new_model(args: argparse.Namespace, tokenizer: Tokenizer) -> BilinearTransformer:
    """Build the model: normal weights of variance 1/fan-in, the two output projections of each block at zero."""
    kind, act, width = MLPS[args.mlp]
    config = BilinearConfig(
        n_layers=args.layers,
        d_model=args.d_model,
        n_ctx=args.context,
        d_vocab=tokenizer.get_vocab_size(),
        attention=AttentionConfig.of_width(args.d_model, args.heads, scale=1 / math.sqrt(2 * args.layers)),
        mlp=MLPConfig(round(width * args.d_hidden), kind, act),
    )
    model = BilinearTransformer(config, tokenizer)
    for name, weight in model.named_parameters():
        if name.endswith(("attn.o.weight", "mlp.p.weight")):
            torch.nn.init.zeros_(weight)
        else:
            torch.nn.init.normal_(
                weight, std=0.02 if "unembed" in name else 1 if "embed" in name else args.d_model**-0.5
            )
    return model


def started_model(args: argparse.Namespace) -> BilinearTransformer:
    """Load the model to train on from, and put its tokenizer into the folder; another that is there is refused."""
    model, tokenizer_file = bilens.load(args.start, dtype=torch.float32), args.out / "tokenizer.json"
    if args.context > model.cfg.n_ctx:
        raise SystemExit(f"--context must be at most {model.cfg.n_ctx}, as {args.start} has, got {args.context}")
    if not tokenizer_file.exists():
        model.tokenizer.backend_tokenizer.save(str(tokenizer_file))
    elif Tokenizer.from_file(str(tokenizer_file)).get_vocab() != model.tokenizer.get_vocab():
        raise SystemExit(f"{tokenizer_file} must be the tokenizer of --start {args.start}, is another: delete it")
    return model


def weights_digest(model: BilinearTransformer) -> str:
    """Return a hash of a model's weights."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode() + weight.cpu().numpy().tobytes())
    return digest.hexdigest()


def rate(step: int, steps: int, warmup: float, decay: float) -> float:
    """Return the learning rate's factor: linear warm-up, plateau, linear decay to zero."""
    return min(1.0, (step + 1) / max(1, warmup * steps), (steps - step) / max(1, decay * steps))


def make_optimizers(model: BilinearTransformer, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Return Muon for the blocks' matrices and AdamW for the rest; each group remembers its peak rate."""
    matrices = [weight for weight in model.blocks.parameters() if weight.ndim == 2]
    taken = {id(weight) for weight in matrices}
    rest = [weight for weight in model.parameters() if id(weight) not in taken]
    return [
        torch.optim.Muon([{"params": matrices, "peak": args.lr}], lr=args.lr, weight_decay=args.weight_decay),
        torch.optim.AdamW(
            [{"params": rest, "peak": args.lr_embed}], lr=args.lr_embed, betas=(0.9, 0.95), weight_decay=0.0
        ),
    ]


Loss = Callable[[torch.nn.Module, Tensor], Tensor]


def mean_loss(model: torch.nn.Module, batch: Tensor) -> Tensor:
    """Return the mean loss of all tokens."""
    return model(batch, return_type="loss")


def verdict_loss(tokenizer: Tokenizer, weight: float) -> Loss:
    """Return a mean loss in which the token after `verdict :` counts `weight` times."""
    ids = tokenizer.encode(VERDICT, add_special_tokens=False).ids

    def loss(model: torch.nn.Module, batch: Tensor) -> Tensor:
        losses = model(batch, return_type="loss", loss_per_token=True)
        weights = torch.where(follows(batch, ids)[:, 1:], weight, 1.0)
        return (losses * weights).sum() / weights.sum()

    return loss


def follows(batch: Tensor, ids: list[int]) -> Tensor:
    """Return where in the rows of a batch the tokens just before are `ids`."""
    found = torch.zeros_like(batch, dtype=torch.bool)
    found[:, len(ids) :] = torch.stack([batch[:, k : k - len(ids)] == token for k, token in enumerate(ids)]).all(0)
    return found


def training_step(
    args: argparse.Namespace,
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    windows: "Windows",
    step: int,
    steps: int,
    loss_of: Loss = mean_loss,
) -> Tensor:
    """Take one step, over as many micro-batches as a batch has; return the loss before it, without waiting for it."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate(step, steps, args.warmup, args.decay)
    per_step = args.micro_batch * accelerator.num_processes
    loss_sum = torch.zeros((), device=accelerator.device)
    for micro in range(args.batch // per_step):
        begin = step * args.batch + micro * per_step + accelerator.process_index * args.micro_batch
        batch = windows.batch(range(begin, begin + args.micro_batch)).to(accelerator.device)
        with accelerator.autocast():
            loss = loss_of(model, batch) / (args.batch // per_step)
        accelerator.backward(loss)
        loss_sum += loss.detach()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return accelerator.reduce(loss_sum, "mean")


class Checkpoint:
    """Weights, optimiser state, place in the data and the losses since the last log row: one safetensors file."""

    def __init__(self, path: Path, settings: dict):
        self.path, self.step = path, 0
        self.fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def save(
        self, model: BilinearTransformer, optimizers: list, windows: "Windows", step: int, recent: list[float]
    ) -> None:
        """Replace the file, atomically; weights that are not finite are refused."""
        tensors = {f"model.{name}": weight for name, weight in model.state_dict().items()}
        if model.cfg.unembed.tied:  # a file cannot hold one tensor under two names
            del tensors["model.unembed.weight"]
        if not all(weight.isfinite().all() for weight in tensors.values()):
            raise SystemExit(f"weights are not finite after step {step}: lower --lr; {self}")
        for number, optimizer in enumerate(optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{number}.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
        about = {"step": step, "recent": recent, "fingerprint": self.fingerprint, "stream": windows.state()}
        write_state(self.path, tensors, about)
        self.step = step

    def load(self, model: BilinearTransformer, optimizers: list, windows: "Windows") -> list[float]:
        """Restore the file if there is one, and `step`, the step to go on with; return the losses."""
        if not self.path.exists():
            return []
        try:
            tensors, about = read_state(self.path)
        except ValueError as error:
            raise SystemExit(str(error)) from error
        if about.get("fingerprint") != self.fingerprint:
            raise SystemExit(
                f"{self.path} belongs to a run with other data or arguments (fingerprint "
                f"{about.get('fingerprint')!s:.12}, this run {self.fingerprint:.12}): give another --out, or delete it "
                "to start over"
            )
        state = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        model.load_state_dict(({"unembed.weight": state["embed.weight"]} if model.cfg.unembed.tied else {}) | state)
        for number, optimizer in enumerate(optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith(f"optimizer.{number}."):
                    _, _, index, name = key.split(".")
                    state.setdefault(int(index), {})[name] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        windows.restore(about["stream"])
        self.step = about["step"]
        return about["recent"]

    def __str__(self) -> str:
        """Say where the last good weights are."""
        return f"the last good checkpoint is {self.path}, after step {self.step}" if self.step else "no checkpoint yet"


def optimise(
    args: argparse.Namespace,
    accelerator: Accelerator,
    model: BilinearTransformer,
    windows: "Windows",
    held_out: dict[str, tuple[Tensor, Tensor]],
    settings: dict,
    before_step: Callable[[int, int], dict[str, str]] = lambda step, steps: {},
    loss_of: Loss = mean_loss,
) -> list[dict[str, str]]:
    """Train a model from its last checkpoint to its last step; return the rows of the log.

    Args:
        args: The training arguments.
        accelerator: The devices.
        model: Trained in place; on the accelerator's device.
        windows: Where batches come from.
        held_out: Rows and mask of each corpus's held-out texts.
        settings: Everything the weights depend on: a checkpoint of a run with others is refused.
        before_step: Called with the step and their number; returns columns for the log.
        loss_of: The loss of a batch.
    """
    per_step = args.micro_batch * accelerator.num_processes
    if args.batch % per_step:
        raise SystemExit(f"--batch must be a multiple of {per_step} (--micro-batch times devices), got {args.batch}")
    main, steps = accelerator.is_main_process, math.ceil(args.tokens / (args.batch * args.context))
    optimizers = make_optimizers(model, args)
    checkpoint = Checkpoint(args.out / "checkpoint.safetensors", settings)
    recent = checkpoint.load(model, optimizers, windows)
    wrapped = accelerator.prepare_model(torch.compile(model) if args.compile else model)
    log = Log(args.out / "log.csv", checkpoint.step, accelerator) if main else None
    progress = tqdm(
        range(checkpoint.step, steps), initial=checkpoint.step, total=steps, desc="training", disable=not main
    )
    patience = 1 if accelerator.device.type == "cpu" else 20  # reading a loss waits for the device
    clock = time.perf_counter()
    for step in progress:
        columns = before_step(step, steps)
        recent.append(training_step(args, accelerator, wrapped, optimizers, windows, step, steps, loss_of))
        done = step + 1
        logs, saves = (done % every == 0 or done == steps for every in (args.eval_every, args.checkpoint_every))
        if logs or saves or done % patience == 0:
            recent = finite(recent, done, checkpoint)
            progress.set_postfix(loss=f"{recent[-1]:.3f}")
        if main and logs:
            some = {name: [part[: args.eval_texts] for part in rows] for name, rows in held_out.items()}
            losses = {name: held_out_loss(model, *rows, args.micro_batch) for name, rows in some.items()}
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            tokens = done * args.batch * args.context
            log.write(done, tokens, sum(recent) / len(recent), columns, losses, seconds)
            recent = []
        if main and saves:
            checkpoint.save(model, optimizers, windows, done, recent)
    return log.rows if main else []


def finite(losses: list[float | Tensor], done: int, checkpoint: Checkpoint) -> list[float]:
    """Return the last losses before step `done` as numbers; one that is not finite ends the run."""
    losses = [float(loss) for loss in losses]
    for step, loss in enumerate(losses, done - len(losses)):
        if not math.isfinite(loss):
            raise SystemExit(f"loss is {loss} at step {step}: lower --lr; {checkpoint}")
    return losses


class Run(NamedTuple):
    """What `optimise` and `export` take."""

    model: BilinearTransformer
    windows: Windows | Mixture
    held_out: dict[str, tuple[Tensor, Tensor]]
    settings: dict


def prepare(args: argparse.Namespace, accelerator: Accelerator) -> Run:
    """Tokenise the corpora and build the model, on the accelerator's device."""
    args.out.mkdir(parents=True, exist_ok=True)
    with accelerator.main_process_first():
        start = started_model(args) if args.start else None
        tokenizer, corpora = tokenised_corpora(args)
    windows = make_windows(args, corpora, accelerator.device)
    held_out = {
        name: held_out_rows(corpus.held_out, args.context, Ends())
        for name, corpus in corpora.items()
        if corpus.held_out
    }
    accelerator.print(
        f"{windows.per_epoch * (args.context - 1) / 1e6:.1f}M tokens of training text, "
        f"{', '.join(f'{len(rows)} held-out texts of {name}' for name, (rows, _) in held_out.items())}"
    )
    model = start or new_model(args, tokenizer)
    accelerator.print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters")
    settings = {k: v for k, v in vars(args).items() if k not in UNSEEN} | {
        "data": {name: corpus.digest for name, corpus in corpora.items()},
        "tokenizer": hashlib.sha256((args.out / "tokenizer.json").read_bytes()).hexdigest(),
        "devices": accelerator.num_processes,
    }
    if start:  # a run from scratch keeps the settings, and so the checkpoints, that it had without the option
        settings["start"] = weights_digest(start)
    else:
        del settings["start"]
    return Run(model.to(accelerator.device), windows, held_out, settings)


def train(args: argparse.Namespace) -> None:
    """Run the whole pipeline."""
    accelerator = Accelerator(mixed_precision=args.precision, log_with="wandb" if args.wandb else None)
    set_seed(args.seed)
    model, windows, held_out, settings = prepare(args, accelerator)
    if args.wandb:
        accelerator.init_trackers(args.wandb, settings)
    loss_of = (
        mean_loss if args.verdict_weight == 1 else verdict_loss(model.tokenizer.backend_tokenizer, args.verdict_weight)
    )
    curve = optimise(args, accelerator, model, windows, held_out, settings, loss_of=loss_of)
    if accelerator.is_main_process:
        export(args.out / "model", model, held_out, {"settings": settings, "curve": curve})
    accelerator.end_training()


class Log:
    """The training curve as csv; rows after the step that a run resumes from are dropped."""

    def __init__(self, path: Path, first: int, accelerator: Accelerator):
        self.path, self.accelerator = path, accelerator
        rows = []
        if path.exists():
            try:
                with path.open() as file:
                    rows = [row for row in csv.DictReader(file) if int(row["step"]) <= first]
            except (KeyError, TypeError, ValueError, csv.Error) as error:
                raise SystemExit(f"{path} is damaged: {error!r}; delete it, and the run goes on without it") from error
        self.rows = rows
        self._flush()

    def write(
        self,
        step: int,
        tokens: int,
        loss: float,
        columns: dict[str, str],
        held_out: dict[str, float],
        seconds: float,
    ) -> None:
        """Append a row."""
        row = {"step": str(step), "tokens": str(tokens), **columns, "train": f"{loss:.4f}"}
        row |= {f"held-out {name}": f"{value:.4f}" for name, value in held_out.items()} | {"seconds": f"{seconds:.0f}"}
        self.rows.append(row)
        self._flush()
        self.accelerator.log({k: float(v) for k, v in row.items()}, step=step)
        tqdm.write("  ".join(f"{k} {v}" for k, v in row.items()))

    def _flush(self) -> None:
        if not self.rows:
            return
        with atomic_write(self.path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.rows[0])
            writer.writeheader()
            writer.writerows(self.rows)


def export(folder: Path, model: BilinearTransformer, held_out: dict[str, tuple[Tensor, Tensor]], record: dict) -> None:
    """Write the model in bfloat16, with `training.json`: the record, and the loss of the weights as stored."""
    model.to(torch.bfloat16).to(torch.float32)
    losses = {name: held_out_loss(model, *rows, 32) for name, rows in held_out.items()}
    bilens.save(model.cpu().to(torch.bfloat16), folder)
    record = {**record, "held-out loss": losses, "torch": torch.__version__}
    (folder / "training.json").write_text(json.dumps(record, indent=1))
    tqdm.write(f"wrote {folder}")


if __name__ == "__main__":
    train(parse_args())
