"""Where the files of a checkpoint come from, a folder or the Hub, and how each kind is read."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

from bilens.tensor.keeping import is_file, user_path

from .tokenization import NAMES, StoredTokenizer, ids_of, with_decoder

EMBEDDED = "bilens-mini"
PUBLISHED = ("tdooms/ts-medium", "tdooms/fw-small", "tdooms/fw-medium")
DATASETS = "datasets/"  # before the name of a model that lies in a dataset repository
IN_DATASETS = ("melephant/2l-bilinear-attn-normalised-v2",)
LARGEST_JSON = 1 << 24  # bytes; the largest index there is has a tenth of that
DEEPEST = 50  # objects and lists within each other in a config
LARGEST_TOKENIZER = 1 << 28  # bytes; the largest published has a tenth of that
LONGEST_NAME = 200  # characters of a tensor's name
MOST_DIMENSIONS = 8  # of a tensor
DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded as what it claims to be; nothing was loaded."""


def assets() -> Path:
    """Return the folder of the embedded model, its tokenizer, its SAEs and its card."""
    return Path(str(files("bilens") / "assets" / EMBEDDED))


class Source:
    """A folder or a Hub repository; finds files by name."""

    def __init__(self, name: str, folder: Path | None, revision: str | None, kind: str = "model"):
        self.name, self.folder, self.revision, self.kind = name, folder, revision, kind
        self.commit: str | None = None  # on the Hub: where the first file came from, so that all are of one state

    @classmethod
    def find(cls, name: str | os.PathLike[str], revision: str | None) -> "Source":
        """Return the folder or repository of that name."""
        folder = assets() if name == EMBEDDED else user_path(name)
        if os.path.isdir(folder) or name == EMBEDDED:  # not the method: it raises where a name is too long
            if revision is not None:
                raise ValueError(f"revision goes with a Hub repository, and {name} is a folder; got {revision!r}")
            return cls(str(name), folder, None)
        if os.path.exists(folder):
            raise FileNotFoundError(f"{name} is a file; give the folder that holds config.json and model.safetensors")
        if isinstance(name, str) and name.startswith(DATASETS) and name.count("/") == 2:
            return cls(name.removeprefix(DATASETS), None, revision, "dataset")
        local = not isinstance(name, str) or name.startswith((".", "/", "~")) or name.count("/") > 1
        if local or name.count("/") == 0:
            near = get_close_matches(str(name), [EMBEDDED, *(p.rsplit("/")[-1] for p in PUBLISHED)], n=1, cutoff=0.6)
            full = [p for p in (EMBEDDED, *PUBLISHED) if near and p.rsplit("/")[-1] == near[0]]
            hint = f"; did you mean {full[0]!r}?" if full else ""
            raise FileNotFoundError(
                f"no folder {str(name)!r}, and a Hub repository is named owner/name (the embedded model is "
                f"{EMBEDDED!r}){hint}"
            )
        return cls(name, None, revision, "dataset" if name in IN_DATASETS else "model")

    def file(self, filename: str) -> Path:
        """Return a file's path, downloaded if need be; raise if there is none."""
        path = self.optional(filename)
        if path is None:
            pickle = self.optional("pytorch_model.bin") if filename.endswith(".safetensors") else None
            hint = ", only pytorch_model.bin: a pickle, and bilens reads safetensors only" if pickle else ""
            there = "" if self.folder is None else ", ".join(sorted(p.name for p in self.folder.iterdir())) or "nothing"
            raise FileNotFoundError(f"{self.name} has no {filename}{hint}{there and f' (it has {there})'}")
        return path

    def optional(self, filename: str) -> Path | None:
        """Return a file's path, or None if the folder or repository does not have it."""
        if self.folder is not None:
            return regular(self.folder / filename)
        known = self.commit and huggingface_hub.try_to_load_from_cache(
            self.name, filename, revision=self.commit, repo_type=self.kind
        )
        if known is not None and not isinstance(known, str):
            return None  # the cache remembers that this commit does not have it; the Hub need not be asked again
        try:
            state = self.commit or self.revision
            path = Path(huggingface_hub.hf_hub_download(self.name, filename, revision=state, repo_type=self.kind))
            self.commit = path.parents[filename.count("/")].name
            return path
        except GatedRepoError as error:
            raise FileNotFoundError(
                f"{self.name} on the Hub is gated: accept its terms and log in (hf auth login)"
            ) from error
        except RepositoryNotFoundError as error:
            raise FileNotFoundError(
                f"{self.name!r} is neither a folder here nor a repository on the Hub (or a private one, without a "
                f"login){self._near_names()}"
            ) from error
        except RevisionNotFoundError as error:
            raise FileNotFoundError(f"{self.name} on the Hub has no revision {self.revision!r}") from error
        except LocalEntryNotFoundError as error:
            raise FileNotFoundError(
                f"{filename} of {self.name} is not in the local cache and the Hub cannot be reached (offline mode, "
                f"HF_HUB_OFFLINE, or no connection); load it once online, or load a folder"
            ) from error
        except EntryNotFoundError:
            return None
        except HFValidationError as error:
            raise FileNotFoundError(f"{self.name!r} is neither a folder here nor a valid Hub name: {error}") from error

    def extra(self, filename: str) -> Path | None:
        """Return a file that may be missing, or that an offline cache may lack since nobody has asked for it before."""
        try:
            return self.optional(filename)
        except FileNotFoundError as error:
            if isinstance(error.__cause__, LocalEntryNotFoundError):
                return None
            raise

    def names(self, folder: str) -> list[str]:
        """Return the names of the files of a subfolder, sorted; none if there is no such folder."""
        if self.folder is not None:
            return sorted(path.name for path in (self.folder / folder).glob("*") if path.is_file())
        state = self.commit or self.revision
        try:
            listed = huggingface_hub.HfApi().list_repo_files(self.name, revision=state, repo_type=self.kind)
        except Exception as error:  # offline, no connection, a portal: as many kinds as transports
            raise FileNotFoundError(f"the files of {self.name} on the Hub cannot be listed: {error}") from error
        return sorted(name.removeprefix(f"{folder}/") for name in listed if name.startswith(f"{folder}/"))

    def _near_names(self) -> str:
        """Return a hint with the repository names of the same owner nearest to the one that does not exist."""
        owner = self.name.split("/")[0]
        try:
            names = [model.id for model in huggingface_hub.HfApi().list_models(author=owner, limit=1000)]
        except Exception:  # whatever it is, this was to be a hint in an error that is raised anyway
            names = []
        near = get_close_matches(self.name, sorted({*names, *PUBLISHED}), n=3, cutoff=0.5)
        return f"; did you mean {' or '.join(near)}?" if near else ""


