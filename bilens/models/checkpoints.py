"""Published checkpoints to models and back."""

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from bilens.tensor.keeping import atomic_write, user_path

from .archives import find_archive, read_archive
from .attention_only import AttentionOnly
from .elriggs import Elriggs
from .exporting import as_llama
from .families import FAMILIES
from .layouts import Layout
from .llama import Llama
from .modelcards import model_card
from .published import Published
from .rotary import Rope
from .sources import (
    DTYPES,
    EMBEDDED,
    CheckpointError,
    Source,
    check_finite,
    read_json,
    read_tensors,
    read_tokenizer,
    stored_tokenizer,
)
from .tokenization import TOKENIZER_FILES, StoredTokenizer, save_tokenizer
from .transformer import BilinearConfig, BilinearTransformer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"


def load(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    checkpoint: str | None = None,
) -> BilinearTransformer:
    """Load a bilinear or Llama-family language model from the Hub, a folder, or the embedded `"bilens-mini"`.

    Reads safetensors directly (memory-mapped) into a plain `nn.Module` in eval mode; no code from the checkpoint runs,
    no weight is ever made up. Where the publishers of a format have nothing else (`Elriggs/*`, attention-only models)
    a torch archive is read, after a check that it holds tensors only; the first time writes a safetensors copy beside
    the Hub's cache and says so.

    Args:
        name: `"bilens-mini"`, a folder with `config.json` and `model.safetensors`, whole or in shards with an index
            (and `tokenizer.json`), or a Hub repository such as `"tdooms/ts-medium"` (the papers' ts-tiny). The config
            tells the format: any published bilinear one, the `Elriggs/*` ones, those of attention only, or that of one
            of transformers' families in `models.families.FAMILIES`: Llama, Mistral, Qwen2 and 3, OLMo2, Gemma 2 and 3,
            nanochat. A dataset repository is `"datasets/owner/name"`.
        revision: Branch, tag or commit of the Hub repository.
        device: Where to put the weights; the CPU if `None`.
        dtype: Floating-point type; if `None` the stored one, half precision widened to float32 (exact, fast on CPUs).
        tokenizer: A `tokenizer.json`, a folder or a Hub repository that holds one. If `None`: the checkpoint's own, for
            a Hub repository else the one that its config or its format names.
        overrides: Config fields set against the checkpoint's, which `save` keeps. `Elriggs/gpt2-*`: `rotary_dtype`
            (`"bfloat16"`, to which their code rounds cosines and sines, or `"float32"`), `normalize_pattern` (whether
            rows of one squared score matrix are divided by their sums), `n_ctx`. Attention-only: `residual` (`"add"`,
            or `"lerp"` for `x + s (o(z) - x)`).
        checkpoint: Which of several checkpoints, e.g. `"step_00020000.pt"`, in the folder or its `checkpoints`; it may
            be left out where there is one.

    Returns:
        The model. `model.source` is the config as published, `model.ignored_keys` its keys without meaning here.

    Raises:
        FileNotFoundError: No such folder or repository (with near names), no such revision or file, shards that are
            missing, or not in the cache while offline.
        CheckpointError: A config that asks for what this model cannot compute (a mixture of experts, quantised weights,
            an unknown rotary scaling, ...) or contradicts the tensors; a missing, misshapen or non-finite tensor; a
            pickle instead of safetensors; a tokenizer with ids beyond the embedding. Says which file and tensor, what
            was expected and what was found.
        ValueError: An empty name, a `dtype` that is not floating point, a `device` that is not there, a `revision` of
            what is not a Hub repository, an override that the format has not, a `checkpoint` that is missing where
            there are several, or given where a format has none.
    """
    if not str(name):
        raise ValueError(f"name must be {EMBEDDED!r}, a folder or a Hub repository, got an empty string")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(sorted(map(str, DTYPES)))}, got {dtype}")
    check_device(device)
    source = Source.find(name, revision)
    config_file = source.file("config.json")
    config = read_json(config_file)
    layout = _layout_of(config, config_file)
    settings = layout.override(config, overrides or {})
    tensors = layout.prepare(_read(source, layout, checkpoint, dtype), settings)
    model = _build(layout, settings, tensors, config_file)
    model.name = str(name)
    model.source, model.ignored_keys = config, tuple(sorted(set(config) - layout.known))
    beside = source.extra(GENERATION)
    model.generation = read_json(beside) if beside else {}
    stored = _find_tokenizer(source, layout, config, tokenizer, model.generation)
    if stored is None:
        model.without_tokenizer = _why_none(layout, config)
    else:
        n_tokens = 1 + max(stored.backend.get_vocab().values(), default=-1)
        if n_tokens > model.cfg.d_vocab:
            raise CheckpointError(
                f"the tokenizer of {name} has {n_tokens} tokens, the embedding only {model.cfg.d_vocab} rows: they do "
                f"not belong together"
            )
        model.tokenizer, model.has_bos = stored, layout.has_bos(stored)
    return model.to(device).eval() if device is not None else model.eval()


