"""Where a model is looked at: texts, and positions in them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bilens.models.texts import Texts, list_of, rows_of
from bilens.models.transformer import BilinearTransformer
from bilens.models.windows import Windows, observed
from bilens.tensor.records import Record


@dataclass(frozen=True, repr=False, eq=False)
class Places(Record, rows="position"):
    """Texts, a window each, and the positions of interest in them: `row[n], position[n]` is the n-th."""

    windows: Windows
    row: Int[Tensor, " position"]
    position: Int[Tensor, " position"]  # BOS is position 0
    words: tuple[tuple[str, ...], ...]  # the tokens of each text, without padding
    texts: tuple[str, ...]

    def word(self, n: int) -> str:
        """Return the token at the n-th position."""
        return self.words[self.row[n]][self.position[n]]

    def observe(self, model: BilinearTransformer, hooks: Sequence[str]) -> dict[str, Float[Tensor, "position ..."]]:
        """Run the model, and return in float64 what the hook points see at each position."""
        parts: dict[str, list[Tensor]] = {hook: [] for hook in hooks}
        order = []
        for rows, _, seen in observed(model, self.windows, list(parts)):
            one, here = (rows[:, None] == self.row).nonzero(as_tuple=True)  # row of the batch, position of interest
            order.append(here)
            for hook, some in parts.items():
                some.append(seen[hook][one, self.position[here]].double())
        back = torch.cat(order).argsort()
        return {hook: torch.cat(some)[back] for hook, some in parts.items()}

    def columns(self) -> dict[str, Any]:
        """Return the text, the position in it, and the word there."""
        return {"row": self.row, "position": self.position, "word": [self.word(n) for n in range(len(self))]}

    def facts(self) -> dict[str, Any]:
        """Return the texts."""
        return {"texts": self.texts}

    def __len__(self) -> int:
        return len(self.row)

    def __repr__(self) -> str:
        return f"Places({len(self)} positions in {len(self.texts)} texts)"


def locate(
    model: BilinearTransformer,
    text: Texts,
    position: int | None = None,
) -> Places:
    """Tokenise, and find the positions that are asked for.

    Args:
        model: The model.
        text: A text, texts, or token ids, of whatever `Windows.of` takes.
        position: Where, BOS being 0, and -1 the last token of each text; `None` for all but BOS.

    Raises:
        ValueError: No text, a text without tokens or longer than the context, or no such position.
    """
    rows = list(rows_of(text, "text"))
    windows = Windows.of(model, rows)
    if any(isinstance(row, str | Mapping) for row in rows):
        _check_whole(model, list_of(rows, "text"), windows)
    row, where = (windows.counts if position is None else _at(position, windows.attend)).nonzero(as_tuple=True)
    kept = [one[mask] for one, mask in zip(windows.tokens, windows.attend, strict=True)]
    words = tuple(tuple(model.labels(one.tolist())) for one in kept)
    texts = tuple(model.text_of(one.tolist()) for one in kept)
    return Places(windows, row, where, words, texts)


def check_layer(model: BilinearTransformer, layer: int) -> None:
    """Make sure that a model has a layer, and that what its attention and MLP return is what they add.

    Raises:
        ValueError: It has none of that number, or norms that come after attention and MLP.
    """
    if not 0 <= layer < model.cfg.n_layers:
        raise ValueError(f"layer must lie between 0 and {model.cfg.n_layers - 1}, got {layer}")
    check_adds(model)


def check_adds(model: BilinearTransformer) -> None:
    """Make sure that what a model's attention and MLPs return is what they add to the residual stream.

    Raises:
        ValueError: A norm comes between (OLMo2, Gemma): then no sum of heads, and no tensor, is what is added.
    """
    if model.cfg.norm is not None and model.cfg.norm.place != "before":
        raise ValueError(
            f"model must have its norms before attention and MLP only, so that what those return is what is added to "
            f"the residual stream, got place={model.cfg.norm.place!r}"
        )


def _check_whole(model: BilinearTransformer, texts: Sequence[str], windows: Windows) -> None:
    """Make sure that every text has exactly one window."""
    for index, count in enumerate(windows.text.bincount(minlength=len(texts)).tolist()):
        if count == 0:
            raise ValueError(f"text must hold a token besides BOS, got {texts[index]!r} as text {index}")
        if count > 1:
            raise ValueError(f"text must fit the context of {model.cfg.n_ctx} tokens, got more of them as text {index}")


def _at(position: int, attend: Bool[Tensor, "text seq"]) -> Bool[Tensor, "text seq"]:
    """Mark one position of each text, from its end if negative."""
    counts = torch.zeros_like(attend)
    for row, length in enumerate(attend.sum(1).tolist()):
        if not -length <= position < length:
            raise ValueError(f"position must lie between {-length} and {length - 1} in text {row}, got {position}")
        counts[row, position % length] = True
    return counts
