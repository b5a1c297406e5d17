"""An SAE by the name of a place and a hook point."""

from pathlib import Path

from bilens.models.sources import EMBEDDED
from bilens.tensor.keeping import user_path

from . import stored
from .catalogue import catalogue
from .checks import LENS_FILES
from .directions import here
from .listing import no_sae
from .stored import SAE


def load(name: str | Path, hook: str, *, revision: str | None = None) -> SAE:
    """Load an SAE: of the embedded model, of a folder, of a Hub repository or of a SAELens release.

    Args:
        name: `"bilens-mini"`; a folder that `fit` wrote, or any with SAEs of SAELens or of the published -scope layout;
            a Hub repository of either; a release of SAELens' registry such as `"gpt2-small-res-jb"`.
        hook: The hook point that it reads, e.g. `"blocks.2.hook_mlp_out"`, or its own name there, e.g.
            `"4-mlp-out-x4-k30"`, where several read one hook point.
        revision: Branch, tag or commit on the Hub.

    Raises:
        FileNotFoundError: No such place, or no such SAE there; the message lists those there are.
        ValueError: Several SAEs read that hook point; the message lists their names.
    """
    folder = user_path(name)
    if name == EMBEDDED or (folder.is_dir() and (folder / hook / LENS_FILES[0]).is_file()):
        if revision is not None:
            raise ValueError(f"revision goes with a Hub repository, got {revision!r} for {name}")
        return stored.load(name if name == EMBEDDED else folder, hook)
    there = catalogue(name, revision)
    named = [one for one in there if one.name == hook] or [one for one in there if one.hook == here(hook)]
    if len(named) > 1:
        raise ValueError(
            f"hook must name one of the SAEs that read {hook} in {there.where}: {', '.join(one.name for one in named)}"
        )
    if not named:
        hooks = [one.hook for one in there if one.hook]
        raise FileNotFoundError(no_sae(hook, there.where, [one.name for one in there], hooks))
    return named[0].load()
