"""The worked example on a converted model: what its edit does is what it says."""

import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch

import bilens

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
script = pytest.importorskip("pronoun_circuit")
sys.path.remove(str(SCRIPTS))


@pytest.fixture
def texts():
    draw = random.Random(0)
    return [" ".join(draw.choice(["the", "cat", "dog", "sat", "on"]) for _ in range(12)) for _ in range(120)]


def test_the_product_is_all_that_the_edit_takes_out(make_model, texts):
    model = make_model(dtype=torch.float32)
    pronouns = script.Pronouns(model, texts, ("cat", "dog"))
    x = pronouns.inputs()[:, :-1]
    directions = torch.linalg.qr(torch.randn(16, 2, generator=torch.Generator().manual_seed(0)))[0].T
    B = model.blocks[1].mlp.tensor()
    a, b = (x @ directions.T).unbind(-1)
    along = (a[:, None] * directions[0], b[:, None] * directions[1])
    expected = B.apply(along[0] + along[1]) - B.apply(along[0]) - B.apply(along[1])  # twice the cross term
    written = []
    for hooked in (False, True):
        names = "blocks.1.hook_mlp_out"
        if hooked:
            with script.without_product(pronouns, directions):
                _, cache = model.run_with_cache(pronouns.tokens, attention_mask=pronouns.mask, names_filter=names)
        else:
            _, cache = model.run_with_cache(pronouns.tokens, attention_mask=pronouns.mask, names_filter=names)
        written.append(cache[names][pronouns.where])
    torch.testing.assert_close(written[0] - written[1], expected, rtol=1e-3, atol=1e-4)


def test_the_report_compares_prediction_measurement_and_controls(make_model, texts, tmp_path, capsys):
    bilens.save(make_model(dtype=torch.float32), tmp_path / "model")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = ["--words", "cat", "dog", "--holdout", "0.4", "--controls", "3"]
    script.main([str(tmp_path / "model"), "--data", str(tmp_path / "text.jsonl"), *words])
    printed = capsys.readouterr().out
    assert float(re.search(r"correlate ([\d.]+)", printed)[1]) > 0.8
    assert "3 random directions instead" in printed
