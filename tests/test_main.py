"""The command as a user runs it: offline, in an empty folder, on the embedded model."""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from sae_lens import TopKSAE

import bilens
from bilens import arguments
from bilens.__main__ import COMMANDS, ask, main, read_texts
from bilens.circuits import nulls


def run(folder, *args):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
    command = [sys.executable, "-m", "bilens", *args]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture
def told(tmp_path, monkeypatch, capsys):
    """Return what a command prints as JSON, run in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        assert main([*args, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture(scope="module")
def main_job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("empty")
    return run(folder), folder


def test_the_main_job_prints_tables_and_says_where_the_report_is(main_job):
    done, folder = main_job
    assert done.returncode == 0, done.stderr
    assert "strongest feature pairs of layer 3" in done.stdout
    odds = [float(one) for one in re.findall(r"the movie was .*│ +([+-]\d+\.\d\d) │", done.stdout)]
    assert [one > 0 for one in odds] == [True, False, False, True]  # good, not good, bad, not bad
    found = re.search(r"layer 3, at the readout: \d+ × \d+ features, z = -\d\.\d\d, q = ([\d.e-]+)", done.stdout)
    assert float(found[1]) < 0.01
    without, whole = re.search(
        r"without their products (\d+)% of \d+ sentences flip, with them (\d+)%", done.stdout
    ).groups()
    assert int(without) <= 70 < 90 <= int(whole)
    assert len(re.findall(r"[+-]\d\.\d{3}\s", done.stdout)) >= 10
    assert [path.name for path in folder.iterdir()] == ["bilens-report.html"]
    assert re.sub(r"\s", "", str(folder / "bilens-report.html")) in re.sub(r"\s", "", done.stdout)


def test_the_report_is_self_contained(main_job):
    html = (main_job[1] / "bilens-report.html").read_text()
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?https?://""", html)
    for part in (
        "Eigenvalues;",
        "What the model does with “not”",
        "Without them",
        "Feature cards",
        "tested by editing",
    ):
        assert part in html
    assert html.count('<div class="plot"') >= 4 * 6 + 3 + 1


@pytest.fixture(scope="module")
def few_features(tmp_path_factory):
    """SAEs of layer 1 cut to their first 64 features, without cards."""
    folder = tmp_path_factory.mktemp("saes")
    for hook in ("blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out"):
        sae = bilens.saes.load("bilens-mini", hook)
        small = TopKSAE(dataclasses.replace(sae.cfg, d_sae=64))
        with torch.no_grad():
            for name, value in small.named_parameters():
                whole = sae.get_parameter(name)
                value.copy_(whole[:, :64] if name == "W_enc" else whole if name == "b_dec" else whole[:64])
        bilens.saes.save(small, folder / hook)
    return folder


def test_circuits_of_a_chosen_layer_as_json(few_features, tmp_path, told):
    brief = ("--draws", "200", "--controls", "4", "--features", "2", "--layer", "1")
    found = told("circuits", "--saes", str(few_features), *brief)
    assert (found["layer"], len(found["findings"])) == (1, 2)
    odds = [row["log_odds"] for row in found["negation"]["behaviour"]]
    assert [one > 0 for one in odds[:4]] == [True, False, False, True]
    assert {"feature", "eigenvalues", "motifs", "pairs", "pearson_active"} <= set(found["findings"][0])
    assert not list(tmp_path.iterdir())


def test_a_model_that_gives_no_verdict_is_not_asked_again(make_model, capsys):
    model = make_model()
    console, args = Console(), argparse.Namespace(model="bilens-mini")
    assert ask(args, console, model) is None
    assert "no verdicts: " in capsys.readouterr().err


def test_attribute_sums_to_the_model(tmp_path, told):
    text = "the movie was not good"
    graph = tmp_path / "graph.json"
    found = told("attribute", text, "--layer", "2", "--feature", "887", "--graph", str(graph))
    parts = [found[name] for name in found if " " in name or name == "bias"]
    assert sum(parts) == pytest.approx(found["model"], rel=1e-5)
    assert found["total"] == pytest.approx(found["model"], rel=1e-5)
    assert len(found["terms"]) == 10
    assert json.loads(graph.read_text())["metadata"]["schema_version"] == 1


