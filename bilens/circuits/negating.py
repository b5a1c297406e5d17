"""Negation that flips a verdict: the search for it in the weights of all layers, and the model without it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bilens.models.texts import Texts
from bilens.models.transformer import BilinearTransformer
from bilens.tensor.records import Record

from .candidates import PLACES, Candidates, candidates
from .couplings import Coupling, couple
from .discovery import q_values
from .groups import Group
from .layer import FeatureLayer
from .records import plain
from .singles import Singles, singles
from .statements import MinimalPair, halves, minimal_pairs
from .turning import FlipTest, flip_test
from .verdict import (
    SENTENCES,
    STANDARD,
    Asked,
    Behaviour,
    Readout,
    ask_pairs,
    behaviour,
    log_odds,
    verdict_direction,
)

VERDICT = "verdict"


@dataclass(frozen=True, repr=False)
class Single(Record):
    """One pair of input features that acts on an output direction, by the names of their cards."""

    layer: int
    place: str
    left: int
    right: int
    names: tuple[str, str]
    output: str
    value: float
    p: float
    q: float
    q_own: float  # with each feature's own size taken out


@dataclass(frozen=True, eq=False, repr=False)
class GroupCoupling(Record):
    """The groups of one layer in one place, and whether their products turn the verdict."""

    place: str
    names: tuple[str, str]
    coupling: Coupling  # one output
    q: float

    def to_dict(self) -> dict[str, Any]:
        """Return groups and numbers."""
        one, about = self.coupling, {"layer": self.coupling.layer, "place": self.place, "names": self.names}
        numbers = {"output": one.outputs[0], "value": one.value[0], "z": one.z[0], "p": one.p[0], "q": self.q}
        groups = {group.role: {"features": group.features, "weights": group.weights} for group in (one.left, one.right)}
        return plain(about | numbers | groups)


@dataclass(frozen=True, eq=False)
class NegationSearch(Record, held="pairs"):
    """What the weights say of negators and sentiment in all layers and places."""

    candidates: tuple[Candidates, ...]
    groups: tuple[GroupCoupling, ...]  # most significant first
    pairs: tuple[Single, ...]  # the strongest, most significant first
    n_tested: int  # single pairs × outputs
    n_found: int  # of them at q < 0.01
    n_found_own: int  # the same with each feature's own size taken out

    @property
    def by_singles(self) -> bool:
        """Whether single features hold the negation at q < 0.01; groups may if they do not."""
        return self.n_found > 0

    def __repr__(self) -> str:
        best = self.groups[0] if self.groups else None
        told = f"; groups: layer {best.coupling.layer} at the {best.place}, q={best.q:.2g}" if best else ""
        return f"NegationSearch({self.n_found} of {self.n_tested} single pairs at q < 0.01{told})"

    def to_dict(self) -> dict[str, Any]:
        """Return all but the candidates that make no groups."""
        about = {
            "tested": self.n_tested,
            "found": self.n_found,
            "found_own": self.n_found_own,
            "by_singles": self.by_singles,
        }
        pairs = [vars(one) for one in self.pairs]
        return plain(about | {"pairs": pairs, "groups": [one.to_dict() for one in self.groups]})


@dataclass(frozen=True, eq=False)
class Negation(Record):
    """What the model does with negators, which products do it, and what it does without them."""

    readout: Readout
    behaviour: Behaviour
    search: NegationSearch
    test: FlipTest | None  # None where no layer has both groups

    def __repr__(self) -> str:
        return f"Negation({self.search!r}, {self.test!r})"

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers."""
        about = {"prompt": self.readout.prompt, "good": self.readout.good, "bad": self.readout.bad}
        parts = {"behaviour": self.behaviour.to_dict(), "search": self.search.to_dict()}
        return plain({"readout": about} | parts | {"test": None if self.test is None else self.test.to_dict()})


