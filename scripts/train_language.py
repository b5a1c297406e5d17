"""Train a bilinear (or gated, or plain) language model in the published format: tokenizer, training, export.

The embedded model was made by

    python scripts/train_language.py --out runs/mini \
        --data tinystories.train.parquet movie-reviews.train.parquet --compile

A corpus is a parquet/json/text file with a column `text`, or a dataset on the Hub (`roneneldan/TinyStories`, or
`stanfordnlp/imdb:train+unsupervised` to name the splits). Kill it at any time: the same command resumes from the last
checkpoint and ends in bit-identical weights. Several devices: `torchrun --nproc-per-node 8 scripts/train_language.py`
or `accelerate launch scripts/train_language.py`, then the arguments. A tokenizer.json that is in the folder
already is used; training one anew breaks ties between rare pieces at random.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import load_dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm

import bilens
from bilens.transformer import BilinearConfig, BilinearTransformer

SPECIAL = ["[UNK]", "[BOS]", "[EOS]"]
MLPS = {  # kind, activation, hidden width relative to --d-hidden: every kind has the same number of parameters
    "bilinear": ("bilinear", None, 1.0),
    "swiglu": ("gated", "silu", 1.0),
    "reglu": ("gated", "relu", 1.0),
    "gelu": ("plain", "gelu", 1.5),
}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="files with a column `text`, or Hub datasets")
    parser.add_argument("--out", type=Path, required=True, help="folder for tokenizer, checkpoints, log and model")
    parser.add_argument("--tokens", type=float, default=48e6, help="how many tokens to train on")
    parser.add_argument("--mlp", default="bilinear", choices=tuple(MLPS), help="kind of MLP, at equal parameters")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--d-hidden", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64, help="sequences per step, over all devices")
    parser.add_argument("--micro-batch", type=int, default=32, help="sequences per forward pass on one device")
    parser.add_argument("--lr", type=float, default=0.02, help="peak rate of Muon (the blocks' matrices)")
    parser.add_argument("--lr-embed", type=float, default=0.004, help="peak rate of AdamW (embedding, unembedding)")
    parser.add_argument("--weight-decay", type=float, default=0.05, help="of Muon")
    parser.add_argument("--warmup", type=float, default=0.02, help="fraction of the steps")
    parser.add_argument("--decay", type=float, default=0.6, help="last fraction of the steps, linear to zero")
    parser.add_argument("--holdout", type=float, default=0.01, help="fraction of each corpus kept for evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "no"), help="autocast; weights stay float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile, 1.3 times faster on a CPU")
    parser.add_argument("--eval-every", type=int, default=500, help="steps")
    parser.add_argument("--checkpoint-every", type=int, default=100, help="steps")
    parser.add_argument("--wandb", metavar="PROJECT", help="log to Weights & Biases too")
    return parser.parse_args()


# -- data -------------------------------------------------------------------------------------------------------------


def read_corpus(name: str) -> tuple[list[str], str]:
    """Return the distinct texts of a file or Hub dataset in their order, and a hash of them."""
    kinds = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".txt": "text", ".csv": "csv"}
    if Path(name).suffix in kinds:
        if not Path(name).is_file():
            raise SystemExit(f"--data {name}: no such file")
        dataset = load_dataset(kinds[Path(name).suffix], data_files=name, split="train")
    else:
        repository, _, split = name.partition(":")
        dataset = load_dataset(repository, split=split or "train")
    if "text" not in dataset.column_names:
        raise SystemExit(f"--data {name}: needs a column `text`, has {', '.join(dataset.column_names)}")
    texts = [text for text in dict.fromkeys(dataset["text"]) if text.strip()]
    return texts, hashlib.sha256("\0".join(texts).encode()).hexdigest()


def is_held_out(text: str, fraction: float) -> bool:
    """Decide by the text's own hash, so the split does not depend on order, seed or the other texts."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16) < fraction * 16**12


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """Train a lower-casing WordPiece tokenizer by the recipe of the published ts-tokenizer-4096."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation("isolated"), pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)]
    )
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=vocab, special_tokens=SPECIAL, limit_alphabet=150)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A", pair="[BOS] $A [BOS] $B", special_tokens=[("[BOS]", 1)]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[Tensor]:
    """Encode each text as BOS, its tokens, EOS."""
    ids = []
    for start in tqdm(range(0, len(texts), 1000), desc="tokenising", unit="k texts", leave=False):
        for encoding in tokenizer.encode_batch(texts[start : start + 1000]):
            ids.append(torch.tensor([*encoding.ids, SPECIAL.index("[EOS]")], dtype=torch.int16))
    return ids


class Windows:
    """Windows of `context` tokens: all documents in a new order each epoch, joined, cut; each starts with BOS.

    Window `n` is a function of the seed and `n` alone, so a run can stop and resume anywhere.
    """

    def __init__(self, documents: list[Tensor], context: int, seed: int):
        self.documents, self.context, self.seed = documents, context, seed
        self.epoch = -1
        self.per_epoch = sum(map(len, documents)) // (context - 1)

    def __getitem__(self, n: int) -> Tensor:
        epoch, place = divmod(n, self.per_epoch)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch)
            order = torch.randperm(len(self.documents), generator=generator).tolist()
            self.epoch, self.stream = epoch, torch.cat([self.documents[i] for i in order])
        window = self.stream[place * (self.context - 1) : (place + 1) * (self.context - 1)].long()
        bos = SPECIAL.index("[BOS]")
        return torch.cat((torch.tensor([bos]), window[1:] if window[0] == bos else window))[: self.context]

    def batch(self, numbers: range) -> Tensor:
        """Stack windows; the odd one that began with BOS by itself is a token shorter and ends in EOS."""
        rows = torch.full((len(numbers), self.context), SPECIAL.index("[EOS]"))
        for row, n in zip(rows, numbers, strict=True):
            window = self[n]
            row[: len(window)] = window
        return rows


def held_out_rows(documents: list[Tensor], context: int) -> tuple[Tensor, Tensor]:
    """Return the first `context` tokens of each document, padded, and their mask."""
    rows = torch.full((len(documents), context), SPECIAL.index("[EOS]"))
    mask = torch.zeros(len(documents), context, dtype=torch.bool)
    for i, document in enumerate(documents):
        document = document[:context].long()
        rows[i, : len(document)], mask[i, : len(document)] = document, True
    return rows, mask


@torch.no_grad()
def held_out_loss(model: BilinearTransformer, rows: Tensor, mask: Tensor, batch: int) -> float:
    """Return the mean loss per token, in nats."""
    total, count = 0.0, 0
    for some, m in zip(rows.split(batch), mask.split(batch), strict=True):
        some, m = some.to(model.W_E.device), m.to(model.W_E.device)
        losses = model(some, return_type="loss", attention_mask=m, loss_per_token=True)
        total += losses.sum().item()
        count += (m[:, 1:] & m[:, :-1]).sum().item()
    return total / count


# -- model and optimisation -------------------------------------------------------------------------------------------


def new_model(args: argparse.Namespace, tokenizer: Tokenizer) -> BilinearTransformer:
    """Build the model: normal weights of variance 1/fan-in, the two output projections of each block at zero."""
    kind, act, width = MLPS[args.mlp]
    config = BilinearConfig(
        n_layers=args.layers,
        d_model=args.d_model,
        d_hidden=round(width * args.d_hidden),
        mlp=kind,
        act=act,
        n_heads=args.heads,
        n_ctx=args.context,
        d_vocab=tokenizer.get_vocab_size(),
        attn_scale=1 / math.sqrt(2 * args.layers),
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


def rate(step: int, steps: int, warmup: float, decay: float) -> float:
    """Return the learning rate's factor: linear warm-up, plateau, linear decay to zero."""
    return min(1.0, (step + 1) / max(1, warmup * steps), (steps - step) / max(1, decay * steps))


