"""What a record holds, as named columns and facts beside them: the shared owner of tables in notebooks and terminals.

A record is a dataclass or a named tuple whose annotations name the axes of its tensors, so that its class need only
say which axis the rows are (`records.Record`).
"""

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from types import UnionType
from typing import Any, ClassVar, Union, get_args, get_origin

import torch
from torch import Tensor

SPREAD = 4  # numbers of a row that get a column each; more stay together in one
_LONG = 60  # letters of one cell


class Tabular(ABC):
    """Anything with columns and facts: a record, a named tuple that is one, or several in a list."""

    __slots__ = ()
    _rows: ClassVar[str | None] = None  # the axis that the rows are
    _held: ClassVar[str | None] = None  # or the field that holds them
    _along: ClassVar[tuple[str, ...]] = ()
    _tells: ClassVar[tuple[str, ...]] = ()
    _names: ClassVar[Mapping[str, str]] = {}
    _unit: ClassVar[str] = ""

    @abstractmethod
    def columns(self) -> dict[str, Any]:
        """Return the columns by name: tensors whose first axis is the rows, or sequences."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return what holds of the record as a whole, by name."""


class Made(Sequence):
    """A column whose cells are made when they are looked at: a ranking may have millions of rows, and each a name.

    Args:
        make: Makes a cell of a number.
        numbers: One for each row.
    """

    def __init__(self, make: Callable[[int], Any], numbers: Sequence[int] | Tensor) -> None:
        self.make, self.numbers = make, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, which: Any) -> Any:
        return Made(self.make, self.numbers[which]) if isinstance(which, slice) else self.make(int(self.numbers[which]))


