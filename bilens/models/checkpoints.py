"""Published checkpoints to models and back: from the Hub, a folder, or the model that ships inside."""

import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models
from torch import Tensor

from .llama import ARCHITECTURES, Llama
from .published import CheckpointError, Layout, Published
from .rotary import Rope

if TYPE_CHECKING:
    from .transformer import BilinearConfig, BilinearTransformer

EMBEDDED = "bilens-mini"
PUBLISHED = ("tdooms/ts-medium", "tdooms/fw-small", "tdooms/fw-medium")
TOKENIZERS = {
    "ts-4096": "tdooms/ts-tokenizer-4096",
    "mistral": "mistral-community/Mixtral-8x22B-v0.1",
    "gpt2": "openai-community/gpt2",
}
DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def assets() -> Path:
    """Return the folder of the embedded model, its tokenizer, its SAEs and its card."""
    return Path(str(files("bilens") / "assets" / EMBEDDED))


def load(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
) -> "BilinearTransformer":
    """Load a bilinear or Llama-family language model from the Hub, a folder, or the embedded `"bilens-mini"`.

    Reads safetensors directly (memory-mapped) into a plain `nn.Module` in eval mode; no code from the checkpoint runs,
    nothing is unpickled, no weight is ever made up.

    Args:
        name: `"bilens-mini"`, a folder with `config.json` and `model.safetensors`, whole or in shards with an index
            (and `tokenizer.json`), or a Hub repository such as `"tdooms/ts-medium"` (the papers' ts-tiny). The config
            tells the format: any published bilinear one, or transformers' Llama, Mistral and Qwen2.
        revision: Branch, tag or commit of the Hub repository.
        device: Where to put the weights; the CPU if `None`.
        dtype: Floating-point type; if `None` the stored one, half precision widened to float32 (exact, fast on CPUs).
        tokenizer: A `tokenizer.json`, a folder or a Hub repository that holds one. If `None`: the checkpoint's own, for
            a Hub repository else the one that its config names.

    Returns:
        The model. `model.source` is the config as published, `model.ignored_keys` its keys without meaning here.

    Raises:
        FileNotFoundError: No such folder or repository (with near names), no such revision or file, shards that are
            missing, or not in the cache while offline.
        CheckpointError: A config that asks for what this model cannot compute (a mixture of experts, quantised weights,
            an unknown rotary scaling, ...) or contradicts the tensors; a missing, misshapen or non-finite tensor; a
            pickle instead of safetensors; a tokenizer with ids beyond the embedding. Says which file and tensor, what
            was expected and what was found.
        ValueError: An empty name, a `dtype` that is not floating point, a `revision` of what is not a Hub repository.
    """
    if not str(name):
        raise ValueError(f"name must be {EMBEDDED!r}, a folder or a Hub repository, got an empty string")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(sorted(map(str, DTYPES)))}, got {dtype}")
    source = Source.find(name, revision)
    config_file = source.file("config.json")
    config = read_json(config_file)
    layout = _layout_of(config, config_file)
    model = _build(layout, config, _read_tensors(source, dtype), config_file)
    model.tokenizer = _find_tokenizer(source, config, tokenizer)
    if model.tokenizer is not None:
        n_tokens = 1 + max(model.tokenizer.get_vocab().values(), default=-1)
        if n_tokens > model.cfg.d_vocab:
            raise CheckpointError(
                f"the tokenizer of {name} has {n_tokens} tokens, the embedding only {model.cfg.d_vocab} rows: they do "
                f"not belong together"
            )
        model.has_bos = layout.has_bos(model.tokenizer)
    return model.to(device).eval() if device is not None else model.eval()