# eight parameters: what is asked of what, how features are chosen, and against how many draws
def negation(
    lenses: Mapping[int, FeatureLayer],
    pairs: Sequence[MinimalPair] | None = None,
    *,
    generator: torch.Generator,
    readout: Readout = STANDARD,
    sentences: Texts = SENTENCES,
    tells: float | None = None,
    n_controls: int = 5,
    n_null: int = 2000,
) -> Negation:
    """Find the products of negators and sentiment that flip verdicts, and take them out of the running model.

    One half of the pairs, by words and frames, chooses the features (`candidates`); the weights say which of them act
    together on the verdict (`search_negation`); the other half tests it (`flip_test`).

    Args:
        lenses: All layers of one model, each between its SAEs.
        pairs: Minimal pairs; the built-in ones if `None`.
        generator: Source of the null models and controls.
        readout: How the model is asked.
        sentences: Statements for the table of behaviour.
        tells: What makes a candidate, as for `candidates`.
        n_controls: Random edits beside the circuit's.
        n_null: Draws of each null model of the groups.

    Raises:
        ValueError: No layers, or pairs whose halves lack good or bad words.
    """
    model = _model(lenses)
    choose, test = halves(minimal_pairs() if pairs is None else pairs)
    told = behaviour(model, sentences, readout)
    found = search_negation(lenses, choose, generator=generator, readout=readout, tells=tells, n_null=n_null)
    options = {"readout": readout, "generator": generator, "n_controls": n_controls}
    tested = flip_test(lenses, found.candidates, test, **options) if any(found.candidates) else None
    return Negation(readout, told, found, tested)


def _model(lenses: Mapping[int, FeatureLayer]) -> BilinearTransformer:
    models = {id(lens.model): lens.model for lens in lenses.values()}
    if len(models) != 1:
        raise ValueError(f"lenses must be layers of one model, got {len(models)} models")
    return next(iter(models.values()))


# eight parameters, as above
def search_negation(
    lenses: Mapping[int, FeatureLayer],
    pairs: Sequence[MinimalPair],
    *,
    generator: torch.Generator,
    readout: Readout = STANDARD,
    tells: float | None = None,
    n_null: int = 10_000,
    n_singles: int = 16,
    n_shown: int = 12,
) -> NegationSearch:
    """Search all layers, at the word and at the readout, for products of negators and sentiment that turn the verdict.

    Single features first: each of the strongest negators with each of the strongest sentiment features, on the verdict
    and on the output features that carry it, against all pairs of the layer (`singles`). Then the groups, on the
    verdict alone (`couple`). q-values are over all layers and places, of the singles and of the groups.

    At the readout the verdict is `verdict_direction`; at the word, whose share of the verdict passes through attention
    and later layers, the mean gradient of the log-odds.

    Args:
        lenses: Layers of one model.
        pairs: Minimal pairs, from which the candidates are chosen.
        generator: Source of the null models of the groups.
        readout: How the model is asked.
        tells: What makes a candidate, as for `candidates`.
        n_null: Draws of each null model of the groups.
        n_singles: Negators, and sentiment features, of each layer and place that are tested one by one.
        n_shown: Single pairs that are kept.
    """
    model = _model(lenses)
    chosen = candidates(lenses, pairs, readout, tells=tells)
    directions = verdict_gradients(lenses, ask_pairs(model, pairs, readout), readout)
    alone, together = [], []
    for one in filter(bool, chosen):
        lens = lenses[one.layer]
        verdict = verdict_direction(model, readout) if one.place == "readout" else directions[one.layer, one.place]
        if not verdict.any():  # nothing that the last layer writes at the word gets to the readout
            continue
        few = (_first(one.negators, n_singles), _first(one.sentiment, n_singles))
        alone.append((one, singles(lens, *few, {VERDICT: verdict} | _carriers(lens, one))))
        null = ("features", "weights") if len(one.sentiment.weights.unique()) > 1 else ("features",)
        options = {"generator": generator, "n": n_null, "null": null}
        together.append((one, couple(lens, one.negators, one.sentiment, {VERDICT: verdict}, **options)))
    pairs_found = _rank(lenses, alone, n_shown)
    return NegationSearch(tuple(chosen), _groups(lenses, together), *pairs_found)


def _first(group: Group, n: int) -> Group:
    return group[:n]


def _carriers(lens: FeatureLayer, one: Candidates) -> dict[str, Float[Tensor, " d_model"]]:
    """Return the readers of the output features that carry the verdict, turned so that good is positive."""
    signs = one.carriers.weights.sign().tolist()
    return {
        f"output feature {feature}": sign * lens.readers[feature]
        for feature, sign in zip(one.carriers.features.tolist(), signs, strict=True)
    }


