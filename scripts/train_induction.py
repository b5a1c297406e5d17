"""Train a two-layer model without a softmax on repeated random tokens and stories, in minutes on one core.

    python scripts/train_induction.py --data tinystories.train.parquet --out runs/induction

Half of each batch are windows of stories, half are a few random tokens repeated until the window is full: what comes
next there is known from the second time on, to a head that attends to what followed the same token before (an
induction head, 2209.11895). Attention is the product of two score matrices. scripts/induction_heads.py studies it.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from corpora import is_held_out, read_corpus, train_tokenizer
from torch import Tensor

import bilens
from bilens import AttentionConfig, BilinearConfig, BilinearTransformer, MLPConfig

SPECIAL = 3  # tokens that are no words: [UNK], [BOS], [EOS]
PERIODS = (6, 20)  # how many random tokens are repeated: at least, and fewer than


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="file with a column `text`, or a Hub dataset")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=16, help="windows per step, half of each kind")
    parser.add_argument("--context", type=int, default=40)
    parser.add_argument("--texts", type=int, default=2000, help="stories to read")
    parser.add_argument("--vocab", type=int, default=256)
    parser.add_argument("--d-model", type=int, default=48)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-3, help="peak rate")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def repeated(n: int, length: int, vocab: int, generator: torch.Generator) -> Tensor:
    """Return windows of BOS and random words, a few of them again and again."""
    rows = torch.ones(n, length, dtype=torch.long)
    for row in rows:
        period = int(torch.randint(*PERIODS, (), generator=generator))
        some = torch.randint(SPECIAL, vocab, (period,), generator=generator)
        row[1:] = some.repeat(length // period + 1)[: length - 1]
    return rows


def windows(ids: list[list[int]], length: int) -> Tensor:
    """Cut stories, one after the other, into windows that start with BOS."""
    flat = torch.tensor([token for row in ids for token in row])
    flat = flat[: len(flat) // (length - 1) * (length - 1)].view(-1, length - 1)
    return torch.cat((torch.ones(len(flat), 1, dtype=torch.long), flat), 1)


def make_model(args: argparse.Namespace, tokenizer) -> BilinearTransformer:
    """Return a model with random weights: normal, embeddings of size 1, matrices that halve what they read."""
    attention = AttentionConfig.of_width(args.d_model, args.heads, kind="bilinear", scale=0.5)
    cfg = BilinearConfig(2, args.d_model, args.context, args.vocab, attention, MLPConfig(2 * args.d_model))
    model = BilinearTransformer(cfg, tokenizer)
    generator = torch.Generator().manual_seed(args.seed)
    spreads = {"embed.weight": 1.0, "unembed.weight": 0.02}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0, spreads.get(name, 0.5 * weight.shape[-1] ** -0.5), generator=generator)
    return model


def batches(stories: Tensor, args: argparse.Namespace, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield windows of stories in a random order, beside as many of repeated tokens."""
    half = args.batch // 2
    while True:
        for some in torch.randperm(len(stories), generator=generator).split(half):
            if len(some) == half:
                yield torch.cat((stories[some], repeated(half, args.context, args.vocab, generator)))


def train(args: argparse.Namespace) -> BilinearTransformer:
    """Train with AdamW; the rate rises for 50 steps and falls to zero over the second half."""
    texts = [text for text in read_corpus(args.data)[0][: args.texts] if not is_held_out(text, 0.05)]
    tokenizer = train_tokenizer(texts, args.vocab)
    stories = windows([one.ids for one in tokenizer.encode_batch(texts, add_special_tokens=False)], args.context)
    model = make_model(args, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.1)
    start, generator = time.monotonic(), torch.Generator().manual_seed(args.seed)
    for step, batch in zip(range(args.steps), batches(stories, args, generator), strict=False):
        rate = args.lr * min(1, (step + 1) / 50, 2 * (args.steps - step) / args.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses = model(batch, return_type="loss", loss_per_token=True)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == args.steps - 1:
            half, known = args.batch // 2, PERIODS[1]
            story, first, again = (
                part.mean().item()
                for part in (losses.detach()[:half], losses.detach()[half:, :5], losses.detach()[half:, known:])
            )
            seconds = time.monotonic() - start
            line = f"step {step}: stories {story:.3f}, random {first:.3f}, repeated {again:.3f} nats; {seconds:.0f} s"
            print(line, flush=True)
    return model.eval()


def main(arguments: list[str] | None = None) -> None:
    """Train and save."""
    args = parse_args(arguments)
    bilens.save(train(args), args.out)


if __name__ == "__main__":
    main()
