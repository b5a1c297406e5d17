"""A model with its SAEs, their feature cards and a model card: one folder, or one commit on the Hub."""

import copy
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from bilens.models.checkpoints import GENERATION
from bilens.models.checkpoints import save as save_model
from bilens.models.exporting import as_llama
from bilens.models.files import casts, fingerprint
from bilens.models.modelcards import Facts, model_card, table
from bilens.models.splicing import own_name
from bilens.models.texts import Texts
from bilens.models.tokenization import TOKENIZER_FILES
from bilens.models.transformer import BilinearTransformer
from bilens.tensor.keeping import atomic_write, user_path

from .cardfiles import AS
from .cards import FILE, FeatureCards
from .catalogue import catalogue
from .directions import check_sae, hook_of, writes_at
from .evaluation import Evaluation, evaluate
from .picking import stored_cards
from .shelf import cached_cards
from .stored import FOLDER, LENS_FILES, as_inference, save

if TYPE_CHECKING:
    from .stored import SAE

MODEL_FILES = ("config.json", GENERATION, *TOKENIZER_FILES)


@dataclass(frozen=True, eq=False)
class _Shelved:
    """One SAE to publish: the name of its folder, its feature cards if there are any, how it does on some texts."""

    name: str
    sae: "SAE"
    cards: FeatureCards | None
    found: Evaluation | None = None


def publish(
    model: BilinearTransformer,
    folder: str | Path,
    *,
    saes: "str | Path | Sequence[SAE] | None" = None,
    texts: Texts | None = None,
    facts: Facts | None = None,
    layout: Literal["llama"] | None = None,
    name: str | None = None,
) -> Path:
    """Write a model, its SAEs with their feature cards, and a model card, as `push_to_hub` lays them out.

    The model as `bilens.save` writes it, SAEs in SAELens' format under `saes/`, one folder each, and a `README.md` with
    the Hub's metadata: data, losses, hook points, a table of the SAEs, the licence. `bilens.load`, `saes.catalogue`,
    `saes.load` and `FeatureLayer.load` read it back by the folder's name. In the layout of Llama the SAEs and cards are
    bound to the weights as they are written.

    Args:
        model: The model.
        folder: Where to; made if need be. A `README.md` in it is replaced.
        saes: What `saes.catalogue` lists of a folder, a repository or `"bilens-mini"`; or SAEs, one per hook point,
            whose cards are looked for in the user's cache.
        texts: Held-out texts, on which each SAE, and the model, is evaluated for the card.
        facts: What only its maker knows: data, losses, licence.
        layout: As for `bilens.save`.
        name: What the card says that it is loaded by; the folder if `None`.

    Returns:
        The folder.

    Raises:
        ValueError: A model that the layout cannot hold, an SAE that does not fit the model, two at one hook point, or a
            folder that holds SAEs of another publication. Nothing was written.
    """
    folder = user_path(folder)
    written = model if layout is None else as_llama(model)
    shelf = _shelf(model, saes)
    _check_same(model, written, shelf)
    _check_fresh(folder, shelf)
    facts = facts or Facts()
    if texts is not None:
        shelf = [replace(one, found=evaluate(model, one.sae, texts)) for one in shelf]
        facts = replace(facts, losses={**facts.losses, **_losses(shelf)})
    save_model(model, folder, layout)
    told = (fingerprint(written), casts(written)) if shelf else ()
    for one in shelf:
        _write(one, folder / FOLDER / one.name, *told)
    card = model_card(written, name or folder.resolve().name, facts, layout=layout, saes=_table(shelf))
    with atomic_write(folder / "README.md") as partial:
        partial.write_text(card, encoding="utf-8")
    return folder


def push_to_hub(
    model: BilinearTransformer,
    repo: str,
    *,
    saes: "str | Path | Sequence[SAE] | None" = None,
    texts: Texts | None = None,
    facts: Facts | None = None,
    layout: Literal["llama"] | None = None,
    private: bool = False,
) -> str:
    """Put a model, its SAEs with their cards, and a model card on the Hub: what `publish` writes, in one commit.

    So no reader sees half of it, and what an earlier publication left (weights, tokenizer, SAEs) goes with the same
    commit; other files of the repository stay. The login is huggingface_hub's (`hf auth login`).

    Args:
        model: The model.
        repo: `"owner/name"`; made if need be.
        saes: As for `publish`.
        texts: As for `publish`.
        facts: As for `publish`.
        layout: As for `publish`.
        private: Whether a repository that is made is private.

    Returns:
        The address of the commit.

    Raises:
        ValueError: As for `publish`, or not a name of a repository. Nothing was sent.
    """
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise ValueError(f"repo must be 'owner/name', got {repo!r} (bilens.publish writes a folder)")
    with tempfile.TemporaryDirectory() as folder:
        publish(model, folder, saes=saes, texts=texts, facts=facts, layout=layout, name=repo)
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        added = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in paths]
        hub = HfApi()
        hub.create_repo(repo, private=private, exist_ok=True)
        stale = _stale(hub.list_repo_files(repo), {one.path_in_repo for one in added})
        done = hub.create_commit(
            repo,
            [*added, *(CommitOperationDelete(path) for path in stale)],
            commit_message="Model by bilens" if saes is None else "Model and SAEs by bilens",
        )
    return str(done.commit_url)


