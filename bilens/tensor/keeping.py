"""Files that are whole or not there: paths that users gave, atomic writes, and state that says when it is damaged."""

import hashlib
import json
import os
import platform
import re
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SAVE_EVERY = 1.0  # seconds between two states of a long job, at least
_SHARE = 20  # of the time one part goes into writing them at most: they may grow with what was found
_STATE = "state"  # key of the header that holds what is not a tensor
_SUM = "checksum"
_WRITER = re.compile(r"(.*)-(\d+)\.[0-9a-f]{12}\.partial")  # machine and process


def user_path(path: str | os.PathLike[str]) -> Path:
    """Return a path that a user gave, `~` and `~name` as the home folder.

    Raises:
        ValueError: An empty path, one with a NUL, or the home folder of nobody.
    """
    if not os.fspath(path) or "\0" in os.fspath(path):
        raise ValueError(f"a path must not be empty or hold a NUL, got {path!r}")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"a path must lead somewhere, but {os.fspath(path)!r} does not: {error}") from error


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path beside `path` to write to, which becomes `path` at the end of the `with` block.

    A kill or an exception at any time leaves the old file, or none; what a kill left half written goes with the next
    write. Missing folders are made. The new file may be read by whom the process' umask lets, also where its writer is
    stricter (safetensors).
    """
    path = user_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    stem, here = f".{path.name[:150]}.", f"{platform.node()[:20]}-{os.getpid()}"
    _sweep(path.parent, stem)
    partial = path.with_name(f"{stem}{here}.{uuid4().hex[:12]}.partial")
    try:
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def is_file(path: Path) -> bool:
    """Tell whether a file is there that can be read to an end.

    Raises:
        ValueError: A folder, a pipe, a device or a link to nowhere is in its place.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if not path.is_symlink():
            return False
        raise ValueError(f"{path} must be a file, but it is a link to what is not there") from None
    except OSError as error:  # a link that loops, a folder that may not be looked into, an odd name
        raise ValueError(f"{path} must be a file, but cannot be looked at: {error}") from error
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "pipe or device"
        raise ValueError(f"{path} must be a file, but it is a {kind}")
    return True


def _sweep(folder: Path, stem: str) -> None:
    """Remove what processes of this machine that are no more left half written."""
    if os.name != "posix":  # elsewhere to ask for a process is to end it
        return
    for path in folder.iterdir() if os.access(folder, os.R_OK) else ():
        found = _WRITER.fullmatch(path.name.removeprefix(stem)) if path.name.startswith(stem) else None
        if found and found[1] == platform.node()[:20]:
            try:
                os.kill(int(found[2]), 0)
            except ProcessLookupError:
                path.unlink(missing_ok=True)
            except PermissionError:  # it is alive, and somebody else's
                pass


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Return a path that a file can be written to later, its folder made; nothing is written.

    Raises:
        ValueError: A folder of that name is there already, or a file in the place of its folder.
        OSError: The folder cannot be made, or not be written to.
    """
    path = user_path(path)
    if path.is_dir():
        raise ValueError(f"a file must be named to write to, but {path} is a folder")
    there = next(parent for parent in path.absolute().parents if parent.exists())
    if not there.is_dir():
        raise ValueError(f"{path} must lie in a folder to be written, but {there} is a file")
    with atomic_write(path.with_name(f"{path.name[:150]}.probe")) as probe:
        probe.touch()
    path.with_name(f"{path.name[:150]}.probe").unlink()
    return path


def check_folder(path: str | os.PathLike[str]) -> Path:
    """Return a folder that files can be written to later, made if need be.

    Raises:
        ValueError: A file of that name is there already.
        OSError: It cannot be made, or not be written to.
    """
    path = user_path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"a folder must be named to write to, but {path} is a file")
    check_writable(path / "file")
    return path


# -- state that says when it is damaged -------------------------------------------------------------------------------


def write_state(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write the state of a long job, tensors and what JSON can say, atomically and with a checksum of both."""
    said = json.dumps(about)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as partial:
        save_file(tensors, partial, {_STATE: said, _SUM: _checksum(tensors, said)})


