"""Models on another device than the CPU: every tensor that they make, and every one that they are given, goes there."""

import copy

import pytest
import torch
from devices import AWAY, Away, move, second_device

from bilens.models import annealing, fits

VARIANTS = {
    "bilinear": {},
    "biases, gains": {"norm": "rms_gain_shift", "mlp_bias": (True, True), "attn_bias": (True, True)},
    "no norm": {"norm": "none"},
    "gated": {"mlp": "gated", "act": "silu", "norm": "rms_gain"},
    "bilinear attention": {"attention": "bilinear"},
    "grouped, tied, windowed": {"n_key_value_heads": 1, "tied": True, "window": 3},
}
TEXTS = ["once upon a time the cat sat", "the dog ran"]


@pytest.fixture(params=VARIANTS)
def pair(request, make_model):
    """A model, and a copy on the other device."""
    model = make_model(**VARIANTS[request.param]).requires_grad_(False)
    with second_device():
        yield model, move(copy.deepcopy(model))


def same(away, here):
    assert away.device == AWAY
    torch.testing.assert_close(away.to("cpu"), here, rtol=1e-12, atol=1e-12)


def test_the_second_device_notices_a_tensor_that_stayed():
    with second_device():
        away = torch.ones(3).to(AWAY)
        assert isinstance(away + torch.ones(3, device=AWAY), Away)
        assert (2 * away).tolist() == [2.0, 2.0, 2.0]
        with pytest.raises(RuntimeError, match="two devices"):
            away + torch.ones(3)
    with pytest.raises(RuntimeError, match="two devices"):
        torch.ones(3).add_(away)


def test_forward_loss_and_cache(pair):
    model, other = pair
    tokens = model.to_tokens(TEXTS)
    mask = tokens != model.eos_id
    for given in (TEXTS, tokens, tokens.to(AWAY)):
        same(other(given), model(TEXTS if given is TEXTS else tokens))
    logits, cache = model.run_with_cache(tokens, attention_mask=mask)
    other_logits, other_cache = other.run_with_cache(tokens, attention_mask=mask)
    same(other_logits, logits)
    for name, activation in cache.items():
        same(other_cache[name], activation)
    same(other(tokens, "loss", attention_mask=mask), model(tokens, "loss", attention_mask=mask))
    resid = cache["blocks.1.hook_resid_pre"]
    arguments = {"start_at_layer": 1, "tokens": tokens, "attention_mask": mask, "loss_per_token": True}
    same(other(resid.to(AWAY), "loss", **arguments), model(resid, "loss", **arguments))


def test_generation(pair):
    model, other = pair
    assert other.generate(TEXTS, 6, temperature=0) == model.generate(TEXTS, 6, temperature=0)
    ids = model.to_tokens(TEXTS[0])
    same(other.generate(ids, 6, temperature=0), model.generate(ids, 6, temperature=0))
    drawn = [one.generate(TEXTS, 6, top_k=5, generator=torch.Generator().manual_seed(0)) for one in pair]
    assert drawn[0] == drawn[1]


def test_text_and_weights(pair):
    model, other = pair
    same(other.to_tokens(TEXTS), model.to_tokens(TEXTS))
    assert other.to_string(other.to_tokens(TEXTS)) == model.to_string(model.to_tokens(TEXTS))
    assert other.to_str_tokens(TEXTS[0]) == model.to_str_tokens(TEXTS[0])
    for tokens in ("cat", [4, 5], torch.tensor([4, 5])):
        same(other.tokens_to_residual_directions(tokens), model.tokens_to_residual_directions(tokens))
    same(other.accumulated_bias(2, mlp_input=False), model.accumulated_bias(2, mlp_input=False))
    for name in ("W_E", "W_U", "W_Q", "W_K", "W_V", "W_O"):
        same(getattr(other, name), getattr(model, name))
    for part in ("b_Q", "b_K", "b_V", "b_O"):
        same(getattr(other.blocks[1].attn, part), getattr(model.blocks[1].attn, part))
    same(other.blocks[1].mlp.b_out, model.blocks[1].mlp.b_out)


@pytest.mark.parametrize("norms", [False, True])
def test_annealing(make_model, norms):
    model = make_model(mlp="gated", act="gelu", norm="rms_gain").requires_grad_(False)
    rows = model.to_tokens("the big dog sat on the little mat")
    results = []
    with second_device():
        for one in (model, move(copy.deepcopy(model))):
            found = {"gates": fits.fit_gates(one, rows), "norms": fits.fit_norms(one, rows)} if norms else {}
            soft = annealing.prepare(one, **found)
            annealing.set_alpha(soft, 0.5)
            halfway = soft(rows)
            annealing.set_alpha(soft, 1)
            results.append((halfway, annealing.fold(soft)(rows)))
        for here, away in zip(*results, strict=True):
            assert away.device == AWAY
            torch.testing.assert_close(away.to("cpu"), here, rtol=1e-6, atol=1e-6)
