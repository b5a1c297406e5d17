"""Gains of norms: every way to split a logit sums to it, directions have the gain, and folding changes nothing."""

import copy

import pytest
import torch

from bilens.models.logits import logit_directions, written_logits

TOKENS = torch.tensor([[1, 5, 7, 6, 9], [1, 8, 3, 3, 2]])
STACKS = {
    "decompose_resid": {},
    "stack_head_results": {"layer": 2, "incl_remainder": True},
    "stack_neuron_results": {"layer": 2, "incl_remainder": True},
    "get_full_resid_decomposition": {},
}


@pytest.fixture(scope="module", params=["none", "rms", "rms_gain", "rms_gain_shift", "layer"])
def run(request, make_model):
    model = make_model(norm=request.param, mlp_bias=(True, True), attn_bias=(True, True))
    return model, *model.run_with_cache(TOKENS)


def same(one, other):
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def of(logits, tokens=TOKENS):
    return logits.gather(-1, tokens[..., None])[..., 0]


def constant(model):
    """What the final norm's shift adds to each logit."""
    return model.ln_final.affine(model.W_E)[1] @ model.W_U


@pytest.mark.parametrize("stack", STACKS)
def test_parts_sum_to_the_logits(run, stack):
    model, logits, cache = run
    parts, rest = getattr(cache, stack)(**STACKS[stack]), constant(model)
    same(cache.logit_attrs(parts, TOKENS).sum(0) + rest[TOKENS], of(logits))
    same(cache.logit_attrs(parts, 7, 5).sum(0) + rest[7] - rest[5], logits[..., 7] - logits[..., 5])
    directions = model.tokens_to_residual_directions(TOKENS)
    same((cache.apply_ln_to_stack(parts, -1).sum(0) * directions).sum(-1) + rest[TOKENS], of(logits))
    read = getattr(cache, stack)(**STACKS[stack], apply_ln=True)
    same(read.sum(0) @ model.W_U + rest, logits)
    last = getattr(cache, stack)(**STACKS[stack], apply_ln=True, pos_slice=-1)
    same(last, read[:, :, -1])


@pytest.mark.parametrize("stack", ["stack_neuron_results", "get_full_resid_decomposition"])
def test_parts_projected_are_parts_times_the_projection(run, stack):
    model, _, cache = run
    ask = getattr(cache, stack)
    for apply_ln in (False, True):
        parts = ask(**STACKS[stack], apply_ln=apply_ln)
        same(ask(**STACKS[stack], apply_ln=apply_ln, project_output_onto=model.W_U), parts @ model.W_U)
        same(ask(**STACKS[stack], apply_ln=apply_ln, project_output_onto=model.W_U[:, 7]), parts @ model.W_U[:, 7])


def test_parts_sum_to_what_a_layer_reads(run):
    model, _, cache = run
    entering, norm = cache["blocks.1.hook_mlp_in"], model.blocks[1].ln2
    parts = cache.decompose_resid(1, mlp_input=True, apply_ln=True)
    same(parts.sum(0) + norm.affine(entering)[1], entering)
    same(parts, cache.apply_ln_to_stack(cache.decompose_resid(1, mlp_input=True), 1, mlp_input=True))
    before, first = cache["blocks.1.hook_resid_pre"], model.blocks[1].ln1
    same(
        cache.stack_head_results(1, incl_remainder=True, apply_ln=True).sum(0) + first.affine(before)[1], first(before)
    )


def test_a_stream_so_far_goes_through_the_last_norm(run):
    model, logits, cache = run
    read = cache.accumulated_resid(apply_ln=True)
    same(read[-1] @ model.W_U, logits)
    same(read[0], model.ln_final(cache["hook_embed"]))


def test_a_cache_without_batches_splits_the_same(run):
    model, logits, cache = run
    alone = model.run_with_cache(TOKENS[:1], remove_batch_dim=True)[1]
    same(alone.decompose_resid(apply_ln=True), cache.decompose_resid(apply_ln=True)[:, 0])
    found = alone.logit_attrs(alone.decompose_resid(), TOKENS[0], has_batch_dim=False).sum(0)
    same(found + constant(model)[TOKENS[0]], of(logits)[0])


