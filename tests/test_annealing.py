"""Gates on their way to linear maps: where the way starts and ends, and that the end is a bilinear model."""

import copy
import math
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from scipy.special import lambertw

import bilens
from bilens.models import annealing, fits, gates
from bilens.models.mlp import ACTIVATIONS
from bilens.models.schedules import SCHEDULES, alpha_at, exponential
from bilens.tensor.polynomials import check_quadratic

ACTS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu}
GATED = {"mlp": "gated", "act": "silu"}


@pytest.fixture(params=ACTS)
def gated(make_model, request):
    return make_model(mlp="gated", act=request.param, norm="rms_gain", mlp_bias=(True, True))


@pytest.fixture
def tokens():
    return torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(0))


# -- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_starts_at_0_ends_at_1_and_never_turns_back(name):
    path = [alpha_at(name, step / 200) for step in range(201)]
    assert (path[0], path[-1]) == (0, pytest.approx(1, abs=1e-12))
    assert all(before <= after for before, after in pairwise(path))


def test_schedules_are_the_published_functions():
    p = 0.3
    assert alpha_at("linear", p) == p
    assert alpha_at("exponential", p) == pytest.approx(p * 2.718281828 ** (1.05 - 1.05 * p))
    assert alpha_at("smootherstep", p) == pytest.approx(6 * p**5 - 15 * p**4 + 10 * p**3)
    sigmoid = [1 / (1 + 2.718281828 ** -(10 * (x - 0.5))) for x in (0, p, 1)]
    assert alpha_at("logistic", p) == pytest.approx((sigmoid[1] - sigmoid[0]) / (sigmoid[2] - sigmoid[0]))


@pytest.mark.parametrize("sharpness", [1.05, 2.0, 5.0])
def test_an_exponential_schedule_is_complete_where_it_says(sharpness):
    end = -lambertw(-sharpness * math.exp(-sharpness)).real / sharpness
    assert exponential(end, sharpness) == pytest.approx(1)
    assert exponential(end + 1e-6, sharpness) == exponential(1.0, sharpness) == 1
    assert exponential(end - 1e-3, sharpness) < 1 - 1e-5


@pytest.mark.parametrize(
    ("schedule", "progress", "message"),
    [
        ("cosine", 0.5, "schedule must be one of linear, exponential, logistic, smootherstep or a function"),
        ("linear", 1.5, r"progress must lie in \[0, 1\], got 1.5"),
        (lambda p: 2 * p, 0.75, r"schedule must stay in \[0, 1\], but at progress 0.75 it is 1.5"),
        (lambda p: float("nan"), 0.5, r"schedule must stay in \[0, 1\], but at progress 0.5 it is nan"),
    ],
)
def test_a_bad_schedule_is_refused(schedule, progress, message):
    with pytest.raises(ValueError, match=message):
        alpha_at(schedule, progress)


# -- the path ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ACTS)
def test_a_path_leads_from_the_activation_to_half_its_argument(act):
    z = torch.linspace(-6, 6, 100, dtype=torch.float64)
    gate = gates.Gate(act).double()
    torch.testing.assert_close(gate(z), ACTS[act](z))
    gate.set_alpha(1)
    torch.testing.assert_close(gate(z), z / 2, rtol=1e-10, atol=0)
    gate.set_alpha(0.5)
    switch = gate(z) / z
    assert ((switch > 0) & (switch < 1)).all()
    torch.testing.assert_close(switch + switch.flip(0), torch.ones_like(switch))  # the odd part stays z/2 on the way


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("act", ACTS)
def test_a_gate_in_half_precision_is_the_exact_one_rounded(act, dtype):
    z = torch.linspace(-6, 6, 100, dtype=dtype)
    gate, exact = gates.Gate(act).to(dtype), gates.Gate(act).double()
    for alpha in (0, 0.5, 0.99, 0.9999, 1):
        gate.set_alpha(alpha)
        exact.set_alpha(gate.alpha)
        torch.testing.assert_close(gate(z).double(), exact(z.double()), rtol=0.03, atol=0.01)
    torch.testing.assert_close(gate(z), z / 2, rtol=0, atol=0)


def test_swish_is_the_formula_of_the_paper():
    z, gate = torch.randn(50, dtype=torch.float64), gates.Gate("silu").double()
    gate.set_alpha(0.3)
    with torch.no_grad():
        gate.c.fill_(1.5)
    torch.testing.assert_close(gate(z), 1.5 * z / (1 + torch.exp(-0.7 * z)))


def test_a_prepared_model_starts_as_the_model_and_leaves_it_alone(gated, tokens):
    before = {name: weight.clone() for name, weight in gated.state_dict().items()}
    soft = annealing.prepare(gated)
    torch.testing.assert_close(soft(tokens), gated(tokens))
    annealing.set_alpha(soft, 1)
    assert (soft(tokens) - gated(tokens)).abs().max() > 1e-3
    assert {name: weight.tolist() for name, weight in gated.state_dict().items()} == {
        name: weight.tolist() for name, weight in before.items()
    }