def save(model: BilinearTransformer, folder: str | os.PathLike[str], layout: Literal["llama"] | None = None) -> None:
    """Write a model in the published format: `config.json`, `model.safetensors` and, if it has one, its tokenizer.

    The format is the one the model came from, unknown config keys included; a new model gets the newest that can
    express it. In the Llama family's, a bilinear MLP is `hidden_act: "linear"`, which transformers loads and runs.
    Loading it again is bit-identical. The tokenizer's files are those that transformers' `AutoTokenizer` reads. Each
    file is replaced atomically, nothing outside `folder` is touched; what an earlier model had and this one has not,
    tokenizer or `generation_config.json`, goes.

    With `layout="llama"` it is written as a Llama, which transformers' own classes and what stands on them read: the
    same function, folded as `exporting.as_llama` says, with a model card, `README.md`, if there is none. Its logits are
    the model's up to rounding, and loading it again gives exactly those that it was written with.

    Args:
        model: The model.
        folder: Where to; made if need be.
        layout: `"llama"`, or `None` for the model's own.

    Raises:
        ValueError: No published format can express the model (of a layout: says which fields stand in the way), or a
            weight is not finite; nothing was written.
    """
    if layout not in (None, "llama"):
        raise ValueError(f"layout must be 'llama' or None (the model's own), got {layout!r}")
    if any(block.mlp.gate is not None for block in model.blocks):
        raise ValueError("model is being annealed, which no format can express: bilens.models.annealing.fold it first")
    model = model if layout is None else as_llama(model)
    form = _layout_for(model) if layout is None else Llama(layout)
    folder = user_path(folder)
    state, config = _state(model, form, folder), form.config(model)
    with ExitStack() as stack:  # which replaces the files once all are written
        written = {name: stack.enter_context(atomic_write(folder / name)) for name in ("config.json", WEIGHTS)}
        written["config.json"].write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        save_file(state, written[WEIGHTS], {"format": "pt"})
        if model.generation:
            beside = stack.enter_context(atomic_write(folder / GENERATION))
            beside.write_text(json.dumps(dict(model.generation), indent=2, sort_keys=True) + "\n")
        tokenizer = set() if model.tokenizer is None else save_tokenizer(model.tokenizer, folder, stack)
        if layout is not None and not (folder / "README.md").exists():
            card = stack.enter_context(atomic_write(folder / "README.md"))
            card.write_text(model_card(model, folder.resolve().name, layout=layout), encoding="utf-8")
    for name in {*TOKENIZER_FILES, GENERATION} - tokenizer - ({GENERATION} if model.generation else set()):
        (folder / name).unlink(missing_ok=True)


