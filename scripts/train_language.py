"""Train a bilinear (or gated, or plain) language model in the published format: tokenizer, training, export.

The embedded model was made by

    python scripts/train_language.py --out runs/mini \
        --data tinystories.train.parquet movie-reviews.train.parquet --compile

A corpus is a parquet/json/text file with a column `text`, or a dataset on the Hub (`roneneldan/TinyStories`, or
`stanfordnlp/imdb:train+unsupervised` to name the splits). Texts are held out by their hash, or as a column `split`
says. Kill it at any time: the same command resumes from the last
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
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm

import bilens
from bilens import AttentionConfig, BilinearConfig, BilinearTransformer, MLPConfig

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

SPECIAL = ["[UNK]", "[BOS]", "[EOS]"]
VERDICT = "verdict :"  # the token after it says how a text judges: see --verdict-weight
ROUND = 1000  # windows within which every corpus with a --share has exactly that share
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


# -- data -------------------------------------------------------------------------------------------------------------


class Corpus(NamedTuple):
    """The texts of a corpus to train on, those held out, and a hash of them all."""

    kept: list
    held_out: list
    digest: str


def read_corpus(name: str) -> tuple[list[str], str]:
    """Return the distinct texts of a file or Hub dataset in their order, and a hash of them."""
    texts = distinct(open_corpus(name)["text"])
    return texts, hashlib.sha256("\0".join(texts).encode()).hexdigest()


def distinct(texts: Iterable[str]) -> list[str]:
    """Return the texts in their order, without repetitions and empty ones."""
    return [text for text in dict.fromkeys(texts) if text.strip()]


def split_corpus(name: str, holdout: float) -> Corpus:
    """Read a corpus; its column `split`, if it has one, says which texts are held out, otherwise their hash."""
    dataset = open_corpus(name)
    if "split" not in dataset.column_names:
        texts, digest = read_corpus(name)
        kept = [text for text in texts if not is_held_out(text, holdout)]
        return Corpus(kept, [text for text in texts if is_held_out(text, holdout)], digest)
    rows = list(zip(dataset["split"], dataset["text"], strict=True))
    other = {split for split, _ in rows} - {"train", "held-out"}
    if other:
        raise SystemExit(f"--data {name}: split must be 'train' or 'held-out', got {sorted(map(repr, other))[0]}")
    kept, held_out = (distinct(text for split, text in rows if split == part) for part in ("train", "held-out"))
    both = set(kept) & set(held_out)
    if both:
        raise SystemExit(f"--data {name}: a held-out text must not be in the train split, {min(both)[:40]!r} is")
    digest = hashlib.sha256("\0".join(["train", *kept, "held-out", *held_out]).encode()).hexdigest()
    return Corpus(kept, held_out, digest)


def open_corpus(name: str, streaming: bool = False) -> "Dataset | IterableDataset":
    """Open a file or Hub dataset; it must have a column `text`."""
    from datasets import load_dataset  # takes seconds, and tokenised corpora do without

    kinds = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".txt": "text", ".csv": "csv"}
    if Path(name).suffix in kinds:
        if not Path(name).is_file():
            raise SystemExit(f"--data {name}: no such file")
        dataset = load_dataset(kinds[Path(name).suffix], data_files=name, split="train", streaming=streaming)
    else:
        repository, _, split = name.partition(":")
        dataset = load_dataset(repository, split=split or "train", streaming=streaming)
    columns = dataset.column_names or next(iter(dataset), {}).keys()
    if "text" not in columns:
        raise SystemExit(f"--data {name}: needs a column `text`, has {', '.join(columns)}")
    return dataset


def read_corpora(names: list[str], holdout: float) -> dict[str, Corpus]:
    """Return the texts of each corpus by its file's name."""
    return {Path(name).name: split_corpus(name, holdout) for name in names}


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


class Ends(NamedTuple):
    """Ids of the tokens that begin and end a text."""

    bos: int = SPECIAL.index("[BOS]")
    eos: int = SPECIAL.index("[EOS]")