def save(model: "BilinearTransformer", folder: str | os.PathLike[str]) -> None:
    """Write a model in the published format: `config.json`, `model.safetensors` and, if it has one, `tokenizer.json`.

    The format is the one the model came from, unknown config keys included; a new model gets the newest that can
    express it. In the Llama family's, a bilinear MLP is `hidden_act: "linear"`, which transformers loads and runs.
    Loading it again is bit-identical. Each file is replaced atomically, nothing outside `folder` is touched; the
    `tokenizer.json` of an earlier model goes if this one has none.

    Args:
        model: The model.
        folder: Where to; made if need be.

    Raises:
        ValueError: No published format can express the model, or a weight is not finite; nothing was written.
    """
    if any(block.mlp.gate is not None for block in model.blocks):
        raise ValueError("model is being annealed, which no format can express: bilens.models.annealing.fold it first")
    layout = _layout_for(model)
    folder = Path(folder)
    state, config = _state(model, layout, folder), layout.config(model)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        written = Path(temporary)
        (written / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        save_file(state, written / "model.safetensors", {"format": "pt"})
        if model.tokenizer is not None:
            model.tokenizer.save(str(written / "tokenizer.json"))
        mode = (written / "config.json").stat().st_mode
        for file in sorted(written.iterdir()):
            file.chmod(mode)  # safetensors writes files that only their owner can read
            os.replace(file, folder / file.name)
    if model.tokenizer is None:
        (folder / "tokenizer.json").unlink(missing_ok=True)


# -- where files come from --------------------------------------------------------------------------------------------


class Source:
    """A folder or a Hub repository; finds files by name."""

    def __init__(self, name: str, folder: Path | None, revision: str | None):
        self.name, self.folder, self.revision = name, folder, revision
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
        local = not isinstance(name, str) or name.startswith((".", "/", "~")) or name.count("/") > 1
        if local or name.count("/") == 0:
            near = get_close_matches(str(name), [EMBEDDED, *(p.rsplit("/")[-1] for p in PUBLISHED)], n=1, cutoff=0.6)
            full = [p for p in (EMBEDDED, *PUBLISHED) if near and p.rsplit("/")[-1] == near[0]]
            hint = f"; did you mean {full[0]!r}?" if full else ""
            raise FileNotFoundError(
                f"no folder {str(name)!r}, and a Hub repository is named owner/name (the embedded model is "
                f"{EMBEDDED!r}){hint}"
            )
        return cls(name, None, revision)

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
        known = self.commit and huggingface_hub.try_to_load_from_cache(self.name, filename, revision=self.commit)
        if known is not None and not isinstance(known, str):
            return None  # the cache remembers that this commit does not have it; the Hub need not be asked again
        try:
            path = Path(huggingface_hub.hf_hub_download(self.name, filename, revision=self.commit or self.revision))
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

    def _near_names(self) -> str:
        """Return a hint with the repository names of the same owner nearest to the one that does not exist."""
        owner = self.name.split("/")[0]
        try:
            names = [model.id for model in huggingface_hub.HfApi().list_models(author=owner, limit=1000)]
        except Exception:  # whatever it is, this was to be a hint in an error that is raised anyway
            names = []
        near = get_close_matches(self.name, sorted({*names, *PUBLISHED}), n=3, cutoff=0.5)
        return f"; did you mean {' or '.join(near)}?" if near else ""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a `CheckpointError` names the file if it is none."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} must be a JSON object, but does not parse: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must be a JSON object, got {type(config).__name__}")
    return config