def check_device(device: str | torch.device | None) -> None:
    """Make sure that a device is there.

    Raises:
        ValueError: It is not.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # as many kinds as backends
        raise ValueError(f"device must be one that torch has here, got {device!r}: {error}") from error


def _read(
    source: Source, layout: Layout, checkpoint: str | None, dtype: torch.dtype | None
) -> dict[str, tuple[Tensor, Path]]:
    """Read the tensors: safetensors, or of a format whose publishers have none a torch archive."""
    if checkpoint is not None and not layout.archived:
        raise ValueError(f"checkpoint must be None for {source.name}, whose format has one only, got {checkpoint!r}")
    if layout.archived and (checkpoint or not (source.optional(WEIGHTS) or source.optional(INDEX))):
        archive = find_archive(source, checkpoint)
        if archive is not None:
            return read_archive(archive, dtype)
    return read_tensors(source, dtype)


def _why_none(layout: Layout, config: Mapping[str, Any]) -> str:
    """Return what a model without a tokenizer says when it needs one; empty where no more is known."""
    if (reason := layout.undecodable(config)) is not None:
        return reason
    named = layout.tokenizer(config) if layout.archived else None
    hint = f"this model has no tokenizer, so it takes token ids only; its own is {named!r}: pass tokenizer={named!r}"
    return hint if named else ""


def _find_tokenizer(
    source: Source,
    layout: Layout,
    config: Mapping[str, Any],
    given: str | os.PathLike[str] | None,
    generation: Mapping[str, Any],
) -> StoredTokenizer | None:
    """Return the tokenizer asked for, else the checkpoint's own, else (on the Hub) the one that its config names."""
    configs = (generation, config)
    if given is not None:
        path = user_path(given)
        if path.is_file() and path.name != "tokenizer.json":
            return StoredTokenizer(read_tokenizer(path))
        place = Source(str(path), path.parent, None) if path.is_file() else Source.find(given, None)
        place.file("tokenizer.json")  # raises if there is none
        return stored_tokenizer(place, *configs)
    own = stored_tokenizer(source, *configs)
    if own is not None or source.folder is not None or layout.undecodable(config) is not None:
        return own
    named = layout.tokenizer(config)
    if named is not None:
        try:
            place = Source(named, None, None)
            place.file("tokenizer.json")
            return stored_tokenizer(place, *configs)
        except FileNotFoundError as error:
            reason = str(error)
    else:
        reason = f"its config names no tokenizer that is known here ({config.get('tokenizer')!r})"
    warnings.warn(f"{source.name} was loaded without a tokenizer: {reason}; pass tokenizer= for one", stacklevel=3)
    return None


# -- from tensors to a model ------------------------------------------------------------------------------------------


def _layout_of(config: Mapping[str, Any], config_file: Path) -> Layout:
    """Tell the format by the config's keys; what of it cannot be represented is refused before any tensor is read."""
    for layout in (Elriggs, AttentionOnly):
        if layout.claims(config):
            return layout()
    return Llama.of_config(config, config_file) if Llama.claims(config) else Published.of_config(config)


