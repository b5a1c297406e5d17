"""Windows of text: what is text in them, and what the model's hook points see."""

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from bilens.models.windows import Windows, layer_of, observe, observed

TEXTS = ["the cat sat on the mat", "once upon a time the dog ran", "a cat", "the big dog saw a little cat and ran"]


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(dtype=torch.float32)


def parts(windows):
    return [windows.tokens.tolist(), windows.attend.tolist(), windows.counts.tolist(), windows.text.tolist()]


def ids(model, text):
    return model.token_rows([text])[0]


def test_a_window_is_bos_and_text_and_padding(model):
    windows = Windows.of(model, TEXTS, length=6)
    pieces = [ids(model, text)[i : i + 5] for text in TEXTS for i in range(0, len(ids(model, text)), 5)]
    assert [row[there].tolist() for row, there in zip(windows.tokens, windows.counts, strict=True)] == pieces
    assert [row[there].tolist() for row, there in zip(windows.tokens, windows.attend, strict=True)] == [
        [model.bos_id, *piece] for piece in pieces
    ]
    assert windows.text.tolist() == [0, 0, 1, 1, 2, 3, 3]
    assert windows.tokens.shape == (7, 6)
    assert Windows.of(model, TEXTS).tokens.shape == (4, 10)  # as wide as the longest text, not as the context
    assert repr(Windows.of(model, TEXTS)) == "Windows(4 of up to 10 tokens, 24 of text)"


@pytest.mark.parametrize(
    "given",
    [
        tuple(TEXTS),
        iter(TEXTS),
        np.array(TEXTS),
        np.array(TEXTS, dtype=object),
        [{"text": text, "label": 1} for text in TEXTS],
        datasets.Dataset.from_dict({"text": TEXTS, "label": [0] * 4}),
        datasets.Dataset.from_dict({"text": TEXTS})["text"],
        datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(),
        [f"[BOS] {text}" for text in TEXTS],
    ],
    ids=["tuple", "iterator", "array", "objects", "rows", "dataset", "column", "stream", "with BOS spelt out"],
)
def test_texts_of_any_kind(model, given):
    assert parts(Windows.of(model, given)) == parts(Windows.of(model, TEXTS))


def test_one_text_is_a_text(model):
    assert parts(Windows.of(model, TEXTS[0])) == parts(Windows.of(model, TEXTS[:1]))


def test_null_and_empty_texts_are_left_out_and_the_others_keep_their_number(model):
    windows = Windows.of(model, [None, TEXTS[0], "", "  ", TEXTS[1]])
    assert windows.text.tolist() == [1, 4]
    assert torch.equal(windows.tokens, Windows.of(model, TEXTS[:2]).tokens)


@pytest.mark.parametrize(
    "kind",
    [
        torch.Tensor.int,
        torch.Tensor.byte,
        torch.Tensor.tolist,
        torch.Tensor.numpy,
        list,
        lambda ids: ids.numpy().astype(np.uint16),
        lambda ids: [row.numpy() for row in ids],
    ],
    ids=["int32", "uint8", "lists", "numpy", "tensors", "uint16", "arrays"],
)
def test_token_ids_of_any_kind_and_their_padding_is_no_text(model, kind):
    tokens = model.to_tokens(TEXTS)
    assert (tokens[:, -1] == model.eos_id).any()
    assert parts(Windows.of(model, kind(tokens))) == parts(Windows.of(model, TEXTS))


def test_one_window_of_token_ids(model):
    tokens = model.to_tokens(TEXTS[0])
    for one in (tokens[0], tokens[0].tolist(), tokens[0].numpy()):
        assert parts(Windows.of(model, one)) == parts(Windows.of(model, tokens))


def test_windows_of_token_ids_may_differ_in_length(model):
    rows = [model.to_tokens(text)[0].tolist() for text in TEXTS]
    assert parts(Windows.of(model, rows)) == parts(Windows.of(model, TEXTS))


def test_only_the_eos_at_the_end_is_padding(model):
    bos, eos, cat, dog = model.bos_id, model.eos_id, *ids(model, "cat dog")
    windows = Windows.of(model, [[bos, cat, eos, dog, eos, eos], [eos, eos, eos, eos, eos, eos], [cat] * 6])
    assert windows.counts.tolist() == [[False, True, True, True, False, False], [False] * 6, [True] * 6]
    assert windows.attend.sum(1).tolist() == [4, 1, 6]


def test_a_tokenizer_without_eos_and_a_model_without_tokenizer(make_model):
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[BOS]": 1, "the": 2, "cat": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    windows = Windows.of(make_model(tokenizer=words), ["the cat", "cat"])
    assert windows.tokens.tolist() == [[1, 2, 3], [1, 3, 0]]
    assert windows.counts.tolist() == [[False, True, True], [False, True, False]]
    windows = Windows.of(make_model(tokenizer=None), [[1, 2, 2], [2]])
    assert windows.counts.tolist() == [[True, True, True], [True, False, False]]


def test_batches_are_all_windows_longest_first_and_trimmed(model):
    windows = Windows.of(model, [*TEXTS, "the", "cat sat"])
    seen, widths = [], []
    for rows, some in windows.batches(2):
        assert some.attend.any(0).all()
        assert torch.equal(some.tokens, windows[rows].tokens[:, : some.tokens.shape[1]])
        seen, widths = seen + rows.tolist(), widths + some.widths.tolist()
    assert sorted(seen) == [*range(6)]
    assert widths == sorted(widths, reverse=True)
    assert seen == [3, 1, 0, 2, 5, 4]


