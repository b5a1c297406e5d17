"""What SAEs a folder, a Hub repository or a SAELens release holds."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bilens.models.sources import EMBEDDED, CheckpointError, Source, read_json
from bilens.tensor.keeping import user_path
from bilens.tensor.records import Record

from .checks import LENS_FILES
from .directions import here
from .listing import list_files
from .stored import FOLDER, SAE, SCOPE_FILES, load_folder, load_release, load_scope, releases, scope_hook

_SCOPE = re.compile(r"(?P<layer>\d+)-(?P<point>[a-z-]+?)-x(?P<expansion>\d+)-k(?P<k>\d+)(?:-(?P<tag>.+))?")
_HOOK = re.compile(r"blocks\.\d+\.(?:ln\d\.|attn\.|mlp\.)?hook_\w+")


@dataclass(frozen=True)
class Stored(Record, tells=("layer", "point")):
    """One SAE that is stored somewhere, and what is known of it without its weights; `None` is unknown."""

    where: str
    name: str
    hook: str | None  # where it reads
    hook_out: str | None  # where it writes: another place for a transcoder
    kind: str  # "topk", as SAELens calls the architectures; "" if unknown
    expansion: int | None
    k: int | None
    tag: str | None
    size: int | None  # bytes
    revision: str | None = None
    layout: str = "scope"  # or "saelens", "release"

    @property
    def layer(self) -> int | None:
        """The block it belongs to."""
        found = re.match(r"blocks\.(\d+)\.", self.hook or "")
        return int(found[1]) if found else None

    @property
    def point(self) -> str:
        """The hook point within the block."""
        return re.sub(r"^blocks\.\d+\.", "", self.hook or "")

    @property
    def folder(self) -> Path | None:
        """Where it lies, if in a folder on this machine."""
        root = None if self.layout == "release" else _source(self.where, self.revision).folder
        return None if root is None else root / self.name

    def beside(self, file: str) -> Path | None:
        """Return a file that lies beside it, fetched if need be; None if there is none."""
        source = None if self.layout == "release" else _source(self.where, self.revision)
        if source is None or (source.folder is None and self.layout != "saelens"):
            return None  # those who publish in the other layouts have no such files
        if source.folder is None:
            source.file(f"{self.name}/{LENS_FILES[0]}")  # so that both are of one state of the repository
        return source.optional(f"{self.name}/{file}")

    def load(self) -> SAE:
        """Load it.

        Raises:
            FileNotFoundError: It is not there any more.
            CheckpointError: It is of the published layout, and damaged or of a kind that is not a top-k SAE.
        """
        if self.layout == "release":
            return load_release(self.where, self.name)
        source = _source(self.where, self.revision)
        if self.layout == "scope":
            return load_scope(self.where if source.folder is None else source.folder, self.name, revision=self.revision)
        config, _ = (source.file(f"{self.name}/{file}") for file in LENS_FILES)
        return load_folder(config.parent)


@dataclass(frozen=True, repr=False)
class Catalogue(Record, Sequence[Stored], held="saes"):
    """The SAEs that there are, by layer and place; prints as a table."""

    where: str
    saes: tuple[Stored, ...]

    def __repr__(self) -> str:
        head = ("name", "layer", "point", "kind", "expansion", "k", "tag", "size")
        rows = [head, *(_row(one) for one in self.saes)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([f"{len(self.saes)} SAEs in {self.where}", *lines])


def _row(one: Stored) -> tuple[str, ...]:
    point = one.point if one.hook_out == one.hook else f"{one.point} -> {here(one.hook_out)}"
    size = None if one.size is None else f"{one.size / 2**20:.1f} MiB"
    cells = (one.name, one.layer, point, one.kind, one.expansion, one.k, one.tag, size)
    return tuple("" if cell is None else str(cell) for cell in cells)


def catalogue(repo: str | Path, revision: str | None = None) -> Catalogue:
    """List the SAEs that a place holds, without loading them.

    Args:
        repo: `"bilens-mini"`; a folder or Hub repository in the published -scope layout, or with SAEs of SAELens in it,
            such as `bilens.saes.fit` writes; or the name of a SAELens release.
        revision: Branch, tag or commit on the Hub.

    Raises:
        FileNotFoundError: No such place.
    """
    if not _is_folder(repo) and "/" not in str(repo):
        return _release(str(repo), revision)
    source = _source(repo, revision)
    files, where = list_files(source, (*SCOPE_FILES, *LENS_FILES))
    folders = {str(Path(file).parent) for file in files}
    found = []
    for name in sorted(folders, key=_natural):
        if all(f"{name}/{file}" in files for file in SCOPE_FILES) and _SCOPE.fullmatch(name):
            found.append(scope_record(str(repo), name, revision, files[f"{name}/{SCOPE_FILES[1]}"]))
        elif all(f"{name}/{file}" in files for file in LENS_FILES):
            found.append(_lens_record(source, str(repo), name, files[f"{name}/{LENS_FILES[1]}"]))
    return Catalogue(where, tuple(sorted(found, key=_order)))


def scope_record(where: str, name: str, revision: str | None, size: int | None = None) -> Stored | None:
    """Return what a name of the published layout says, `{layer}-{point}-x{expansion}-k{k}[-tag]`; None of another."""
    said = _SCOPE.fullmatch(name)
    if said is None:
        return None
    hook = scope_hook(said["point"], int(said["layer"]))
    numbers = (int(said["expansion"]), int(said["k"]), said["tag"])
    return Stored(where, name, hook, hook, "signed top-k", *numbers, size, revision)


def _lens_record(source: Source, where: str, name: str, size: int | None) -> Stored:
    """Return what the config of an SAE of SAELens says."""
    path = source.file(f"{name}/{LENS_FILES[0]}")
    config = read_json(path)
    if not isinstance(metadata := config.get("metadata", {}), dict):
        raise CheckpointError(f"{path}: metadata must be an object, got {metadata!r:.80}")
    about = config | metadata
    for key in ("hook_name", "hook_point", "hook_name_out"):
        if not isinstance(about.get(key) or "", str):
            raise CheckpointError(f"{path}: {key} must be text, got {about[key]!r:.80}")
    hook = here(about.get("hook_name") or about.get("hook_point"))
    hook_out = here(about.get("hook_name_out")) or hook
    d_in, d_sae = config.get("d_in"), config.get("d_sae")
    sized = isinstance(d_in, int) and isinstance(d_sae, int) and d_in > 0
    expansion = d_sae // d_in if sized else None  # what is wrong with it, loading it will say
    known = (config.get("architecture", "standard"), expansion, config.get("k"), None)
    return Stored(where, name, hook, hook_out, *known, size, source.revision, "saelens")


def _release(name: str, revision: str | None) -> Catalogue:
    """List a SAELens release by its names, which mostly hold the hook point; nothing is downloaded."""
    there = releases()
    if name not in there:
        _source(name, revision)  # raises, with the nearest name of a model
        raise FileNotFoundError(f"{name!r} is no folder, Hub repository or SAELens release")
    if revision is not None:
        raise ValueError(f"revision goes with a Hub repository, and {name} is a SAELens release; got {revision!r}")
    record = partial(Stored, kind="", expansion=None, k=None, tag=None, size=None, layout="release")
    hooks = {one: (_HOOK.search(one) or [None])[0] for one in there[name]}
    return Catalogue(name, tuple(record(name, one, here(hook), here(hook)) for one, hook in hooks.items()))


def _source(repo: str | Path, revision: str | None) -> Source:
    """Return a place; what a model's folder has in its folder `saes` is meant where there is one."""
    source = Source.find(repo, revision)
    if source.folder is not None and (source.folder / FOLDER).is_dir():
        return Source(source.name, source.folder / FOLDER, None)
    return source


def _is_folder(repo: str | Path) -> bool:
    return repo == EMBEDDED or user_path(repo).is_dir() or not isinstance(repo, str)


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _order(one: Stored) -> tuple[Any, ...]:
    return (one.layer is None, one.layer or 0, one.point, _natural(one.name))