def regular(path: Path) -> Path | None:
    """Return a path if a file is there, None if nothing is.

    Raises:
        CheckpointError: A folder, a pipe, a device or a link to nowhere is in its place.
    """
    try:
        return path if is_file(path) else None
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def conversions() -> Path:
    """Return the folder, beside the Hub's cache, for copies of what was published in another form."""
    return Path(constants.HF_HUB_CACHE).parent / "bilens"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of at most 16 MiB in which no key stands twice; a `CheckpointError` names the file if not."""
    must = f"{path} must be a JSON object"
    if regular(path) is None:
        raise FileNotFoundError(f"no file {path}")
    try:
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise CheckpointError(f"{must} of at most {LARGEST_JSON} bytes, got {size}")
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=partial(_once, path))
    except CheckpointError:
        raise
    except RecursionError as error:
        raise CheckpointError(f"{must}, but it is nested too deeply") from error
    except ValueError as error:
        raise CheckpointError(f"{must}, but does not parse: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{must}, but cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{must}, got {type(config).__name__}")
    _check_depth(config, must)
    return config


def _check_depth(config: dict[str, Any], must: str) -> None:
    """Refuse what is nested more deeply than any config, which printing it would not survive."""
    level: list[Any] = [config]
    for _ in range(DEEPEST):
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one)]
        level = [one for one in level if isinstance(one, dict | list)]
        if not level:
            return
    raise CheckpointError(f"{must}, but it is nested more than {DEEPEST} deep")


def _once(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"{path}: {twice} must stand there once, got it {names.count(twice)} times")
    return found


def read_tensors(source: Source, dtype: torch.dtype | None) -> dict[str, tuple[Tensor, Path]]:
    """Read every tensor and the file it came from, checked to be finite floating point, and where the index says."""
    whole = source.optional("model.safetensors")
    index = None if whole else source.optional("model.safetensors.index.json")
    if index is None:
        shards, weight_map = [whole or source.file("model.safetensors")], None
    else:
        weight_map = _weight_map(index)
        found = {shard: source.optional(shard) for shard in sorted(set(weight_map.values()))}
        missing = [shard for shard, path in found.items() if path is None]
        if missing:
            raise FileNotFoundError(
                f"{source.name} has no {', '.join(missing)}, though {index.name} names {len(found)} files"
            )
        shards = list(found.values())
    tensors: dict[str, tuple[Tensor, Path]] = {}
    for shard in shards:
        for name, tensor in read_safetensors(shard, dtype):
            if name in tensors:
                raise CheckpointError(f"{shard}: tensor {name} must be in one file only, but {tensors[name][1]} has it")
            tensors[name] = tensor, shard
    for name, shard in () if weight_map is None else weight_map.items():
        there = tensors[name][1].name if name in tensors else None
        if there is not None and there != shard:
            raise CheckpointError(f"{index}: weight_map must say where tensor {name} is, {there}, got {shard}")
        if there is None:
            raise CheckpointError(f"{index}: weight_map must name tensors of the shards, but none has {name}")
    if weight_map is not None and (unnamed := sorted(set(tensors) - set(weight_map))):
        raise CheckpointError(f"{index}: weight_map must name every tensor of the shards, but not {unnamed[0]}")
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    """Return in which file beside an index each tensor is."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must map tensors to names of files beside it, got {weight_map!r}")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index}: weight_map must map tensors to names of files beside it, got {shard!r}")
    return weight_map


