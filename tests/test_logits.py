"""A norm as a linear map, and the residual directions that raise logits, against the running model."""

import pytest
import torch

from bilens.models.layers import NoNorm, RMSNorm
from bilens.models.logits import logit_direction, logit_directions, token_ids

NORMS = ["none", "rms", "rms_gain", "rms_gain_shift"]


@pytest.fixture(params=NORMS)
def model(request, make_model):
    return make_model(norm=request.param)


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_norm_is_factor_times_x_plus_shift(model):
    x = 3 * random(2, 5, 16)
    for norm in (model.ln_final, model.blocks[0].ln1, model.blocks[1].ln2):
        factor, shift = norm.linear(x)
        torch.testing.assert_close(factor * x + shift, norm(x), rtol=1e-14, atol=1e-14)
        gain, also = norm.affine(x)
        torch.testing.assert_close(factor, (gain / norm.rms(x)).expand_as(x), rtol=0, atol=0)
        assert torch.equal(shift, also)
    assert isinstance(model.ln_final, NoNorm if model.cfg.norm == "none" else RMSNorm)


def test_the_root_mean_square_is_what_the_hook_sees(make_model):
    model = make_model(norm="rms_gain_shift")
    _, cache = model.run_with_cache("the big dog")
    assert torch.equal(model.ln_final.rms(cache["blocks.1.hook_resid_post"]), cache["ln_final.hook_scale"])


def test_a_direction_gives_the_logit(model):
    x = random(5, 16)
    expected = model.unembed(model.ln_final(x) - model.ln_final.linear(x)[1])
    found = x @ logit_directions(model).T / model.ln_final.rms(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    ids = token_ids(model, ["cat", 5])
    assert torch.equal(logit_directions(model, ids), logit_directions(model)[ids])
    assert torch.equal(logit_direction(model, "cat"), logit_directions(model)[ids[0]])
    assert not logit_directions(model).requires_grad


def test_other_tokens_are_refused(make_model):
    with pytest.raises(ValueError, match="token must be an id from 0 to 73, or a text, got 74"):
        logit_direction(make_model(), 74)
    with pytest.raises(ValueError, match="token must be an id from 0 to 73, or a text, got -1"):
        token_ids(make_model(), ["cat", -1])
    with pytest.raises(ValueError, match="'cat dog' is not a single token"):
        logit_direction(make_model(), "cat dog")
