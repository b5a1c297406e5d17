"""Labels beside points, of which no two overlap."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_LETTER, _LINE = 0.6, 1.4  # width of a letter and height of a line, of the size of the font
_DISTANCES, _ANGLES = (8, 18, 30, 44, 60, 80, 105, 135, 170), 16
_MARKER = 5.0  # radius of a marker with what is left around it
_STEPS = 8  # points of a leader line that are looked at


class Box(NamedTuple):
    """A rectangle, in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    @classmethod
    def around(cls, x: float, y: float, width: float, height: float) -> "Box":
        """Return the rectangle with its middle at a point."""
        return cls(x - width / 2, y - height / 2, x + width / 2, y + height / 2)

    def meets(self, other: "Box") -> bool:
        """Whether two rectangles have more than an edge in common."""
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def within(self, other: "Box") -> bool:
        """Whether it lies in another."""
        return (
            other.left <= self.left and self.right <= other.right and other.top <= self.top
        ) and self.bottom <= other.bottom


def size(text: str, font: float) -> tuple[float, float]:
    """Return about how wide and high a line of text is, rather too much than too little."""
    return _LETTER * font * len(text), _LINE * font


def place(
    points: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], area: Box
) -> list[tuple[float, float] | None]:
    """Find a place for the label of each point, the first point first: the nearest that is free.

    Labels meet neither each other, nor a marker, nor the line from another label to its point; one that finds no such
    place is left out.

    Args:
        points: Where the markers are.
        sizes: Width and height of the label of each of the first points; the others have none.
        area: Where labels may lie.

    Returns:
        The middle of each label, or `None`.
    """
    markers = [Box.around(x, y, 2 * _MARKER, 2 * _MARKER) for x, y in points]
    labels, lines, found = [], [], []
    for point, wanted in zip(points, sizes, strict=False):
        for at in _around(point, wanted):
            box, line = Box.around(*at, *wanted), _leader(point, at)
            free = box.within(area) and not any(map(box.meets, (*markers, *labels, *lines)))
            if free and not any(label.meets(part) for label in labels for part in line):
                labels.append(box)
                lines += line
                found.append(at)
                break
        else:
            found.append(None)
    return found


def _around(point: tuple[float, float], wanted: tuple[float, float]) -> Iterator[tuple[float, float]]:
    for distance in _DISTANCES:
        for step in range(_ANGLES):  # from straight above
            x, y = (f(2 * math.pi * step / _ANGLES) for f in (math.sin, math.cos))
            yield point[0] + x * (distance + wanted[0] / 2), point[1] - y * (distance + wanted[1] / 2)


def _leader(point: tuple[float, float], at: tuple[float, float]) -> list[Box]:
    """Return small boxes along the line from a point to its label's middle."""
    shares = [step / (_STEPS + 1) for step in range(2, _STEPS + 1)]
    between = [tuple(p + share * (q - p) for p, q in zip(point, at, strict=True)) for share in shares]
    return [Box.around(x, y, 2.0, 2.0) for x, y in between]
