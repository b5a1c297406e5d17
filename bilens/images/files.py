"""Files of images and labels, npz and idx: read once it is known that they hold what they say, and how much."""

import gzip
import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from bilens.tensor.keeping import is_file

LARGEST = 1 << 32  # bytes of one array: 5 million images of 28x28
_RATIO, _SMALL = 200, 1 << 26  # what is over 64 MiB and was compressed more than 200 times is no image set


def read_npz(path: Path, names: tuple[str, ...]) -> list[np.ndarray]:
    """Read arrays of an npz file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is damaged, lacks an array, or would take far more memory than its size suggests.
    """
    if not is_file(path):
        raise FileNotFoundError(f"no file {path}")
    with _blaming(path):
        with zipfile.ZipFile(path) as archive:
            there = [name.removesuffix(".npy") for name in archive.namelist()]
            if missing := [name for name in names if name not in there]:
                got = ", ".join(there)[:200]
                raise ValueError(f"it must hold {', '.join(names)}, but {', '.join(missing)} is missing: got {got}")
            for name in names:
                with archive.open(f"{name}.npy") as file:
                    _check_array(file, archive.getinfo(f"{name}.npy"), name)
        with np.load(path, allow_pickle=False) as arrays:
            return [arrays[name] for name in names]


def _check_array(file: Any, entry: zipfile.ZipInfo, name: str) -> None:
    """Make sure that the header of an array tells its true size, and that it is no compression bomb."""
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    version = npy.read_magic(file)
    if version not in readers:
        raise ValueError(f"{name} must be an array of version 1 or 2, got {version}")
    shape, _, dtype = readers[version](file)
    if dtype.hasobject:
        raise ValueError(f"{name} must hold numbers, got {dtype}, which only a pickle can hold")
    size = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or size + file.tell() != entry.file_size:
        raise ValueError(
            f"{name} must be as large as its header says, {list(shape)} of {dtype}, got {entry.file_size} bytes"
        )
    _check_ratio(name, size, entry.compress_size)


def _check_ratio(name: str, size: int, compressed: int) -> None:
    if size > LARGEST or (size > _SMALL and size > _RATIO * compressed):
        raise ValueError(f"{name} must be images that fit memory, got {size} bytes in {compressed} compressed ones")


def read_idx(folder: Path, stem: str) -> np.ndarray:
    """Read one idx file, gzipped or not: two zero bytes, type 8 (bytes), number of axes, then the sizes and the data.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is damaged, of another kind, or would take far more memory than its size suggests.
    """
    path = next((path for path in (folder / stem, folder / f"{stem}.gz") if is_file(path)), None)
    if path is None:
        raise FileNotFoundError(f"no file {stem} or {stem}.gz in {folder}")
    with _blaming(path), (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        head = file.read(4)
        if head[:3] != b"\0\0\x08" or len(head) < 4 or not 1 <= head[3] <= 3:
            raise ValueError(f"it must be an idx file of bytes with 1 to 3 axes, got header {head!r}")
        told = file.read(4 * head[3])
        if len(told) < 4 * head[3]:
            raise ValueError(f"it must be an idx file of bytes, got header {head + told!r}, which ends too early")
        shape = tuple(int.from_bytes(told[4 * i : 4 * i + 4], "big") for i in range(head[3]))
        _check_ratio(path.name, math.prod(shape), path.stat().st_size)
        data = file.read(math.prod(shape) + 1)
        if len(data) != math.prod(shape):
            more = "more" if len(data) > math.prod(shape) else f"{len(data)}"
            raise ValueError(
                f"it must hold {list(shape)} bytes, as an idx file whose header {head!r} says so, got {more}"
            )
    return np.frombuffer(data, np.uint8).reshape(shape)


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Name the file in whatever its reading raises."""
    damage = (
        ValueError,
        KeyError,
        EOFError,
        OSError,
        zlib.error,
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
    )
    try:
        yield
    except damage as error:
        raise ValueError(f"{path} must be a file of images or labels, but: {error or type(error).__name__}") from error
