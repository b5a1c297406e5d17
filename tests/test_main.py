"""The command as a user runs it: offline, in an empty folder, on the embedded model."""

import os
import re
import subprocess
import sys

import pytest
from plotly.offline import get_plotlyjs


def run(folder, *args):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
    command = [sys.executable, "-m", "bilens", *args]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def main_job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("empty")
    return run(folder), folder


def test_the_main_job_prints_a_table_and_says_where_the_report_is(main_job):
    done, folder = main_job
    assert done.returncode == 0, done.stderr
    assert "strongest feature pairs" in done.stdout
    assert "sentiment negation" in done.stdout
    assert len(re.findall(r"[+-]\d\.\d{3}\s", done.stdout)) >= 10
    assert [path.name for path in folder.iterdir()] == ["bilens-report.html"]
    assert re.sub(r"\s", "", str(folder / "bilens-report.html")) in re.sub(r"\s", "", done.stdout)


def test_the_report_is_self_contained(main_job):
    html = (main_job[1] / "bilens-report.html").read_text()
    assert get_plotlyjs() in html  # the library itself, whose code mentions links that a page does not load
    html = html.replace(get_plotlyjs(), "")
    outside = re.findall(r"""(?:src|href)\s*=\s*["']?https?://""", html)
    assert not outside
    for part in ("Spectrum", "Interactions of its strongest", "Where it is most active", "Sentiment negation"):
        assert part in html
    assert html.count("Plotly.newPlot(") >= 2 + 4 * 6


def test_a_mistyped_model_is_one_line_with_a_hint(tmp_path):
    done = run(tmp_path, "bilens-mni")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "bilens-mini" in done.stderr
    assert not list(tmp_path.iterdir())
