"""Negators and sentiment as groups, for a model that gives no verdicts: what the weights say, and the running model."""

from typing import Any

from bilens.circuits.couplings import CouplingTest, NegationCouplings
from bilens.circuits.groups import Group
from bilens.circuits.layer import FeatureLayer

from . import plots
from .parts import Figure, Table, to_card

_MEMBERS = 12  # features of a coupling's groups that are named


def groups(lens: FeatureLayer, found: NegationCouplings, test: CouplingTest | None) -> dict[str, Any]:
    """Return negators and sentiment as groups: the weights' answer layer by layer, and the running model's."""
    rows = []
    for one, q in zip(found.layers, found.q.tolist(), strict=True):
        numbers = (one.value[0].item(), one.z[0].item(), one.p[0].item(), q)
        rows.append((f"layer {one.layer}", len(one.left.features), len(one.right.features), *numbers))
    header = ("layer", "negators", "sentiment features", "mean interaction", "z", "p", "q")
    caption = "Negators × sentiment → logits of good less bad words; a negative value flips the sentiment"
    members = [
        {
            "role": group.role,
            "named": [to_card(lens, "inp", i) for i in _strongest(group)],
            "others": max(len(group.features) - _MEMBERS, 0),
        }
        for group in _groups(lens, found)
    ]
    shown = {"table": Table(caption, header, rows), "members": members, "test": test}
    return shown if test is None else shown | {"figures": _coupling_figures(test)}


def members(lens: FeatureLayer, found: NegationCouplings) -> list[int]:
    """Return the input features of this layer's groups that are named."""
    return [i for group in _groups(lens, found) for i in _strongest(group)]


def _groups(lens: FeatureLayer, found: NegationCouplings) -> list[Group]:
    return [group for one in found.layers if one.layer == lens.layer for group in (one.left, one.right)]


def _strongest(group: Group) -> list[int]:
    return group.features[group.weights.abs().argsort(descending=True, stable=True)][:_MEMBERS].tolist()


def _coupling_figures(test: CouplingTest) -> list[Figure]:
    kl = test.effect.kl[0].item()
    says = (
        f"KL of removing all their products, {kl:.3g}, among {len(test.scale)} random groups: percentile "
        f"{test.percentile['kl']:.0f}"
    )
    return [
        Figure.of(
            plots.predicted_measured(test.predicted, test.measured, "Change of good less bad without the products"),
            f"Predicted and measured change of good less bad correlate {test.correlation:.4f} at "
            f"{len(test.measured)} positions",
        ),
        Figure.of(plots.among(kl, test.controls.kl, "Effect on the predictions", "KL, nats"), says),
    ]
