"""Every public record is a table: in a notebook, as a data frame, in a line of text, and as a figure."""

import copy
import dataclasses
import importlib
import inspect
import pickle
import sys
import types
import typing
from functools import partial
from html import escape
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

import bilens
from bilens import saes
from bilens.circuits import discovery, paths, sources, traces
from bilens.circuits.targets import Target
from bilens.images.reading import Truncation
from bilens.report import plots
from bilens.tensor.decompositions import Eigen
from bilens.tensor.interactions import Interactions
from bilens.tensor.records import Rows
from bilens.tensor.tables import Tabular

WINGS = ("tensor", "models", "saes", "circuits", "images")
OBJECTS = {  # what is asked rather than read: models, layers, texts, and how something is to be done
    *("BilinearTensor", "BilinearForm", "LinearMap", "FeatureLayer", "BilinearAutoencoder", "VirtualTokens", "Entries"),
    *("Windows", "Baseline", "Seen", "Asked", "Entry", "Reading", "Scoring", "ContextTally", "RoleTally", "Active"),
    *("Toy", "Gate", "Plan", "Shape", "Protocol", "Recipe", "Tuning", "Roles", "Line", "Word", "Rope", "Family"),
    *("Local", "Projection", "Frame", "Wanted", "Tabular", "Facts", "Sampling", "StoredTokenizer", "Ends", "Cost"),
}


def is_record_like(kind):
    named = isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")
    return isinstance(kind, type) and (named or dataclasses.is_dataclass(kind))


def kinds_in(annotation):
    """Yield the classes that an annotation is made of."""
    if is_record_like(annotation):
        yield annotation
    for part in typing.get_args(annotation):
        yield from kinds_in(part)


def public_modules():
    """Return the modules that the wings' tables name, and those whose names they hold."""
    tables = [importlib.import_module(f"bilens.{wing}") for wing in WINGS]
    public = [getattr(table, name) for table in tables for name in table.__all__]
    named = {
        value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", "") for value in public
    }
    return [sys.modules[name] for name in sorted(named) if name.startswith("bilens.")]


def public_kinds():
    """Yield every dataclass and named tuple that a public module defines, or that a public function returns."""
    for module in public_modules():
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
                continue
            if inspect.isfunction(value):
                yield from kinds_in(inspect.signature(value).return_annotation)
            elif inspect.isclass(value):
                yield from kinds_in(value)


KINDS = {kind for kind in public_kinds() if not kind.__name__.startswith("_") and kind.__module__.startswith("bilens")}
RECORDS = [kind for kind in KINDS if kind.__name__ not in OBJECTS and not kind.__name__.endswith("Config")]
RECORDS = sorted(RECORDS, key=lambda kind: (kind.__module__, kind.__name__))
NAME = "<b>&"  # a name that is no HTML


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_every_public_record_is_a_table(kind):
    assert issubclass(kind, Tabular), f"{kind} is none: it needs `Record` or `@tabular`, or stands among OBJECTS"


# -- an instance of each, made from what its fields are annotated with -------------------------------------------------


def size_of(dim):
    """Return how long an axis of a record is here: by its name, so that axes of one name agree."""
    return int(dim) if dim.isdigit() else 4 + sum(map(ord, dim)) % 3


def made(annotation, name=""):
    """Return a value that an annotation admits."""
    if hasattr(annotation, "dim_str"):
        dims = [dim.strip("#?") for dim in annotation.dim_str.split() if dim[0] not in "*."]
        shape = [size_of(dim) for dim in dims]
        numbers = torch.arange(1, 1 + int(torch.tensor(shape).prod())).reshape(shape)
        kind = str(annotation)
        return numbers % 2 == 0 if "Bool" in kind else numbers % 4 if "Int" in kind else numbers / numbers.max() - 0.4
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return made(parts[0], name) if parts[0] in (str, int, float) else None
    if origin is typing.Literal:
        return parts[0]
    if origin is tuple:
        return tuple(made(parts[0], name) for _ in range(3)) if Ellipsis in parts else tuple(map(made, parts))
    if origin is dict:
        return {key: made(parts[1], name) for key in ("pair", NAME)}
    plain = {str: NAME, int: 1, float: 0.5, bool: True, torch.dtype: torch.float32}
    return plain[annotation] if annotation in plain else instance(annotation)