def test_directions_have_the_final_gain(run):
    model, logits, cache = run
    scale = model.ln_final.rms(cache["resid_post", 1])
    same(cache["resid_post", 1] / scale @ logit_directions(model).T + constant(model), logits)
    found = model.tokens_to_residual_directions(TOKENS)
    assert torch.equal(found, logit_directions(model)[TOKENS])
    same(written_logits(model, found[0]), found[0] @ logit_directions(model).T)
    found.sum().backward()
    assert model.unembed.weight.grad is not None
    model.zero_grad()


def test_a_final_layer_norm_alone_is_taken(make_model):
    from dataclasses import replace

    from bilens import BilinearTransformer, NormConfig, UnembedConfig

    cfg = replace(make_model(norm="none").cfg, unembed=UnembedConfig(norm=NormConfig(1e-5, True, kind="layer")))
    model = BilinearTransformer(cfg).double()
    logits, cache = model.run_with_cache(TOKENS)
    same(cache.logit_attrs(cache.decompose_resid(), TOKENS).sum(0), of(logits))
    same(cache.decompose_resid(apply_ln=True).sum(0) @ model.W_U, logits)


def test_folding_changes_no_logit(run):
    model, logits, _ = run
    folded = copy.deepcopy(model)
    folded.process_weights_()
    same(folded(TOKENS), logits)
    for norm in (folded.ln_final, folded.blocks[0].ln1, folded.blocks[1].ln2):
        assert (norm.affine(folded.W_E)[0] == 1).all()
    same(folded.tokens_to_residual_directions(TOKENS), model.tokens_to_residual_directions(TOKENS))
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(model.fold_layer_norm(model.state_dict()))
    assert all(torch.equal(one, other) for one, other in zip(loaded.parameters(), folded.parameters(), strict=True))
    folded.process_weights_(center_unembed=True)
    same(folded(TOKENS).log_softmax(-1), logits.log_softmax(-1))
    same(folded.W_U.mean(1), torch.zeros(16, dtype=torch.float64))


def test_folding_parts_a_tied_unembedding_and_keeps_a_gain_of_zero(make_model):
    model = make_model(norm="rms_gain_shift", tied=True)
    with torch.no_grad():
        for norm in (model.ln_final, model.blocks[0].ln1):
            norm.weight[:3] = 0
    logits, embedding = model(TOKENS), model.W_E.clone()
    with pytest.raises(ValueError, match="unembedding is its embedding"):
        model.fold_layer_norm(model.state_dict())
    model.process_weights_()
    same(model(TOKENS), logits)
    assert torch.equal(model.W_E, embedding)
    assert not model.cfg.unembed.tied
    assert model.ln_final.weight.tolist() == [0, 0, 0, *[1] * 13]


def test_what_folding_cannot_do_is_refused(make_model):
    model = make_model()
    for name in ("center_writing_weights", "refactor_factored_attn_matrices"):
        with pytest.raises(ValueError, match=f"{name} must be False"):
            model.process_weights_(**{name: True})


def test_parts_that_do_not_sum_are_refused(make_model):
    from dataclasses import replace

    from bilens import BilinearTransformer, NormConfig

    for place in ("after", "both"):
        cfg = replace(make_model().cfg, norm=NormConfig(gain=True, place=place))
        _, cache = BilinearTransformer(cfg).double().run_with_cache(TOKENS)
        same(cache.decompose_resid().sum(0), cache["resid_post", 1])
        for ask in ("stack_head_results", "get_full_resid_decomposition", "stack_neuron_results"):
            with pytest.raises(ValueError, match="a norm follows"):
                getattr(cache, ask)(1)


def test_a_cache_without_the_scale_says_so(make_model):
    _, cache = make_model().run_with_cache(TOKENS, names_filter=lambda name: not name.startswith("ln_final"))
    with pytest.raises(ValueError, match=r"the cache must hold ln_final\.hook_scale"):
        cache.apply_ln_to_stack(cache.decompose_resid())
