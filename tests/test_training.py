"""The training script as a user runs it: killed and resumed, it ends in the same weights."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import bilens

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_language.py"
TINY = "--vocab 80 --layers 1 --d-model 16 --d-hidden 32 --heads 2 --context 16 --batch 8 --micro-batch 4 --tokens 6000"
EVERY = "--checkpoint-every 5 --eval-every 20 --holdout 0.1 --precision no"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Sentences of a small grammar: data that can be learnt in a few steps."""
    draw = random.Random(0)
    nouns, verbs = ("cat", "dog", "bird", "mouse"), ("saw", "liked", "chased")
    texts = [" and ".join(f"the {draw.choice(nouns)} {draw.choice(verbs)} me" for _ in range(4)) for _ in range(300)]
    path = tmp_path_factory.mktemp("data") / "grammar.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def command(corpus, out):
    return [sys.executable, str(SCRIPT), "--data", str(corpus), "--out", str(out), *TINY.split(), *EVERY.split()]


def run(corpus, out):
    subprocess.run(command(corpus, out), check=True, capture_output=True, timeout=200)
    return out / "model"


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    return run(corpus, tmp_path_factory.mktemp("runs") / "straight")


def test_a_run_learns_and_exports_the_published_format(trained):
    model = bilens.load(trained)
    record = json.loads((trained / "training.json").read_text())
    first, last = (float(record["curve"][i]["train"]) for i in (0, -1))
    assert last < first - 0.2
    text = "the cat saw me and the dog"
    assert model(text, "loss") < torch.tensor(model.cfg.d_vocab).log()
    assert record["held-out loss"]["grammar.jsonl"] == pytest.approx(last, abs=0.5)


def test_a_killed_run_resumes_bit_identically(corpus, trained, tmp_path):
    (tmp_path / "run").mkdir()  # ties between tokens are broken at random when a tokenizer is trained
    (tmp_path / "run" / "tokenizer.json").write_bytes((trained / "tokenizer.json").read_bytes())
    process = subprocess.Popen(command(corpus, tmp_path / "run"), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (tmp_path / "run" / "checkpoint.safetensors").exists():
        assert process.poll() is None, "the run ended before its first checkpoint"
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (tmp_path / "run" / "model").exists(), "killed too late to test anything"
    resumed = run(corpus, tmp_path / "run")
    assert (resumed / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    curves = [json.loads((folder / "training.json").read_text())["curve"] for folder in (resumed, trained)]
    assert [row["train"] for row in curves[0]] == [row["train"] for row in curves[1]]