def _stale(there: Iterable[str], added: set[str]) -> list[str]:
    """Return the files of an earlier publication that this one does not replace."""
    ours = (*LENS_FILES, FILE)
    return sorted(
        path
        for path in set(there) - added
        if path in MODEL_FILES
        or (path.startswith("model") and path.endswith((".safetensors", ".safetensors.index.json")) and "/" not in path)
        or (path.startswith(f"{FOLDER}/") and path.endswith(tuple(f"/{file}" for file in ours)))
    )


def _shelf(model: BilinearTransformer, saes: "str | Path | Sequence[SAE] | None") -> list[_Shelved]:
    """Return the SAEs to publish, checked to fit the model, under names of their own."""
    if saes is None:
        return []
    if isinstance(saes, str | Path):
        loaded = [(one, one.load()) for one in catalogue(saes)]
        shelf = [_Shelved(Path(one.name).name, sae, stored_cards(one, model, sae)) for one, sae in loaded]
    else:
        shelf = [_Shelved(hook_of(sae), as_inference(sae), cached_cards(model, sae)) for sae in saes]
    names = [one.name for one in shelf]
    if doubles := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"saes must have names of their own (one SAE per hook point), got two of {', '.join(doubles)}")
    for one in shelf:
        check_sae(model, one.sae, writes_at(one.sae) or hook_of(one.sae), f"saes: the one at {one.name}")
    return shelf


@torch.no_grad()
def _check_same(model: BilinearTransformer, written: BilinearTransformer, shelf: Sequence[_Shelved]) -> None:
    """Make sure that what each SAE reads is the same in a layout, whose weights take in shifts of norms and scales."""
    if written is model or not shelf:
        return
    tokens = torch.arange(min(model.cfg.n_ctx, model.cfg.d_vocab), device=model.W_E.device)[None]
    hooks = [own_name(hook_of(one.sae)) for one in shelf]
    there = [hook for hook in hooks if hook in written.hook_dict]
    before, after = (one.run_with_cache(tokens, names_filter=there)[1] for one in (model, written))
    rounding = torch.finfo(model.W_E.dtype).eps ** 0.5
    for one, hook in zip(shelf, hooks, strict=True):
        if hook not in there or (after[hook] - before[hook]).norm() > rounding * before[hook].norm():
            raise ValueError(
                f"layout must be None with an SAE at {one.name}: what it reads at {hook} is not the same in a Llama, "
                f"whose weights take in shifts of norms and scales"
            )


def _check_fresh(folder: Path, shelf: Sequence[_Shelved]) -> None:
    there = {path.parent.name for path in (folder / FOLDER).glob(f"*/{LENS_FILES[0]}")}
    if others := sorted(there - {one.name for one in shelf}):
        raise ValueError(f"folder must not hold SAEs of another publication, got {', '.join(others)} in {folder}")


def _write(one: _Shelved, folder: Path, after: str, cast: dict[str, str]) -> None:
    """Write an SAE and its cards, bound to the weights that the model has where it is written, and to their casts."""
    sae = copy.copy(one.sae)  # whose config is written otherwise than it is here
    sae.cfg = copy.deepcopy(sae.cfg)
    settings = sae.cfg.metadata.settings or {}
    if settings.get("model") is not None:  # the model's, by `check_sae`, if need be before a cast
        sae.cfg.metadata["settings"] = settings | {"model": after, "casts": cast}
    save(sae, folder)
    if one.cards is None:
        (folder / FILE).unlink(missing_ok=True)
    else:
        told = {"model": after} | {f"{AS}{dtype}": digest for dtype, digest in cast.items()}
        kept = {key: value for key, value in one.cards.provenance.items() if not key.startswith(AS)}
        replace(one.cards, provenance=kept | told).save(folder / FILE)


def _losses(shelf: Sequence[_Shelved]) -> dict[str, float]:
    found = [one.found for one in shelf if one.found is not None]
    return {f"held-out texts ({found[0].tokens:,} tokens)": found[0].loss} if found else {}


@torch.no_grad()
def _table(shelf: Sequence[_Shelved]) -> str:
    """Return the SAEs as a Markdown table; empty if there are none."""
    if not shelf:
        return ""
    head = ["name", "hook point", "kind", "features", "k", "cards"]
    measured = any(one.found is not None for one in shelf)
    head += ["FVU", "L0", "dead", "loss", "spliced", "recovered"] if measured else []
    text = table(head, (_row(one) for one in shelf))
    if measured:
        text += "\n\nFraction of variance unexplained, active features per token, features never active, the model's "
        text += (
            "loss (nats per token), with the reconstruction spliced in, and the loss recovered against zero ablation."
        )
    return text


def _row(one: _Shelved) -> list[str]:
    cfg, found = one.sae.cfg, one.found
    cells = [one.name, hook_of(one.sae), cfg.architecture(), cfg.d_sae, getattr(cfg, "k", ""), ""]
    cells[-1] = "" if one.cards is None else f"of {one.cards.provenance['texts']} texts"
    if found is not None:
        numbers = (found.fvu, found.l0, found.dead, found.loss, found.loss_spliced, found.recovered)
        cells += [f"{number:.4g}" for number in numbers]
    return [str(cell) for cell in cells]
