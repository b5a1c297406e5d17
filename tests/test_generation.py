"""Generation with transformer_lens' arguments, against what each of them means."""

import inspect

import pytest
import torch
from transformer_lens import HookedTransformer
from transformer_lens.utilities import sample_logits

PROMPT = "the cat"


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(dtype=torch.float32)


@pytest.fixture(scope="module")
def greedy(model):
    return model.generate(model.to_tokens(PROMPT), 6, do_sample=False, stop_at_eos=False)


@pytest.mark.parametrize("name", ["generate", "generate_stream"])
def test_every_argument_of_theirs_is_one_of_ours_in_their_order(model, name):
    theirs = [p for p in inspect.signature(getattr(HookedTransformer, name)).parameters if p != "generation_kwargs"]
    ours = list(inspect.signature(getattr(type(model), name)).parameters)
    assert ours[: len(theirs)] == theirs


@pytest.mark.parametrize(
    "options",
    [{"do_sample": False}, {"temperature": 0}, {"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-4, "freq_penalty": 0}],
)
def test_greedy_in_every_way(model, greedy, options):
    found = model.generate(PROMPT, 6, stop_at_eos=False, return_type="tokens", **options)
    assert torch.equal(found, greedy)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 5},
        {"top_p": 0.6},
        {"top_p": 1.0},
        {"temperature": 0.7},
        {"freq_penalty": 2.0, "temperature": 0.5},
        {"top_k": 3, "top_p": 0.2},
    ],
    ids=str,
)
def test_sampling_has_their_distribution(model, options):
    tokens = model.to_tokens(PROMPT)
    logits = model(tokens)[:, -1]
    many = logits.expand(4000, -1)
    theirs = sample_logits(many.clone(), tokens=tokens.expand(4000, -1), **options).bincount(minlength=logits.shape[1])
    generator = torch.Generator().manual_seed(0)
    new = model.generate(tokens.expand(4000, -1), 1, stop_at_eos=False, generator=generator, **options)[:, -1]
    ours = new.bincount(minlength=logits.shape[1])
    assert set(ours.nonzero()[:, 0].tolist()) <= set((theirs > 0).nonzero()[:, 0].tolist()) | set(
        (theirs < 6).nonzero()[:, 0].tolist()
    )
    assert ((ours - theirs).abs() < 6 * (theirs.clamp(min=1) * 2).sqrt() + 8).all()
    kept = {"top_k": 5, "top_p": None}.get(next(iter(options)))
    assert kept is None or (ours > 0).sum() <= kept


def test_the_same_seed_gives_the_same_text(model):
    def said(**options):
        return model.generate(PROMPT, 6, stop_at_eos=False, **options)

    one, two = (said(generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert one == two
    torch.manual_seed(5)
    before = said()
    torch.manual_seed(5)
    assert said() == before


def test_return_types(model, greedy):
    options = {"do_sample": False, "stop_at_eos": False}
    text = model.to_string(greedy[0], skip_special_tokens=True)
    assert model.generate(PROMPT, 6, **options) == text
    assert model.generate([PROMPT], 6, **options) == [text]
    assert model.generate(greedy[:, :3], 6, return_type="str", **options) == [text]
    embedded = model.embed(greedy)
    torch.testing.assert_close(model.generate(PROMPT, 6, return_type="embeds", **options), embedded)
    torch.testing.assert_close(model.generate(embedded[:, :3], 6, **options), embedded)
    assert torch.equal(model.generate(embedded[:, :3], 6, return_type="tokens", **options), greedy[:, 3:])
    assert model.generate(embedded[:, :3], 6, return_type="str", **options) == [
        model.to_string(greedy[0, 3:], skip_special_tokens=True)
    ]


def test_logits_of_each_step(model, greedy):
    found = model.generate(PROMPT, 6, do_sample=False, stop_at_eos=False, output_logits=True)
    assert torch.equal(found.sequences, greedy)
    torch.testing.assert_close(torch.stack(found.logits, 1), model(greedy)[:, 2:-1])


def test_prompts_of_several_lengths_are_padded_on_the_left_whatever_is_said(model):
    texts = ["the cat", "a big dog sat on the mat"]
    alone = [model.generate(text, 5, do_sample=False, stop_at_eos=False) for text in texts]
    for side in ("left", "right", None):
        assert model.generate(texts, 5, do_sample=False, stop_at_eos=False, padding_side=side) == alone


def test_a_list_of_ends_fills_up_with_eos(model, greedy):
    first = int(greedy[0, 3])
    both = torch.cat((greedy[:, :3], model.to_tokens("a dog")))
    found = model.generate(both, 3, do_sample=False, eos_token_id=[first, model.cfg.d_vocab - 1])
    assert found[0, 3:].tolist() == [first, model.eos_id, model.eos_id][: found.shape[1] - 3]


def test_a_stream_is_the_text_in_parts(model, greedy):
    options = {"do_sample": False, "stop_at_eos": False}
    for most, parts in ((1, 6), (5, 2), (100, 1)):
        found = list(model.generate_stream(greedy[:, :3], 6, most, **options))
        assert torch.equal(torch.cat(found, 1), greedy)
        assert len(found) == parts
    texts = list(model.generate_stream(PROMPT, 6, 5, **options))
    assert len(texts) == 2
    assert texts[0] == model.to_string(greedy[0, :5], skip_special_tokens=True)
    stream = model.generate_stream(PROMPT, 6, 1, fwd_hooks=[("hook_embed", lambda x, hook: x)], **options)
    next(stream)
    stream.close()
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_a_progress_bar_is_shown_when_asked_for(model, capsys):
    model.generate(PROMPT, 2, stop_at_eos=False)
    assert not capsys.readouterr().err
    model.generate(PROMPT, 2, stop_at_eos=False, verbose=True)
    assert "2/2" in capsys.readouterr().err


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"top_p": 0}, "top_p must be above 0 and at most 1"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"temperature": -1}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"freq_penalty": -1}, "freq_penalty must be finite and not be negative"),
        ({"return_type": "text"}, "return_type must be 'input', 'str', 'tokens' or 'embeds', got 'text'"),
        ({"padding_side": "up"}, "padding_side must be 'left' or 'right', got 'up'"),
        ({"eos_token_id": 10**6}, "eos_token_id must hold ids from 0 to"),
    ],
)
def test_what_cannot_be_meant_is_refused(model, options, said):
    with pytest.raises(ValueError, match=said):
        model.generate(PROMPT, 2, **options)


def test_what_is_unknown_is_refused_by_name(model):
    with pytest.raises(TypeError, match="num_beams"):
        model.generate(PROMPT, 2, num_beams=4)
    with pytest.raises(ValueError, match="freq_penalty must be 0 for embeddings"):
        model.generate(model.embed(model.to_tokens(PROMPT)), 2, freq_penalty=1.0)