def encode(tokenizer: Tokenizer, texts: list[str], ends: Ends) -> list[Tensor]:
    """Encode each text as BOS, its tokens, EOS; as BOS and its tokens where one token is both, and parts texts."""
    ids, end = [], [] if ends.bos == ends.eos else [ends.eos]
    for start in tqdm(range(0, len(texts), 1000), desc="tokenising", unit="k texts", leave=False):
        for encoding in tokenizer.encode_batch(texts[start : start + 1000], add_special_tokens=False):
            ids.append(torch.tensor([ends.bos, *encoding.ids, *end], dtype=torch.int32))
    return ids


def tokenise(corpora: dict[str, Corpus], tokenizer: Tokenizer, ends: Ends) -> dict[str, Corpus]:
    """Encode every text of every corpus."""
    return {
        name: Corpus(encode(tokenizer, kept, ends), encode(tokenizer, held_out, ends), digest)
        for name, (kept, held_out, digest) in corpora.items()
    }


def write_tokenised(path: Path, corpora: dict[str, Corpus], origin: dict[str, str]) -> None:
    """Write tokenised corpora and what they come from: for each part its tokens, joined, and the texts' lengths."""
    tensors = {}
    for name, corpus in corpora.items():
        for part in ("kept", "held_out"):
            documents = getattr(corpus, part)
            tensors[f"{name}/{part}"] = torch.cat([torch.empty(0, dtype=torch.int32), *documents])
            tensors[f"{name}/{part}/lengths"] = torch.tensor([len(document) for document in documents])
    digests = {name: corpus.digest for name, corpus in corpora.items()}
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, {"digests": json.dumps(digests), "origin": json.dumps(origin)})
    os.replace(partial, path)


