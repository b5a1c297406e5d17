"""Feature cards in the user's cache, found again by the weights that they are of."""

import hashlib
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from bilens.models.files import fingerprint, known_as
from bilens.models.sources import CheckpointError
from bilens.models.transformer import BilinearTransformer
from bilens.tensor.keeping import user_path

from .cardfiles import casts_told, header
from .cards import FeatureCards, read_cards
from .collecting import collect
from .directions import hook_of

if TYPE_CHECKING:
    from .stored import SAE

CACHE = "BILENS_CACHE"  # environment variable that names another folder


def cards_folder() -> Path:
    """Return the folder of the cards in the user's cache; it need not be there."""
    return user_path(os.environ.get(CACHE) or platformdirs.user_cache_dir("bilens", appauthor=False)) / "cards"


def cards_path(model: BilinearTransformer, sae: "SAE") -> Path:
    """Return where the cards of an SAE on a model are kept: the name is a hash of the weights of both."""
    digest = hashlib.sha256(f"{fingerprint(model)} {fingerprint(sae)}".encode()).hexdigest()
    return cards_folder() / f"{digest[:32]}.safetensors"


def cached_cards(model: BilinearTransformer, sae: "SAE") -> FeatureCards | None:
    """Return the cards that `keep_cards` made of an SAE on a model, None if it never did."""
    if not cards_folder().is_dir():  # weights need not be hashed for nothing
        return None
    path = cards_path(model, sae)
    if not path.exists():
        path = next((one for one in sorted(cards_folder().glob("*.safetensors")) if _of_cast(one, model, sae)), path)
    return read_cards(path, model) if path.exists() else None


def _of_cast(path: Path, model: BilinearTransformer, sae: "SAE") -> bool:
    """Tell whether cards are of an SAE on what a model was before it was cast."""
    try:
        told = header(path)["provenance"]
    except CheckpointError as error:  # cards of something else, for all one knows: they must not be in the way
        warnings.warn(f"cards in the cache were left out: {error}", stacklevel=2)
        return False
    return told["sae"] == fingerprint(sae) and known_as(model, told["model"], casts_told(told)) is not None


def keep_cards(
    model: BilinearTransformer,
    saes: "Sequence[SAE]",
    dataset: Iterable[str | Mapping[str, Any] | None],
    source: str,
    *,
    text: str = "text",
    label: str | None = None,
) -> list[FeatureCards]:
    """Make the cards of SAEs and keep them in the user's cache, where `FeatureLayer.load` finds them.

    One pass over the dataset for SAEs that read different hook points, as `collect` makes it: streamed, and resumed by
    the same call if it was killed.

    Args:
        model: The model.
        saes: The SAEs.
        dataset: Texts, or rows with a column of texts.
        source: What the dataset is called: a run over another one does not resume this one.
        text: Column of the texts.
        label: Column of the labels; none if `None`.

    Raises:
        ValueError: As `collect`; or an SAE that does not say where it reads.
    """
    passes: list[dict[str, SAE]] = []
    for sae in saes:
        hook = hook_of(sae)
        free = next((one for one in passes if hook not in one), None)
        if free is None:
            passes.append({hook: sae})
        else:
            free[hook] = sae
    if len(passes) > 1 and iter(dataset) is dataset:
        raise ValueError("dataset must be one that can be read twice, as several of the SAEs read one hook point")
    made = {}
    for one in passes:
        progress = cards_folder() / f"unfinished-{_digest(model, one, source, label)}"
        for hook, cards in collect(model, one, dataset, folder=progress, text=text, label=label).items():
            cards.save(cards_path(model, one[hook]))
            made[id(one[hook])] = cards
        shutil.rmtree(progress)
    return [made[id(sae)] for sae in saes]


def _digest(model: BilinearTransformer, saes: "Mapping[str, SAE]", source: str, label: str | None) -> str:
    parts = [fingerprint(model), source, str(label), *(f"{hook} {fingerprint(sae)}" for hook, sae in saes.items())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
