"""The conversion script as a user runs it: killed and resumed, controlled, streamed, and refusing what it must."""

import csv
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import bilens

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
anneal, corpora = pytest.importorskip("anneal"), pytest.importorskip("corpora")
train_language = pytest.importorskip("train_language")
sys.path.remove(str(SCRIPTS))

TINY = (
    "--batch 8 --micro-batch 4 --tokens 5000 --context 16 --holdout 0.1 --precision no "
    "--lr 0.01 --lr-embed 0.004 --checkpoint-every 5 --eval-every 10"
)
STREAMED = ("--streaming", "--schedule", "smootherstep")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Sentences of a small grammar: data that can be learnt in a few steps."""
    draw = random.Random(0)
    texts = [" and ".join(f"the {draw.choice(['cat', 'dog'])} sat on" for _ in range(4)) for _ in range(300)]
    path = tmp_path_factory.mktemp("data") / "grammar.jsonl"
    path.write_text("".join(json.dumps({"text": f"{text} {number}"}) + "\n" for number, text in enumerate(texts)))
    return path


@pytest.fixture(scope="module")
def gated(make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "gated"
    bilens.save(make_model(dtype=torch.float32, mlp="gated", act="silu"), folder)
    return folder


def arguments(model, corpus, out, *more):
    return [str(model), "--data", str(corpus), "--out", str(out), *TINY.split(), *more]


def run(*args):
    anneal.main(arguments(*args))


def refusal(*args):
    with pytest.raises(SystemExit) as refused:
        run(*args)
    return str(refused.value)


def curve(out):
    with (out / "log.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def streamed(gated, corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "streamed"
    run(gated, corpus, out, *STREAMED)
    return out


def test_the_result_is_bilinear_and_has_learnt(streamed):
    model = bilens.load(streamed / "model")
    assert model.cfg.mlp.kind == "bilinear"
    model.blocks[0].mlp.tensor()
    rows = curve(streamed)
    assert float(rows[-1]["train"]) < float(rows[0]["train"]) - 0.2
    assert [row["tokens"] for row in rows] == [str(128 * step) for step in (10, 20, 30, 40)]
    beta = [float(row["beta"]) for row in rows]
    assert 0 < beta[0] < 1
    assert beta[2:] == [0, 0]
    record = json.loads((streamed / "model" / "training.json").read_text())
    assert len(record["c"]) == 2
    assert record["held-out loss"]["grammar.jsonl"] == pytest.approx(
        float(rows[-1]["held-out grammar.jsonl"]), abs=0.01
    )


def test_a_killed_run_resumes_bit_identically(gated, corpus, streamed, tmp_path):
    command = [sys.executable, str(SCRIPTS / "anneal.py"), *arguments(gated, corpus, tmp_path, *STREAMED)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (tmp_path / "checkpoint.safetensors").exists():
        assert process.poll() is None, "the run ended before its first checkpoint"
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (tmp_path / "model").exists(), "killed too late to test anything"
    run(gated, corpus, tmp_path, *STREAMED)
    assert [row["train"] for row in curve(tmp_path)] == [row["train"] for row in curve(streamed)]
    files = [folder / "model" / "model.safetensors" for folder in (tmp_path, streamed)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_control_keeps_its_gates_and_sees_the_same_tokens(gated, corpus, streamed, tmp_path):
    run(gated, corpus, tmp_path, "--streaming", "--control")
    assert bilens.load(tmp_path / "model").cfg.mlp.act == "silu"
    rows, annealed = curve(tmp_path), curve(streamed)
    assert {row["beta"] for row in rows} == {"1.0000"}
    assert [row["tokens"] for row in rows] == [row["tokens"] for row in annealed]
    assert abs(float(rows[0]["train"]) - float(annealed[0]["train"])) < 0.3


def test_gates_and_norms_can_be_fitted_by_least_squares(gated, corpus, tmp_path, capsys):
    run(gated, corpus, tmp_path, "--method", "least-squares", "--norms", "--fit-windows", "16")
    assert "blocks.0.mlp.gate: a linear map explains R² 0." in capsys.readouterr().out
    model = bilens.load(tmp_path / "model")
    assert (model.cfg.mlp.kind, model.cfg.norm) == ("bilinear", None)
    assert set(json.loads((tmp_path / "model" / "training.json").read_text())["r2"]) > {"ln_final", "blocks.1.ln2"}


def test_what_cannot_be_annealed_is_refused(make_model, gated, corpus, tmp_path):
    bilens.save(make_model(dtype=torch.float32), tmp_path / "bilinear")
    assert "model must have gated MLPs" in refusal(tmp_path / "bilinear", corpus, tmp_path / "a")
    model = bilens.load(gated)
    model.tokenizer.add_tokens(["wombat"])
    bilens.save(model, tmp_path / "other")
    message = refusal(tmp_path / "other", corpus, tmp_path / "b")
    assert "has 75 tokens, the embedding only 74 rows: they do not belong together" in message
    model.tokenizer = None
    bilens.save(model, tmp_path / "none")
    assert "has no tokenizer.json" in refusal(tmp_path / "none", corpus, tmp_path / "c")
    assert "--context must be at most 32, the model's own, got 64" in refusal(
        gated, corpus, tmp_path / "d", "--context", "64"
    )


def test_a_loss_that_is_not_a_number_ends_the_run_at_a_good_checkpoint(gated, corpus, tmp_path, monkeypatch):
    take_step = train_language.training_step

    def spoil(args, accelerator, model, optimizers, windows, step, steps, loss_of):
        loss = take_step(args, accelerator, model, optimizers, windows, step, steps, loss_of)
        return float("nan") if step == 12 else loss

    monkeypatch.setattr(train_language, "training_step", spoil)
    where = f"the last good checkpoint is {tmp_path / 'checkpoint.safetensors'}, after step 10"
    assert refusal(gated, corpus, tmp_path) == f"loss is nan at step 12: lower --lr; {where}"


def test_weights_that_are_not_finite_are_not_kept(gated, corpus, tmp_path, monkeypatch):
    take_step = train_language.training_step

    def spoil(args, accelerator, model, optimizers, windows, step, steps, loss_of):
        loss = take_step(args, accelerator, model, optimizers, windows, step, steps, loss_of)
        if step == 9:
            next(model.parameters()).data[0, 0] = torch.nan
        return loss

    monkeypatch.setattr(train_language, "training_step", spoil)
    assert "weights are not finite after step 10: lower --lr; the last good" in refusal(gated, corpus, tmp_path)
    kept = safetensors.torch.load_file(tmp_path / "checkpoint.safetensors")
    assert all(weight.isfinite().all() for weight in kept.values())


GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 6, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"num_key_value_heads": 2}),
        ("qwen3", {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True}),
        ("olmo2", {}),
        ("gemma2", {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 9.0}),
        ("gemma3_text", {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_family_stays_what_it_is(kind, changes, corpus, tiny_tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        kind,
        **{"vocab_size": tiny_tokenizer.get_vocab_size(), "hidden_size": 16, "intermediate_size": 24}
        | {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32, **changes},
    )
    original = transformers.AutoModelForCausalLM.from_config(config)
    original.save_pretrained(tmp_path / "gated")
    tiny_tokenizer.save(str(tmp_path / "gated" / "tokenizer.json"))
    run(tmp_path / "gated", corpus, tmp_path / "run", "--tokens", "1500")
    ours = bilens.load(tmp_path / "run" / "model")
    assert (ours.cfg.mlp.kind, ours.cfg.norm.gain) == ("bilinear", True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32).eval()
    assert type(theirs) is type(original)
    tokens = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_model_without_bos_is_annealed_on_texts_that_one_token_parts(corpus, tmp_path):
    transformers = pytest.importorskip("transformers")
    words = {word: i for i, word in enumerate(["[UNK]", "[EOS]", "the", "cat", "dog", "sat", "on", "and"])}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))  # as SimpleStories has it: EOS comes last
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[EOS]"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 1)])
    sizes = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(num_attention_heads=4, tie_word_embeddings=True, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "gated")
    tokenizer.save(str(tmp_path / "gated" / "tokenizer.json"))
    run(tmp_path / "gated", corpus, tmp_path / "run", "--tokens", "1500")
    model = bilens.load(tmp_path / "run" / "model")
    assert (model.cfg.mlp.kind, model.has_bos, model.cfg.unembed.tied) == ("bilinear", False, True)
    ends = corpora.Ends(1, 1)
    assert corpora.encode(tokenizer, ["the cat"], ends)[0].tolist() == [1, 2, 3]