def read_tokenised(path: Path, names: list[str], origin: dict[str, str]) -> dict[str, Corpus]:
    """Read what `write_tokenised` wrote; other corpora, tokenizer or holdout than asked for are refused."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        digests = json.loads(metadata["digests"])
        if list(digests) != names or json.loads(metadata["origin"]) != origin:
            raise SystemExit(f"--tokenised {path}: holds other corpora, or another tokenizer or --holdout: delete it")
        parts = {
            name: [
                list(file.get_tensor(f"{name}/{part}").split(file.get_tensor(f"{name}/{part}/lengths").tolist()))
                for part in ("kept", "held_out")
            ]
            for name in names
        }
    return {name: Corpus(*parts[name], digests[name]) for name in names}


def tokenised_corpora(args: argparse.Namespace) -> tuple[Tokenizer, dict[str, Corpus]]:
    """Return the tokenizer in the folder, trained if there is none, and the tokenised corpora."""
    tokenizer_file, corpora = args.out / "tokenizer.json", None
    if not tokenizer_file.exists():
        corpora = read_corpora(args.data, args.holdout)
        train_tokenizer([text for corpus in corpora.values() for text in corpus.kept], args.vocab).save(
            str(tokenizer_file)
        )
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    origin = {"tokenizer": hashlib.sha256(tokenizer_file.read_bytes()).hexdigest(), "holdout": str(args.holdout)}
    if args.tokenised and args.tokenised.exists():
        return tokenizer, read_tokenised(args.tokenised, [Path(name).name for name in args.data], origin)
    documents = tokenise(corpora or read_corpora(args.data, args.holdout), tokenizer, Ends())
    if args.tokenised:
        write_tokenised(args.tokenised, documents, origin)
    return tokenizer, documents


class Windows:
    """Windows of `context` tokens: all documents in a new order each epoch, joined, cut; each starts with BOS.

    Window `n` is a function of the seed and `n` alone, so a run can stop and resume anywhere. The tokens live on
    `device`.
    """

    def __init__(
        self, documents: list[Tensor], context: int, seed: int, ends: Ends, device: torch.device | None = None
    ):
        self.tokens, self.lengths = torch.cat(documents).to(device), torch.tensor([len(some) for some in documents])
        self.context, self.seed, self.ends = context, seed, ends
        self.epoch = -1
        self.per_epoch = len(self.tokens) // (context - 1)
        if not self.per_epoch:
            raise ValueError(f"documents must hold at least {context - 1} tokens together, got {len(self.tokens)}")

    def batch(self, numbers: Iterable[int]) -> Tensor:
        """Stack windows."""
        rows = []
        for epoch, some in groupby(numbers, lambda n: n // self.per_epoch):
            self._turn_to(epoch)
            begins = torch.tensor([n % self.per_epoch for n in some]) * (self.context - 1)
            places = begins[:, None] + torch.arange(self.context - 1)
            rows.append(self.stream[places.to(self.stream.device)])
        return stack(torch.cat(rows), self.ends)

    def _turn_to(self, epoch: int) -> None:
        if epoch == self.epoch:
            return
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        self.epoch, self.stream = epoch, torch.cat([self._join(some) for some in order.split(16384)])

    def _join(self, documents: Tensor) -> Tensor:
        """Join documents, by their numbers."""
        begins, lengths = (self.lengths.cumsum(0) - self.lengths)[documents], self.lengths[documents]
        shifts = (begins - (lengths.cumsum(0) - lengths)).to(self.tokens.device)
        total = int(lengths.sum())
        shifts = shifts.repeat_interleave(lengths.to(shifts.device), output_size=total)
        return self.tokens[shifts + torch.arange(total, device=shifts.device)]

    def state(self) -> str:
        """What a checkpoint has to remember: nothing."""
        return ""

    def restore(self, state: str) -> None:
        """Go on after a checkpoint."""


class Mixture:
    """Windows from several sources, of each a fixed share in every round; window `n` depends on the seed and `n` alone.

    Args:
        sources: Where the windows come from.
        shares: How many windows of a round each source gives.
        seed: Of the order within a round.
    """

    def __init__(self, sources: list[Windows], shares: list[int], seed: int):
        self.sources, self.shares, self.seed = sources, torch.tensor(shares), seed
        self.per_epoch = sum(source.per_epoch for source in sources)
        self.context = sources[0].context

    def batch(self, numbers: Iterable[int]) -> Tensor:
        """Stack windows."""
        round_size = int(self.shares.sum())
        parts = []
        for number, some in groupby(numbers, lambda n: n // round_size):
            places = torch.tensor([n % round_size for n in some])
            parts.append(torch.stack([part[places] for part in self._round(number)]))
        which, windows = torch.cat(parts, 1)
        rows, order = [], []
        for k, source in enumerate(self.sources):
            mine = (which == k).nonzero()[:, 0]
            if len(mine):
                rows.append(source.batch(windows[mine].tolist()))
                order.append(mine)
        return torch.cat(rows)[torch.cat(order).argsort().to(rows[0].device)]

    def _round(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the source of each window of a round, and its number there, which grows from window to window."""
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * number)
        which = torch.arange(len(self.shares)).repeat_interleave(self.shares)
        which = which[torch.randperm(len(which), generator=generator)]
        windows = torch.empty_like(which)
        for k, share in enumerate(self.shares.tolist()):
            windows[which == k] = number * share + torch.arange(share)
        return which, windows

    def state(self) -> str:
        """What a checkpoint has to remember: nothing."""
        return ""

    def restore(self, state: str) -> None:
        """Go on after a checkpoint."""


def parse_shares(shares: list[str], names: list[str]) -> dict[str, int]:
    """Return how many windows of a round each corpus with a `NAME=FRACTION` fills."""
    found = {}
    for share in shares:
        name, _, fraction = share.rpartition("=")
        if name not in names:
            raise SystemExit(f"--share {share}: must name one of the corpora {', '.join(names)}")
        try:
            found[name] = round(ROUND * float(fraction))
        except ValueError:
            raise SystemExit(f"--share {share}: must be NAME=FRACTION") from None
        if found[name] < 1:
            raise SystemExit(f"--share {share}: must be at least {1 / ROUND}")
    if found and (sum(found.values()) >= ROUND or len(found) == len(set(names))):
        raise SystemExit("--share: the fractions must leave something to a corpus without one")
    return found


