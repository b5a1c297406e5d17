"""Corpora as language models are trained on them: read, held out by hash, tokenised, cut into mixed windows.

A corpus is a parquet/json/text file with a column `text`, or a dataset on the Hub.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm

from bilens import BilinearTransformer

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

SPECIAL = ["[UNK]", "[BOS]", "[EOS]"]
ROUND = 1000  # windows within which every corpus with a --share has exactly that share


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
