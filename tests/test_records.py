"""Every public record is a table: in a notebook, as a data frame, in a line of text, and as a figure."""

import dataclasses
import importlib
import inspect
import subprocess
import sys
import types
import typing
from html.parser import HTMLParser

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from bilens.circuits import attending, attribution, compiled, findings, paths, places, sources, spectral, terms, traces
from bilens.images.sets import ImageSet
from bilens.report import plots
from bilens.saes.cards import FeatureCards
from bilens.tensor.interactions import Interactions
from bilens.tensor.records import Record, Rows, tabular
from bilens.tensor.tables import Tabular

WINGS = ("tensor", "models", "saes", "circuits", "images")
OBJECTS = {  # what is asked rather than read: models, layers, texts, and how something is to be done
    *("BilinearTensor", "BilinearForm", "LinearMap", "FeatureLayer", "BilinearAutoencoder", "VirtualTokens", "Entries"),
    *("Windows", "Baseline", "Seen", "Asked", "Entry", "Reading", "Scoring", "ContextTally", "RoleTally", "Active"),
    *("Toy", "Gate", "Plan", "Shape", "Protocol", "Recipe", "Tuning", "Roles", "Line", "Word", "Rope", "Family"),
    *("Local", "Projection", "Frame", "Wanted", "Tabular"),
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
        return None if type(None) in parts and parts[0] is not str else made(parts[0], name)
    if origin is typing.Literal:
        return parts[0]
    if origin is tuple:
        return tuple(made(parts[0], name) for _ in range(3)) if Ellipsis in parts else tuple(map(made, parts))
    if origin is dict:
        return {f"{NAME}{index}": made(parts[1], name) for index in range(3)}
    plain = {str: NAME, int: 1, float: 0.5, bool: True, torch.dtype: torch.float32}
    return plain[annotation] if annotation in plain else instance(annotation)


def instance(kind):
    """Return a record of a kind; fields along its rows that no axis says have as many entries as it has rows."""
    types_of = typing.get_type_hints(kind, include_extras=True)
    names = kind._fields if issubclass(kind, tuple) else [one.name for one in dataclasses.fields(kind)]
    held = {name: made(types_of[name], name) for name in names if name not in FIXED.get(kind.__name__, {})}
    for name in kind._along:
        if isinstance(held[name], tuple) and not isinstance(held[name], Tabular):
            part = typing.get_args(types_of[name])[0]
            held[name] = tuple(made(part, name) for _ in range(size_of(kind._rows)))
    return kind(**held, **{name: value() for name, value in FIXED.get(kind.__name__, {}).items()})


def images():
    return torch.rand(4, 9, generator=torch.Generator().manual_seed(0))


FIXED = {  # what the classes themselves ask of their fields
    "ImageSet": {"x": lambda: torch.rand(size_of("n"), 5, 5), "names": lambda: tuple("0123")},
}


class Reader(HTMLParser):
    """Reads a record's HTML strictly: tags that open close again."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        assert tag in {"div", "table", "caption", "thead", "tbody", "tr", "th", "td", "details", "summary", "svg"} | {
            *("title", "line", "polyline", "img")
        }
        if tag not in ("img", "line", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("img", "line", "polyline"):
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
    assert len({len(column) for column in record.columns().values()}) == 1
    if not isinstance(record, tuple):  # a named tuple unpacks
        assert len(record) == len(frame)
        assert type(record[:1]) is type(record)
        assert len(record[:1]) == 1
        assert type(next(iter(record[:1]))) is not None
    assert list(record[:1].to_dataframe()) == list(frame) if isinstance(record, Record) else True
    return frame


WHOLE = {"Attribution", "SourceAttribution", "Attending", "Paths", "Places", "Sources", "Trace", "Compiled"} | {
    *("FeatureCards", "Target", "RoleScores", "HOSVD", "CP", "Discoveries", "Contexts", "Truncation", "Scale"),
}  # their fields must fit each other: below


@pytest.mark.parametrize(
    "kind", [kind for kind in RECORDS if kind.__name__ not in WHOLE], ids=lambda kind: kind.__name__
)
def test_a_record_shows_itself(kind, unchecked):
    record = instance(kind)
    check(record)
    if kind.__name__ not in ("Label",):
        assert record.plot().data
