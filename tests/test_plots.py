"""Figures of circuits: labels that do not overlap, titles that fit."""

import pytest
import torch

from bilens.report import figures, plots
from bilens.report.labels import Box, place, size

LABELS = [f"the {i}th feature of them all / and" for i in range(14)]


def boxes(figure):
    """Return the labels of a plane as they lie in the figure, in pixels."""
    layout, found = figure.layout, []
    width = layout.width - layout.margin.l - layout.margin.r
    height = layout.height - layout.margin.t - layout.margin.b
    limit = layout.xaxis.range[1]
    for one in layout.annotations:
        at = (one.x / limit + 1) * width / 2 + one.ax, (1 - one.y / limit) * height / 2 + one.ay
        found.append(Box.around(*at, *size(one.text, float(one.font.size))))
    return found, Box(0.0, 0.0, float(width), float(height))


@pytest.mark.parametrize(("spread", "least"), [(1.0, 8), (0.05, 4), (0.0, 2)])
def test_labels_of_a_plane_do_not_overlap(spread, least):
    """Also where the points lie close together, or all in one place."""
    points = 0.4 + spread * torch.randn(14, 2, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    figure = plots.cosine_plane(points, LABELS, ("v1", "v2"))
    found, area = boxes(figure)
    assert len(found) >= least
    assert all(box.within(area) for box in found)
    assert not [1 for i, box in enumerate(found) for other in found[:i] if box.meets(other)]
    assert list(figure.data[0].customdata) == LABELS


def test_the_first_points_are_named_first():
    points = [(50.0, 50.0)] * 40
    found = place(points, [(40.0, 14.0)] * 40, Box(0.0, 0.0, 100.0, 100.0))
    named = [i for i, at in enumerate(found) if at is not None]
    assert 0 in named
    assert len(named) < 40
    assert place([(50.0, 50.0)], [(200.0, 14.0)], Box(0.0, 0.0, 100.0, 100.0)) == [None]


def test_a_long_title_takes_as_many_lines_as_it_needs():
    title = "A title that is much too long for a figure of this width, " * 3
    figure = figures.draw(title=title, width=360)
    lines = figure.layout.title.text.split("<br>")
    assert " ".join(lines) == title.strip()
    assert max(map(len, lines)) * 8.5 <= 360
    assert figure.layout.margin.t >= 20 * len(lines)