def make_windows(args: argparse.Namespace, corpora: dict[str, Corpus], device: torch.device) -> Windows | Mixture:
    """Return the training windows, mixed by the shares."""
    shares = parse_shares(args.share, list(corpora))
    groups = [[document for name, corpus in corpora.items() if name not in shares for document in corpus.kept]]
    groups += [corpora[name].kept for name in shares]
    # A seed of its own for each source: corpora of equally many texts are not shuffled alike.
    sources = [Windows(group, args.context, args.seed + 7919 * k, Ends(), device) for k, group in enumerate(groups)]
    return Mixture(sources, [ROUND - sum(shares.values()), *shares.values()], args.seed) if shares else sources[0]


def stack(windows: Tensor, ends: Ends) -> Tensor:
    """Put BOS before each window; one that began with it by itself is shifted, and ends in EOS."""
    windows = windows.long()
    shifted = torch.cat((windows[:, 1:], torch.full_like(windows[:, :1], ends.eos)), 1)
    body = torch.where(windows[:, :1] == ends.bos, shifted, windows)
    return torch.cat((torch.full_like(body[:, :1], ends.bos), body), 1)


def held_out_rows(documents: list[Tensor], context: int, ends: Ends) -> tuple[Tensor, Tensor]:
    """Return the first `context` tokens of each document, padded, and their mask."""
    rows = torch.full((len(documents), context), ends.eos)
    mask = torch.zeros(len(documents), context, dtype=torch.bool)
    for i, document in enumerate(documents):
        document = document[:context].long()
        rows[i, : len(document)], mask[i, : len(document)] = document, True
    return rows, mask


@torch.no_grad()
def held_out_loss(model: BilinearTransformer, rows: Tensor, mask: Tensor, batch: int) -> float:
    """Return the mean loss per token, in nats, of rows padded on the right."""
    total, count = 0.0, 0
    for some, m in zip(rows.split(batch), mask.split(batch), strict=True):
        width = max(2, int(m.sum(1).max()))
        some, m = some[:, :width].to(model.W_E.device), m[:, :width].to(model.W_E.device)
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
        model.tokenizer.save(str(tokenizer_file))
    elif Tokenizer.from_file(str(tokenizer_file)).to_str() != model.tokenizer.to_str():
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
        partial = self.path.with_suffix(".partial")
        metadata = {"step": str(step), "recent": json.dumps(recent), "fingerprint": self.fingerprint}
        metadata |= {"stream": windows.state()}
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata)
        os.replace(partial, self.path)
        self.step = step

    def load(self, model: BilinearTransformer, optimizers: list, windows: "Windows") -> list[float]:
        """Restore the file if there is one, and `step`, the step to go on with; return the losses."""
        if not self.path.exists():
            return []
        with safe_open(self.path, "pt") as file:
            metadata = file.metadata()
        if metadata["fingerprint"] != self.fingerprint:
            raise SystemExit(
                f"{self.path} belongs to a run with other data or arguments (fingerprint "
                f"{metadata['fingerprint'][:12]}, this run {self.fingerprint[:12]}): give another --out, or delete it "
                "to start over"
            )
        tensors = load_file(self.path)
        state = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        model.load_state_dict(({"unembed.weight": state["embed.weight"]} if model.cfg.unembed.tied else {}) | state)
        for number, optimizer in enumerate(optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith(f"optimizer.{number}."):
                    _, _, index, name = key.split(".")
                    state.setdefault(int(index), {})[name] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        windows.restore(metadata.get("stream", ""))
        self.step = int(metadata["step"])
        return json.loads(metadata["recent"])

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
    loss_of = mean_loss if args.verdict_weight == 1 else verdict_loss(model.tokenizer, args.verdict_weight)
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
            with path.open() as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) <= first]
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
        partial = self.path.with_suffix(".partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.rows[0])
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(partial, self.path)


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