class Images(Sequence):
    """A column of images `[row, height, width]`, which notebooks show as such."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, which: Any) -> Any:
        return Images(self.pixels[which]) if isinstance(which, slice) else self.pixels[which]


# -- what a class says of its rows -------------------------------------------------------------------------------------


def describe(
    cls: type,
    rows: str | None = None,
    held: str | None = None,
    along: Sequence[str] = (),
    tells: Sequence[str] = (),
    names: Mapping[str, str] | None = None,
    unit: str = "",
) -> None:
    """Note on a class what its rows are; what is not said stays as in the class it stands on."""
    said = {"_rows": rows, "_held": held, "_along": tuple(along), "_tells": tuple(tells), "_names": names}
    for name, value in (said | {"_unit": unit}).items():
        if value:
            setattr(cls, name, value)


def is_one(record: Any) -> bool:
    """Tell whether a record is one row by itself."""
    return not isinstance(record, list) and type(record)._rows is None and type(record)._held is None


def fields_of(record: Any) -> dict[str, Any]:
    """Return the annotations of a dataclass's or named tuple's fields; those that start with _ are its own affair."""
    cls = type(record)
    if dataclasses.is_dataclass(cls):
        return {field.name: field.type for field in dataclasses.fields(cls) if not field.name.startswith("_")}
    return {name: cls.__annotations__[name] for name in getattr(cls, "_fields", ())}


def axis_of(annotation: Any, axis: str) -> int | None:
    """Return which axis of an annotated tensor has a name, counted from the end behind axes of any number."""
    for one in get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,):
        dims = [dim.strip("#?") for dim in getattr(one, "dim_str", "").split()]
        if axis in dims:
            index = dims.index(axis)
            return index - len(dims) if any(dim.startswith(("*", "...")) for dim in dims[:index]) else index
    return None


def along_of(record: Any) -> dict[str, int]:
    """Return the fields with something for each row, and which of their axes the rows are."""
    cls, there = type(record), fields_of(record)
    if cls._rows is None:
        return {} if cls._held is None else {cls._held: 0}
    axes = {name: axis_of(annotation, cls._rows) for name, annotation in there.items()}
    axes |= dict.fromkeys(cls._along, 0)
    found = {name: getattr(record, name) for name in there if axes[name] is not None}
    return {name: axes[name] for name, value in found.items() if not (value is None or _empty(value))}


def _empty(value: Any) -> bool:
    """Tell a tuple that may hold something for each row and here does not."""
    return isinstance(value, tuple) and not value


def length_of(record: Any) -> int:
    """Return the number of rows."""
    if isinstance(record, list):
        return len(record)
    if is_one(record):
        return 1
    name, axis = next(iter(along_of(record).items()), (None, 0))
    value = () if name is None else getattr(record, name)
    if isinstance(value, Tensor):
        return value.shape[axis]
    return length_of(value) if isinstance(value, Tabular) else len(value)


def unit_of(record: Any) -> str:
    """Return what a row is, in the plural."""
    if isinstance(record, list):
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(record[0]).__name__) if record else "row"
        return plural(words.lower())
    cls = type(record)
    return cls._unit or cls._held or plural(cls._rows or "row")


def plural(word: str) -> str:
    """Return a word in the plural."""
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return f"{word[:-1]}ies"
    return word if word.endswith("s") else f"{word}s"


# -- some of the rows --------------------------------------------------------------------------------------------------


def number_of(which: Any) -> Any:
    """Return what numbers one row as an `int`, also NumPy's and a tensor of one number; what names several as it is.

    Raises:
        TypeError: A string, which a tensor would take for a sequence (templates ask records for names in this way).
    """
    if isinstance(which, str):
        raise TypeError(f"rows must be a number, a slice, a mask or numbers, got {which!r}")
    return int(which) if getattr(which, "ndim", None) == 0 else which


def sliced(record: Any, which: Any) -> Any:
    """Return some of the rows as a record of the same kind; its facts stay those of the whole."""
    if is_one(record):
        if not len(torch.arange(1)[which]):
            raise IndexError(f"{type(record).__name__} is one row, of which none were asked for")
        return record
    parts = {name: taken(getattr(record, name), axis, which) for name, axis in along_of(record).items()}
    return record._replace(**parts) if isinstance(record, tuple) else dataclasses.replace(record, **parts)


def taken(value: Any, axis: int, which: Any) -> Any:
    """Return some of the rows of a field."""
    if isinstance(value, Tensor):
        return value.index_select(axis, torch.arange(value.shape[axis], device=value.device)[which])
    if isinstance(value, Tabular):
        return sliced(value, which) if isinstance(value, tuple) else value[which]
    numbers = torch.arange(len(value))[which].tolist()
    if isinstance(value, Mapping):
        names = list(value)
        return {names[index]: value[names[index]] for index in numbers}
    return type(value)(value[index] for index in numbers)


def row_of(record: Any, index: int) -> Any:
    """Return one row: a record, or its cells by name."""
    if is_one(record):
        return record
    if held := type(record)._held:
        held = getattr(record, held)
        return list(held.values())[index] if isinstance(held, Mapping) else held[index]
    return {name: cell(column[index]) for name, column in record.columns().items()}


# -- columns and facts -------------------------------------------------------------------------------------------------


def columns_of(record: Any) -> dict[str, Any]:
    """Return the columns of a record, as its class says what they are."""
    cls = type(record)
    if is_one(record):
        return {name: [value] for name, value in line_of(record).items()}
    if cls._held:
        return held_columns(getattr(record, cls._held))
    columns = {}
    for name, axis in along_of(record).items():
        columns |= spread(name, getattr(record, name), axis)
    for name, value in told(record).items():
        if runs(record, value):
            columns |= value if isinstance(value, Mapping) else spread(name, value, 0)
    return with_names(record, columns)


def facts_of(record: Any) -> dict[str, Any]:
    """Return what holds of a record as a whole: its other fields, and what it tells."""
    along = along_of(record)
    facts = {name: getattr(record, name) for name in fields_of(record) if name not in along}
    facts |= {name: value for name, value in told(record).items() if not runs(record, value)}
    return {name: value for name, value in facts.items() if not callable(value)}


def told(record: Any) -> dict[str, Any]:
    """Return the properties that the record's class names."""
    return {name: getattr(record, name) for name in type(record)._tells}


