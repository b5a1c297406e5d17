"""Rotary positions: the frequencies that checkpoints ask for, and the rotation of queries and keys by them."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Angles = tuple[Float[Tensor, "batch seq half"], Float[Tensor, "batch seq half"]]


@dataclass(frozen=True)
class Rope:
    """How fast each pair of a head's dimensions turns with position: `f_i = base^(-2i/d_head)`, possibly stretched.

    A stretched kind blends each frequency with its `factor`-th part, `f_i (keep_i + (1 - keep_i) / factor)`, where
    keep_i rises from 0 to 1 between frequencies that turn `turns[0]` and `turns[1]` times within `original_ctx`:
    linearly in the number of turns (`"llama3"`) or in i (`"yarn"`, arXiv 2309.00071); `"linear"` keeps nothing.
    `"default"` is as transformers rounds it, `"published"` as the bilinear checkpoints' models always were here: the
    same to a unit in the last place, which position 4096 makes 1e-4 of a radian.

    `tables` rounds cosines and sines, which then are those of float32 whatever the activations' dtype: they are part of
    the model. `reverse` turns the other way, by -f_i: the same scores as of weights whose second halves are negated.
    """

    base: float = 10000.0
    kind: Literal["published", "default", "linear", "llama3", "yarn"] = "published"
    factor: float = 1.0  # by how much the context was stretched
    original_ctx: int = 0  # the context before that (llama3, yarn)
    turns: tuple[float, float] = (1.0, 1.0)
    gain: float = 1.0  # on cosines and sines (yarn), so squared on the scores
    whole: bool = True  # whether the ends of yarn's ramp are rounded to whole indices
    reverse: bool = False  # whether pairs turn against Llama's direction
    tables: Literal["float32", "bfloat16"] = "float32"  # what cosines and sines are rounded to

    def __post_init__(self):
        if self.tables not in ("float32", "bfloat16"):
            raise ValueError(f"tables must be 'float32' (as they are) or 'bfloat16', got {self.tables!r}")
        for name in ("base", "factor", "gain"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.kind in ("llama3", "yarn"):
            low, high = self.turns
            if not 0 < low < high:
                raise ValueError(f"turns must be positive and increasing for kind {self.kind!r}, got {self.turns}")
            if self.original_ctx < 1:
                raise ValueError(f"original_ctx must be at least 1 for kind {self.kind!r}, got {self.original_ctx}")

    def frequencies(
        self, d_head: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> Float[Tensor, " half"]:
        """Return the angle, in radians, by which each pair turns from one position to the next."""
        index = torch.arange(0, d_head, 2, device=device, dtype=dtype)
        if self.kind == "published":
            return self.base ** (-index / d_head)
        frequencies = 1 / self.base ** (index / d_head)
        if self.kind == "default":
            return frequencies
        keep = self._keep(frequencies, d_head)
        return (1 - keep) * frequencies / self.factor + keep * frequencies

    def _keep(self, frequencies: Float[Tensor, " half"], d_head: int) -> Float[Tensor, " half"]:
        low, high = self.turns
        if self.kind == "linear":
            return torch.zeros_like(frequencies)
        if self.kind == "llama3":
            turned = self.original_ctx * frequencies / (2 * math.pi)
            return ((turned - low) / (high - low)).clamp(0, 1)
        # the index, as a real number, of the frequency that turns that often
        first, last = (
            d_head * math.log(self.original_ctx / (turn * 2 * math.pi)) / (2 * math.log(self.base))
            for turn in (high, low)
        )
        if self.whole:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, d_head - 1)
        index = torch.arange(len(frequencies), device=frequencies.device, dtype=frequencies.dtype)
        return 1 - ((index - first) / (last - first or 1e-3)).clamp(0, 1)

    def angles(self, positions: Tensor, d_head: int, dtype: torch.dtype) -> Angles:
        """Return cosines and sines of `position · f_i`, times `gain`, at least in float32.

        Args:
            positions: Integer positions, `[batch, seq]`.
            d_head: Width of a head; half as many angles.
            dtype: The activations' dtype.
        """
        rounded = self.tables == "bfloat16"
        dtype = torch.float32 if rounded else torch.promote_types(dtype, torch.float32)
        angles = positions[..., None].to(dtype) * self.frequencies(d_head, dtype, positions.device)
        cos, sin = angles.cos(), (-angles if self.reverse else angles).sin()
        if rounded:
            cos, sin = cos.bfloat16().float(), sin.bfloat16().float()
        return (cos, sin) if self.gain == 1 else (cos * self.gain, sin * self.gain)


def rotate(x: Float[Tensor, "batch seq head d_head"], angles: Angles) -> Float[Tensor, "batch seq head d_head"]:
    """Rotate each pair `(x_i, x_{i + d_head/2})` by the angle of its position (half-split layout)."""
    cos, sin = (part[:, :, None] for part in angles)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