def _layout_for(model: BilinearTransformer) -> Layout:
    """Choose the format to write: the model's own, for a new model the newest that can express it."""
    if model.source:
        layouts = [_layout_of(model.source, Path("config.json"))]
    else:
        layouts = [*map(Published, Published.generations), *map(Llama, FAMILIES), Elriggs(), AttentionOnly()]
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

    def check_sizes(self, cfg: BilinearConfig) -> None:
        """Refuse sizes far beyond what is stored, before anything of such a size is made.

        Smaller contradictions are told tensor by tensor.
        """
        total = sum(tensor.numel() for tensor, _ in self.left.values())
        most = {"layers": len(self.left), "d_model": 64 * total // cfg.d_vocab}
        found = {"layers": cfg.n_layers, "d_model": cfg.d_model}
        found |= {"d_hidden": cfg.d_hidden, "heads times their width": cfg.n_heads * cfg.d_head}
        for name, size in found.items():
            if size > (limit := most.get(name, 64 * total // cfg.d_model)):
                raise CheckpointError(
                    f"{self.config_file}: {name} must be at most {limit}, as {', '.join(self.files)} holds "
                    f"{len(self.left)} tensors of {total} numbers, got {size}"
                )

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
) -> BilinearTransformer:
    """Build the model that the config describes and fill it with the tensors; both must agree entirely."""
    stored = _Stored(tensors, config_file)
    cfg = layout.shape(config, stored.vocabulary(layout.embedding), config_file)
    stored.check_sizes(cfg)
    with torch.device("meta"):
        model = BilinearTransformer(cfg, source=config)
    state: dict[str, Tensor] = {}
    for name, parameter in model.state_dict().items():
        named = layout.parts(name, _rows(parameter), cfg)
        if cfg.unembed.tied and name == "unembed.weight":
            state[name] = _tied(stored, state["embed.weight"], named)
            continue
        parts = [
            stored.take(part, [rows, *parameter.shape[1:]] if parameter.ndim else []) for part, rows in named.items()
        ]
        state[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    _refuse_leftovers(stored, cfg)
    model.load_state_dict(state, assign=True)
    model.ignored_keys = tuple(sorted(set(config) - layout.known))
    return model


def _rows(weight: Tensor) -> int:
    return len(weight) if weight.ndim else 1


def _tied(stored: _Stored, embedding: Tensor, names: Iterable[str]) -> Tensor:
    """Return the embedding; a stored copy of it must equal it."""
    for name in names:
        if name in stored.left and not torch.equal(stored.take(name, list(embedding.shape)), embedding):
            raise CheckpointError(
                f"{', '.join(stored.files)}: tensor {name} must equal the embedding, since {stored.config_file.name} "
                f"ties them (tie_word_embeddings), but it differs"
            )
    return embedding


def _refuse_leftovers(stored: _Stored, cfg: BilinearConfig) -> None:
    """Raise if there are tensors that the config does not account for; check rotary frequencies if stored."""
    for name, (tensor, path) in stored.left.items():
        if not name.endswith(("rotary.inv_freq", "rotary_emb.inv_freq")):
            raise CheckpointError(
                f"{path}: tensor {name} of shape {list(tensor.shape)} has no place in the model that "
                f"{stored.config_file.name} describes ({cfg.n_layers} layers, {cfg.mlp}, {cfg.norm}, "
                f"attention biases {cfg.attention.bias})"
            )
        expected = Rope(cfg.attention.rope.base).frequencies(cfg.d_head, torch.float32)  # stored before any stretching
        if tensor.shape != expected.shape or not torch.allclose(tensor.float(), expected, rtol=0.01):
            raise CheckpointError(
                f"{path}: tensor {name} must hold the {len(expected)} rotary frequencies "
                f"{cfg.attention.rope.base:g}^(-2i/{cfg.d_head}) that n_head={cfg.n_heads} in "
                f"{stored.config_file.name} asks for, got {list(tensor.shape)} starting {tensor.flatten()[:3].tolist()}"
            )


def _state(model: BilinearTransformer, layout: Layout, folder: Path) -> dict[str, Tensor]:
    """Return the tensors to write, under the format's names."""
    cfg, state = model.cfg, {}
    for name, weight in model.state_dict().items():
        if cfg.unembed.tied and name == "unembed.weight":
            if not torch.equal(weight, model.W_E):
                raise ValueError(
                    "model.unembed.weight must equal model.embed.weight, which cfg.unembed.tied says it is"
                )
            continue
        parts, weight = layout.parts(name, _rows(weight), cfg), check_finite(weight, name, folder).cpu()
        pieces = weight.split(list(parts.values())) if weight.ndim else [weight]
        # clones: a safetensors file cannot hold weights that share memory
        copies = (piece.clone(memory_format=torch.contiguous_format) for piece in pieces)
        state |= dict(zip(parts, copies, strict=True))
    if isinstance(layout, Published):  # the authors' code refuses a file without them
        frequencies = cfg.attention.rope.frequencies(cfg.d_head, torch.float32)
        state |= {f"transformer.h.{i}.attn.rotary.inv_freq": frequencies.clone() for i in range(cfg.n_layers)}
    return state
