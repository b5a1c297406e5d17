"""Torch archives: read where a publisher has nothing else, after checking that they hold tensors only."""

import hashlib
import logging
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bilens.tensor.keeping import atomic_write

from .sources import DTYPES, CheckpointError, Source, check_finite, conversions, read_safetensors, widened

ARCHIVE = "pytorch_model.bin"
CHECKPOINTS = "checkpoints"  # the folder of those that hold several
logger = logging.getLogger(__name__)

# What the pickle of a dict of tensors asks for; none of it runs code of the archive's.
TENSORS = {
    ("collections", "OrderedDict"),
    *(("torch._utils", f"_rebuild_{what}") for what in ("tensor_v2", "parameter")),
}
STORAGES = re.compile(r"torch (Float|Half|BFloat16|Double|Byte|Char|Short|Int|Long|Bool)Storage")
ASKING = {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"}  # which tensors do not need
RECORDS = re.compile(
    r"[^/]+/(data\.pkl|data/\d+|byteorder|version|\.format_version|\.storage_alignment|\.data/serialization_id)"
)


def find_archive(source: Source, checkpoint: str | None) -> Path | None:
    """Return the torch archive of that name, or the only one there is; None if there is none.

    Raises:
        ValueError: No name where there are several, or one that is no file's name.
        FileNotFoundError: No such checkpoint.
    """
    if checkpoint is None:
        whole = source.optional(ARCHIVE)
        names = [] if whole else [name for name in source.names(CHECKPOINTS) if name.endswith(".pt")]
        if len(names) > 1:
            some = ", ".join(names if len(names) < 9 else [*names[:4], "...", *names[-4:]])
            raise ValueError(f"checkpoint must name one of the {len(names)} of {source.name} ({some}), got None")
        return source.optional(f"{CHECKPOINTS}/{names[0]}") if names else whole
    if Path(checkpoint).name != checkpoint:
        raise ValueError(f"checkpoint must be the name of a file in {source.name}, got {checkpoint!r}")
    found = source.optional(f"{CHECKPOINTS}/{checkpoint}") or source.optional(checkpoint)
    if found is None:
        names = source.names(CHECKPOINTS)
        near = get_close_matches(checkpoint, names, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else f" (it has {', '.join(names[:8]) or 'none'})"
        raise FileNotFoundError(f"{source.name} has no checkpoint {checkpoint!r}{hint}")
    return found


def read_archive(path: Path, dtype: torch.dtype | None) -> dict[str, tuple[Tensor, Path]]:
    """Read the tensors of a torch archive, each with its file, from the safetensors copy that the first time writes.

    The copy lies beside the Hub's cache, under a name that changes whenever the archive does; a message says so. Of a
    training checkpoint the model's state is read, the rest left.

    Args:
        path: A `.bin` or `.pt` file.
        dtype: As for `read_safetensors`.

    Raises:
        CheckpointError: Not a zip archive of torch's, anything in it but tensors (and, of a training checkpoint, plain
            numbers and text), a tensor that is not floating point or not finite. Nothing was executed.
    """
    copy = conversions() / _key(path) / "model.safetensors"
    if copy.is_file():
        return {name: (tensor, path) for name, tensor in read_safetensors(copy, dtype)}
    tensors = {name: check_finite(tensor, name, path) for name, tensor in _load(path).items()}
    try:
        with atomic_write(copy) as partial:
            save_file(tensors, partial, {"format": "pt"})
    except OSError as error:
        logger.warning("%s: no safetensors copy could be written (%s); it is read anew each time", path, error)
        return {name: (widened(tensor, dtype), path) for name, tensor in tensors.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    logger.warning("%s: wrote a safetensors copy (%.3g MB), which is read from now on: %s", path, size / 1e6, copy)
    return {name: (tensor, path) for name, tensor in read_safetensors(copy, dtype)}


def check_archive(path: Path) -> None:
    """Raise unless a file is a torch archive that asks for nothing but tensors, numbers, text and their containers.

    Raises:
        CheckpointError: It is not; the message names what it holds or asks for. Nothing was unpickled.
    """
    must = f"{path} must be a torch archive of tensors only, but"
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.namelist()
            pickles = [archive.read(name) for name in records if name.endswith("/data.pkl")]
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise CheckpointError(f"{must} is no zip file: {error}") from error
    if odd := [name for name in records if not RECORDS.fullmatch(name)]:
        raise CheckpointError(f"{must} it holds {odd[0]}")
    if len(pickles) != 1:
        raise CheckpointError(f"{must} it holds {len(pickles)} pickles")
    try:
        asked = list(_asked(pickles[0]))
    except ValueError as error:
        raise CheckpointError(f"{must} its pickle is damaged: {error}") from error
    for name in asked:
        if tuple(name.split(" ")) not in TENSORS and not STORAGES.fullmatch(name):
            raise CheckpointError(
                f"{path} must hold tensors only, but its pickle asks for {name.replace(' ', '.')}; nothing was executed"
            )


def _asked(pickled: bytes) -> Iterator[str]:
    """Yield what a pickle imports, "module name"; an instruction that could import by other means counts too."""
    for instruction, argument, _ in pickletools.genops(pickled):
        if instruction.name == "GLOBAL":
            yield argument
        elif instruction.name in ASKING:
            yield f"{instruction.name} {argument or ''}".strip()


def _load(path: Path) -> dict[str, Tensor]:
    check_archive(path)
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises whatever a damaged archive leads to
        raise CheckpointError(f"{path} must be a torch archive of tensors only, but does not load: {error}") from error
    if path.suffix == ".pt" and isinstance(held, Mapping) and isinstance(held.get("model_state_dict"), Mapping):
        held = held["model_state_dict"]
    if not isinstance(held, Mapping):
        raise CheckpointError(f"{path} must hold a dict of names and tensors, got {type(held).__name__}")
    tensors: dict[str, Tensor] = {}
    for name, tensor in held.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{path} must hold tensors only, but {name!r} is {type(tensor).__name__} {tensor!r:.60}"
            )
        if name.endswith("num_batches_tracked"):  # training's count of batches, which nothing here reads
            continue
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"{path}: tensor {name} must be floating point, got {tensor.dtype}")
        tensors[name] = tensor.detach().contiguous()
    return _unshared(tensors)


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy each tensor that lies in another's memory, or in part of its own, which a safetensors file cannot say."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensors[name] = tensor.clone()
        seen.add(storage.data_ptr())
    return tensors


def _key(path: Path) -> str:
    """Return a name that no other archive has, nor this one when it is changed: of its place, time and checksums."""
    path = path.resolve()
    stat = path.stat()
    said: list[Any] = [str(path), stat.st_size, stat.st_mtime_ns]
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            said += [(entry.filename, entry.CRC, entry.file_size) for entry in archive.infolist()]
    return hashlib.sha256(repr(said).encode()).hexdigest()[:32]