def instance(kind):
    """Return a record of a kind; fields along its rows that no axis says have as many entries as it has rows."""
    types_of = typing.get_type_hints(kind, include_extras=True)
    names = kind._fields if issubclass(kind, tuple) else [one.name for one in dataclasses.fields(kind)]
    fixed = FIXED.get(kind.__name__, {})
    held = {name: made(types_of[name], name) for name in names if name not in fixed}
    for name in kind._along:
        if isinstance(held.get(name), tuple) and not isinstance(held[name], Tabular):
            part = typing.get_args(types_of[name])[0]
            held[name] = tuple(made(part, name) for _ in range(size_of(kind._rows)))
    return kind(**held | fixed)


FIXED = {  # what the classes themselves ask of their fields
    "ImageSet": {"x": torch.full((size_of("n"), 5, 5), 0.5), "names": tuple("0123")},
    "Circuit": {"left": 1, "right": 2},
    "Marked": {"roles": (NAME,) * size_of("group")},
    "Modification": {"names": (NAME,) * size_of("k")},
    "Evaluation": {"loss": 2.0, "loss_spliced": 3.0, "loss_zero": 4.0, "loss_mean": 5.0},
    "Node": {"children": ()},
    **{name: {"size": (1, size_of("pixels"))} for name in ("Masks", "ClassEigen")},
}