def _rank(
    lenses: Mapping[int, FeatureLayer], alone: Sequence[tuple[Candidates, Singles]], n_shown: int
) -> tuple[tuple[Single, ...], int, int, int]:
    """Return the most significant single pairs, how many were tested, and how many have q < 0.01, by p and `p_own`."""
    if not alone:
        return (), 0, 0, 0
    p = torch.cat([one.p.flatten() for _, one in alone])
    q, q_own = q_values(p), q_values(torch.cat([one.p_own.flatten() for _, one in alone]))
    shown, sizes = [], [one.p.numel() for _, one in alone]
    starts = torch.tensor([0, *sizes]).cumsum(0)
    for index in p.argsort(stable=True)[:n_shown].tolist():
        which = int((starts <= index).sum()) - 1
        one, found = alone[which]
        a, b, o = (int(i) for i in torch.unravel_index(torch.tensor(index - int(starts[which])), found.p.shape))
        left, right = found.left.features[a].item(), found.right.features[b].item()
        names = tuple(lenses[one.layer].name("inp", feature) for feature in (left, right))
        numbers = (found.value[a, b, o].item(), *(some[index].item() for some in (p, q, q_own)))
        shown.append(Single(one.layer, one.place, left, right, names, found.outputs[o], *numbers))
    return tuple(shown), len(p), *(int((some < 0.01).sum()) for some in (q, q_own))


def _groups(
    lenses: Mapping[int, FeatureLayer], together: Sequence[tuple[Candidates, Coupling]]
) -> tuple[GroupCoupling, ...]:
    """Return the couplings of the groups with their q-values and names, most significant first."""
    if not together:
        return ()
    q = q_values(torch.cat([coupling.p for _, coupling in together])).tolist()
    found = []
    for (one, coupling), each in zip(together, q, strict=True):
        names = tuple(_group_name(lenses[one.layer], group) for group in (one.negators, one.sentiment))
        found.append(GroupCoupling(one.place, names, coupling, each))
    return tuple(sorted(found, key=lambda one: (one.q, -abs(one.coupling.z[0].item()))))


def _group_name(lens: FeatureLayer, group: Group) -> str:
    """Name a group by its strongest member: what all of them have in common is the place where they are looked at."""
    first, *others = group.features.tolist()
    return lens.name("inp", first) + (f" and {len(others)} more" if others else "")


def verdict_gradients(
    lenses: Mapping[int, FeatureLayer], asked: Asked, readout: Readout = STANDARD
) -> dict[tuple[int, str], Float[Tensor, " d_model"]]:
    """Return the mean gradient of the log-odds by what each layer writes at the word, and at the readout.

    It holds attention and later layers as they are to first order: what a small push there does to the verdict.
    """
    model = _model(lenses)
    total = {(layer, place): model.W_E.new_zeros(model.cfg.d_model) for layer in lenses for place in PLACES}
    for _, some in asked.batches():
        rows = torch.arange(len(some), device=some.last.device)
        pushes = {key: model.W_E.new_zeros(len(some), model.cfg.d_model).requires_grad_() for key in total}
        where = {"word": some.word, "readout": some.last}

        def pushed(y: Tensor, hook: Any, layer: int, pushes: Any = pushes, where: Any = where, rows: Any = rows):
            for place in PLACES:
                there = where[place] >= 0
                y = y.index_put((rows[there], where[place][there]), pushes[layer, place][there], accumulate=True)
            return y

        hooks = [
            (lens.hook_out, lambda y, hook, layer=layer, pushed=pushed: pushed(y, hook, layer))
            for layer, lens in lenses.items()
        ]
        with torch.enable_grad(), model.hooks(fwd_hooks=hooks):
            resid = model(some.windows.tokens, attention_mask=some.windows.attend, stop_at_layer=model.cfg.n_layers)
            odds = log_odds(model, model.unembed(model.ln_final(resid[rows, some.last])), readout).sum()
            found = torch.autograd.grad(odds, list(pushes.values()))
        for key, gradient in zip(pushes, found, strict=True):
            total[key] += gradient.sum(0)
    return {key: gradient / len(asked) for key, gradient in total.items()}
