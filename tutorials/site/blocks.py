"""The code blocks of a page, run in order as a reader would: Python in one namespace, commands in this process.

A `python` block may be followed by what it prints, a `text` block. Commands that take minutes (`SLOW_COMMANDS`, and all
scripts) are only parsed, by the parser of the program itself; other tests run them.
"""

import argparse
import contextlib
import io
import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from unittest import mock

from bilens.__main__ import main

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"[-+]?\d*\.?\d+(?:e[-+]?\d+)?")
SLOW_COMMANDS = ("circuits", "cards", "check")
KINDS = ("python", "text", "bash", "")  # of blocks; those without a kind show what a file or a screen holds


class Parsed(Exception):  # noqa: N818
    """A program's arguments were understood, and nothing was run."""


@dataclass(frozen=True)
class Block:
    """One fenced block of a page, and the line it starts at."""

    kind: str
    text: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    found = [Block(kind, dedent(body), text[: start + 1].count("\n") + 1) for kind, body, start in _fences(text)]
    assert all(block.kind in KINDS for block in found), f"{page.name}: kinds of blocks are {KINDS}"
    return found


def _fences(text):
    return [(match[2], match[3], match.start()) for match in FENCE.finditer(text)]


def run_page(page: Path):
    """Run all blocks of a page; return each Python block that is followed by its output, with what it printed."""
    space, printed, blocks = {"__name__": "__page__"}, [], blocks_of(page)
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        if block.kind == "python":
            out = run_python(block, page, space)
            if after is not None and after.kind == "text":
                printed.append((block, after, out))
        elif block.kind == "bash":
            for line in block.text.replace("\\\n", " ").splitlines():
                run_line(line)
    return printed


def run_python(block: Block, page: Path, space: dict) -> str:
    out, where = io.StringIO(), "\n" * block.line
    with contextlib.redirect_stdout(out):
        exec(compile(where + block.text, str(page), "exec"), space)
    return out.getvalue()


def run_line(line: str):
    for command in line.split("&&"):
        words = shlex.split(command, comments=True)
        if words[:2] == ["torchrun", "--nproc-per-node"]:
            words = ["python", *words[3:]]
        if not words:
            continue
        if words[0] == "bilens":
            run_bilens(words[1:])
        elif words[0] == "python" and words[1].startswith("scripts/"):
            parse_script(words[1:])
        elif words[:2] == ["pip", "install"]:
            check_extras(words[2:])
        else:
            assert words[0] in ("pytest", "mkdocs"), f"no test runs {words[0]!r}"


def run_bilens(args):
    if not args or args[0] in SLOW_COMMANDS or args[0].startswith("-") or Path(args[0]).suffix or "/" in args[0]:
        with refused():
            main(args)
    else:
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(args) == 0


def parse_script(words):
    path = ROOT / words[0]
    with (
        refused(),
        mock.patch.object(sys, "argv", words),
        mock.patch.object(sys, "path", [str(path.parent), *sys.path]),
    ):
        runpy.run_path(str(path), run_name="__main__")


@contextlib.contextmanager
def refused():
    """Let a program parse its arguments, and stop it there."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop):
        try:
            yield
        except Parsed:
            return
        except SystemExit as done:  # --help, --version
            assert done.code in (0, None)
            return
    raise AssertionError("the program never looked at its arguments")


def check_extras(words):
    """Make sure that what is installed from this folder names extras that there are."""
    project = (ROOT / "pyproject.toml").read_text()
    for word in words:
        if match := re.fullmatch(r"\.\[(.+)\]", word):
            assert all(f"\n{extra} = [" in project for extra in match[1].split(","))


def assert_prints(printed: str, said: str, where: str):
    """Words must be the same; numbers may differ in their last digits, which hang on the processor."""
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", said).split(), f"{where} prints\n{printed}"
    for ours, told in zip(NUMBER.findall(printed), NUMBER.findall(said), strict=True):
        assert abs(float(ours) - float(told)) <= 0.02 * abs(float(told)) + 0.02, f"{where} prints\n{printed}"
