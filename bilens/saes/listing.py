"""What files a folder or a Hub repository has."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from bilens.models.sources import Source

# What is raised without a connection, whichever HTTP library the client stands on; offline mode is an OSError.
_UNREACHABLE = (*HfHubHTTPError.__bases__, OSError)


def list_files(source: Source, ends: tuple[str, ...]) -> tuple[dict[str, int | None], str]:
    """Return the files whose paths end so, with their sizes in bytes if known, and where they were looked for.

    Where the Hub cannot be reached (offline mode too) they are those of the local cache.

    Raises:
        FileNotFoundError: No such repository or revision, or nothing of it in the cache when the Hub cannot be reached.
    """
    if source.folder is not None:
        return _in_folder(source.folder, ends), source.name
    try:
        hub = huggingface_hub.HfApi()
        entries = list(hub.list_repo_tree(source.name, recursive=True, revision=source.revision, repo_type=source.kind))
    except _UNREACHABLE as error:
        if getattr(getattr(error, "response", None), "status_code", 500) < 500:
            source.optional("README.md")  # raises what is wrong with the repository or the revision
            raise FileNotFoundError(f"{source.name} on the Hub cannot be listed: {error}") from error
        return _in_cache(source, ends), f"{source.name} (in the local cache; the Hub cannot be reached)"
    found = {one.path: getattr(one, "size", None) for one in entries if one.path.endswith(ends)}
    return dict(sorted(found.items())), source.name


def no_sae(name: str, where: str | Path, names: Sequence[str], others: Iterable[str] = ()) -> str:
    """Say that a place has no SAE of that name, and which come near; `others` are what its SAEs are called besides."""
    known = [*names, *dict.fromkeys(others)]
    near = get_close_matches(name, known, n=4, cutoff=0.3) or known[:8]
    return f"{where} has no SAE for {name!r}; it has {len(names)}, the nearest: {', '.join(near) or 'none'}"


def _in_folder(folder: Path, ends: tuple[str, ...]) -> dict[str, int | None]:
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.stat().st_size for name, path in sorted(paths.items()) if name.endswith(ends)}


def _in_cache(source: Source, ends: tuple[str, ...]) -> dict[str, int | None]:
    try:
        folder = huggingface_hub.snapshot_download(
            source.name, revision=source.revision, repo_type=source.kind, local_files_only=True
        )
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{source.name} is not in the local cache and the Hub cannot be reached (offline mode, HF_HUB_OFFLINE, or "
            "no connection); load it once online, or give a folder"
        ) from error
    return _in_folder(Path(folder), ends)
