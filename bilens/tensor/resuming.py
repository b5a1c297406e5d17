"""The rows that a long call finds, kept on disk stage by stage: the same call goes on from there after a kill."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .keeping import Pace, damaged, fingerprint_of, read_own_state, write_state

_GENERATOR = "generator"

Rows = dict[str, Tensor]


@dataclass(frozen=True)
class Stages:
    """The stages of one long call: each finds rows in order, and has a file of its own in the folder.

    A stage that is whole is read, one that was killed goes on after its last row, and the result is the same, bit for
    bit. A file belongs to all that its rows depend on: `fingerprint`, the stage's name and number of rows, and where
    the generator stood before it.
    """

    folder: Path | None = None  # nothing is kept where there is none
    fingerprint: str = ""
    progress: bool = False
    device: torch.device | None = None  # where the rows are found, and so where those that are read go

    def run(
        self,
        name: str,
        n: int,
        find: Callable[[int], Iterator[Rows]],
        generator: torch.Generator | None = None,
        unit: str = "row",
    ) -> Rows:
        """Return all rows of a stage, its columns by name.

        Args:
            name: Of the stage, and its file.
            n: How many rows.
            find: Yields the rows from a given one on, some at a time. What it draws before it returns the iterator is
                drawn in every call, what it draws for the rows goes on where it was.
            generator: What it draws from.
            unit: What a row is, for the progress bar.

        Raises:
            ValueError: The file is damaged, or of another call; the message says which, and what to do.
        """
        kept = None if self.folder is None else _Kept(self.folder / f"{name}.safetensors", self, n, generator)
        done, parts, left = (0, [], None) if kept is None else kept.load()
        found = find(done)
        if left is not None:
            generator.set_state(left)
        with tqdm(total=n, initial=done, desc=name, unit=unit, disable=not self.progress) as bar:
            for part in () if 0 < n <= done else found:
                parts.append(part)
                done += _length(part)
                bar.update(_length(part))
                if kept is not None and (done >= n or kept.pace.due()):
                    parts = [_joined(parts)]
                    kept.save(done, parts[0])
        return _joined(parts)


UNKEPT = Stages()


class _Kept:
    """The file of one stage."""

    def __init__(self, path: Path, stages: Stages, n: int, generator: torch.Generator | None):
        self.path, self.n, self.generator, self.device = path, n, generator, stages.device
        stood = None if generator is None else generator.get_state()
        self.fingerprint = fingerprint_of([stood], stages.fingerprint, path.name, n)
        self.pace = Pace()

    def load(self) -> tuple[int, list[Rows], Tensor | None]:
        """Return how many rows are there, what they are, and where the generator stood after them."""
        if (own := read_own_state(self.path, self.fingerprint)) is None:
            return 0, [], None
        rows, about = own
        left, done = rows.pop(_GENERATOR, None), about.get("next")
        if not isinstance(done, int) or not 0 < done <= self.n:
            raise damaged(self.path, f"next must lie between 1 and {self.n}, got {done!r}")
        if not rows or (left is None) != (self.generator is None):
            raise damaged(self.path, f"it holds {', '.join(sorted(rows)) or 'nothing'}")
        lengths = {name: len(column) if column.ndim else None for name, column in rows.items()}
        if wrong := [f"{name} {length}" for name, length in lengths.items() if length != done]:
            raise damaged(self.path, f"every column must have {done} rows, got {', '.join(wrong)}")
        return done, [{name: column.to(device=self.device) for name, column in rows.items()}], left

    def save(self, done: int, rows: Rows) -> None:
        """Write the rows so far so that a kill at any time leaves the old ones or the new ones."""
        drawn = {} if self.generator is None else {_GENERATOR: self.generator.get_state()}
        with self.pace.writing():
            write_state(self.path, rows | drawn, {"fingerprint": self.fingerprint, "next": done})


def _length(rows: Rows) -> int:
    return len(next(iter(rows.values())))


def _joined(parts: list[Rows]) -> Rows:
    """Return the rows of all parts."""
    return parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[-1]}
