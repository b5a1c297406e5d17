"""The README's code runs, and its example prints what the README says."""

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(code, folder, timeout):
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_prints_its_output(tmp_path):
    code, output = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", README, re.DOTALL).groups()
    assert run(code, tmp_path, 300) == output


def test_every_block_runs_after_those_before_it(tmp_path):
    assert len(BLOCKS) >= 4
    run("\n".join(BLOCKS), tmp_path, 900)


def test_the_commands_are_those_that_ci_runs():
    run = (Path(__file__).parents[1] / ".ci" / "run").read_text()
    test_command = 'pip install -e ".[dev]" && pytest'
    assert test_command in README
    assert test_command in run