def runs(record: Any, value: Any) -> bool:
    """Tell whether a property has a number for each row."""
    if type(record)._rows is None:
        return False
    if isinstance(value, Mapping):
        return bool(value) and all(runs(record, one) for one in value.values())
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == length_of(record)


def held_columns(held: Any) -> dict[str, Any]:
    """Return the columns of records in a tuple, or by name."""
    if isinstance(held, Mapping):
        return {"name": list(held)} | stacked(list(held.values()))
    return stacked(held)


def stacked(records: Sequence[Any]) -> dict[str, Any]:
    """Return the columns of records that are a row each."""
    lines = [line_of(one) for one in records]
    names = dict.fromkeys(name for line in lines for name in line)
    return {name: [line.get(name) for line in lines] for name in names}


def line_of(record: Any) -> dict[str, Any]:
    """Return a record as one row: its facts; a tuple of a few named things has a column for each."""
    line, types = {}, fields_of(record)
    for name, value in record.facts().items():
        parts = get_args(types.get(name)) if get_origin(types.get(name)) is tuple else ()
        if 0 < len(parts) <= SPREAD and Ellipsis not in parts:
            line |= {f"{name}_{index}": cell(one) for index, one in enumerate(value)}
        else:
            line[name] = cell(value)
    return with_names(record, line)


def spread(name: str, value: Any, axis: int) -> dict[str, Any]:
    """Return a field as a column, or as one for each of the few numbers of a row; a record in it gives its own."""
    if isinstance(value, Tabular):
        before = f"{name}_" if isinstance(value, tuple) else ""  # a named tuple's names say little by themselves
        return {f"{before}{column}": values for column, values in value.columns().items()}
    if not isinstance(value, Tensor):
        return held_columns(value) if len(value) and isinstance(value[0], Tabular) else {name: value}
    value = value.detach().movedim(axis, 0)
    if value.ndim != 2 or value.shape[1] > SPREAD:
        return {name: value}
    return {f"{name}_{index}": value[:, index] for index in range(value.shape[1])}


def with_names(record: Any, columns: dict[str, Any]) -> dict[str, Any]:
    """Put names beside the columns that number features, if the record can name them."""
    sides, found = type(record)._names, {}
    if not sides or record.name is None:
        return columns
    for column, values in columns.items():
        found[column] = values
        if column in sides:
            name = partial(record.name, sides[column])
            found[f"{column}_name"] = name(values) if isinstance(values, int) else Made(name, values)
    return found


# -- in words ----------------------------------------------------------------------------------------------------------


def cell(value: Any) -> Any:
    """Return a number for a tensor that is one."""
    return value.item() if isinstance(value, Tensor) and not value.ndim else value


def brief(value: Any, length: int = _LONG) -> str:
    """Say a value in a few letters: numbers to four digits, long things by their size."""
    text = _said(cell(value))
    return text if len(text) <= length else text[: length - 1] + "…"


def _said(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, Tabular) or not isinstance(value, Mapping | tuple | list | frozenset | set):
        return str(value)
    pairs = value.items() if isinstance(value, Mapping) else ((None, one) for one in value)
    parts = [brief(one) if name is None else f"{name} {brief(one)}" for name, one in islice(pairs, 8)]
    return ", ".join([*parts, *(["…"] if len(value) > 8 else [])]) or "none"


def sentence(record: Any) -> str:
    """Return the kind of a record, how many rows it has, its first facts and its first row, on one line."""
    cls = type(record)
    facts = islice(record.facts().items(), 8)
    parts = [f"{name}={_quoted(one)}" for name, one in facts if not isinstance(one, Tabular)]
    many = not is_one(record)
    if many:
        parts.insert(0, f"{length_of(record)} {unit_of(record)}")
    said = f"{cls.__name__}({', '.join(parts)}"
    if many and length_of(record):
        cells = islice(record.columns().items(), 6)
        said += f"; first: {', '.join(f'{name} {_quoted(column[0], 30)}' for name, column in cells)}"
    return f"{said})"


def _quoted(value: Any, length: int = _LONG) -> str:
    return repr(brief(value, length)) if isinstance(value, str) else brief(value, length)