def test_every_gate_has_a_factor_that_learns(make_model, tokens):
    soft = annealing.prepare(make_model(**GATED))
    annealing.set_alpha(soft, 0.5)
    soft(tokens, "loss").backward()
    assert all(block.mlp.gate.c.grad.abs() > 0 for block in soft.blocks)


def test_a_gate_is_annealed_for_the_length_of_a_block(gated, tokens):
    before, names = gated(tokens), list(gated.state_dict())
    soft = annealing.prepare(gated)
    annealing.set_alpha(soft, 0.4)
    with annealing.annealed(gated, 0.4):
        torch.testing.assert_close(gated(tokens), soft(tokens))
    with pytest.raises(ValueError, match="at least one token"), annealing.annealed(gated, 0.4):
        gated(tokens[:0])
    assert torch.equal(gated(tokens), before)
    assert list(gated.state_dict()) == names


# -- the end ----------------------------------------------------------------------------------------------------------


def test_at_the_end_the_model_is_bilinear(gated, tokens, tmp_path):
    soft = annealing.prepare(gated)
    with torch.no_grad():
        for layer, block in enumerate(soft.blocks):
            block.mlp.gate.c.fill_(0.7 + layer)
    annealing.set_alpha(soft, 1)
    folded = annealing.fold(soft)
    assert (folded.cfg.mlp.kind, folded.cfg.mlp.act) == ("bilinear", None)
    torch.testing.assert_close(folded(tokens), soft(tokens), rtol=1e-9, atol=1e-9)
    x = torch.randn(7, gated.cfg.d_model, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for before, block in zip(gated.blocks, folded.blocks, strict=True):
        check_quadratic(block.mlp, generator=generator)
        with pytest.raises(ValueError, match="quadratic"):
            check_quadratic(before.mlp, generator=generator)
    for block, annealed in zip(folded.blocks, soft.blocks, strict=True):
        torch.testing.assert_close(block.mlp.tensor().apply(x), annealed.mlp(x))


def test_a_folded_model_can_be_saved_and_a_prepared_one_cannot(make_model, tokens, tmp_path):
    soft = annealing.prepare(make_model(**GATED, attn_scale=0.5))
    with pytest.raises(ValueError, match="being annealed, which no format can express"):
        bilens.save(soft, tmp_path)
    annealing.set_alpha(soft, 1)
    folded = annealing.fold(soft)
    bilens.save(folded, tmp_path)
    assert torch.equal(bilens.load(tmp_path)(tokens), folded(tokens))


def test_float32_agrees_within_1e_5(make_model, tokens):
    soft = annealing.prepare(make_model(**GATED, dtype=torch.float32))
    annealing.set_alpha(soft, 1)
    torch.testing.assert_close(annealing.fold(soft)(tokens), soft(tokens), rtol=1e-5, atol=1e-5)


# -- least squares ----------------------------------------------------------------------------------------------------


def test_a_linear_gate_is_fitted_exactly(make_model, tokens, monkeypatch):
    slopes = torch.rand(24, dtype=torch.float64) + 0.5
    monkeypatch.setitem(ACTIVATIONS, "silu", lambda z: slopes * z)  # a gate that is linear
    model = make_model(**GATED)
    found = fits.fit_gates(model, tokens, batch=3)
    for fit in found:
        assert fit.r2 == pytest.approx(1)
        assert fit.pairs == tokens.numel()
        torch.testing.assert_close(fit.weight, slopes)
    soft = annealing.prepare(model, gates=found)
    torch.testing.assert_close(soft(tokens), model(tokens))
    annealing.set_alpha(soft, 1)
    torch.testing.assert_close(annealing.fold(soft)(tokens), model(tokens))


@pytest.mark.parametrize("diagonal", [True, False])
def test_a_fit_is_the_least_squares_solution(gated, tokens, diagonal):
    found = fits.fit_gates(gated, tokens, diagonal=diagonal)
    _, cache = gated.run_with_cache(tokens)
    for layer, fit in enumerate(found):
        z = cache[f"blocks.{layer}.mlp.hook_pre"].flatten(0, 1)
        y = ACTS[gated.cfg.mlp.act](z)
        if diagonal:
            expected = torch.stack([torch.linalg.lstsq(z[:, i, None], y[:, i, None])[0][0, 0] for i in range(24)])
        else:
            expected = torch.linalg.lstsq(z, y, driver="gelsd")[0].T
        torch.testing.assert_close(fit.weight, expected, rtol=1e-6, atol=1e-6)
        got = z * fit.weight if diagonal else z @ fit.weight.T
        r2 = 1 - (y - got).pow(2).sum() / (y - y.mean(0)).pow(2).sum()
        assert fit.r2 == pytest.approx(r2.item(), abs=1e-6)


@pytest.mark.parametrize("diagonal", [True, False])
def test_gates_and_norms_are_blended_in_and_folded(gated, tokens, diagonal):
    gate_fits = fits.fit_gates(gated, tokens, diagonal=diagonal)
    norms = fits.fit_norms(gated, tokens, diagonal=diagonal)
    assert set(norms) == {"blocks.0.ln1", "blocks.0.ln2", "blocks.1.ln1", "blocks.1.ln2", "ln_final"}
    soft = annealing.prepare(gated, gates=gate_fits, norms=norms)
    torch.testing.assert_close(soft(tokens), gated(tokens))
    annealing.set_alpha(soft, 1)
    folded = annealing.fold(soft)
    assert folded.cfg.norm is None
    torch.testing.assert_close(folded(tokens), soft(tokens), rtol=1e-8, atol=1e-8)


def test_a_norm_of_inputs_of_one_length_is_fitted_exactly(make_model, tokens):
    model = make_model(**GATED)
    with torch.no_grad():
        model.embed.weight.copy_(3 * F.normalize(model.embed.weight, dim=1))
    fit = fits.fit_norms(model, tokens)["blocks.0.ln1"]
    assert fit.r2 == pytest.approx(1)
    x = model.embed(tokens)
    torch.testing.assert_close(x @ fit.weight.T, model.blocks[0].ln1(x))


def test_norms_of_float16_are_fitted_though_squares_overflow(make_model, tokens):
    model = make_model(**GATED, norm="rms_gain", dtype=torch.float32)
    with torch.no_grad():
        model.embed.weight.mul_(500)
    half = copy.deepcopy(model).half()
    found, expected = fits.fit_norms(half, tokens), fits.fit_norms(half.float(), tokens)
    for name, fit in found.items():
        assert fit.r2 == pytest.approx(expected[name].r2, abs=0.01)
        assert fit.weight.dtype == torch.float16


def test_whatever_norm_there_is_is_fitted(make_model, tokens):
    model = make_model(**GATED)
    model.blocks[1].ln2 = torch.nn.LayerNorm(16, dtype=torch.float64)
    _, cache = model.run_with_cache(tokens)
    x, y = cache["blocks.1.hook_resid_mid"].flatten(0, 1), cache["blocks.1.hook_mlp_in"].flatten(0, 1)
    fit = fits.fit_norms(model, tokens)["blocks.1.ln2"]
    torch.testing.assert_close(fit.weight, torch.linalg.lstsq(x, y, driver="gelsd")[0].T, rtol=1e-6, atol=1e-6)
    assert not any(module._forward_hooks for module in model.modules())


# -- bad input --------------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_gated_is_refused(make_model):
    with pytest.raises(ValueError, match=r"model must have gated MLPs.*got bilinear ones: it needs no annealing"):
        annealing.prepare(make_model())
    with pytest.raises(ValueError, match="got plain ones: it has no product to keep"):
        annealing.prepare(make_model(mlp="plain", act="gelu"))


def test_an_activation_without_a_path_is_refused(make_model):
    with pytest.raises(ValueError, match=r"act must be one of silu, gelu, gelu_tanh, relu.*got 'identity'"):
        annealing.prepare(make_model(mlp="gated", act="identity"))


def test_what_does_not_fit_is_refused(make_model, tokens):
    model = make_model(**GATED)
    soft = annealing.prepare(model)
    with pytest.raises(ValueError, match="being annealed already"):
        annealing.prepare(soft)
    found = fits.fit_norms(model, tokens)
    with pytest.raises(ValueError, match="being annealed already: its norms"):
        fits.fit_norms(annealing.prepare(model, norms=found), tokens)
    with pytest.raises(ValueError, match="gates must be at alpha 1 to be folded"):
        annealing.fold(soft)
    with pytest.raises(ValueError, match="model must be one that `prepare` returned"):
        annealing.fold(model)
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got 1.2"):
        annealing.set_alpha(soft, 1.2)
    with pytest.raises(ValueError, match="gates must hold one fit for each of the 2 layers, got 1"):
        annealing.prepare(model, gates=fits.fit_gates(model, tokens)[:1])
    with pytest.raises(ValueError, match=r"norms must hold a fit for each of blocks.0.ln1, .*, got ln_final"):
        annealing.prepare(model, norms={"ln_final": fits.fit_norms(model, tokens)["ln_final"]})
    with pytest.raises(ValueError, match="model must have norms to fit"):
        fits.fit_norms(make_model(**GATED, norm="none"), tokens)
