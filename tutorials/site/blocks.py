"""The code blocks of a page, run in order as a reader would: Python in one namespace, commands in this process.

A `python` block may be followed by what it prints, a `text` block. Commands that take minutes (`SLOW_COMMANDS`, and all
scripts) are only parsed, by the parser of the program itself; other tests run them.
"""

import argparse
import contextlib
import io
import itertools
import re
import runpy
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any
from unittest import mock

from bilens.__main__ import main

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"[-+]?\d*\.?\d+(?:e[-+]?\d+)?")
SLOW_COMMANDS = ("circuits", "cards", "check")
KINDS = ("python", "text", "bash", "")  # of blocks; those without a kind show what a file or a screen holds


class Parsed(Exception):  # noqa: N818 - no error
    """A program's arguments were understood, and nothing was run."""


@dataclass(frozen=True)
class Block:
    """One fenced block of a page, and the line that its fence is on."""

    kind: str
    text: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    """Return the blocks of a page."""
    text = page.read_text()
    found = [
        Block(match[2], dedent(match[3]), text[: match.start() + 1].count("\n") + 1) for match in FENCE.finditer(text)
    ]
    unknown = [block.kind for block in found if block.kind not in KINDS]
    assert not unknown, f"{page.name}: blocks must be of the kinds {KINDS}, got {unknown}"
    return found


def run_page(page: Path) -> list[tuple[Block, Block, str]]:
    """Run all blocks of a page; return each Python block that has its output behind it, that, and what it printed."""
    space, printed, blocks = {"__name__": "__page__"}, [], blocks_of(page)
    for block, after in itertools.pairwise([*blocks, None]):
        if block.kind == "python":
            out = run_python(block, page, space)
            if after is not None and after.kind == "text":
                printed.append((block, after, out))
        elif block.kind == "bash":
            for line in block.text.replace("\\\n", " ").splitlines():
                run_line(line)
    return printed


def run_python(block: Block, page: Path, space: dict[str, Any]) -> str:
    """Run a Python block in a namespace; return what it prints. A traceback shows the page's own lines."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile("\n" * block.line + block.text, str(page), "exec"), space)
    return out.getvalue()


def run_line(line: str) -> None:
    """Run the commands of a line, or have them parsed."""
    for command in line.split("&&"):
        words = shlex.split(command, comments=True)
        if words[:2] == ["torchrun", "--nproc-per-node"]:
            words = ["python", *words[3:]]
        if words[:1] == ["bilens"]:
            run_bilens(words[1:])
        elif words[:1] == ["python"] and words[1].startswith("scripts/"):
            parse_script(words[1:])
        elif words[:2] == ["pip", "install"]:
            check_extras(words[2:])
        else:
            assert not words or words[0] in ("pytest", "mkdocs"), f"no test runs {words[0]!r}"


def run_bilens(args: Sequence[str]) -> None:
    """Run the program, which must succeed; a command that takes minutes is parsed."""
    if args and args[0] in ("attribute", "features"):
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(args) == 0
    else:
        with parsing():
            main(args)


def parse_script(words: Sequence[str]) -> None:
    """Have a script parse its arguments."""
    path = ROOT / words[0]
    found = [str(path.parent), *sys.path]
    with parsing(), mock.patch.object(sys, "argv", list(words)), mock.patch.object(sys, "path", found):
        runpy.run_path(str(path), run_name="__main__")


@contextlib.contextmanager
def parsing() -> Iterator[None]:
    """Let a program parse its arguments, which must be right, and stop it there."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop), contextlib.suppress(Parsed):
        yield
        raise AssertionError("the program never looked at its arguments")


def check_extras(words: Sequence[str]) -> None:
    """Make sure that what is installed from this folder names extras that there are."""
    project = (ROOT / "pyproject.toml").read_text()
    for word in words:
        if match := re.fullmatch(r"\.\[(.+)\]", word):
            assert all(f"\n{extra} = [" in project for extra in match[1].split(",")), word


def assert_prints(printed: str, said: str, where: str) -> None:
    """Words must be the same; numbers may differ in their last digits, which hang on the processor."""
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", said).split(), f"{where} prints\n{printed}"
    for ours, told in zip(NUMBER.findall(printed), NUMBER.findall(said), strict=True):
        assert abs(float(ours) - float(told)) <= 0.02 * abs(float(told)) + 0.02, f"{where} prints\n{printed}"
