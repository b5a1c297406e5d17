"""The training script as a user runs it: killed and resumed, it ends in the same weights."""

import csv
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
sys.path.insert(0, str(SCRIPT.parent))
corpora, train_language = pytest.importorskip("corpora"), pytest.importorskip("train_language")
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


def arguments(corpus, out):
    return ["--data", str(corpus), "--out", str(out), *TINY.split(), *EVERY.split()]


def train(some):
    train_language.train(train_language.parse_args(some))


def run(corpus, out):
    train(arguments(corpus, out))
    return out / "model"


def killed(some, out):
    """Start a run in a process of its own, and kill it after its first checkpoint."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *some], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    while not (out / "checkpoint.safetensors").exists():
        assert process.poll() is None, "the run ended before its first checkpoint"
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (out / "model").exists(), "killed too late to test anything"


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
    killed(arguments(corpus, tmp_path / "run"), tmp_path / "run")
    resumed = run(corpus, tmp_path / "run")
    assert (resumed / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    curves = [json.loads((folder / "training.json").read_text())["curve"] for folder in (resumed, trained)]
    assert [row["train"] for row in curves[0]] == [row["train"] for row in curves[1]]


# -- shares, splits, tokenised corpora --------------------------------------------------------------------------------

ENDS = corpora.Ends()


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """Judgements in which one word decides, with a split of their own."""
    words = {"fine": "good", "dull": "bad", "odd": "okay"}
    rows = [
        {"text": f"the {noun} is {word} verdict : {verdict}", "split": "held-out" if noun == "mouse" else "train"}
        for noun in ("cat", "dog", "bird", "mouse")
        for word, verdict in words.items()
    ]
    path = tmp_path_factory.mktemp("data") / "verdicts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mixed(corpus, verdicts, out, *more):
    share = ("--share", f"{verdicts.name}=0.25", "--verdict-weight", "4", "--tokenised", str(out / "tokens"))
    data = ("--data", str(corpus), str(verdicts))
    return [*arguments(corpus, out), *data, *share, *more]


@pytest.fixture(scope="module")
def mixture(corpus, verdicts, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "mixture"
    train(mixed(corpus, verdicts, out))
    return out


def test_a_column_split_decides_what_is_held_out(corpus, verdicts):
    by_column, by_hash = (corpora.split_corpus(str(path), 0.1) for path in (verdicts, corpus))
    assert len(by_column.kept) == 9
    assert all("mouse" in text for text in by_column.held_out)
    assert len(by_column.held_out) == 3
    assert all(corpora.is_held_out(text, 0.1) for text in by_hash.held_out)
    assert not any(corpora.is_held_out(text, 0.1) for text in by_hash.kept)
    texts, digest = corpora.read_corpus(str(corpus))
    assert (sorted(texts), digest) == (sorted(by_hash.kept + by_hash.held_out), by_hash.digest)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", "train"), ("b", "test")], "split must be 'train' or 'held-out', got 'test'"),
        ([("a", "train"), ("a", "held-out")], "a held-out text must not be in the train split, 'a' is"),
    ],
)
def test_a_split_that_means_something_else_or_leaks_is_refused(rows, message, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"text": text, "split": split}) + "\n" for text, split in rows))
    with pytest.raises(SystemExit, match=message):
        corpora.split_corpus(str(path), 0.1)


def test_every_window_of_an_epoch_comes_once_and_in_any_order():
    windows = corpora.Windows([torch.arange(3, 3 + 40 * k) for k in (1, 2, 3)], 9, 0, ENDS)
    rows = windows.batch(range(2 * windows.per_epoch))
    first, second = rows.split(windows.per_epoch)
    assert (rows[:, 0] == ENDS.bos).all()
    assert not first.equal(second)
    numbers = [windows.per_epoch + 1, 3, 0, windows.per_epoch]
    assert windows.batch(numbers).equal(rows[numbers])
    joined = torch.cat([torch.arange(3, 3 + 40 * k) for k in (1, 2, 3)])
    kept = first[:, 1:].flatten().bincount(minlength=130)
    lost = len(joined) - windows.per_epoch * 8
    assert (joined.bincount(minlength=130) - kept).sum() == lost < 8


def test_a_share_is_exact_in_every_round_and_no_window_comes_twice():
    big = corpora.Windows([torch.arange(100, 100 + 8 * 900)], 9, 0, ENDS)
    small = corpora.Windows([torch.arange(50_000, 50_000 + 8 * 50)], 9, 1, ENDS)
    mixture = corpora.Mixture([big, small], [950, 50], seed=3)
    rows = mixture.batch(range(1000))
    from_small = rows[:, 1] >= 50_000
    assert from_small.sum() == 50
    assert len(rows[from_small].unique(dim=0)) == 50
    assert len(rows[~from_small].unique(dim=0)) == 900  # 950 windows: a whole epoch and the beginning of another
    assert 10 < from_small[:500].sum() < 40  # spread over the round
    assert mixture.batch(range(990, 1010))[:10].equal(rows[990:])
    assert not (mixture.batch(range(1000, 2000))[:, 1] >= 50_000).equal(from_small)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        (["c=0.1"], "must name one of the corpora a, b"),
        (["a=x"], "must be NAME=FRACTION"),
        (["a=0.0001"], "must be at least 0.001"),
        (["a=0.5", "b=0.5"], "must leave something to a corpus without one"),
        (["a=1"], "must leave something to a corpus without one"),
    ],
)
def test_a_share_that_cannot_be_is_refused(shares, message):
    with pytest.raises(SystemExit, match=message):
        corpora.parse_shares(shares, ["a", "b"])


def test_the_token_after_verdict_counts_by_its_weight(trained):
    model = bilens.load(trained)
    ids = model.token_rows([train_language.VERDICT])[0]
    batch = torch.tensor([[ENDS.bos, 5, *ids, 7, 9], [*ids, 6, ENDS.eos, ENDS.bos, 8]])
    where = train_language.follows(batch, ids)
    assert where.nonzero().tolist() == [[0, 2 + len(ids)], [1, len(ids)]]
    losses = model(batch, "loss", loss_per_token=True)
    plain, weighted = (
        train_language.verdict_loss(model.tokenizer.backend_tokenizer, weight)(model, batch) for weight in (1.0, 4.0)
    )
    assert plain.item() == pytest.approx(train_language.mean_loss(model, batch).item(), rel=1e-5)
    expected = (losses.sum() + 3 * losses[where[:, 1:]].sum()) / (losses.numel() + 6)
    assert weighted.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_mixture_learns_its_verdicts_and_resumes_bit_identically(corpus, verdicts, mixture, tmp_path):
    record = json.loads((mixture / "model" / "training.json").read_text())
    assert record["settings"]["share"] == [f"{verdicts.name}=0.25"]
    assert record["settings"]["verdict_weight"] == 4
    losses = [float(record["curve"][i][f"held-out {verdicts.name}"]) for i in (0, -1)]
    assert losses[1] < losses[0] - 0.5
    out = tmp_path / "run"
    out.mkdir()
    (out / "tokenizer.json").write_bytes((mixture / "tokenizer.json").read_bytes())
    (out / "tokens").write_bytes((mixture / "tokens").read_bytes())
    killed(mixed(corpus, verdicts, out), out)
    moved = verdicts.parent / "elsewhere" / verdicts.name  # tokenised corpora do without their files
    train(mixed(corpus.parent / "elsewhere" / corpus.name, moved, out))
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (out, mixture)]
    assert weights[0] == weights[1]
    with (out / "log.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == sorted(set(steps))


def test_tokenised_corpora_of_another_run_are_refused(corpus, verdicts, mixture):
    with pytest.raises(SystemExit, match="holds other corpora, or another tokenizer or --holdout: delete it"):
        train(mixed(corpus, verdicts, mixture, "--holdout", "0.2"))


def test_training_goes_on_from_a_models_weights(corpus, trained, tmp_path):
    more = ["--start", str(trained), "--lr", "0", "--lr-embed", "0", "--tokens", "128"]
    train([*arguments(corpus, tmp_path / "run"), *more])
    before, after = bilens.load(trained).state_dict(), bilens.load(tmp_path / "run" / "model").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    record = json.loads((tmp_path / "run" / "model" / "training.json").read_text())
    assert record["settings"]["start"] == train_language.weights_digest(bilens.load(trained))


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--context", "32"], "at most 16"), (["--context", "16"], "must be the tokenizer of --start")],
)
def test_a_start_that_does_not_fit_is_refused(more, message, trained, tmp_path):
    tokenizer = (trained / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(tokenizer.replace('"cat"', '"cow"'))
    args = train_language.parse_args(["--data", "x", "--out", str(tmp_path), "--start", str(trained), *more])
    with pytest.raises(SystemExit, match=message):
        train_language.started_model(args)
