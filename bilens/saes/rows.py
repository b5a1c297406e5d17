"""Rows, which `bilens.models.windows.Windows` replaces; gone when circuits reads windows."""

from typing import NamedTuple

import torch
from torch import Tensor

from bilens.models.transformer import BilinearTransformer
from bilens.models.windows import Texts, Windows, layer_of, observe

__all__ = ["Rows", "activations", "layer_of", "text_of_rows", "to_rows", "trim"]


class Rows(NamedTuple):
    """Windows without the numbers of their texts."""

    tokens: Tensor
    attend: Tensor
    counts: Tensor


def to_rows(model: BilinearTransformer, texts: Texts, length: int | None = None) -> Rows:
    """Cut texts into windows."""
    windows = Windows.of(model, texts, length)
    return Rows(windows.tokens, windows.attend, windows.counts)


def text_of_rows(model: BilinearTransformer, texts: Texts, length: int | None = None) -> Tensor:
    """Return which text each window of `to_rows` is cut from."""
    return Windows.of(model, texts, length).text


def trim(rows: Rows) -> Rows:
    """Cut columns that are padding in every row."""
    width = int(rows.attend.any(0).nonzero().max()) + 1
    return Rows(*(part[:, :width] for part in rows))


def activations(model: BilinearTransformer, rows: Rows, hooks: list[str]) -> dict[str, Tensor]:
    """Run the model and return what the hook points see."""
    return observe(model, Windows(*rows, torch.arange(len(rows.tokens))), hooks)
