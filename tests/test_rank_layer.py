"""The ranking script as a user runs it: killed and resumed, on one process or two, it ends in the same table."""

import contextlib
import csv
import dataclasses
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet
import pytest
from sae_lens import TopKSAE

import bilens
from bilens.circuits import FeatureLayer

SCRIPT = Path(__file__).parents[1] / "scripts" / "rank_layer.py"
sys.path.insert(0, str(SCRIPT.parent))
rank_layer = pytest.importorskip("rank_layer")
sys.path.remove(str(SCRIPT.parent))
ARGUMENTS = ["bilens-mini", "--layer", "2", "-k", "300", "--per-output", "4"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(out, *more):
    return [sys.executable, str(SCRIPT), *ARGUMENTS, "--out", str(out), *more]


def run(out, *more):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command(out, *more)[1:])
        rank_layer.main()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    out = tmp_path_factory.mktemp("rank") / "straight"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        run(out, "--format", "csv")
    assert "300 pairs" in said.getvalue()
    return out


def tables(folder):
    return [(folder / f"{name}.csv").read_bytes() for name in ("pairs", "per-output")]


def test_the_table_is_the_ranking(straight):
    lens = FeatureLayer.load(bilens.load("bilens-mini"), 2)
    expected = bilens.top_interactions(lens.tensor, 300, out=lens.readers, inp=lens.writers)
    with (straight / "pairs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["left"]) for row in rows] == expected.left.tolist()
    assert [float(row["value"]) for row in rows] == expected.value.tolist()
    assert len((straight / "per-output.csv").read_text().splitlines()) == 1 + 4 * 1024
    manifest = json.loads((straight / "manifest.json").read_text())
    assert manifest["arguments"]["layer"] == 2
    assert set(manifest["tables"]) == {"pairs", "per-output"}
    assert not (straight / "state").exists()


def test_a_killed_run_resumes_identically(straight, tmp_path):
    process = subprocess.Popen(
        command(tmp_path, "--format", "csv"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT
    )
    while not (tmp_path / "state" / "rank-0-of-1.safetensors").exists():
        assert process.poll() is None, "the run ended before its first checkpoint"
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (tmp_path / "pairs.csv").exists(), "killed too late to test anything"
    run(tmp_path, "--format", "csv")
    assert tables(tmp_path) == tables(straight)


def test_a_folder_begun_with_other_arguments_is_refused(straight):
    with pytest.raises(SystemExit, match=r"was begun with something else[^$]*arguments\.k: 300 there, 299 now"):
        run(straight, "--format", "csv", "-k", "299")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """SAEs of the layer cut to their first 96 features."""
    folder = tmp_path_factory.mktemp("saes")
    for hook in ("blocks.2.hook_mlp_in", "blocks.2.hook_mlp_out"):
        sae = bilens.saes.load("bilens-mini", hook)
        small = TopKSAE(dataclasses.replace(sae.cfg, d_sae=96, k=min(sae.cfg.k, 96)))
        whole = sae.state_dict()
        cut = {"W_enc": whole["W_enc"][:, :96], "b_dec": whole["b_dec"]}
        small.load_state_dict(cut | {name: whole[name][:96] for name in ("W_dec", "b_enc")})
        bilens.saes.save(small, folder / hook)
    return folder


def test_two_processes_write_the_same_table(few, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    given = ("--saes", str(few), "--format", "csv")
    done = subprocess.run(
        [*launch, *command(tmp_path / "two", *given)[1:]], capture_output=True, text=True, timeout=300, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    run(tmp_path / "one", *given)
    assert tables(tmp_path / "two") == tables(tmp_path / "one")


def test_parquet(few, tmp_path):
    for form in ("parquet", "csv"):
        run(tmp_path / form, "--saes", str(few), "--format", form)
    found = pyarrow.parquet.read_table(tmp_path / "parquet" / "pairs.parquet").to_pydict()
    with (tmp_path / "csv" / "pairs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert found == {name: [type(values[0])(row[name]) for row in rows] for name, values in found.items()}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--layer", "4"], "--layer must lie between 0 and 3, got 4"),
        (["--scope", "somewhere"], "--scope, --inp-sae and --out-sae go together"),
        (["-k", "0"], "k must be at least 1, got 0"),
    ],
)
def test_errors(tmp_path, capsys, unchecked, more, message):
    with pytest.raises((SystemExit, ValueError)) as refused:
        run(tmp_path, *more)
    assert message in f"{refused.value}\n{capsys.readouterr().err}"
