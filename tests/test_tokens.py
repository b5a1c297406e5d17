"""Tokenizers as Hugging Face has them: special tokens from files, template and configs; tokens as they are shown."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import bilens
from bilens.models.tokenization import StoredTokenizer


@pytest.fixture(scope="module")
def bytes_tokenizer():
    """A byte-level tokenizer like GPT-2's, with two special tokens and a template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=275,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|stop|>", "<|startoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["I not the cat not the cat"] * 5, trainer)
    single = "<|startoftext|> $A"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<|startoftext|>", 1)])
    return tokenizer


def piece_tokenizer():
    """A tokenizer like SentencePiece's, which falls back to bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁the", "▁cat", "s", "▁", "a"]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def saved(folder, make_model, tokenizer, *, generation=None, settings=None, **config):
    """Save a model, and rewrite its tokenizer and what is told of its special tokens."""
    bilens.save(make_model(dtype=torch.float32, tokenizer=None, d_vocab=tokenizer.get_vocab_size()), folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    told = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(told))
    for name, keys in (("generation_config.json", generation), ("tokenizer_config.json", settings)):
        if keys is not None:
            (folder / name).write_text(json.dumps(keys))
    return bilens.load(folder)


# -- special tokens ---------------------------------------------------------------------------------------------------


def words(*special):
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["?", *special, "a", "cat"])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def test_special_tokens_come_from_the_settings_then_the_template_then_the_configs_then_their_names():
    plain = words("<one>", "<two>", "<s>", "</s>")
    ids, templated = {"bos": (2,), "eos": (1,)}, words("<one>", "<two>", "<s>", "</s>")
    templated.post_processor = processors.TemplateProcessing(
        single="<one> $A <two>", special_tokens=[("<one>", 1), ("<two>", 2)]
    )

    def told(*given):
        stored = StoredTokenizer(*given)
        return stored.special("bos"), stored.special("eos")

    settings = {"bos_token": "</s>", "eos_token": {"content": "<s>", "lstrip": False}}
    assert told(templated, settings, ids) == ("</s>", "<s>")
    assert told(templated, {}, ids) == ("<one>", "<two>")
    assert told(plain, {}, ids) == ("<two>", "<one>")
    assert told(plain) == ("<s>", "</s>")
    assert told(plain, {"bos_token": "<unheard-of>"}) == ("<s>", "</s>")  # which the vocabulary lacks
    assert told(plain, {}, {"bos": (5,)}) == ("<s>", "</s>")  # "a", which the tokenizer does not mark as special
    assert told(words("<one>")) == (None, None)


def test_bos_by_the_template(tmp_path, make_model, bytes_tokenizer):
    model = saved(tmp_path, make_model, bytes_tokenizer, bos_token_id=0)
    assert model.bos_id == 1
    assert model.to_tokens("cat")[0].tolist() == bytes_tokenizer.encode("cat").ids


@pytest.mark.parametrize("where", ["config", "generation"])
def test_generation_stops_at_each_end_of_a_list(tmp_path, make_model, bytes_tokenizer, where):
    ends = {"eos_token_id": [0, 7]}
    model = saved(tmp_path, make_model, bytes_tokenizer, **(ends if where == "config" else {"generation": ends}))
    assert model.eos_ids == (0, 7)
    assert (model.tokenizer.eos_token, model.eos_id) == ("<|stop|>", 0)

    def always(token):
        return [("ln_final.hook_normalized", lambda x, hook: 100 * torch.linalg.pinv(model.W_U)[token].expand_as(x))]

    for token in (0, 7):
        assert model.generate(torch.tensor([[5]]), 6, do_sample=False, fwd_hooks=always(token)).tolist() == [[5, token]]
    options = {"do_sample": False, "fwd_hooks": always(7)}
    assert model.generate(torch.tensor([[5]]), 3, eos_token_id=0, **options).tolist() == [[5, 7, 7, 7]]
    assert model.generate(torch.tensor([[5]]), 3, eos_token_id=[9, 7], **options).tolist() == [[5, 7]]
    bilens.save(model, tmp_path / "again")
    assert bilens.load(tmp_path / "again").eos_ids == (0, 7)


def test_padding_needs_no_eos(make_model):
    model = make_model(tokenizer=words())
    assert model.to_tokens(["a cat", "a"], prepend_bos=False).shape == (2, 2)
    with pytest.raises(ValueError, match="the tokenizer has no EOS token: neither its files, its template nor"):
        _ = model.eos_id
    with pytest.raises(ValueError, match="the tokenizer has no BOS token"):
        model.to_tokens("a cat")
    model.has_bos = False
    torch.testing.assert_close(model(["a cat", "a"])[1, :1], model("a")[0])


def test_padding_is_the_settings_padding_token(tmp_path, make_model):
    tokenizer = words("<fill>", "[BOS]", "[EOS]")
    model = saved(tmp_path, make_model, tokenizer, settings={"pad_token": "<fill>"})
    assert model.to_tokens(["a cat", "a"]).tolist() == [[2, 4, 5], [2, 4, 1]]
    assert model.padding_ids[:2] == (1, 3)


# -- Hugging Face's own -----------------------------------------------------------------------------------------------


def test_auto_tokenizer_reads_what_is_saved(tmp_path):
    model = bilens.load("bilens-mini")
    assert isinstance(model.tokenizer, PreTrainedTokenizerFast)
    bilens.save(model, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "The movie was not good."
    assert theirs(text)["input_ids"] == model.to_tokens(text)[0].tolist()
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("[BOS]", "[EOS]", "[EOS]")
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    model.tokenizer = theirs
    assert model.to_str_tokens(text) == ["[BOS]", "the", "movie", "was", "not", "good", "."]


def test_settings_survive_saving(tmp_path, make_model, bytes_tokenizer):
    chat = "{% for m in messages %}{{ m.content }}{% endfor %}"
    settings = {"eos_token": "<|stop|>", "chat_template": chat, "add_bos_token": False}
    (tmp_path / "a").mkdir()
    model = saved(tmp_path / "a", make_model, bytes_tokenizer, settings=settings)
    bilens.save(model, tmp_path / "b")
    again = bilens.load(tmp_path / "b")
    assert again.tokenizer.chat_template == model.tokenizer.chat_template == chat
    assert again.tokenizer("cat")["input_ids"] == model.tokenizer("cat")["input_ids"]


def test_what_is_no_tokenizer_is_refused(make_model):
    with pytest.raises(ValueError, match="tokenizer must be one of transformers or tokenizers, or None, got str"):
        make_model().tokenizer = "gpt2"


def test_importing_loads_no_transformers():
    code = "import sys, bilens; print([m for m in ('transformers', 'transformer_lens') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert run.stdout.strip() == "[]"


# -- how tokens are shown ---------------------------------------------------------------------------------------------


def test_byte_level_tokens_are_text_and_pieces_of_characters_bytes(make_model, bytes_tokenizer):
    model = make_model(tokenizer=bytes_tokenizer, d_vocab=280)
    shown = model.to_str_tokens("I noté the 猫")
    assert shown == ["<|startoftext|>", "I", " not", "<0xC3>", "<0xA9>", " the", " ", "<0xE7>", "<0x8C>", "<0xAB>"]
    assert model.to_string(model.to_tokens("I noté the 猫")[0, 1:]) == "I noté the 猫"
    assert model.labels([278]) == ["278"]  # a row of the embedding that no token has
    assert model.spellings(model.to_tokens("the cats")[0, 1:].tolist())[-1] == "s"
    (cat,) = model.tokens_of([" cat"])
    assert model.label(cat) == " cat"
    assert cat in model.tokens_of(["cat", "unheard-of"])


def test_tokens_like_those_of_sentencepiece(make_model):
    model = make_model(tokenizer=piece_tokenizer(), d_vocab=300)
    assert model.to_str_tokens("the cats é") == ["<s>", " the", " cat", "s", " ", "<0xC3>", "<0xA9>"]
    assert model.labels([3 + 10]) == ["\n"]
    assert model.spellings([1, 259])[1] == " the"


def test_wordpiece_pieces_keep_their_mark_and_get_their_spaces(make_model):
    model = make_model()
    assert model.to_str_tokens("the cats") == ["[BOS]", "the", "cat", "##s"]
    assert model.spellings(model.to_tokens("the cats")[0].tolist()) == [" [BOS]", " the", " cat", "s"]


def test_labels_of_a_byte_level_model_everywhere(make_model, bytes_tokenizer):
    model = make_model(tokenizer=bytes_tokenizer, d_vocab=280)
    not_, cat = (model.tokens_of([word])[0] for word in (" not", " cat"))
    found = bilens.circuits.bigrams.bigrams(model, cat, k=280)
    assert not [one.token for one in found if one.token is None or "Ġ" in one.token or "Ã" in one.token]
    assert bilens.circuits.targets.Target.token(model, not_).name == "logit of ' not'"
    assert bilens.circuits.places.locate(model, "I not").words[0][-1] == " not"


def test_without_a_tokenizer_labels_are_ids_and_text_is_refused(make_model):
    model = make_model()
    model.tokenizer = None
    assert model.labels([5, 6]) == model.to_str_tokens(torch.tensor([5, 6])) == ["5", "6"]
    calls = (model, model.to_tokens, model.generate, model.to_single_token, lambda _: model.to_string([3]))
    for call in (*calls, lambda text: bilens.circuits.bigrams.bigrams(model, text)):
        with pytest.raises(ValueError, match="this model has no tokenizer, so it takes token ids only"):
            call("cat")


# -- BOS --------------------------------------------------------------------------------------------------------------


def test_prepend_bos_of_none_is_the_default(make_model):
    model = make_model()
    with_bos = model.to_tokens("the cat")
    assert with_bos[0, 0] == model.bos_id
    assert torch.equal(model.to_tokens("the cat", prepend_bos=None), with_bos)
    assert torch.equal(model("the cat", prepend_bos=None), model(with_bos))
    assert model.to_str_tokens("the cat", prepend_bos=None)[0] == "[BOS]"
    said = model.generate("the cat", 3, prepend_bos=None, do_sample=False, return_type="tokens")
    assert torch.equal(said, model.generate(with_bos, 3, do_sample=False))
    assert model.to_tokens("the cat", False).shape == (1, 2)


def test_truncation(make_model):
    model, text = make_model(), "the " * 40
    assert model.to_tokens(text, truncate=False).shape == (1, 41)
    assert model.to_tokens(text, truncate=True).shape == (1, 32)
    assert model.to_tokens("", prepend_bos=False, truncate=False).shape == (1, 0)
    assert model.to_tokens("the cat", move_to_device=False).device.type == "cpu"
    with pytest.raises(ValueError, match="Unicode, but text 1 does not"):
        model.to_tokens(["a", "\ud800"])


def test_a_tokenizer_with_several_chat_templates_is_written_whole(make_model, tmp_path):
    model, templates = make_model(), {"default": "{{ messages }}", "tools": "{{ tools }}"}
    model.tokenizer.chat_template = templates
    bilens.save(model, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == templates
