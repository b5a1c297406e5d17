"""What files a folder or a Hub repository has."""

from pathlib import Path

import httpx
import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from bilens.models.sources import Source


def list_files(source: Source, ends: tuple[str, ...]) -> tuple[dict[str, int | None], str]:
    """Return the files whose paths end so, with their sizes in bytes if known, and where they were looked for.

    Where the Hub cannot be reached (offline mode too) they are those of the local cache.

    Raises:
        FileNotFoundError: No such repository or revision, or nothing of it in the cache when the Hub cannot be reached.
    """
    if source.folder is not None:
        return _in_folder(source.folder, ends), source.name
    try:
        entries = list(huggingface_hub.list_repo_tree(source.name, recursive=True, revision=source.revision))
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx.TransportError) as error:
        if getattr(getattr(error, "response", None), "status_code", 500) < 500:
            source.optional("README.md")  # raises what is wrong with the repository or the revision
            raise FileNotFoundError(f"{source.name} on the Hub cannot be listed: {error}") from error
        return _in_cache(source, ends), f"{source.name} (in the local cache; the Hub cannot be reached)"
    found = {one.path: getattr(one, "size", None) for one in entries if one.path.endswith(ends)}
    return dict(sorted(found.items())), source.name


def _in_folder(folder: Path, ends: tuple[str, ...]) -> dict[str, int | None]:
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.stat().st_size for name, path in sorted(paths.items()) if name.endswith(ends)}


def _in_cache(source: Source, ends: tuple[str, ...]) -> dict[str, int | None]:
    try:
        folder = huggingface_hub.snapshot_download(source.name, revision=source.revision, local_files_only=True)
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{source.name} is not in the local cache and the Hub cannot be reached (offline mode, HF_HUB_OFFLINE, or "
            "no connection); load it once online, or give a folder"
        ) from error
    return _in_folder(Path(folder), ends)