def _read_tensors(source: Source, dtype: torch.dtype | None) -> dict[str, tuple[Tensor, Path]]:
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
                half = tensor.dtype in (torch.float16, torch.bfloat16)
                yield name, _finite(tensor.to(dtype or (torch.float32 if half else tensor.dtype)), name, path)
    except SafetensorError as error:
        with open(path, "rb") as file:
            head = file.read(4)
        pickled = head[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
        what = "is a pickle under another name; bilens reads safetensors only" if pickled else f"is damaged: {error}"
        raise CheckpointError(f"{path} must be a safetensors file, but {what} (first bytes {head!r})") from error


def _finite(tensor: Tensor, name: str, path: Path) -> Tensor:
    if not (good := tensor.isfinite()).all():
        first = (~good).nonzero()[0].tolist()
        raise CheckpointError(
            f"{path}: tensor {name} must be finite in {tensor.dtype}, but {(~good).sum()} of {tensor.numel()} values "
            f"are not; the first is {tensor[tuple(first)].item()} at {first}"
        )
    return tensor


def _find_tokenizer(
    source: Source, config: Mapping[str, Any], given: str | os.PathLike[str] | None
) -> Tokenizer | None:
    """Return the tokenizer asked for, else the checkpoint's own, else (on the Hub) the one that its config names."""
    if given is not None:
        path = Path(given)
        return read_tokenizer(path if path.is_file() else Source.find(given, None).file("tokenizer.json"))
    own = source.optional("tokenizer.json")
    if own is not None:
        return read_tokenizer(own)
    if source.folder is not None:
        return None
    named = TOKENIZERS.get(str(config.get("tokenizer")))
    if named is None and "n_vocab" in config:
        named = f"tdooms/TinyStories-{config['n_vocab']}"
    if named is not None:
        try:
            return read_tokenizer(Source(named, None, None).file("tokenizer.json"))
        except FileNotFoundError as error:
            reason = str(error)
    else:
        reason = f"its config names no tokenizer that is known here ({config.get('tokenizer')!r})"
    warnings.warn(f"{source.name} was loaded without a tokenizer: {reason}; pass tokenizer= for one", stacklevel=3)
    return None


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`; a WordPiece one without a decoder, as published, gets the usual decoder."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise CheckpointError(f"{path} must be a tokenizers file, but does not parse: {error}") from error
    if tokenizer.decoder is None and isinstance(tokenizer.model, models.WordPiece):
        tokenizer.decoder = decoders.WordPiece()
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


# -- from tensors to a model ------------------------------------------------------------------------------------------


def _layout_of(config: Mapping[str, Any], config_file: Path) -> Layout:
    """Tell the format by the config's keys; what of it cannot be represented is refused before any tensor is read."""
    return Llama.of_config(config, config_file) if Llama.claims(config) else Published.of_config(config)


def _layout_for(model: "BilinearTransformer") -> Layout:
    """Choose the format to write: the model's own, for a new model the newest that can express it."""
    if model.source:
        layouts = [_layout_of(model.source, Path("config.json"))]
    else:
        layouts = [*map(Published, Published.generations), *map(Llama, ARCHITECTURES)]
    for layout in layouts:
        if layout.expresses(model.cfg):
            return layout
    raise ValueError(f"no published format can express this model: {model.cfg}")


class _Stored:
    """The tensors of a checkpoint; each leaves when it has found its place, so that what is left has none."""

    def __init__(self, tensors: dict[str, tuple[Tensor, Path]], config_file: Path):
        self.names, self.left, self.config_file = tuple(tensors), tensors, config_file
        self.files = sorted({str(path) for _, path in tensors.values()}) or [str(config_file.parent)]

    def vocabulary(self, name: str) -> int:
        """Return the rows of the embedding."""
        embedding, path = self._find(name, "[vocab, d_model]")
        if embedding.ndim != 2:
            raise CheckpointError(
                f"{path}: tensor {name} must have shape [vocab, d_model], got {list(embedding.shape)}"
            )
        return len(embedding)

    def take(self, name: str, shape: list[int]) -> Tensor:
        """Return the tensor of that name, which must have that shape."""
        tensor, path = self._find(name, str(shape))
        if list(tensor.shape) != shape:
            raise CheckpointError(
                f"{path}: tensor {name} must have shape {shape} by {self.config_file.name}, got {list(tensor.shape)}"
            )
        del self.left[name]
        return tensor

    def _find(self, name: str, shape: str) -> tuple[Tensor, Path]:
        if name in self.left:
            return self.left[name]
        near = get_close_matches(name, self.names, n=1)
        hint = f"; it has {near[0]}" if near else ""
        raise CheckpointError(
            f"{', '.join(self.files)}: tensor {name} of shape {shape} is missing, though {self.config_file.name} asks "
            f"for it{hint}"
        )


def _build(
    layout: Layout, config: dict[str, Any], tensors: dict[str, tuple[Tensor, Path]], config_file: Path
) -> "BilinearTransformer":
    """Build the model that the config describes and fill it with the tensors; both must agree entirely."""
    from .transformer import BilinearTransformer

    stored = _Stored(tensors, config_file)
    cfg = layout.shape(config, stored.vocabulary(layout.embedding), config_file)
    with torch.device("meta"):
        model = BilinearTransformer(cfg, source=config)
    state: dict[str, Tensor] = {}
    for name, parameter in model.state_dict().items():
        if cfg.tied and name == "unembed.weight":
            state[name] = _tied(stored, state["embed.weight"], layout.parts(name, len(parameter), cfg))
            continue
        parts = [
            stored.take(part, [rows, *parameter.shape[1:]])
            for part, rows in layout.parts(name, len(parameter), cfg).items()
        ]
        state[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    _refuse_leftovers(stored, cfg)
    model.load_state_dict(state, assign=True)
    model.ignored_keys = tuple(sorted(set(config) - layout.known))
    return model


def _tied(stored: _Stored, embedding: Tensor, names: Iterable[str]) -> Tensor:
    """Return the embedding; a stored copy of it must equal it."""
    for name in names:
        if name in stored.left and not torch.equal(stored.take(name, list(embedding.shape)), embedding):
            raise CheckpointError(
                f"{', '.join(stored.files)}: tensor {name} must equal the embedding, since {stored.config_file.name} "
                f"ties them (tie_word_embeddings), but it differs"
            )
    return embedding


def _refuse_leftovers(stored: _Stored, cfg: "BilinearConfig") -> None:
    """Raise if there are tensors that the config does not account for; check rotary frequencies if stored."""
    for name, (tensor, path) in stored.left.items():
        if not name.endswith(("rotary.inv_freq", "rotary_emb.inv_freq")):
            raise CheckpointError(
                f"{path}: tensor {name} of shape {list(tensor.shape)} has no place in the model that "
                f"{stored.config_file.name} describes ({cfg.n_layers} layers, mlp {cfg.mlp}, mlp_bias {cfg.mlp_bias}, "
                f"attn_bias {cfg.attn_bias}, norm {cfg.norm})"
            )
        expected = Rope(cfg.rope.base).frequencies(cfg.d_head, torch.float32)  # stored before any stretching
        if tensor.shape != expected.shape or not torch.allclose(tensor.float(), expected, rtol=0.01):
            raise CheckpointError(
                f"{path}: tensor {name} must hold the {len(expected)} rotary frequencies "
                f"{cfg.rope.base:g}^(-2i/{cfg.d_head}) that n_head={cfg.n_heads} in {stored.config_file.name} asks "
                f"for, got {list(tensor.shape)} starting {tensor.flatten()[:3].tolist()}"
            )


def _state(model: "BilinearTransformer", layout: Layout, folder: Path) -> dict[str, Tensor]:
    """Return the tensors to write, under the format's names."""
    cfg, state = model.cfg, {}
    for name, weight in model.state_dict().items():
        if cfg.tied and name == "unembed.weight":
            if not torch.equal(weight, model.W_E):
                raise ValueError("model.unembed.weight must equal model.embed.weight, which cfg.tied says it is")
            continue
        parts = layout.parts(name, len(weight), cfg)
        pieces = _finite(weight, name, folder).cpu().split(list(parts.values()))
        # clones: a safetensors file cannot hold weights that share memory
        copies = (piece.clone(memory_format=torch.contiguous_format) for piece in pieces)
        state |= dict(zip(parts, copies, strict=True))
    if isinstance(layout, Published):  # the authors' code refuses a file without them
        frequencies = cfg.rope.frequencies(cfg.d_head, torch.float32)
        state |= {f"transformer.h.{i}.attn.rotary.inv_freq": frequencies.clone() for i in range(cfg.n_layers)}
    return state
