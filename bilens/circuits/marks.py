"""Where groups of input features are active in a text, token by token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens.models.windows import Windows, observe
from bilens.tensor.records import Record

from .groups import Group
from .layer import FeatureLayer


@dataclass(frozen=True, eq=False, repr=False)
class Marked(Record, rows="token", along=("tokens",)):
    """How active each group is at each token of a text, BOS left out."""

    layer: int
    tokens: tuple[str, ...]
    roles: tuple[str, ...]
    values: Float[Tensor, "group token"]  # sum over the group's features
    strongest: Int[Tensor, "group token"]  # the most active of them
    spelt: tuple[str, ...] = ()  # the tokens as they stand in the text, with spaces

    def columns(self) -> dict[str, Any]:
        """Return the tokens, and how active each group is there."""
        return {"token": self.tokens} | dict(zip(self.roles, self.values, strict=True))


@torch.no_grad()
def mark(lens: FeatureLayer, text: str, groups: Sequence[Group]) -> Marked:
    """Say where in a text groups of input features are active.

    Args:
        lens: The layer.
        text: One text.
        groups: Groups of its input features; their weights do not count.

    Raises:
        ValueError: No groups, or one without features.
    """
    if not groups or not all(len(group.features) for group in groups):
        raise ValueError(f"groups must each hold an input feature, got {list(groups)}")
    windows = Windows.of(lens.model, [text])
    z = lens.codes(observe(lens.model, windows, [lens.hook_in])[lens.hook_in][windows.counts])
    parts = [z[:, group.features] for group in groups]
    strongest = [
        group.features.to(part.device)[part.argmax(1)].cpu() for group, part in zip(groups, parts, strict=True)
    ]
    ids = windows.tokens[windows.counts].tolist()
    tokens, spelt = tuple(lens.model.labels(ids)), tuple(lens.model.spellings(ids))
    roles = tuple(group.role for group in groups)
    values = torch.stack([part.sum(1).cpu() for part in parts])
    return Marked(lens.layer, tokens, roles, values, torch.stack(strongest), spelt)
