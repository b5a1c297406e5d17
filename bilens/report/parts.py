"""Pieces of a page as values: links, tables, figures. The templates in `assets/report` write them."""

import json
from collections.abc import Sequence
from typing import NamedTuple

import plotly.graph_objects as go
from markupsafe import Markup

from bilens.circuits.layer import FeatureLayer
from bilens.tensor.interactions import Interactions

_TOP = 16  # pixels above a figure whose title stands over it


class Link(NamedTuple):
    """Text that leads to another place of the page, or nowhere."""

    text: str
    href: str | None


class Table(NamedTuple):
    """A table; numbers stand to the right."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str | float | int | Link]]

    @property
    def head(self) -> list[tuple[str, bool]]:
        """Names of the columns, and whether they hold numbers."""
        first = self.rows[0] if self.rows else self.header
        return [(name, isinstance(value, int | float)) for name, value in zip(self.header, first, strict=True)]


class Figure(NamedTuple):
    """A figure, its title, and a sentence that says what is to be seen."""

    title: str
    says: str
    height: int
    data: Markup  # JSON

    @classmethod
    def of(cls, drawn: go.Figure, says: str) -> "Figure":
        """Take a plotly figure; its title becomes text of the page, which breaks lines on any screen."""
        found = json.loads(drawn.to_json())
        layout = found["layout"]
        layout.pop("template", None)
        title = layout.pop("title").get("text", "").replace("<br>", " ")
        layout["height"] += _TOP - layout["margin"]["t"]
        layout["margin"]["t"] = _TOP
        data = json.dumps(found, separators=(",", ":")).replace("</", "<\\/")  # it stands in a <script>
        return cls(title, says, layout["height"], Markup(data))


class Word(NamedTuple):
    """A token of a text, how active something is there relative to its strongest, and what to say of it."""

    text: str
    shade: float
    peak: bool
    says: str = ""

    @property
    def marked(self) -> bool:
        """Whether there is something to see."""
        return self.peak or self.shade > 0.02


def to_card(lens: FeatureLayer, side: str, feature: int) -> Link:
    """Return a feature's name, as a link to its card; the constant leg has none."""
    if feature >= len(lens.writers if side == "inp" else lens.readers):
        return Link("(constant)", None)
    return Link(f"{feature} {lens.name(side, feature)}", f"#{side}-{feature}")


def rows_of(found: Interactions, n: int | None = None) -> list[tuple[int, int, int, float]]:
    """Return output, left, right and coefficient of the n strongest pairs."""
    return list(zip(*(part.tolist() for part in found), strict=True))[:n]
