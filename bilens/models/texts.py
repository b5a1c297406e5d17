"""Texts from wherever they are: strings, columns, rows, streams, data frames, files. Their one reader."""

import contextlib
import glob
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from bilens.tensor.keeping import user_path

# A text, texts (of a list, a column, rows with a column `text`, a stream, a file), or windows of token ids.
Texts: TypeAlias = str | os.PathLike | Tensor | np.ndarray | Iterable[Any]
COLUMN = "text"
READERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text"}


def rows_of(texts: Texts, name: str = "texts", column: str = COLUMN) -> Iterator[Any]:
    """Yield the texts, the rows that hold one, or the windows of token ids, one by one, read as they are asked for.

    A string is one text and a path (`pathlib.Path`) a file: a text on each line of a `.txt`, rows with columns in
    `.jsonl`, `.json`, `.csv` and `.parquet`. Of a `datasets` dataset, streamed or not, come its rows, and so
    they do of a pandas data frame; of a column of either, or an array of strings, the texts. A row by itself, or a
    batch of rows `{"text": [...]}` as slices of a dataset are, is taken as well.

    Args:
        texts: Whatever holds them.
        name: What the caller calls them.
        column: Where rows have their text.

    Raises:
        ValueError: Something that holds no texts; a dataset of several splits; columns of several lengths.
        FileNotFoundError: No such file.
    """
    if isinstance(texts, os.PathLike):
        return rows_of_file(user_path(texts), column)
    if isinstance(texts, str):
        return iter([texts])
    if isinstance(texts, Mapping):
        return _of_columns(texts, name, column)
    if isinstance(texts, bytes) or not isinstance(texts, Iterable):
        raise ValueError(f"{name} must be texts or windows of token ids, got {type(texts).__name__}")
    if isinstance(texts, Tensor):
        return iter(torch.atleast_2d(texts))
    return iter(np.atleast_1d(texts)) if isinstance(texts, np.ndarray) else _of_pandas(texts)


def text_of(row: Any, index: int, column: str = COLUMN, name: str = "texts") -> str | None:
    """Return a text, or the one in a column of a row; `None` where there is none.

    Args:
        row: The text or the row.
        index: Its number, to be named.
        column: Which column.
        name: What the caller calls the texts.

    Raises:
        ValueError: A row without the column, or something else than text.
    """
    where = f"text {index}"
    if isinstance(row, Mapping):
        if column not in row:
            raise ValueError(f"{name} must have a column {column!r}, got {', '.join(map(repr, row))} in row {index}")
        row, where = row[column], f"{where}, in column {column!r}"
    if row is not None and not isinstance(row, str):
        raise ValueError(f"{name} must hold strings, got {type(row).__name__} {row!r} as {where}")
    return row


def list_of(texts: Texts, name: str = "texts") -> list[str]:
    """Return texts that must all be there: one for each row, of anything that `rows_of` takes.

    Args:
        texts: Whatever holds them.
        name: What the caller calls them.

    Raises:
        ValueError: No text at all; a row without one.
    """
    found = [text_of(row, index, name=name) for index, row in enumerate(rows_of(texts, name))]
    if not found:
        raise ValueError(f"{name} must hold at least one text, got none")
    if None in found:
        raise ValueError(f"{name} must hold a text in each row, got None in row {found.index(None)}")
    return found


def rows_of_file(path: Path, column: str = COLUMN) -> Iterator[Any]:
    """Yield the rows of a file, read as a stream; what is wrong with one is said by file, row and column.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Another kind of file, or a row without text in its column `text`, where it has something else.
    """
    if path.suffix not in READERS:
        raise ValueError(f"{path} must be a {', '.join(READERS)} file to be read for texts")
    return _checked(str(path), stream_of(path), column)


def stream_of(path: Path) -> Iterable[dict[str, Any]]:
    """Return the rows of a file as `datasets` streams them.

    Raises:
        FileNotFoundError: No such file.
        ValueError: An empty one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if not path.stat().st_size:
        raise ValueError(f"{path} must hold texts, but it is empty")
    import datasets

    with contextlib.redirect_stdout(sys.stderr):
        kind = READERS.get(path.suffix, "text")
        return datasets.load_dataset(kind, data_files=glob.escape(str(path)), split="train", streaming=True)


def _checked(name: str, rows: Iterable[Any], column: str) -> Iterator[Any]:
    """Yield rows, and name the file where one of them holds no text, or none can be read."""
    import pyarrow

    try:
        for index, row in enumerate(rows):
            text_of(row, index, column, name)
            yield row
    except pyarrow.ArrowInvalid as error:  # with `datasets` before 5 columns of several types end here
        raise ValueError(f"{name} must hold rows of one kind, but cannot be read: {error}") from error


def _of_columns(columns: Mapping[str, Any], name: str, column: str) -> Iterator[Any]:
    """Yield the rows of a mapping: one, if its text is one, else one for each entry of its columns."""
    if column not in columns:
        splits = [key for key, value in columns.items() if hasattr(value, "features")]
        wanted = f"be one split, such as [{splits[0]!r}]" if splits else f"have a column {column!r}"
        raise ValueError(f"{name} must {wanted}, got a mapping of {', '.join(map(repr, columns))}")
    if columns[column] is None or isinstance(columns[column], str):
        return iter([columns])
    texts = columns[column]
    if not isinstance(texts, Sequence | np.ndarray):
        raise ValueError(f"{name} must hold strings in column {column!r}, got {type(texts).__name__} {texts!r}")
    uneven = [key for key, value in columns.items() if not hasattr(value, "__len__") or len(value) != len(texts)]
    if uneven:
        raise ValueError(f"{name} must have columns of one length, {len(texts)}, got another for {uneven[0]!r}")
    return ({key: value[index] for key, value in columns.items()} for index in range(len(texts)))


def _of_pandas(texts: Iterable[Any]) -> Iterator[Any]:
    """Yield the rows of a data frame (its own are the names of its columns) or of a series, missing texts as `None`."""
    pandas = sys.modules.get("pandas")  # who has a data frame has imported it
    if pandas is None or not isinstance(texts, pandas.DataFrame | pandas.Series):
        return iter(texts)
    whole = texts.astype(object).where(texts.notna(), None)
    if isinstance(whole, pandas.Series):
        return iter(whole.tolist())
    return (dict(zip(whole.columns, row, strict=True)) for row in whole.itertuples(index=False, name=None))
