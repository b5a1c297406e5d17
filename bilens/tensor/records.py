"""Records: what results of all kinds can do, and how a class says what its rows are."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from .markup import html_of
from .tables import (
    Images,
    Tabular,
    columns_of,
    describe,
    facts_of,
    length_of,
    number_of,
    row_of,
    sentence,
    sliced,
    stacked,
    unit_of,
)

if TYPE_CHECKING:
    import pandas

Class = TypeVar("Class", bound=type)
T = TypeVar("T")
Self = TypeVar("Self")  # typing has its own from Python 3.11 on
_SHOWN = 10  # records of a list in its repr


class Record(Tabular):
    """What a result can do: it is a table, whose rows run along one of its axes, with facts beside them.

    `len(found)` is the number of rows and `found[:5]` the same kind of record with the first five; a row by itself is
    `found[0]`. `to_dataframe()`, the notebook's table and `plot()` show the same `columns()`. A record without such an
    axis is one row.

    A class says which axis that is: `class Outliers(Record, rows="feature")` takes all fields annotated with it for
    columns. `along` names further fields that hold something for each row: tuples, or records with the same rows.
    With `held="found"` the records in the field `found` are the rows. `tells` names properties: those with
    a number for each row are columns, the others facts. `names` says which columns hold numbers of features, and of
    which side of the layer: where the field `name` is a function that names them, names stand beside them. `unit` is
    what a row is, in the plural.
    """

    __slots__ = ()

    def __init_subclass__(cls, **said: Any) -> None:
        super().__init_subclass__()
        describe(cls, **said)

    def columns(self) -> dict[str, Any]:
        """Return the columns by name: tensors whose first axis is the rows, or sequences."""
        return columns_of(self)

    def facts(self) -> dict[str, Any]:
        """Return what holds of the record as a whole, by name."""
        return {name: Rows(value) if _several(value) else value for name, value in facts_of(self).items()}

    def __len__(self) -> int:
        return length_of(self)

    def __getitem__(self: Self, which: Any) -> Any:
        """Return some of the rows as the same kind of record, by a slice, a mask or numbers; or one row, by its number.

        Raises:
            IndexError: No such row.
        """
        if not isinstance(which := number_of(which), int):
            return sliced(self, which)
        if not -len(self) <= which < len(self):
            raise IndexError(f"{type(self).__name__} has {len(self)} {unit_of(self)}, got row {which}")
        return row_of(self, which % len(self))

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what names features, a whole layer, when the record is pickled or copied: `named` gives it back."""
        named = "name" in self.__dict__ and callable(self.name)
        return self.__dict__ | ({"name": None} if named else {})

    def named(self: Self, name: Callable[[str, int], str]) -> Self:
        """Return it with names beside the numbers of features.

        Args:
            name: Gives the name of a feature, from its side (`"inp"` or `"out"`) and its number: `FeatureLayer.name`.

        Raises:
            TypeError: A record that numbers no features.
        """
        if not self._names:
            raise TypeError(f"{type(self).__name__} numbers no features to be named")
        return dataclasses.replace(self, name=name)

    def to_dataframe(self) -> "pandas.DataFrame":
        """Return the columns; where a row has more than four numbers of a kind, they are an array in one cell."""
        import pandas

        return pandas.DataFrame({name: pandas.Series(_values(column)) for name, column in self.columns().items()})

    def plot(self) -> Any:
        """Draw it as a plotly figure: `bilens.report.plots.of(self)`."""
        from bilens.report.plots import of  # the one door from here to the wing on top

        return of(self)

    def _repr_html_(self) -> str:
        return html_of(self)

    def __repr__(self) -> str:
        return sentence(self)


class Rows(list[T]):
    """Several records, a row each: a list that shows itself as a table, and slices to itself."""

    _rows = _held = None

    def columns(self) -> dict[str, Any]:
        """Return the columns by name: what the rows hold under it, `None` where one holds nothing."""
        return stacked(self)

    def facts(self) -> dict[str, Any]:
        """Return what holds of all rows: nothing."""
        return {}

    def __getitem__(self, which: Any) -> Any:
        found = super().__getitem__(which)
        return type(self)(found) if isinstance(which, slice) else found

    to_dataframe, plot, _repr_html_ = Record.to_dataframe, Record.plot, Record._repr_html_

    def __repr__(self) -> str:
        shown = [f"  {row!r}" for row in self[:_SHOWN]]
        return "\n".join([f"{len(self)} {unit_of(self)}", *shown, *(["  …"] if len(self) > len(shown) else [])])


Tabular.register(Rows)


def tabular(
    rows: str | None = None, along: Sequence[str] = (), tells: Sequence[str] = (), unit: str = ""
) -> Callable[[Class], Class]:
    """Make a named tuple a record; as a tuple that unpacks it keeps a tuple's length and slices.

    Args:
        rows: As `Record` has it, like the others.
        along: Further fields with something for each row.
        tells: Properties.
        unit: What a row is, in the plural.
    """

    def decorate(cls: Class) -> Class:
        own = cls.__repr__.__module__ == cls.__module__  # a named tuple's comes from collections
        for name in ("columns", "facts", "to_dataframe", "plot", "_repr_html_", *(() if own else ("__repr__",))):
            setattr(cls, name, vars(cls).get(name) if name in vars(cls) and name != "__repr__" else vars(Record)[name])
        for name in ("_rows", "_held", "_along", "_tells", "_names", "_unit"):
            setattr(cls, name, getattr(Record, name))
        describe(cls, rows, None, along, tells, None, unit)
        return Tabular.register(cls)

    return decorate


def _several(value: Any) -> bool:
    """Tell several records from a named tuple that is one."""
    several = isinstance(value, tuple | list) and not isinstance(value, Tabular) and len(value) > 0
    return several and all(isinstance(one, Tabular) for one in value)


def _values(column: Any) -> Any:
    """Return a column as pandas takes it: an array of numbers, or a list of what is in its cells."""
    if isinstance(column, Images):
        column = column.pixels
    if not isinstance(column, Tensor):
        return [one.detach().cpu().numpy() if isinstance(one, Tensor) else one for one in column]
    column = column.detach().cpu()
    column = column.float() if column.dtype in (torch.bfloat16, torch.float16) else column
    return column.numpy() if column.ndim == 1 else [one.numpy() for one in column]
