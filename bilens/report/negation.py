"""What the report says first: the model's verdicts, where negators turn them, by which features, and without these."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from bilens.circuits.groups import Group
from bilens.circuits.layer import FeatureLayer
from bilens.circuits.marks import Marked
from bilens.circuits.negating import GroupCoupling, Negation
from bilens.circuits.turning import FlipTest
from bilens.circuits.verdict import Flips

from . import plots
from .parts import Figure, Link, Table, Word, to_card

_MEMBERS = 12  # features of a group that are named
_PAIRS = 8  # single pairs that are shown
_SURE = 0.01  # q of a single pair that counts


class Line(NamedTuple):
    """A sentence with the tokens marked at which one group is active."""

    role: str
    words: Sequence[Word]


def section(lens: FeatureLayer, found: Negation, marked: Sequence[Marked]) -> dict[str, Any]:
    """Return the section's tables, groups, sentences and figures; what is in this layer is linked to its card."""
    readout, search = found.readout, found.search
    shown = {"behaviour": _behaviour(found), "where": _where(found), "search": search, "sure": _SURE}
    shown |= {"pairs": _pairs(lens, found) if search.by_singles else None, "groups": _groups(lens, found)}
    shown |= {"prompt": readout.prompt.strip(), "sentences": [_lines(lens, one) for one in marked]}
    if found.test is not None:
        shown |= {"flips": _flips(found.test), "figures": [_figure(found.test)]}
    return shown


def members(lens: FeatureLayer, found: Negation) -> list[int]:
    """Return the input features of this layer that the section names."""
    named = [i for one in _here(lens, found) for group in halves(one) for i in _strongest(group)]
    pairs = [one for one in found.search.pairs[:_PAIRS] if one.layer == lens.layer]
    return list(dict.fromkeys(named + [i for one in pairs for i in (one.left, one.right)]))


def halves(one: GroupCoupling) -> list[Group]:
    """Return the negators, and the features of good and of bad words as groups of their own."""
    found, words = [one.coupling.left], one.coupling.right
    for role, keep in (("good words", words.weights > 0), ("bad words", words.weights < 0)):
        if keep.any():
            found.append(Group(role, words.features[keep], words.weights[keep]))
    return found


def _here(lens: FeatureLayer, found: Negation) -> list[GroupCoupling]:
    return [one for one in found.search.groups if one.coupling.layer == lens.layer]


def _strongest(group: Group) -> list[int]:
    return group.features[group.weights.abs().argsort(descending=True, stable=True)][:_MEMBERS].tolist()


def _behaviour(found: Negation) -> Table:
    told, readout = found.behaviour, found.readout
    rows = list(zip(told.statements, told.log_odds.tolist(), told.words, strict=True))
    header = ("statement", "log-odds", "likeliest word")
    caption = f"Log-odds of {' or '.join(readout.good)} against {' or '.join(readout.bad)}"
    return Table(caption, header, rows)


def _where(found: Negation) -> Table:
    rows = []
    for one in sorted(found.search.groups, key=lambda one: (one.coupling.layer, one.place)):
        groups = one.coupling
        sizes = len(groups.left.features), len(groups.right.features)
        rows.append((f"layer {groups.layer}", f"at the {one.place}", *sizes, groups.z[0].item(), one.q))
    header = ("layer", "place", "negators", "sentiment features", "z", "q")
    return Table("Negators × sentiment → verdict, from the weights; a negative z turns the verdict", header, rows)


def _pairs(lens: FeatureLayer, found: Negation) -> Table:
    rows = []
    for one in [pair for pair in found.search.pairs if pair.q < _SURE][:_PAIRS]:
        legs = [
            to_card(lens, "inp", feature) if one.layer == lens.layer else Link(f"{feature} {name}", None)
            for feature, name in zip((one.left, one.right), one.names, strict=True)
        ]
        rows.append((f"layer {one.layer}, {one.place}", *legs, one.output, one.value, one.q))
    header = ("layer", "negator", "× sentiment", "→", "interaction", "q")
    return Table("Single pairs of features that turn the verdict, from the weights", header, rows)


def _groups(lens: FeatureLayer, found: Negation) -> list[dict[str, Any]]:
    """Return the groups of this layer by name, the more significant place first."""
    groups = [(f"{group.role}, at the {one.place}", group) for one in _here(lens, found) for group in halves(one)]
    return [
        {
            "role": role,
            "named": [to_card(lens, "inp", feature) for feature in _strongest(group)],
            "others": max(len(group.features) - _MEMBERS, 0),
        }
        for role, group in groups
    ]


def _lines(lens: FeatureLayer, one: Marked) -> list[Line]:
    """Return the sentence once for each group; shades are relative to the group's strongest token."""
    lines = []
    for role, values, strongest in zip(one.roles, one.values.tolist(), one.strongest.tolist(), strict=True):
        most = max(*values, 0.0) or 1.0
        says = [
            f"{role} {value:.2f}, most of it {feature} {lens.name('inp', feature)}"
            for value, feature in zip(values, strongest, strict=True)
        ]
        words = zip(one.spelt or one.tokens, values, says, strict=True)
        lines.append(Line(role, [Word(text, max(value, 0) / most, False, what) for text, value, what in words]))
    return lines


def _flips(test: FlipTest) -> Table:
    """Return how many pairs flip, in percent, under each edit."""
    rows = [("nothing", *_percent([test.before])), ("all of their products", *_percent([test.after]))]
    rows += [(f"those at the {place}", *_percent([one])) for place, one in test.by_place.items()]
    for name, some in (("random ones", test.controls), ("random ones of equal strength", test.matched)):
        rows += [(f"{name}, least of {len(some)}", *_percent(some))] if some else []
    header = ("taken out", "good words flip", "bad words flip", "all flip", "plain ones right")
    caption = f"Minimal pairs ({len(test.measured)}) that change their verdict, in percent"
    return Table(caption, header, rows)


def _percent(some: Sequence[Flips]) -> list[float]:
    return [round(100 * min(getattr(one, name) for one in some), 1) for name in ("good", "bad", "all", "plain")]


def _figure(test: FlipTest) -> Figure:
    return Figure.of(
        plots.predicted_measured(test.predicted, test.measured, "Change of the verdict without the products"),
        f"Predicted (by the direct path) and measured change of the log-odds correlate {test.correlation:.2f} over "
        f"{len(test.measured)} negated statements",
    )
