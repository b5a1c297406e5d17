"""The graph of an output feature: input features, their strongest pairs, the feature, the tokens it promotes."""

from typing import NamedTuple

from bilens.circuits.findings import Finding
from bilens.circuits.layer import FeatureLayer

from .parts import rows_of

_WIDE, _BOX, _STEP, _TOP = 1060, 216, 34, 16  # of the drawing, of a node, between rows, above the first
_LONGEST = 31  # characters that fit a node


class Node(NamedTuple):
    """A box that is a link."""

    x: float
    y: float
    href: str
    text: str
    says: str


class Edge(NamedTuple):
    """A line between two boxes."""

    sign: str
    path: str
    width: str


class Graph(NamedTuple):
    """The drawing."""

    nodes: list[Node]
    edges: list[Edge]
    height: str
    width: int = _WIDE
    box: int = _BOX


def graph(lens: FeatureLayer, one: Finding, n: int = 8) -> Graph:
    """Draw the n strongest pairs, from left to right; every node leads to a card."""
    rows = [row for row in rows_of(one.pairs) if max(row[1], row[2]) < len(lens.writers)][:n]
    inputs = list(dict.fromkeys(i for row in rows for i in row[1:3]))
    tokens = list(lens.out_cards[one.feature].promoted.items())[:5] if lens.out_cards is not None else []
    height = _TOP + _STEP * max(len(inputs), len(rows), len(tokens), 1)
    strongest = max((abs(row[3]) for row in rows), default=1.0)
    left, pair, out, right = (i * (_WIDE - _BOX) / 3 for i in range(4))
    edges, nodes, middle = [], [], height / 2

    def y(index: int, count: int) -> float:
        return (index + 0.5) * height / max(count, 1)

    for index, feature in enumerate(inputs):
        name = f"{feature} {lens.name('inp', feature)}"
        nodes.append(_node(left, y(index, len(inputs)), f"#inp-{feature}", name, f"Input feature {name}"))
    for index, (_, i, j, value) in enumerate(rows):
        at = y(index, len(rows))
        for leg in dict.fromkeys((i, j)):
            edges.append(_edge(left, y(inputs.index(leg), len(inputs)), pair, at, value / strongest))
        edges.append(_edge(pair, at, out, middle, value / strongest))
        name = f"{i} × {j}: {value:+.3f}"
        nodes.append(_node(pair, at, f"#inp-{i}", name, f"Pair {name}, to the first feature's card"))
    for index, (token, effect) in enumerate(tokens):
        at, says = y(index, len(tokens)), f"Promotes {token}, logit {effect:+.2f}"
        edges.append(_edge(out, middle, right, at, effect / tokens[0][1]))
        nodes.append(_node(right, at, f"#out-{one.feature}", f"{token} {effect:+.2f}", says))
    name = f"{one.feature} {one.label}"
    nodes.append(_node(out, middle, f"#out-{one.feature}", name, f"Output feature {name}"))
    return Graph(nodes, edges, f"{height:.0f}")


def _node(x: float, y: float, href: str, text: str, says: str) -> Node:
    return Node(x, y, href, text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…", says)


def _edge(x: float, y: float, to_x: float, to_y: float, share: float) -> Edge:
    """Draw a line as thick as its share of the strongest."""
    x, middle = x + _BOX, (x + _BOX + to_x) / 2
    path = f"M{x:.0f},{y:.0f} C{middle:.0f},{y:.0f} {middle:.0f},{to_y:.0f} {to_x:.0f},{to_y:.0f}"
    return Edge("plus" if share > 0 else "minus", path, f"{0.75 + 4 * abs(share):.1f}")
