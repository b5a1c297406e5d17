"""The scripts that make and compare SAEs run one after the other, on a tiny model and a few sentences."""

import random
import shutil
import sys
from pathlib import Path

import pandas
import pytest
import torch
from conftest import WORDS

import bilens
from bilens import saes
from bilens.tensor.keeping import read_record, write_record

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
fit_saes = pytest.importorskip("fit_saes")
make_cards = pytest.importorskip("make_cards")
compare_saes = pytest.importorskip("compare_saes")
sys.path.remove(str(SCRIPTS))

HOOKS = ["blocks.0.hook_mlp_in", "blocks.0.hook_mlp_out"]


def call(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
    script.main()


def read(path):
    return read_record(path).items()


@pytest.fixture
def place(make_model, tmp_path):
    """Return a folder with a model, labelled texts and a lexicon."""
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=12)) for _ in range(60)]
    rows = {"text": texts, "label": [rng.choice(["pos", "neg", "unlabelled"]) for _ in texts]}
    pandas.DataFrame(rows).to_parquet(tmp_path / "texts.parquet")
    (tmp_path / "words.csv").write_text("word,mean\nbig,2\nlittle,-2\n")
    bilens.save(make_model(dtype=torch.float32), tmp_path / "model")
    return tmp_path


def test_saes_are_fitted_get_cards_and_are_compared(place, monkeypatch, capsys):
    model, data, fitted = place / "model", place / "texts.parquet", place / "saes"
    options = ["--tokens", 600, "--batch", 64, "--texts", 40, "--held-out-texts", 10, "--holdout", 0.3]
    options += ["--k", 3, "--expansion", 2, "--finetune-below", 2, "--finetune-tokens", 200]
    call(fit_saes, monkeypatch, model, "--data", data, "--out", fitted, *options)
    sae = saes.load(fitted, HOOKS[1])
    assert (sae.cfg.d_sae, sae.cfg.k) == (32, 3)

    written = fitted / "evaluation.json"  # as if killed once they were tuned, before that was written down
    told = {hook: {name: value for name, value in one.items() if name != "fine-tuned"} for hook, one in read(written)}
    write_record(written, told)
    with monkeypatch.context() as patch:
        patch.setattr(saes, "finetune", lambda *args, **options: pytest.fail("was tuned again"))
        call(fit_saes, patch, model, "--data", data, "--out", fitted, *options)
    assert all("fine-tuned" in one for _, one in read(written))
    assert torch.equal(saes.load(fitted, HOOKS[1]).W_enc, sae.W_enc)

    source = ["--data", data, "--lexicon", place / "words.csv", "--label", "label", "--unlabelled", "unlabelled"]
    source += ["--holdout", 0.3]
    call(make_cards, monkeypatch, model, "--saes", fitted, "--out", place / "cards", *source)
    for hook in HOOKS:
        shutil.copy(place / "cards" / hook / "cards.safetensors", fitted / hook)
    lens = bilens.circuits.FeatureLayer.load(bilens.load(model), 0, saes=fitted)
    assert lens.out_cards.auroc.shape == (32, 2)

    monkeypatch.setattr(compare_saes, "GRID", [("topk", 3, 2), ("jumprelu", 3, 4)])
    options = [
        "--hooks",
        *HOOKS,
        "--tokens",
        600,
        "--batch",
        64,
        "--test",
        10,
        "--runs",
        place / "runs",
        "--out",
        place / "saes.md",
    ]
    call(compare_saes, monkeypatch, model, *source, *options)
    table = (place / "saes.md").read_text()
    assert table.count("| topk | 3 | 2x |") == table.count("| jumprelu | 3 | 4x |") == 2
    call(compare_saes, monkeypatch, model, *source, *options)  # all is there
    assert (place / "saes.md").read_text() == table
    assert "Training" not in capsys.readouterr().out
