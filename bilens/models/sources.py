"""Where the files of a checkpoint come from, a folder or the Hub, and how each kind is read."""

import json
import os
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
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

from .tokenization import NAMES, StoredTokenizer, ids_of, with_decoder

EMBEDDED = "bilens-mini"
PUBLISHED = ("tdooms/ts-medium", "tdooms/fw-small", "tdooms/fw-medium")
DATASETS = "datasets/"  # before the name of a model that lies in a dataset repository
IN_DATASETS = ("melephant/2l-bilinear-attn-normalised-v2",)
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
        folder = assets() if name == EMBEDDED else Path(name).expanduser()
        if folder.is_dir() or name == EMBEDDED:
            if revision is not None:
                raise ValueError(f"revision goes with a Hub repository, and {name} is a folder; got {revision!r}")
            return cls(str(name), folder, None)
        if folder.exists():
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
            path = self.folder / filename
            return path if path.is_file() else None
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


def conversions() -> Path:
    """Return the folder, beside the Hub's cache, for copies of what was published in another form."""
    return Path(constants.HF_HUB_CACHE).parent / "bilens"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a `CheckpointError` names the file if it is none."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} must be a JSON object, but does not parse: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must be a JSON object, got {type(config).__name__}")
    return config


def read_tensors(source: Source, dtype: torch.dtype | None) -> dict[str, tuple[Tensor, Path]]:
    """Read every tensor and the file it came from, checked to be finite floating point."""
    whole = source.optional("model.safetensors")
    index = None if whole else source.optional("model.safetensors.index.json")
    if index is None:
        shards = [whole or source.file("model.safetensors")]
    else:
        weight_map = read_json(index).get("weight_map")
        named = list(weight_map.values()) if isinstance(weight_map, dict) else [weight_map]
        for shard in named:
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise CheckpointError(
                    f"{index}: weight_map must map tensors to names of files beside it, got {shard!r}"
                )
        found = {shard: source.optional(shard) for shard in sorted(set(named))}
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
    return tensors


def read_safetensors(path: Path, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a safetensors file one by one, memory-mapped.

    Args:
        path: The file.
        dtype: What to convert to; if `None` half precision becomes float32 and the rest stays.

    Raises:
        CheckpointError: Not a safetensors file, a tensor that is not floating point, or a value that is not finite.
    """
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_tensor(name)
                if tensor.dtype not in DTYPES:
                    raise CheckpointError(f"{path}: tensor {name} must be floating point, got {tensor.dtype}")
                yield name, check_finite(widened(tensor, dtype), name, path)
    except SafetensorError as error:
        with open(path, "rb") as file:
            head = file.read(4)
        pickled = head[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
        what = "is a pickle under another name; bilens reads safetensors only" if pickled else f"is damaged: {error}"
        raise CheckpointError(f"{path} must be a safetensors file, but {what} (first bytes {head!r})") from error


def widened(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a tensor in that dtype; if `None`, half precision as float32 and the rest as it is."""
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.to(dtype or (torch.float32 if half else tensor.dtype))


def check_finite(tensor: Tensor, name: str, path: Path) -> Tensor:
    """Return a tensor that is finite; a `CheckpointError` names its first value that is not."""
    if not (good := tensor.isfinite()).all():
        first = (~good).nonzero()[0].tolist()
        raise CheckpointError(
            f"{path}: tensor {name} must be finite in {tensor.dtype}, but {(~good).sum()} of {tensor.numel()} values "
            f"are not; the first is {tensor[tuple(first)].item()} at {first}"
        )
    return tensor


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`; one without a decoder, as published, gets the usual decoder of its pieces."""
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