class Reader(HTMLParser):
    """Reads a record's HTML strictly: tags that open close again."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        assert tag in {"div", "table", "caption", "thead", "tbody", "tr", "th", "td", "details", "summary", "svg"} | {
            *("title", "line", "polyline", "img", "br")
        }
        if tag not in ("img", "line", "polyline", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("img", "line", "polyline", "br"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def check(record):
    """Hold a record to what all can do."""
    said, text = repr(record), record._repr_html_()
    assert len(said) < 700
    assert "tensor(" not in said
    read = Reader(text)
    assert not read.open
    assert len(text) < 150_000
    frame = record.to_dataframe()
    assert len({len(column) for column in record.columns().values()}) <= 1
    if not isinstance(record, tuple):  # a named tuple unpacks
        assert len(record) == len(frame)
        some = record[:2]
        assert type(some) is type(record)
        assert len(some) == len(list(some)) == min(2, len(record)) or isinstance(record, UNPACKS)
        assert list(some.to_dataframe()) == list(frame)
    return frame


WHOLE = {"Attribution", "SourceAttribution", "Attending", "Paths", "Places", "Sources", "Trace", "Compiled"} | {
    *("FeatureCards", "Target", "RoleScores", "HOSVD", "CP", "Discoveries", "Contexts", "Truncation", "Scale"),
}  # their fields must fit each other: below
NUMBERLESS = {"Readout", "Node"}  # nothing to draw
UNPACKS = (Eigen, Interactions)  # into their columns


@pytest.mark.parametrize(
    "kind", [kind for kind in RECORDS if kind.__name__ not in WHOLE], ids=lambda kind: kind.__name__
)
def test_a_record_shows_itself(kind, unchecked):
    record = instance(kind)
    check(record)
    if kind.__name__ in NUMBERLESS:
        with pytest.raises(ValueError, match=f"to be drawn, but {kind.__name__} has no"):
            record.plot()
    else:
        assert record.plot().data


# -- of a model --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lens():
    return bilens.circuits.FeatureLayer.load(bilens.load("bilens-mini"), 2)


@pytest.fixture(scope="module")
def found(lens):
    """Return records whose fields must fit each other, of a real model."""
    model, text, target = lens.model, "the movie was not good", Target.token(lens.model, "good")
    came, B = sources.sources(model, text, 2), lens.tensor.without_constant()
    return {
        "attribution": bilens.attribute(model, text, 2, 7, inp=lens.inp, out=lens.out, label=partial(lens.name, "inp")),
        "sources": came,
        "places": came.places,
        "source attribution": sources.attribute_sources(model, text, 2, target),
        "target": target,
        "trace": traces.trace(came, lens.inp, [1, 2, 3]),
        "paths": paths.expand(model, text),
        "cards": lens.inp_cards,
        "roles": lens.inp_cards.roles,
        "contexts": saes.contexts(model, lens.out, [text]),
        "pairs": bilens.circuits.pairs(lens, 7),
        "outliers": bilens.circuits.Outliers(torch.arange(5), torch.rand(5, 2), torch.rand(5), lens.name),
        "hosvd": bilens.hosvd(B, 6),
        "cp": bilens.CP(B, 0.5, torch.linspace(0, 0.5, 8), 80, True),
        "discoveries": discovery.search(
            (B, lens.readers[:8], lens.writers[:32]), generator=rng(), n=50, tail=False, fdr=0.99
        ),
        "truncation": Truncation(torch.arange(1, 4), torch.rand(3), torch.rand(3), torch.rand(3), 0.9),
        "terms": bilens.attribute(model, text, 2, 7, inp=lens.inp, out=lens.out).top(5),
    }


def rng():
    return torch.Generator().manual_seed(0)


def test_records_of_a_model_show_themselves(found):
    for name, record in found.items():
        check(record[:40] if name in ("cards", "contexts", "roles") else record)
        assert record.plot().data, name


def test_rankings_name_their_features(lens, found):
    frame = found["pairs"].to_dataframe()
    assert list(frame) == ["out", "out_name", "left", "left_name", "right", "right_name", "value"]
    assert frame["left_name"][0] == lens.name("inp", int(frame["left"][0]))
    some = bilens.Interactions(*found["pairs"])
    assert "left_name" not in some.columns()
    assert some[2:4].named(lens.name).to_dataframe().equals(frame[2:4].reset_index(drop=True))
    assert escape(frame["left_name"][0]) in found["pairs"]._repr_html_()
    assert list(found["outliers"].to_dataframe())[:2] == ["feature", "feature_name"]
    with pytest.raises(TypeError, match="HOSVD numbers no features"):
        found["hosvd"].named(lens.name)


def test_records_travel_without_the_model(found):
    for name in ("pairs", "outliers", "contexts"):
        sent = pickle.dumps(found[name][:5])
        assert len(sent) < 100_000
        assert list(pickle.loads(sent).columns()) == [
            column for column in found[name].columns() if not column.endswith("_name") and column != "context"
        ]
    assert copy.copy(found["pairs"]).value is found["pairs"].value


def test_slices_keep_what_they_are_of(lens, found):
    hosvd, cards = found["hosvd"], found["cards"]
    again = bilens.hosvd(lens.tensor.without_constant(), 3)
    assert torch.allclose(hosvd[:3].core.down, again.core.down, atol=1e-5)
    assert hosvd[:3].error == pytest.approx(again.error)
    assert cards[10:12][11] == cards[11]
    assert [card.feature for card in cards[10:13]] == [10, 11, 12]
    with pytest.raises(IndexError, match="between 10 and 12"):
        cards[10:13][3]
    mask = found["outliers"].ratio > 0
    assert len(found["outliers"][mask]) == int(mask.sum())
    assert found["outliers"][-1]["feature"] == 4
    with pytest.raises(IndexError, match="Outliers has 5 features, got row 5"):
        found["outliers"][5]


@pytest.mark.parametrize("number", [np.int64(1), torch.tensor(1)])
def test_a_row_has_the_number_that_numpy_or_torch_gives(number):
    some = torch.arange(3)
    assert Interactions(some, some, some, some.float())[number] == (1, 1, 1, 1.0)
    eigen = Eigen(some.float(), torch.eye(3))
    assert [part.tolist() for part in eigen[number]] == [1.0, [0.0, 1.0, 0.0]]
    assert eigen[[0, 2]].values.tolist() == eigen[some != 1].values.tolist() == [0.0, 2.0]
    loss = bilens.images.classifiers.History((3.0, 2.0), (0.1, 0.2), 1.0)
    assert loss[number]["loss"] == 2.0


def test_a_name_is_no_row():
    found = saes.Evaluation(0.1, 3.0, 0.0, 2.0, 2.1, 9.0, 3.0, 100)
    for record in (found, Interactions(*(torch.arange(3),) * 3, torch.rand(3))):
        with pytest.raises(TypeError, match="rows must be a number, a slice, a mask or numbers, got 'figure'"):
            record["figure"]  # as templates ask


def test_what_is_no_record_is_refused():
    with pytest.raises(TypeError, match="record must be a result of bilens, got int"):
        plots.of(3)
    assert repr(Rows()) == "0 rows"
    assert Rows().to_dataframe().empty
    assert "0 of 0 rows" in Rows()._repr_html_()
