"""`scripts/reproduce.py images` at its smallest scale: all parts run, identities hold, models are trained once."""

import re
import runpy
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a function that runs the script into one folder, and that folder."""
    out = tmp_path_factory.mktemp("runs")

    def call():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["reproduce.py", "images", "--smoke", "--out", str(out)])
            patch.syspath_prepend(str(SCRIPTS))
            runpy.run_path(str(SCRIPTS / "reproduce.py"), run_name="__main__")

    call()
    return call, out


def measured(out):
    rows = re.findall(r"^\| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", (out / "images.md").read_text(), re.M)
    return {what: value for what, _, value, _ in rows[1:]}


def test_the_identities_hold_in_the_table(run):
    table = measured(run[1])
    assert float(table["Sum of eigenvector contributions against the logits"]) < 1e-5
    assert float(table["Two layers, all eigenvectors of all eigenvectors against the logit"]) < 1e-4
    for kind in ("dense", "edge"):
        what = f"{kind} masks against the best perturbation of their norm"
        assert float(table[f"{what}, margin minus bound, largest"]) <= 1e-9
        assert float(table[f"{what}, bound not attained by"]) < 1e-9
        assert 0 < float(table[f"{what}, share of its gain, largest"]) <= 1


def test_every_section_has_its_figures(run):
    figures = {path.stem for path in (run[1] / "figures").glob("*.html")}
    assert figures >= {"eigenvectors-main", "spectra-main", "truncation", "similarity", "explanation", "casper", "tree"}
    assert figures >= {"masks-dense", "attack-edge", "sparsity-eigenvalues", "noise", "hosvd"}


def test_a_second_call_reads_the_models(run, monkeypatch):
    call, out = run
    before = (out / "images.md").read_text()
    weights = {path: path.stat().st_mtime_ns for path in out.glob("*/model.safetensors")}
    call()
    assert (out / "images.md").read_text() == before
    assert weights == {path: path.stat().st_mtime_ns for path in out.glob("*/model.safetensors")}
