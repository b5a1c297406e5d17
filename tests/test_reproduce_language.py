"""The table of claimed and measured numbers, on a corpus that takes seconds."""

import json
import random
import sys
from pathlib import Path

import pytest
from scipy import stats

import bilens

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
script = pytest.importorskip("reproduce_language")
sys.path.remove(str(SCRIPTS))


def test_an_interval_is_the_one_of_students_t():
    values = [1.0, 1.3, 1.1]
    low, high = stats.t.interval(0.95, 2, loc=stats.tmean(values), scale=stats.sem(values))
    assert script.Interval.of(values) == pytest.approx((stats.tmean(values), low, high))


@pytest.fixture
def command(tiny_tokenizer, tmp_path):
    draw = random.Random(0)
    texts = [" and ".join(f"the {draw.choice(['cat', 'dog'])} sat" for _ in range(4)) for _ in range(200)]
    (tmp_path / "text.jsonl").write_text("".join(f"{json.dumps({'text': f'{t} {i}'})}\n" for i, t in enumerate(texts)))
    tiny_tokenizer.save(str(tmp_path / "tokenizer.json"))
    size = "--layers 1 --d-model 16 --d-hidden 32 --heads 2 --context 16 --batch 32 --holdout 0.1 --precision no"
    return [
        *("--data", str(tmp_path / "text.jsonl"), "--out", str(tmp_path / "runs"), "--seeds", "2", "--size", size),
        *("--tokenizer", str(tmp_path / "tokenizer.json"), "--tokens", "5120", "--write", str(tmp_path / "table.md")),
    ]


def test_the_table_is_measured_once(command, tmp_path, monkeypatch):
    monkeypatch.setattr(
        script,
        "cost",
        lambda bench, kind: {"seconds": {"plain": 2, "annealed": 2.1}, "MiB": {"plain": 8, "annealed": 8}},
    )
    monkeypatch.setattr(script, "step_times", lambda bench: {"bilinear": 1.0, "reglu": 1.0, "swiglu": 1.25})
    script.main(command)
    table = (tmp_path / "table.md").read_text()
    rows = {row.split("|")[1].strip(): row.split("|")[2:-1] for row in table.splitlines() if row.count("|") > 3}
    assert [int(cell) for cell in rows["steps, equal time"]] == [10, 10, 8]
    results = json.loads((tmp_path / "runs" / "results.json").read_text())
    gap = [results[f"swiglu {seed} 8"] - results[f"bilinear {seed} 10"] for seed in range(2)]
    assert rows["difference measured, equal time"][2].strip() == str(script.Interval.of(gap))
    assert rows["SwiGLU, seconds"][-1].strip() == "1.050"
    annealed = bilens.load(tmp_path / "runs" / "reglu-1-annealed" / "model")
    assert annealed.cfg.mlp.kind == "bilinear"

    monkeypatch.setattr(script, "optimise", lambda *args: pytest.fail("was trained again"))
    script.main(command)
    assert (tmp_path / "table.md").read_text() == table


def test_one_seed_makes_no_interval(command):
    with pytest.raises(SystemExit):
        script.main([*command, "--seeds", "1"])
