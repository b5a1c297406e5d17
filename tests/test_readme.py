"""The README's example runs and prints what the README says; it is short, and its commands are CI's."""

import io
import re
import sys
from pathlib import Path

from rich.console import Console

import bilens
from bilens.circuits import verdict
from bilens.report.verdicts import print_behaviour

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
sys.path.insert(0, str(ROOT / "tutorials" / "site"))
import blocks  # noqa: E402

sys.path.remove(str(ROOT / "tutorials" / "site"))


def test_the_example_prints_its_output(tmp_path, monkeypatch, unchecked):
    monkeypatch.chdir(tmp_path)
    printed = blocks.run_page(README)
    assert printed
    for block, said, out in printed:
        blocks.assert_prints(out, said.text, f"README.md:{block.line}")


def test_the_first_table_is_what_the_command_prints():
    told = verdict.behaviour(bilens.load("bilens-mini"), verdict.SENTENCES[:4], verdict.STANDARD)
    console = Console(width=95, record=True, file=io.StringIO())
    print_behaviour(console, told, verdict.STANDARD)
    shown = re.search(r"^what the model says.*?┘", README.read_text(), re.MULTILINE | re.DOTALL)[0]
    blocks.assert_prints(console.export_text(), shown, "bilens")


def test_the_commands_are_those_that_ci_runs():
    test_command = 'pip install -e ".[dev]" && pytest'
    assert test_command in README.read_text()
    assert test_command in (ROOT / ".ci" / "run").read_text()


def test_it_fits_two_screens_and_links_to_what_is_there():
    text = README.read_text()
    assert len(text) < 8500
    links = re.findall(r"\]\(([^):#]+)\)", text)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]
