"""The command line as people type it: quickly, in this process, on the embedded model."""

import io
import json
import sys

import pytest

import bilens
from bilens.__main__ import COMMANDS, main

TEXT = "the movie was not good"
ATTRIBUTE = ("--layer", "2", "--feature", "887", "-k", "2")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["atribute", TEXT], "no command is named 'atribute'; did you mean 'attribute'?"),
        (["feature"], "did you mean 'features'?"),
        (["bilens-mni"], "the embedded model is 'bilens-mini'"),
        (["circuits", "--out", "."], "is a folder"),
        (["circuits", "--resume", "file"], "is a file"),
        (["attribute", TEXT, *ATTRIBUTE, "--graph", "file/g.json"], "is a file"),
    ],
)
def test_mistakes_are_told_in_a_line_before_any_work(tmp_path, capsys, args, says):
    (tmp_path / "file").touch()
    assert main(args) in (1, 2)
    told = capsys.readouterr().err
    assert told.startswith("bilens: ")
    assert told.count("\n") == 1
    assert says in told
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_mistyped_option_is_told(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["features", "--layr", "2"])
    assert "did you mean --layer for --layr?" in capsys.readouterr().err


def test_version_and_completion(capsys):
    for args, says in ((["--version"], f"bilens {bilens.__version__}\n"), (["--completion", "bash"], "--graph")):
        with pytest.raises(SystemExit, match="0"):
            main(args)
        assert says in capsys.readouterr().out


def test_text_from_standard_input_to_a_graph_with_an_odd_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{TEXT}\n"))
    assert main(["attribute", "-", *ATTRIBUTE, "--graph", "new/g[red].json"]) == 0
    assert f"graph: {tmp_path / 'new' / 'g[red].json'}\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "new" / "g[red].json").read_text())["metadata"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert main(["attribute", "-", *ATTRIBUTE]) == 1
    assert "got nothing" in capsys.readouterr().err


def test_quiet_prints_nothing_and_a_name_that_none_has_is_told(capsys):
    assert main(["features", "--layer", "2", "--find", "zzz", "-q"]) == 0
    assert tuple(capsys.readouterr()) == ("", "no feature at blocks.2.hook_mlp_out has 'zzz' in its name\n")


def test_a_home_folder_is_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    sae = bilens.saes.load("bilens-mini", "blocks.2.hook_mlp_out")
    bilens.saes.save(sae, "~/saes/blocks.2.hook_mlp_out")
    assert (tmp_path / "home" / "saes").is_dir()
    assert bilens.saes.load("~/saes", "blocks.2.hook_mlp_out").cfg.d_sae == 1024
    assert main(["features", "--layer", "2", "--saes", "~/saes"]) == 1
    assert "has no cards" in capsys.readouterr().err


@pytest.mark.parametrize(("raised", "code", "says"), [(KeyboardInterrupt, 130, "bilens: interrupted\n")])
def test_an_interrupt_is_no_traceback(monkeypatch, capsys, raised, code, says):
    def stop(args, console):
        raise raised

    monkeypatch.setitem(COMMANDS, "features", stop)
    assert main(["features", "--layer", "1"]) == code
    assert capsys.readouterr().err == says


def test_letters_that_the_terminal_does_not_know_are_replaced(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["features", "--layer", "2", "--find", "not"]) == 0
    assert b"3.20 % | 0.46 | 0.54 |" in stream.buffer.getvalue()
