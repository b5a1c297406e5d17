"""The tutorials run from top to bottom, and so do the solutions of their exercises; what is stored of them is small.

Cells run in this process: a kernel of its own takes longer to start than most notebooks to run.
"""

import os
import re
import sys
from functools import cache
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
script = pytest.importorskip("run_tutorials")
sys.path.remove(str(ROOT / "scripts"))

TUTORIALS = sorted((ROOT / "tutorials").glob("[0-9]_*.ipynb"))
BADGE = "https://colab.research.google.com/github/OWNER/bilens/blob/main/tutorials/{}"
SOLUTION = re.compile(r"<details>\n<summary>Solution</summary>\n\n(.*?)\n\n</details>", re.DOTALL)
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
MOST = 300_000  # bytes
every_tutorial = pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)


@cache
def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def solutions(path: Path) -> list[str]:
    texts = [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]
    return [found for text in texts for found in SOLUTION.findall(text)]


def run(source: str, names: dict, where: str) -> None:
    _, value = script.run(source, names, where)
    script.shown(value)


@every_tutorial
def test_a_tutorial_and_its_solutions_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for number, cell in enumerate(read(path).cells):
        if cell.cell_type == "code":
            run(cell.source, names, f"{path.stem}[{number}]")
    for number, solution in enumerate(solutions(path)):
        for code in CODE.findall(solution):  # each starts from the notebook, not from the solution before
            run(code, dict(names), f"{path.stem}[solution {number}]")
    assert not os.listdir(tmp_path), "the tutorial left files behind"


def test_there_are_eight_in_order():
    assert [path.stem[0] for path in TUTORIALS] == list("12345678")


@every_tutorial
def test_a_tutorial_has_its_parts(path):
    cells = read(path).cells
    assert cells[0].source.startswith(f"# {path.stem[0]} · ")
    assert BADGE.format(path.name) in cells[0].source
    found = solutions(path)
    assert len(found) == 3
    assert all(CODE.search(solution) for solution in found)


@every_tutorial
def test_what_is_stored_is_small_and_shows_without_scripts(path):
    assert path.stat().st_size < MOST
    outputs = [output for cell in read(path).cells for output in cell.get("outputs", [])]
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    assert kinds.count("image/png") >= 2
    assert not {kind for kind in kinds if "javascript" in kind or "plotly" in kind}
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