def test_some_windows(model):
    windows = Windows.of(model, TEXTS)
    assert windows[1].text.tolist() == [1]
    assert windows[-1].text.tolist() == [3]
    assert windows[1:3].text.tolist() == [1, 2]
    assert windows[[2, 0]].text.tolist() == [2, 0]
    assert windows[windows.widths < 8].text.tolist() == [0, 2]
    assert [one.text.tolist() for one in windows] == [[0], [1], [2], [3]]
    assert len(windows[[]].trim()) == 0


def test_what_is_seen_is_what_the_model_computes_text_by_text(model):
    hooks = ["hook_embed", "blocks.0.hook_mlp_in", "blocks.1.attn.hook_pattern", "ln_final.hook_normalized"]
    windows, found = Windows.of(model, TEXTS), {}
    for rows, some, seen in observed(model, windows, hooks, batch=3):
        for hook in hooks:
            for i, row in enumerate(rows.tolist()):
                n = int(some.attend[i].sum())
                found[row, hook] = seen[hook][i, ..., :n, :n] if "pattern" in hook else seen[hook][i, :n]
    for row, text in enumerate(TEXTS):
        _, cache = model.run_with_cache(text, names_filter=hooks)
        for hook in hooks:
            torch.testing.assert_close(found[row, hook], cache[hook][0])


def test_the_model_runs_no_further_than_needed(model):
    ran = []
    watch = [(f"blocks.{i}.hook_resid_pre", lambda x, hook: ran.append(hook.name)) for i in range(2)]
    with model.hooks(fwd_hooks=watch):
        observe(model, Windows.of(model, TEXTS), ["hook_embed", "blocks.0.hook_mlp_out"])
    assert ran == ["blocks.0.hook_resid_pre"]
    assert [layer_of(hook) for hook in ("hook_embed", "blocks.0.hook_mlp_in", "blocks.11.hook_mlp_out")] == [0, 0, 11]


def test_everything_is_on_the_models_device(make_model):
    model = make_model().to("meta")
    windows = Windows.of(model, TEXTS)
    assert {part.device.type for part in (windows.tokens, windows.attend, windows.counts, windows.text)} == {"meta"}
    on_cpu = Windows.of(make_model(), TEXTS)
    with model.hooks(fwd_hooks=[]):
        assert on_cpu.to("meta").tokens.device.type == "meta"


@pytest.mark.usefixtures("unchecked")
def test_errors_name_what_it_was(model, make_model):
    def refused(texts, message, **arguments):
        with pytest.raises(ValueError, match=message):
            Windows.of(model, texts, **arguments)

    refused([], "at least one text or window of token ids, got none")
    refused(["", None, " "], "at least one text that is not empty, got 3 empty ones")
    refused(["the", 3.5], r"must hold strings, got float 3\.5 as text 1")
    refused([None, "the", float("nan")], "got float nan as text 2")
    refused([{"text": "the"}, {"text": 7}], "got int 7 as text 1")
    refused([3, "the"], "must hold strings, got int 3 as text 0")
    refused(["the", b"cat"], "got bytes b'cat' as text 1")
    refused([{"text": "the"}, {"body": "the"}], "must have a column 'text', got 'body' in row 1")
    refused({"body": ["the"]}, "must have a column 'text', got a mapping of 'body'")
    refused(7, "got int")
    refused(b"the cat", "got bytes")
    refused("the", "length must lie between 2 and 32", length=1)
    refused("the", "length must lie between 2 and 32", length=33)
    refused(torch.zeros(2, 3, dtype=torch.float32), r"texts \(window 0\) must hold integer token ids, got float32")
    refused(torch.ones(2, 3) > 0, "got bool")
    refused([[1, 2], [0.5]], r"texts \(window 1\) must be text or integer token ids, got list of float64")
    refused([[1, 2], "the"], r"texts \(window 1\)")
    refused(["the", [1, 2]], r"must hold strings, got list \[1, 2\] as text 1")
    refused(torch.ones(2, 2, 2, dtype=torch.int64), r"shape \[2, 2\] as window 0")
    refused([[3, 4], [3, 99]], "ids from 0 to 78, got 99 in window 1".replace("78", str(model.cfg.d_vocab - 1)))
    refused([[3, -1]], "got -1 in window 0")
    refused(torch.ones(1, 40, dtype=torch.int64), r"at most 32 token ids \(n_ctx\), got 40")
    refused(torch.ones(3, 0, dtype=torch.int64), "at least one token id, got 3 empty windows")
    refused([[3, 4]], "taken as they are, got length=8", length=8)
    with pytest.raises(ValueError, match="for a model without a tokenizer"):
        Windows.of(make_model(tokenizer=None), "the cat")
    windows = Windows.of(model, TEXTS)
    with pytest.raises(ValueError, match="hooks must be a list"):
        observe(model, windows, "hook_embed")
    with pytest.raises(ValueError, match=r"no hook point is named 'blocks\.0\.mlp_in'"):
        observe(model, windows, ["blocks.0.mlp_in"])
    with pytest.raises(ValueError, match="or a hook point of a block, got 'blocks'"):
        observe(model, windows, ["blocks"])
    with pytest.raises(ValueError, match="n must be at least 1"):
        next(windows.batches(0))
    with pytest.raises(IndexError):
        windows[4]