def save_checkpoint(
    path: Path, model: BilinearTransformer, optimizers: list, step: int, recent: list[float], fingerprint: str
) -> None:
    """Write weights, optimiser state and the losses since the last log row in one safetensors file, atomically."""
    tensors = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    partial = path.with_suffix(".partial")
    metadata = {"step": str(step), "recent": json.dumps(recent), "fingerprint": fingerprint}
    save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata)
    os.replace(partial, path)


def load_checkpoint(
    path: Path, model: BilinearTransformer, optimizers: list, fingerprint: str
) -> tuple[int, list[float]]:
    """Restore a checkpoint; return the step to go on with and the losses since the last log row."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    if metadata["fingerprint"] != fingerprint:
        raise SystemExit(
            f"{path} belongs to a run with other data or arguments (fingerprint {metadata['fingerprint'][:12]}, this "
            f"run {fingerprint[:12]}): give another --out, or delete it to start over"
        )
    tensors = load_file(path)
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    for number, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"optimizer.{number}."):
                _, _, index, name = key.split(".")
                state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return int(metadata["step"]), json.loads(metadata["recent"])


def train(args: argparse.Namespace) -> None:
    """Run the whole pipeline."""
    accelerator = Accelerator(mixed_precision=args.precision, log_with="wandb" if args.wandb else None)
    set_seed(args.seed)
    main = accelerator.is_main_process
    args.out.mkdir(parents=True, exist_ok=True)
    per_step = args.micro_batch * accelerator.num_processes
    if args.batch % per_step:
        raise SystemExit(f"--batch must be a multiple of {per_step} (--micro-batch times devices), got {args.batch}")

    corpora = {Path(name).name: read_corpus(name) for name in args.data}
    splits = {
        name: (
            [t for t in texts if not is_held_out(t, args.holdout)],
            [t for t in texts if is_held_out(t, args.holdout)],
        )
        for name, (texts, _) in corpora.items()
    }
    tokenizer_file = args.out / "tokenizer.json"
    with accelerator.main_process_first():
        if not tokenizer_file.exists():
            tokenizer = train_tokenizer([t for kept, _ in splits.values() for t in kept], args.vocab)
            tokenizer.save(str(tokenizer_file))
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    windows = Windows(encode(tokenizer, [t for kept, _ in splits.values() for t in kept]), args.context, args.seed)
    held_out = {name: held_out_rows(encode(tokenizer, out), args.context) for name, (_, out) in splits.items()}
    steps = math.ceil(args.tokens / (args.batch * args.context))
    accelerator.print(
        f"{windows.per_epoch * (args.context - 1) / 1e6:.1f}M tokens of training text, "
        f"{', '.join(f'{len(rows)} held-out texts of {name}' for name, (rows, _) in held_out.items())}; {steps} steps"
    )

    model = new_model(args, tokenizer)
    accelerator.print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters")
    ignored = ("out", "eval_every", "checkpoint_every", "wandb")
    settings = {k: v for k, v in vars(args).items() if k not in ignored} | {
        "data": {name: digest for name, (_, digest) in corpora.items()},
        "tokenizer": hashlib.sha256(tokenizer_file.read_bytes()).hexdigest(),
        "devices": accelerator.num_processes,
    }
    fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    muon = torch.optim.Muon(model.blocks.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    adamw = torch.optim.AdamW(
        [model.embed.weight, model.unembed.weight], lr=args.lr_embed, betas=(0.9, 0.95), weight_decay=0.0
    )
    peaks = {id(muon): args.lr, id(adamw): args.lr_embed}
    model = model.to(accelerator.device)
    checkpoint = args.out / "checkpoint.safetensors"
    first, recent = 0, []
    if checkpoint.exists():
        first, recent = load_checkpoint(checkpoint, model, [muon, adamw], fingerprint)
    wrapped = accelerator.prepare_model(torch.compile(model) if args.compile else model)
    if args.wandb:
        accelerator.init_trackers(args.wandb, settings)

    log = Log(args.out / "log.csv", first, accelerator) if main else None
    progress = tqdm(range(first, steps), initial=first, total=steps, desc="training", disable=not main)
    micro_steps, clock = args.batch // per_step, time.perf_counter()
    for step in progress:
        for optimizer in (muon, adamw):
            for group in optimizer.param_groups:
                group["lr"] = peaks[id(optimizer)] * rate(step, steps, args.warmup, args.decay)
        loss_sum = torch.zeros((), device=accelerator.device)
        for micro in range(micro_steps):
            begin = step * args.batch + micro * per_step + accelerator.process_index * args.micro_batch
            batch = windows.batch(range(begin, begin + args.micro_batch)).to(accelerator.device)
            with accelerator.autocast():
                loss = wrapped(batch, return_type="loss") / micro_steps
            accelerator.backward(loss)
            loss_sum += loss.detach()
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
        recent.append(accelerator.reduce(loss_sum, "mean").item())
        if not math.isfinite(recent[-1]):
            raise SystemExit(f"loss is {recent[-1]} at step {step}: lower --lr; the last checkpoint is {checkpoint}")
        done = step + 1
        progress.set_postfix(loss=f"{recent[-1]:.3f}")
        if main and (done % args.eval_every == 0 or done == steps):
            losses = {name: held_out_loss(model, *rows, args.micro_batch) for name, rows in held_out.items()}
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            log.write(done, done * args.batch * args.context, sum(recent) / len(recent), losses, seconds)
            recent = []
        if main and (done % args.checkpoint_every == 0 or done == steps):
            save_checkpoint(checkpoint, model, [muon, adamw], done, recent, fingerprint)
    if main:
        model.to(torch.bfloat16).to(torch.float32)  # evaluate the weights as they are stored
        export(args, model, settings, {name: held_out_loss(model, *rows, 32) for name, rows in held_out.items()})
    accelerator.end_training()


class Log:
    """The training curve as csv; rows after the step that a run resumes from are dropped."""

    def __init__(self, path: Path, first: int, accelerator: Accelerator):
        self.path, self.accelerator = path, accelerator
        rows = []
        if path.exists():
            with path.open() as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) <= first]
        self.rows = rows
        self._flush()

    def write(self, step: int, tokens: int, loss: float, held_out: dict[str, float], seconds: float) -> None:
        """Append a row."""
        values = {f"held-out {name}": f"{value:.4f}" for name, value in held_out.items()}
        row = {"step": step, "tokens": tokens, "train": f"{loss:.4f}", **values, "seconds": f"{seconds:.0f}"}
        self.rows.append(row)
        self._flush()
        self.accelerator.log({k: float(v) for k, v in row.items()}, step=step)
        tqdm.write("  ".join(f"{k} {v}" for k, v in row.items()))

    def _flush(self) -> None:
        if self.rows:
            with self.path.open("w", newline="") as file:
                writer = csv.DictWriter(file, self.rows[0])
                writer.writeheader()
                writer.writerows(self.rows)


def export(args: argparse.Namespace, model: BilinearTransformer, settings: dict, losses: dict[str, float]) -> None:
    """Write the model in bfloat16, the published format, with `training.json` beside it."""
    folder = args.out / "model"
    bilens.save(model.cpu().to(torch.bfloat16), folder)
    with (args.out / "log.csv").open() as file:
        curve = list(csv.DictReader(file))
    record = {"settings": settings, "held-out loss": losses, "torch": torch.__version__, "curve": curve}
    (folder / "training.json").write_text(json.dumps(record, indent=1))
    tqdm.write(f"wrote {folder}")


if __name__ == "__main__":
    train(parse_args())
