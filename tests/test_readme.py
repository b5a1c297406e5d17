"""The README's example runs, and prints what the README says."""

import re
import subprocess
import sys
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_example_prints_its_output(tmp_path):
    code, output = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", README, re.DOTALL).groups()
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == output


def test_the_commands_are_those_that_ci_runs():
    run = (Path(__file__).parents[1] / ".ci" / "run").read_text()
    test_command = 'pip install -e ".[dev]" && pytest'
    assert test_command in README
    assert test_command in run
