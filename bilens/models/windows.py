"""Text as windows of tokens, and what a model's hook points see of them: the one reader of activations."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .text import token_ids
from .texts import Texts, rows_of, text_of
from .transformer import BilinearTransformer


@dataclass(frozen=True, eq=False, repr=False)
class Windows:
    """Windows of tokens, padded on the right, and which of their positions are seen and which are text."""

    tokens: Int[Tensor, "row seq"]
    attend: Bool[Tensor, "row seq"]  # all but padding
    counts: Bool[Tensor, "row seq"]  # text: neither BOS nor padding
    text: Int[Tensor, " row"]  # which text a window is cut from

    @classmethod
    def of(cls, model: BilinearTransformer, texts: Texts, length: int | None = None) -> "Windows":
        """Cut texts into windows that each start with BOS (if the model knows one), on the model's device.

        `text` numbers the texts as they are given; those that are `None` or hold no token have no window.

        Token ids are taken as they are, a window each. BOS is not text there, nor is the run of EOS (or of the
        tokenizer's padding token) that a window ends in: padding, as `model.to_tokens` pads, though a text that was
        ended by hand looks the same. Build the `Windows` from its parts where it must count.

        Args:
            model: Owner of the tokenizer.
            texts: A text; texts, or rows with a column `text`, of whatever `texts.rows_of` reads: lists, streams,
                `datasets` datasets, data frames, files by their `pathlib.Path`; or windows of token ids: integers of
                any width, as a tensor, an array or lists, one window or several.
            length: Tokens per window of text, BOS included; at most, and by default, the model's context.

        Raises:
            ValueError: No text at all; something that is not a text, by its number; texts for a model without a
                tokenizer; a length out of range; token ids that are outside the vocabulary or exceed the context.
        """
        rows = list(rows_of(texts))
        if not rows:
            raise ValueError("texts must hold at least one text or window of token ids, got none")
        first = next((row for row in rows if row is not None), None)
        if isinstance(first, int | np.integer) and not any(isinstance(row, str) for row in rows):  # one window
            rows, first = [rows], rows
        ids = isinstance(first, Sequence | Tensor | np.ndarray) and not isinstance(first, str | bytes)
        return _of_ids(model, rows, length) if ids else _of_texts(model, rows, length)

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        rows, seq = self.tokens.shape
        return f"Windows({rows} of up to {seq} tokens, {int(self.counts.sum())} of text)"

    def __getitem__(self, index: Any) -> "Windows":
        """Return some of the windows, by number, slice, mask or list of numbers."""
        index = torch.atleast_1d(torch.arange(len(self), device=self.tokens.device)[index])
        return Windows(self.tokens[index], self.attend[index], self.counts[index], self.text[index])

    @property
    def widths(self) -> Int[Tensor, " row"]:
        """How many columns each window needs."""
        return (self.attend * torch.arange(1, self.tokens.shape[1] + 1, device=self.tokens.device)).amax(1)

    def trim(self) -> "Windows":
        """Cut the columns that are padding in every window."""
        width = int(self.widths.max()) if len(self) else 0
        return Windows(self.tokens[:, :width], self.attend[:, :width], self.counts[:, :width], self.text)

    def to(self, device: torch.device | str) -> "Windows":
        """Return them on a device."""
        return Windows(*(part.to(device) for part in (self.tokens, self.attend, self.counts, self.text)))

    def batches(self, n: int) -> Iterator[tuple[Int[Tensor, " row"], "Windows"]]:
        """Yield n windows at a time, the longest first, trimmed: their numbers and they themselves."""
        if n < 1:
            raise ValueError(f"n must be at least 1 window at a time, got {n}")
        for rows in self.widths.argsort(descending=True, stable=True).split(n):
            yield rows, self[rows].trim()


def _of_ids(model: BilinearTransformer, rows: Sequence[Any], length: int | None) -> Windows:
    """Take windows of token ids as they are."""
    if length is not None:
        raise ValueError(f"length goes with texts, windows of token ids are taken as they are, got length={length}")
    ids = [_ids(row, index) for index, row in enumerate(rows)]
    longest = max(map(len, ids))
    if longest > model.cfg.n_ctx:
        raise ValueError(f"texts must hold windows of at most {model.cfg.n_ctx} token ids (n_ctx), got {longest}")
    if not longest:
        raise ValueError(f"texts must hold at least one token id, got {len(ids)} empty windows")
    tokens, there = _pad(model, ids)
    bad = there & ((tokens < 0) | (tokens >= model.cfg.d_vocab))
    if bad.any():
        row = int(bad.any(1).nonzero()[0])
        last = model.cfg.d_vocab - 1
        raise ValueError(f"texts must hold token ids from 0 to {last}, got {int(tokens[bad][0])} in window {row}")
    pads = torch.tensor(model.padding_ids, dtype=torch.int64, device=tokens.device)
    text = (there & ~torch.isin(tokens, pads)).flip(1).cummax(1).values.flip(1)  # up to the last that is no padding
    attend = text.clone()
    attend[:, 0] = True  # a window of padding alone still has a token to run on
    if model.tokenizer is not None and model.has_bos:
        text &= tokens != model.bos_id
    if not text.any():
        raise ValueError("texts must hold at least one token besides BOS and padding, got none")
    return Windows(tokens, attend, text, torch.arange(len(ids), device=tokens.device))


def _ids(row: Any, index: int) -> Int[Tensor, " seq"]:
    """Read one window of token ids."""
    ids = token_ids(row, f"texts (window {index})")
    if ids.ndim != 1:
        raise ValueError(f"texts must hold windows [seq] of token ids, got shape {list(ids.shape)} as window {index}")
    return ids


def _of_texts(model: BilinearTransformer, rows: Sequence[Any], length: int | None) -> Windows:
    """Cut texts into windows."""
    if model.tokenizer is None:
        raise ValueError("texts must be windows of token ids for a model without a tokenizer, got text")
    first = int(model.has_bos)  # the first position of text
    length = model.cfg.n_ctx if length is None else length
    if not first < length <= model.cfg.n_ctx:
        raise ValueError(f"length must lie between {first + 1} and {model.cfg.n_ctx} (n_ctx), got {length}")
    texts = [text_of(row, index) or "" for index, row in enumerate(rows)]
    start, step = [model.bos_id] if model.has_bos else [], length - first
    pieces, of = [], []
    for index, ids in enumerate(model.token_rows(texts)):
        ids = ids[1:] if start and ids[:1] == start else ids  # a text may spell BOS out
        cut = [torch.tensor(start + ids[i : i + step]) for i in range(0, len(ids), step)]
        pieces += cut
        of += [index] * len(cut)
    if not pieces:
        raise ValueError(f"texts must hold at least one text that is not empty, got {len(texts)} empty ones")
    tokens, attend = _pad(model, pieces)
    counts = attend.clone()
    counts[:, :first] = False
    return Windows(tokens, attend, counts, torch.tensor(of, device=tokens.device))


def holds_text(model: BilinearTransformer, text: str) -> bool:
    """Tell whether a text has a token, so that `Windows.of` finds a window in it."""
    first, ids = int(model.has_bos), model.token_rows([text])[0]
    return bool(ids[first:] if first and ids[:1] == [model.bos_id] else ids)


def _pad(
    model: BilinearTransformer, rows: Sequence[Int[Tensor, " _"]]
) -> tuple[Int[Tensor, "row seq"], Bool[Tensor, "row seq"]]:
    """Pad on the right, and say where there is something."""
    device, (pad, *_) = model.W_E.device, (*model.padding_ids, 0)
    tokens = pad_sequence(list(rows), batch_first=True, padding_value=pad).to(device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return tokens, torch.arange(tokens.shape[1], device=device) < lengths[:, None]


def layer_of(hook: str) -> int:
    """Return the block that a hook point belongs to; the embedding counts as part of the first."""
    if hook.startswith(("hook_embed", "ln_embed.")):
        return 0
    found = re.match(r"blocks\.(\d+)\.", hook)
    if not found:
        raise ValueError(f"hook must be 'hook_embed' or a hook point of a block, got {hook!r}")
    return int(found[1])


@torch.no_grad()
def observe(
    model: BilinearTransformer, windows: Windows, hooks: Sequence[str]
) -> dict[str, Float[Tensor, "row seq ..."]]:
    """Run a batch of windows as far as need be, and return what the hook points see, padding included.

    Raises:
        ValueError: No hook point, or one that the model does not have.
    """
    if isinstance(hooks, str) or not hooks:
        raise ValueError(f"hooks must be a list of hook point names, got {hooks!r}")
    whole = any(hook.startswith(("ln_final.", "unembed_")) for hook in hooks)
    windows = windows.to(model.W_E.device)
    _, cache = model.run_with_cache(
        windows.tokens,
        attention_mask=windows.attend,
        names_filter=list(hooks),
        stop_at_layer=None if whole else max(map(layer_of, hooks)) + 1,
        return_cache_object=False,
    )
    return cache


def observed(
    model: BilinearTransformer, windows: Windows, hooks: Sequence[str], batch: int = 32, start: int = 0
) -> Iterator[tuple[Int[Tensor, " row"], Windows, dict[str, Float[Tensor, "row seq ..."]]]]:
    """Run windows a batch at a time: their numbers, the batch as it ran (`Windows.batches`), and what was seen.

    The batches that hold the first `start` positions of text, in the order in which they run, are left out.
    """
    done = 0
    for rows, some in windows.batches(batch):
        done += int(some.counts.sum())
        if done <= start and start:
            continue
        yield rows, some, observe(model, some, hooks)
