"""Hooks that edit in place, interrupts, and plain torch hooks: an edit changes what it says and no more."""

import gc
import signal
import sys

import pytest
import torch

from bilens.images.classifiers import ClassifierConfig, ImageClassifier

TOKENS = torch.tensor([[1, 5, 7, 6, 9]])


@pytest.fixture(params=["softmax", "bilinear"])
def model(request, make_model):
    return make_model(attention=request.param)


def in_place(value, hook):
    value[:, -1:] *= 0.5
    return value


def in_place_and_silent(value, hook):
    value[:, -1:] *= 0.5


def elsewhere(value, hook):
    return torch.cat((value[:, :-1], 0.5 * value[:, -1:]), 1)


def loss_and_gradient(model, name, edit):
    model.zero_grad()
    loss = model.run_with_hooks(TOKENS, return_type="loss", fwd_hooks=[(name, edit)])
    loss.backward()
    return loss.item(), model.W_E.grad.clone()


def test_an_edit_in_place_is_the_edit_with_its_gradients(model):
    for name in model.hook_dict:
        loss, gradient = loss_and_gradient(model, name, elsewhere)
        for edit in (in_place, in_place_and_silent):
            again, other = loss_and_gradient(model, name, edit)
            assert again == pytest.approx(loss, rel=1e-12), name
            torch.testing.assert_close(other, gradient)


def test_an_edit_in_place_leaves_what_was_cached_before_it(model):
    _, clean = model.run_with_cache(TOKENS)
    for before, here in (
        ("blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"),
        ("hook_embed", "blocks.0.hook_resid_pre"),
    ):
        with model.hooks(fwd_hooks=[(here, in_place)]):
            _, cache = model.run_with_cache(TOKENS)
        torch.testing.assert_close(cache[before], clean[before])
        assert not torch.equal(cache[here], clean[here])


def test_an_edit_in_place_leaves_the_users_data():
    classifier = ImageClassifier(ClassifierConfig(3, 3, 2, d_hidden=4), torch.Generator().manual_seed(0))
    x = torch.rand(2, 9)
    kept = x.clone()
    classifier.run_with_hooks(x, fwd_hooks=[("hook_image", in_place)])
    assert torch.equal(x, kept)


def test_hooks_that_only_read_see_the_activation_itself(make_model):
    model = make_model()
    cache, fwd, _ = model.get_caching_hooks(["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"])
    with model.hooks(fwd_hooks=fwd):
        model(TOKENS)
    pointers = {value.data_ptr() for value in cache.values()}
    assert len(pointers) == 1  # cached without a copy


@pytest.fixture
def uncollected():
    """Without garbage collection, which calls what others have asked it to call, and swallows what that raises."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("seed", range(8))
def test_an_interrupt_leaves_no_hook(make_model, seed):
    """A signal arrives at the seed's share of the calls that setting hooks, running and removing them makes."""
    model = make_model()
    calls = count_calls(lambda: model.run_with_cache(TOKENS))
    for at in range(seed, calls, 8 * max(1, calls // 400)):
        interrupted(lambda: model.run_with_cache(TOKENS), at)
        assert not any(point.fwd_hooks or point.bwd_hooks for point in model.hook_points()), at
        assert model.context_level == 0


def count_calls(run):
    counted = 0

    def profile(frame, event, arg):
        nonlocal counted
        counted += event == "call"

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return counted


def interrupted(run, at):
    """Raise SIGINT as the call with this number begins."""
    left = at

    def profile(frame, event, arg):
        nonlocal left
        if event == "call":
            left -= 1
            if left == 0:
                sys.setprofile(None)
                signal.raise_signal(signal.SIGINT)

    sys.setprofile(profile)
    try:
        run()
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)


def test_generation_with_torchs_own_hooks_is_that_without_the_cache(make_model):
    model = make_model()
    where = (model.embed, model.blocks[1].mlp, model.blocks[0].attn.o)
    for module in where:
        handle = module.register_forward_hook(lambda module, args, out: 2 * out)
        some = [model.generate(TOKENS, 6, temperature=0, use_past_kv_cache=use) for use in (True, False)]
        handle.remove()
        assert torch.equal(*some)
        assert model.generate(TOKENS, 6, temperature=0).shape == some[0].shape