def test_features_shows_cards(told, capsys):
    cards = told("features", "--layer", "3", "--side", "inp", "--find", "not")["features"]
    assert cards
    assert all("not" in card["name"] for card in cards)
    assert {"positive", "negative"} <= set(cards[0]["auroc"])
    assert main(["features", "--layer", "3", "--side", "inp", "--feature", str(cards[0]["feature"])]) == 0
    shown = capsys.readouterr().out
    assert cards[0]["name"] in shown
    assert "promotes" in shown


def test_features_makes_cards_of_a_file(tmp_path, told):
    rows = [
        {"text": "the film was bad and dull", "kind": "no"},
        {"text": "a lovely film, great fun", "kind": "yes"},
    ] * 4
    data = tmp_path / "reviews.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ("features", "--layer", "1", "--text", str(data), "--label", "kind", "--folder", str(tmp_path / "cards"))
    found = told(*args)
    assert found["provenance"]["texts"] == "8"
    assert set(found["features"][0]["auroc"]) == {"no", "yes"}


def test_an_unknown_auroc_is_null(tmp_path, capsys):
    """All texts have one label, so nothing can be told apart."""
    data = tmp_path / "reviews.jsonl"
    data.write_text("".join(json.dumps({"text": text, "kind": "no"}) + "\n" for text in ("a bad film", "a dull film")))
    args = ["features", "--layer", "1", "--text", str(data), "--label", "kind", "--feature", "3", "--json"]
    assert main(args) == 0
    assert json.loads(capsys.readouterr().out)["features"][0]["auroc"] == {"no": None}


def test_a_text_that_is_null_is_passed_over(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in (None, "a cat", "", " ", "a dog")))
    assert read_texts(str(data)) == ["a cat", "a dog"]
    data.write_text(json.dumps({"text": None}) + "\n")
    with pytest.raises(ValueError, match="must hold a text that is not empty, got none"):
        read_texts(str(data))
    data.write_text(json.dumps({"text": 3}) + "\n")
    with pytest.raises(ValueError, match="must hold text in its column 'text', got 3"):
        read_texts(str(data))


def test_a_fault_of_ours_is_not_shown_as_the_users(monkeypatch):
    monkeypatch.setitem(COMMANDS, "features", lambda args, console: len(3))
    with pytest.raises(TypeError, match="object of type 'int' has no len"):
        main(["features", "--layer", "1"])


def test_a_model_that_is_not_bilinear_is_named(tmp_path, make_model, capsys):
    bilens.save(make_model(mlp="gated", act="silu"), tmp_path / "gated")
    assert main(["circuits", str(tmp_path / "gated")]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "model must have bilinear MLPs" in line
    assert "are gated" in line


def test_help_imports_nothing_heavy():
    heavy = ("torch", "rich", "plotly", "datasets", "numpy", "jinja2")
    code = f"""
import sys
from bilens.__main__ import main
try:
    main(["--help"])
except SystemExit:
    print([name for name in {heavy} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_command_knows_the_null_models(capsys):
    assert set(arguments.NULLS) == set(nulls.NULLS)
    with pytest.raises(SystemExit, match="2"):
        main(["circuits", "--null", "reader"])
    assert "invalid choice: 'reader'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["bilens-mni"], "bilens-mini"),
        (["circuits", "--layer", "4"], "layer"),
        (["circuits", "--draws", "64"], "--draws must be at least 200, got 64"),
        (["circuits", "--outputs", "0"], "--outputs must be at least 1, got 0"),
        (["attribute", "good", "--layer", "2", "--feature", "1024"], "1023"),
        (["attribute", "good", "--layer", "2", "--feature", "3", "--position", "9"], "position"),
        (["features", "--layer", "2", "--feature", "1024"], "1023"),
        (["features", "--layer", "2", "--text", "none.txt"], "none.txt"),
    ],
)
def test_mistakes_are_one_line_with_a_hint(tmp_path, monkeypatch, capsys, args, said):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert said in line
    assert not list(tmp_path.iterdir())


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in ("circuits", "attribute", "features"))
