"""The induction-head scripts: they run, and what they take out of a head's scores is what is there."""

import sys
from pathlib import Path

import pandas
import pytest
import torch

import bilens

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
train_induction, induction_heads = (pytest.importorskip(name) for name in ("train_induction", "induction_heads"))
sys.path.remove(str(SCRIPTS))

STORIES = ["the cat sat on the mat and the dog ran", "once upon a time a little bird saw a big tree"] * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model trained for three steps."""
    root = tmp_path_factory.mktemp("induction")
    stories = [f"{story} number {index}" for index, story in enumerate(STORIES)]
    pandas.DataFrame({"text": stories}).to_parquet(root / "stories.parquet")
    sizes = ["--steps", "3", "--batch", "4", "--context", "30", "--vocab", "120", "--d-model", "16", "--heads", "2"]
    train_induction.main(["--data", str(root / "stories.parquet"), "--out", str(root / "model"), *sizes])
    return root / "model"


def test_the_tables_are_written(folder, tmp_path):
    few = [
        "--windows",
        "4",
        "--controls",
        "3",
        "--pairs",
        "2",
        "--ranked",
        "10",
        "--means",
        "20",
        "--out",
        str(tmp_path / "table.md"),
    ]
    induction_heads.main([str(folder), *few])
    text = (tmp_path / "table.md").read_text()
    for head in ("0.0", "0.1", "1.0", "1.1"):
        assert f"\n| {head} |" in text
    assert text.count("largest") == 8


@torch.no_grad()
def test_what_pairs_add_is_a_mixed_difference_of_the_scores(folder):
    """With a token's feature taken from the query, from the key, from both: the score is bilinear."""
    model = bilens.load(folder).double()
    draw = torch.Generator().manual_seed(0)
    features = induction_heads.Features.of(model, induction_heads.random(20, model, draw))
    tokens = train_induction.repeated(2, 30, model.cfg.d_vocab, draw)
    run = induction_heads.Running.of(model, 1, tokens)
    _, cache = model.run_with_cache(tokens)
    resid, scale = cache["blocks.1.hook_resid_pre"], cache["blocks.1.ln1.hook_scale"]
    for query, key in ((12, 3), (29, 20), (7, 7)):
        i, j = (tokens[:, at] - train_induction.SPECIAL for at in (query, key - 1))
        for row in (0, 1):
            removed = run.removed(features, i[row, None], j[row, None])[:, row, query, key]
            for branch in (0, 1):
                form = model.blocks[1].attn.score_tensor(1, query - key, branch)
                x = [(resid[row, query] - n * features.here[i[row]]) / scale[row, query] for n in (0, 1)]
                y = [(resid[row, key] - n * features.after[j[row]]) / scale[row, key] for n in (0, 1)]
                mixed = sum((-1) ** (a + b) * form.apply(x[a], y[b]) for a in (0, 1) for b in (0, 1))
                torch.testing.assert_close(removed[branch], mixed, rtol=1e-8, atol=1e-10)
                torch.testing.assert_close(run.scores[branch, row, query, key], form.apply(x[0], y[0]))
    whole = run.cost(model, 1, torch.zeros(()))
    assert whole == pytest.approx(induction_heads.loss_of(model, tokens), rel=1e-9)


def test_windows_repeat(unchecked):
    rows = train_induction.repeated(5, 40, 60, torch.Generator().manual_seed(0))
    assert (rows[:, 0] == 1).all()
    for row in rows[:, 1:]:
        periods = [p for p in range(*train_induction.PERIODS) if torch.equal(row[p:], row[:-p])]
        assert periods
    assert rows[:, 1:].min() >= train_induction.SPECIAL


def test_matched_pairs_are_others_as_active():
    draw = torch.Generator().manual_seed(0)
    activity = torch.rand(40, 40, generator=draw)
    left, right = torch.tensor([3, 5]), torch.tensor([4, 5])
    for _ in range(20):
        i, j = induction_heads.matched(activity, left, right, draw)
        assert not {(3, 4), (5, 5)} & set(zip(i.tolist(), j.tolist(), strict=True))
        assert ((activity[i, j] - activity[left, right]).abs() < 0.1).all()
