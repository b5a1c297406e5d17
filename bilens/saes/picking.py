"""Which of the SAEs that are stored somewhere stands at one side of a layer."""

from collections.abc import Sequence
from pathlib import Path

from bilens.models.sources import regular
from bilens.models.transformer import BilinearTransformer

from .cards import FILE, FeatureCards, read_cards
from .catalogue import Catalogue, Stored, catalogue, scope_record
from .shelf import cached_cards
from .stored import SAE

BEFORE = ("hook_mlp_in", "ln2.hook_normalized", "hook_resid_mid")
BEHIND = "hook_mlp_out"
_SIDES = {"inp": "before", "out": "behind"}


def pick(repo: str | Path, name: str | None, hooks: Sequence[str], side: str, revision: str | None = None) -> Stored:
    """Return the SAE of a name, or the only one that writes at one of some hook points.

    Args:
        repo: Where they are stored, as for `catalogue`.
        name: Which; if `None`, the only one that fits.
        hooks: The hook points at which it may write.
        side: `"inp"` or `"out"`, what the caller calls it.
        revision: Branch, tag or commit on the Hub.

    Raises:
        FileNotFoundError: No such place, or none of that name.
        ValueError: The one of that name writes elsewhere; without a name, none fits or several do.
    """
    if name is not None and (known := scope_record(str(repo), name, revision)) is not None:
        return _checked(known, hooks, side)  # what the name says; whether it is there shows when it is loaded
    there = catalogue(repo, revision)
    if name is not None:
        found = [one for one in there if one.name == name]
        if not found:
            raise FileNotFoundError(f"{side} must name one of the SAEs that there are, got {name!r}\n{there}")
        return _checked(found[0], hooks, side)
    found = [one for one in there if one.hook_out in hooks]
    if len(found) == 1:
        return found[0]
    if found:
        several = Catalogue(there.where, tuple(found))
        raise ValueError(f"{side} must name one of those {_SIDES[side]} the MLP, as there are several\n{several}")
    raise ValueError(
        f"{there.where} has no SAE at {' or '.join(hooks)}, for {side}; the nearest\n{_nearest(there, hooks)}"
    )


def _checked(one: Stored, hooks: Sequence[str], side: str) -> Stored:
    if one.hook_out is not None and one.hook_out not in hooks:
        raise ValueError(f"{side} must be an SAE at {' or '.join(hooks)}, got {one.name!r}, which is at {one.hook_out}")
    return one


def _nearest(there: Catalogue, hooks: Sequence[str], most: int = 8) -> Catalogue:
    """Return those at the same points of other layers, the nearest first, and then the others of the layer."""
    layer, points = int(hooks[0].split(".")[1]), {hook.split(".", 2)[2] for hook in hooks}

    def far(one: Stored) -> tuple[bool, int]:
        return one.point not in points, abs((one.layer if one.layer is not None else 10**6) - layer)

    return Catalogue(there.where, tuple(sorted(there, key=far)[:most]))


def fitting_hooks(layer: int, side: str) -> list[str]:
    """Return the hook points at which an SAE at one side of a layer's MLP may write, `"inp"` or `"out"`."""
    return [f"blocks.{layer}.{point}" for point in (BEFORE if side == "inp" else (BEHIND,))]


def layers_between(repo: str | Path, revision: str | None = None) -> list[int]:
    """Return the layers that have an SAE before the MLP and one behind it, in order.

    Args:
        repo: Where they are stored, as for `catalogue`.
        revision: Branch, tag or commit on the Hub.

    Raises:
        FileNotFoundError: No such place.
        ValueError: No layer has both.
    """
    there = catalogue(repo, revision)
    points = {(one.layer, one.hook_out.split(".", 2)[2]) for one in there if one.hook_out and one.layer is not None}
    before = {layer for layer, point in points if point in BEFORE}
    found = sorted(before & {layer for layer, point in points if point == BEHIND})
    if not found:
        raise ValueError(f"{there.where} must hold SAEs before and behind an MLP\n{there}")
    return found


def stored_cards(one: Stored, model: BilinearTransformer, sae: SAE) -> FeatureCards | None:
    """Return the feature cards that lie beside an SAE, or else in the user's cache; None if there are none.

    Raises:
        ValueError: They are of another model.
    """
    path = None if one.folder is None else one.folder / FILE
    return read_cards(path, model) if path is not None and regular(path) else cached_cards(model, sae)