def read_safetensors(path: Path, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a safetensors file one by one, memory-mapped.

    Args:
        path: The file.
        dtype: What to convert to; if `None` half precision becomes float32 and the rest stays.

    Raises:
        CheckpointError: Not a safetensors file, one that cannot be read, a tensor that is not floating point or has
            more than 8 dimensions, a name of over 200 characters, or a value that is not finite.
    """
    with open_safetensors(path) as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            if len(name) > LONGEST_NAME:
                raise CheckpointError(
                    f"{path}: tensor names must have at most {LONGEST_NAME} characters, got {len(name)}: {name[:60]}..."
                )
            if (ndim := len(file.get_slice(name).get_shape())) > MOST_DIMENSIONS:
                raise CheckpointError(
                    f"{path}: tensor {name} must have at most {MOST_DIMENSIONS} dimensions, got {ndim}"
                )
            tensor = file.get_tensor(name)
            if tensor.dtype not in DTYPES:
                raise CheckpointError(f"{path}: tensor {name} must be floating point, got {tensor.dtype}")
            yield name, check_finite(widened(tensor, dtype), name, path)


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file.

    Raises:
        CheckpointError: It is none, or cannot be read.
    """
    must = f"{path} must be a safetensors file"
    if regular(path) is None:
        raise FileNotFoundError(f"no file {path}")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, UnicodeDecodeError, OverflowError) as error:
        with open(path, "rb") as file:
            head = file.read(4)
        pickled = head[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
        what = "is a pickle under another name; bilens reads safetensors only" if pickled else f"is damaged: {error}"
        raise CheckpointError(f"{must}, but {what} (first bytes {head!r})") from error
    except OSError as error:
        raise CheckpointError(f"{must}, but cannot be read: {error}") from error


def widened(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a tensor in that dtype; if `None`, half precision as float32 and the rest as it is."""
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.to(dtype or (torch.float32 if half else tensor.dtype))


def check_finite(tensor: Tensor, name: str, path: Path) -> Tensor:
    """Return a tensor that is finite, and but for float16 small enough that products of four are finite.

    Raises:
        CheckpointError: It is not; the message names the first value.
    """
    most = torch.finfo(tensor.dtype).max
    most = most if tensor.dtype == torch.float16 else most**0.25  # what it writes is squared, in norms and products
    if not (good := tensor.abs() <= most).all():  # NaN is not below either
        first = tuple((~good).nonzero()[0].tolist())
        told = f"{(~good).sum()} of {tensor.numel()} values are not"
        told += f"; the first is {tensor[first].item()} at {list(first)}"
        if tensor[first].isfinite():
            raise CheckpointError(f"{path}: tensor {name} must be at most {most:.3g} for finite results, but {told}")
        raise CheckpointError(f"{path}: tensor {name} must be finite in {tensor.dtype}, but {told}")
    return tensor


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`; one without a decoder, as published, gets the usual decoder of its pieces."""
    if regular(path) is None:
        raise FileNotFoundError(f"no file {path}")
    if (size := path.stat().st_size) > LARGEST_TOKENIZER:
        raise CheckpointError(f"{path} must be a tokenizers file of at most {LARGEST_TOKENIZER} bytes, got {size}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise CheckpointError(f"{path} must be a tokenizers file, but does not parse: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return with_decoder(tokenizer)


def stored_tokenizer(source: Source, *configs: Mapping[str, Any]) -> StoredTokenizer | None:
    """Read a tokenizer and what the files beside it say of special tokens; None if there is no `tokenizer.json`.

    Args:
        source: Where it lies.
        *configs: Of the model, `generation_config.json` first.
    """
    path = source.optional("tokenizer.json")
    if path is None:
        return None
    settings: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):  # the latter is of older ones
        beside = None if settings else source.extra(name)
        settings |= read_json(beside) if beside else {}
    template = source.extra("chat_template.jinja") if settings and "chat_template" not in settings else None
    settings |= {"chat_template": template.read_text(encoding="utf-8")} if template else {}
    return StoredTokenizer(read_tokenizer(path), settings, {role: ids_of(role, *configs) for role in NAMES})