def read_state(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what `write_state` wrote.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or no state of this version; the message says what to do.
    """
    path = user_path(path)
    if not is_file(path):
        raise FileNotFoundError(f"no file {path}")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except (SafetensorError, UnicodeDecodeError) as error:
        raise damaged(path, str(error)) from error
    if not {_STATE, _SUM} <= set(header):
        raise damaged(path, "it has no checksum, as another version of bilens may have written it")
    if _checksum(tensors, header[_STATE]) != header[_SUM]:
        raise damaged(path, "its checksum does not match")
    return tensors, json.loads(header[_STATE])


def read_own_state(path: Path, fingerprint: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return what `write_state` wrote of the call with this fingerprint; None where there is no file.

    Raises:
        StateError: The file is of another call, or damaged.
    """
    if not is_file(path):
        return None
    tensors, about = read_state(path)
    if about.get("fingerprint") != fingerprint:
        raise foreign(path, about.get("fingerprint"), fingerprint)
    return tensors, about


def write_record(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Write what a long job has found so far, as JSON that people read too, atomically and with a checksum."""
    told = json.loads(json.dumps(record))
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(told | {_SUM: _checksum({}, json.dumps(told, sort_keys=True))}, indent=1) + "\n")


def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what `write_record` wrote; nothing where there is no file.

    Raises:
        ValueError: It is damaged, or no record of this version; the message says what to do.
    """
    path = user_path(path)
    if not is_file(path):
        return {}
    try:
        told = json.loads(path.read_text())
        found = told.pop(_SUM)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise damaged(path, f"it is no JSON object with a checksum ({error!r:.80})") from error
    if found != _checksum({}, json.dumps(told, sort_keys=True)):
        raise damaged(path, "its checksum does not match")
    return told


class Pace:
    """When a long job writes its state: not at once, and not for most of its time."""

    def __init__(self):
        self.saved, self.took = time.monotonic(), 0.0

    def due(self) -> bool:
        """Return whether the last state is old, beside the time that it took to write."""
        return time.monotonic() - self.saved > max(SAVE_EVERY, _SHARE * self.took)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Take the time of a state that is written in the `with` block."""
        began = time.monotonic()
        yield
        self.saved = time.monotonic()
        self.took = self.saved - began


class StateError(ValueError):
    """A state on disk that cannot be gone on from."""


def damaged(path: str | os.PathLike[str], why: str) -> StateError:
    """Return the error for a state that is damaged, to be raised: it says which, why, and what to do."""
    return StateError(f"{path} is damaged: {why}; delete it, and the same call starts anew")


def foreign(path: str | os.PathLike[str], theirs: Any, mine: str) -> StateError:
    """Return the error for a state of another call, to be raised, given both fingerprints."""
    return StateError(
        f"checkpoint must be of this call, but {path} is of one with other weights, bases, texts, random numbers or "
        f"arguments (fingerprint {theirs!s:.12}, not {mine:.12}): remove it or name another folder"
    )


def fingerprint_of(tensors: Iterable[Tensor | None], *said: Any) -> str:
    """Return a hash of tensors, and of what `repr` says of everything else."""
    digest = hashlib.sha256()
    for tensor in tensors:
        header = "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        digest.update(header.encode())
        if tensor is not None:
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    digest.update(repr(said).encode())
    return digest.hexdigest()


def checksum_of(path: Path) -> str:
    """Return the checksum of a file."""
    digest = hashlib.blake2b()
    with path.open("rb") as file:
        while some := file.read(1 << 20):
            digest.update(some)
    return digest.hexdigest()


def _checksum(tensors: Mapping[str, Tensor], said: str) -> str:
    digest = hashlib.blake2b(said.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, str(tensor.dtype), list(tensor.shape))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
