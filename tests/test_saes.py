"""SAEs: the published ones, fitting, evaluation, contexts."""

import copy
import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from far import FAR, Far, is_far, send
from sae_lens import TopKSAE, TopKSAEConfig
from safetensors.torch import load_file, save_file

from bilens import saes
from bilens.models.files import fingerprint
from bilens.models.windows import Windows, observe
from bilens.saes import Recipe, Tuning
from bilens.saes.tuning import TUNED, _Kept
from bilens.tensor.keeping import Pace

SCOPE = Path(__file__).parents[1] / "../shared/fixtures/published-format/bilinear-scope"
HOOKS = ["blocks.0.hook_mlp_in", "blocks.1.hook_mlp_out"]


def published():
    return sorted(path.parent.name for path in SCOPE.glob("*/expected.safetensors"))


@pytest.fixture
def model(make_model):
    return make_model(dtype=torch.float32)


@pytest.fixture
def windows(model):
    tokens = torch.randint(3, model.cfg.d_vocab, (40, 16), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = model.bos_id
    return tokens


@pytest.fixture
def scope_folder(tmp_path):
    """A random SAE in the published layout, with k so large that negative values are kept."""
    folder = tmp_path / "1-mlp-out-x2-k20"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    shapes = {"w_enc.weight": (24, 12), "w_dec.weight": (12, 24), "b_dec": (12,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    config = {"point": ["mlp-out", 1], "expansion": 2, "d_model": 12, "k": 20, "unknown": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return tmp_path, tensors


def test_a_published_sae_keeps_the_k_largest_of_either_sign(scope_folder):
    root, tensors = scope_folder
    sae = saes.load_scope(root, "1-mlp-out-x2-k20")
    x = torch.randn(5, 12)
    pre = (x - tensors["b_dec"]) @ tensors["w_enc.weight"].T
    kept = pre >= pre.topk(20).values[:, -1:]
    torch.testing.assert_close(sae.encode(x), pre * kept)
    assert (sae.encode(x) < 0).any()
    torch.testing.assert_close(sae(x), pre * kept @ tensors["w_dec.weight"].T + tensors["b_dec"])
    assert sae.cfg.metadata.hook_name == "blocks.1.hook_mlp_out"


@pytest.mark.skipif(not SCOPE.is_dir(), reason="needs the published fixtures in ../shared")
@pytest.mark.parametrize("name", published())
def test_features_equal_the_authors(name):
    sae = saes.load_scope(SCOPE, name)
    expected = load_file(SCOPE / name / "expected.safetensors")
    features = sae.encode(expected["input"])
    torch.testing.assert_close(features, expected["features"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sae.decode(features), expected["reconstruction"], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not SCOPE.is_dir(), reason="needs the published fixtures in ../shared")
@pytest.mark.parametrize("which", ["encoder", "decoder"])
@pytest.mark.parametrize("feature", [0, 3, 17])
def test_projected_matrices_equal_the_authors(which, feature):
    import bilens

    layer = bilens.load(SCOPE.parent / "bilinear").blocks[1].mlp.tensor().detach()
    expected = load_file(SCOPE / "tracer_expected.safetensors")
    direction = saes.readers(saes.load_scope(SCOPE, "1-mlp-out-x4-k5"), which)[feature]
    published_q = expected[f"{which}.{feature}.q"]  # published unsymmetrised
    torch.testing.assert_close(layer.matrix(direction), (published_q + published_q.T) / 2, rtol=1e-5, atol=1e-6)
    projected = layer.project(inp=saes.writers(saes.load_scope(SCOPE, "1-mlp-in-x4-k5"))).matrix(direction)
    torch.testing.assert_close(projected, expected[f"{which}.{feature}.q_projected_symmetric"], rtol=1e-5, atol=1e-6)


def test_an_unknown_sae_is_refused_with_the_names_there_are(scope_folder):
    with pytest.raises(FileNotFoundError, match="1-mlp-out-x2-k20"):
        saes.load_scope(scope_folder[0], "1-mlp-out-x2-k30")


def test_a_config_that_contradicts_the_tensors_is_refused(scope_folder):
    root, _ = scope_folder
    path = root / "1-mlp-out-x2-k20" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"expansion": 3}))
    with pytest.raises(ValueError, match=r"w_dec.weight must be \[12, 36\].*got \[12, 24\]"):
        saes.load_scope(root, "1-mlp-out-x2-k20")


@pytest.mark.parametrize("rescale", [False, True])
def test_readers_writers_and_offsets_say_what_the_sae_computes(rescale):
    sae = TopKSAE(TopKSAEConfig(d_in=6, d_sae=9, k=9, rescale_acts_by_decoder_norm=rescale))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        x = torch.randn(4, 6)
        z = sae.encode(x)
        pre = x @ saes.readers(sae).T + saes.offsets(sae)
        torch.testing.assert_close(z, pre.relu())
        torch.testing.assert_close(sae.decode(z), z @ saes.writers(sae) + sae.b_dec)


def fit(model, windows, folder, **changes):
    recipe = Recipe(**{"expansion": 2, "k": 4, "tokens": 12_000, "batch": 100} | changes)
    return saes.fit(model, windows, HOOKS, folder, recipe, n_checkpoints=4)


@pytest.fixture
def fitted(model, windows, tmp_path):
    return fit(model, windows, tmp_path / "fitted"), tmp_path / "fitted"


def test_fitted_saes_reconstruct_and_sae_lens_reads_them(model, windows, fitted):
    from sae_lens import SAE

    found, folder = fitted
    for hook in HOOKS:
        reread = SAE.load_from_disk(folder / hook)
        for name, weight in found[hook].state_dict().items():
            assert torch.equal(reread.state_dict()[name], weight)
        result = saes.evaluate(model, reread, windows)
        assert result.fvu < 0.75  # random activations have little structure; an unfitted SAE is above 1
        assert result.l0 <= 4
        torch.testing.assert_close(reread.W_dec.norm(dim=1), torch.ones(32))
    assert not (folder / "checkpoints").exists()


def test_a_finished_fit_is_loaded_and_other_arguments_are_refused(model, windows, fitted):
    found, folder = fitted
    again = fit(model, windows, folder)
    assert torch.equal(again[HOOKS[0]].W_enc, found[HOOKS[0]].W_enc)
    with pytest.raises(ValueError, match="other data or arguments"):
        fit(model, windows, folder, lr=1e-2)


@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka", "jumprelu"])
def test_other_kinds_are_fitted_and_read_as_sae_lens_saves_them(model, windows, tmp_path, kind):
    from sae_lens import SAE

    found = fit(model, windows, tmp_path, kind=kind, tokens=24_000)
    for hook in HOOKS:
        result = saes.evaluate(model, SAE.load_from_disk(tmp_path / hook), windows)
        assert result == saes.evaluate(model, found[hook], windows)
        assert result.fvu < 0.75
        assert 1 < result.l0 < 10  # asked for 4 on average
        torch.testing.assert_close(found[hook].W_dec.norm(dim=1), torch.ones(32))
    with pytest.raises(ValueError, match="kind must be one of"):
        Recipe(kind="relu")


def test_a_killed_fit_resumes_to_the_same_weights(model, windows, fitted, tmp_path):
    calls = 0

    def kill(value, hook):
        nonlocal calls
        calls += 1
        if calls == 35:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), model.hooks(fwd_hooks=[("hook_embed", kill)]):
        fit(model, windows, tmp_path / "killed")
    assert list((tmp_path / "killed" / "checkpoints").glob("*/complete.json")), "killed before the first checkpoint"
    for file in (tmp_path / "killed" / "checkpoints").rglob("*.safetensors"):  # a damaged checkpoint is refused
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ValueError, match=r"checkpoints is damaged: .* checksums in .*complete\.json; delete it"):
            fit(model, windows, tmp_path / "killed")
        file.write_bytes(whole)
    resumed = fit(model, windows, tmp_path / "killed")
    for hook in HOOKS:
        for name, weight in fitted[0][hook].state_dict().items():
            assert torch.equal(resumed[hook].state_dict()[name], weight), f"{hook} {name}"


def test_the_stream_gives_the_same_positions_at_every_hook_and_leaves_bos_and_padding_out(model):
    rows = Windows.of(model, ["the cat sat on the mat", "once upon a time the dog ran"], length=8)
    assert rows.counts.sum() == 6 + 7
    assert not rows.counts[:, 0].any()
    stream = saes.ActivationStream(model, rows, ["blocks.0.hook_resid_pre", "hook_embed"], 13, seed=0, chunk=9)
    batch = next(stream())
    torch.testing.assert_close(batch["blocks.0.hook_resid_pre"], batch["hook_embed"])
    expected = model.W_E[rows.tokens[rows.counts]]
    torch.testing.assert_close(batch["hook_embed"].sort(0).values, expected.sort(0).values)


def test_the_stream_resumes_at_any_batch(model, windows):
    stream = saes.ActivationStream(model, Windows.of(model, windows), HOOKS, 70, seed=3, chunk=16)
    batches = stream()
    straight = [next(batches) for _ in range(20)]
    for first in (0, 1, 5, 19):
        torch.testing.assert_close(next(stream(first))[HOOKS[0]], straight[first][HOOKS[0]], rtol=0, atol=0)


@pytest.mark.parametrize("lengths", [[2] * 30, [6] * 4 + [1] * 30, [1] * 23], ids=["short", "a few long", "one batch"])
def test_windows_too_short_for_a_batch_are_gathered(model, lengths):
    rows = [[model.bos_id, *range(3, 3 + n)] for n in lengths]
    windows = Windows.of(model, rows)
    batches = islice(saes.ActivationStream(model, windows, ["hook_embed"], 23, seed=0, chunk=4)(), 6)
    known, counts = model.W_E.detach(), torch.bincount(windows.tokens[windows.counts], minlength=model.cfg.d_vocab)
    for batch in batches:
        assert batch["hook_embed"].shape == (23, 16)
        ids = torch.cdist(batch["hook_embed"], known).argmin(1)
        torch.testing.assert_close(batch["hook_embed"], known[ids])
        assert (torch.bincount(ids, minlength=model.cfg.d_vocab) <= counts).all()  # no position twice


def test_fitting_and_loading_leave_torchs_random_numbers_alone(model, windows, tmp_path, scope_folder):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one = fit(model, windows, tmp_path / "one", tokens=500)
    saes.load(tmp_path / "one", HOOKS[0])
    saes.load_scope(scope_folder[0], "1-mlp-out-x2-k20")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    two = fit(model, windows, tmp_path / "two", tokens=500)
    assert torch.equal(one[HOOKS[0]].W_enc, two[HOOKS[0]].W_enc)
    three = fit(model, windows, tmp_path / "three", tokens=500, seed=1)
    assert not torch.equal(one[HOOKS[0]].W_enc, three[HOOKS[0]].W_enc)


def test_fine_tuning_lowers_the_divergence_and_leaves_the_model_alone(model, windows, fitted):
    sae = fitted[0][HOOKS[1]]
    before, weights = saes.evaluate(model, sae, windows), fingerprint(model)
    model.blocks[1].mlp.down.grad = mine = torch.ones_like(model.blocks[1].mlp.down)
    saes.finetune(model, sae, windows, tuning=Tuning(16 * 8 * 60, windows=8, lr=3e-3, fvu_weight=0.0))
    after = saes.evaluate(model, sae, windows)
    assert abs(after.loss_spliced - after.loss) < 0.8 * abs(before.loss_spliced - before.loss)
    assert fingerprint(model) == weights
    given = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(given) == 1
    assert given[0] is mine
    assert torch.equal(mine, torch.ones_like(mine))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32))
    assert sae.cfg.metadata.settings[TUNED] == 16 * 8 * 60


def test_a_killed_fine_tuning_goes_on_to_the_same_weights(model, windows, fitted, tmp_path, monkeypatch):
    tuning, save, steps = Tuning(16 * 8 * 6, windows=8), _Kept.save, []
    monkeypatch.setattr(Pace, "due", lambda self: True)

    def run(folder=None, tokens=windows):
        sae = copy.deepcopy(fitted[0][HOOKS[1]])
        return saes.finetune(model, sae, tokens, tuning=tuning, checkpoint=folder).state_dict()

    def die(self, sae, optimizer, done):
        save(self, sae, optimizer, done)
        steps.append(done)
        if done == 3:
            raise KeyboardInterrupt

    whole = run()
    monkeypatch.setattr(_Kept, "save", die)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    with pytest.raises(ValueError, match="checkpoint must be of this call"):
        run(tmp_path, windows[1:])
    for _ in range(2):  # the second time there is nothing left to do
        again = run(tmp_path)
        assert all(torch.equal(again[name], weight) for name, weight in whole.items())
    assert steps == [1, 2, 3, 4, 5, 6]


def test_evaluation_by_hand(model, windows, fitted):
    sae, hook = fitted[0][HOOKS[1]], HOOKS[1]
    result = saes.evaluate(model, sae, windows, batch=7)
    with torch.no_grad():
        _, cache = model.run_with_cache(windows, names_filter=hook)
        x = cache[hook][:, 1:].flatten(0, 1)
        error = (x - sae(x)).pow(2).sum() / (x - x.mean(0)).pow(2).sum()

        def spliced(new):
            edit = lambda value, hook: torch.cat((value[:, :1], new(value[:, 1:])), 1)  # noqa: E731
            return model.run_with_hooks(windows, "loss", fwd_hooks=[(hook, edit)]).item()

        assert result.fvu == pytest.approx(error.item(), rel=1e-4)
        assert result.loss == pytest.approx(model(windows, "loss").item(), rel=1e-5)
        assert result.loss_zero == pytest.approx(spliced(torch.zeros_like), rel=1e-5)
        assert result.loss_spliced == pytest.approx(spliced(sae), rel=1e-5)
        assert result.loss_mean == pytest.approx(spliced(lambda v: x.mean(0).expand_as(v)), rel=1e-5)
        assert result.l0 == pytest.approx((sae.encode(x) != 0).sum(1).float().mean().item())
        assert result.tokens == len(x)


def test_contexts_are_the_strongest_positions(model, fitted):
    texts = [
        "the cat sat on the mat",
        "once upon a time the big dog ran and the cat saw",
        "a dog ran on a little cat",
    ] * 3
    texts = [text + " mat" * i for i, text in enumerate(texts)]
    hook = HOOKS[0]
    sae = fitted[0][hook]
    found = saes.contexts(model, sae, texts, n=3, batch=4)
    rows = Windows.of(model, texts)
    with torch.no_grad():
        z = sae.encode(observe(model, rows, [hook])[hook]).masked_fill(~rows.counts[..., None], 0)
    best = z.max(1).values.topk(3, dim=0).values.T
    torch.testing.assert_close(found.values[:, :, found.peak], best, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.density, (z > 0).float().sum((0, 1)) / rows.counts.sum())
    feature = int(best[:, 0].argmax())
    row, position = divmod(int(z[:, :, feature].argmax()), z.shape[1])
    word = model.label(int(rows.tokens[row, position]))
    assert f"[{word}]" in found.snippet(feature, 0, model)
    assert word in found.top_tokens(feature, model)


TEXTS = ["the cat sat", "once upon a time the big dog ran and the cat saw", "a dog ran", "the mat"]


def as_numbers(evaluation):
    return torch.tensor([float(value) for value in vars(evaluation).values()], dtype=torch.float64)


def test_padding_and_batches_change_nothing(model, fitted):
    sae = fitted[0][HOOKS[1]]
    whole = as_numbers(saes.evaluate(model, sae, TEXTS))
    for same in (
        saes.evaluate(model, sae, TEXTS, batch=1),  # nothing is padded
        saes.evaluate(model, sae, model.to_tokens(TEXTS)),
        saes.evaluate(model, sae, [{"text": text} for text in (None, *TEXTS, "")]),
    ):
        torch.testing.assert_close(as_numbers(same), whole, rtol=1e-5, atol=1e-6)
    ones, tokens = saes.contexts(model, sae, TEXTS, batch=1), saes.contexts(model, sae, model.to_tokens(TEXTS))
    for found in (saes.contexts(model, sae, TEXTS, batch=3), tokens):
        torch.testing.assert_close(found.values[:, :, found.peak], ones.values[:, :, ones.peak])
        torch.testing.assert_close(found.density, ones.density)


def test_the_model_runs_on_its_own_device_and_the_sae_on_its_own(model, fitted):
    sae, hook = fitted[0][HOOKS[1]], HOOKS[1]
    here = as_numbers(saes.evaluate(model, sae, TEXTS)), saes.contexts(model, sae, TEXTS)
    send(model)
    for _ in range(2):
        with Far():
            assert model.W_E.device == FAR
            assert is_far(next(saes.ActivationStream(model, Windows.of(model, TEXTS), [hook], 5, 0, 2)())[hook])
            there = as_numbers(saes.evaluate(model, sae, TEXTS)), saes.contexts(model, sae, TEXTS)
            cards = saes.collect(model, {hook: sae}, TEXTS)[hook]
        torch.testing.assert_close(there[0], here[0])
        torch.testing.assert_close(there[1].values, here[1].values)
        torch.testing.assert_close(cards.contexts.values, here[1].values)
        send(sae)
    with Far(), pytest.raises(AssertionError, match="mixes devices"):
        model.W_E + torch.ones(16)


def test_an_sae_is_checked_in_one_place(make_model, model, fitted):
    sae, hook = fitted[0][HOOKS[1]], HOOKS[1]
    saes.check_sae(model, sae, hook)
    saes.check_sae(make_model(dtype=torch.float32).double(), sae, hook)  # the same weights
    with pytest.raises(ValueError, match=r"the SAE at blocks\.1\.hook_mlp_out must be one of this model"):
        saes.check_sae(make_model(seed=1, dtype=torch.float32), sae, hook)
    with pytest.raises(ValueError, match=r"inp must be one that was fitted at blocks\.0\.hook_mlp_out, got one"):
        saes.check_sae(model, sae, "blocks.0.hook_mlp_out", "inp")
    with pytest.raises(ValueError, match=r"must read 24 dimensions \(d_model\), got an SAE with d_in=16"):
        saes.check_sae(make_model(d_model=24), sae, hook)
    sae.cfg.normalize_activations = "expected_average_only_in"
    with pytest.raises(ValueError, match=r"must say how it reads its input.*mean norm of its activations was never"):
        saes.collect(model, {hook: sae}, TEXTS)


def test_half_precision_copies_are_the_same_model(model, windows, fitted):
    sae = fitted[0][HOOKS[0]]
    coarse = model.to(torch.bfloat16).to(torch.float32)
    sae.cfg.metadata.settings = {"model": fingerprint(coarse)}
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        copy = model.to(dtype)
        saes.check_sae(copy, sae, HOOKS[0])
        assert saes.evaluate(copy, sae, windows).tokens == 600


@pytest.mark.usefixtures("unchecked")
def test_errors_name_the_argument(model, windows, tmp_path):
    with pytest.raises(ValueError, match="hooks must be a list"):
        saes.fit(model, windows, "blocks.0.hook_mlp_in", tmp_path)
    with pytest.raises(ValueError, match="no hook point is named"):
        saes.fit(model, windows, ["blocks.0.mlp_in"], tmp_path, Recipe(tokens=100, batch=100))
    with pytest.raises(ValueError, match="dataset must hold at least one batch of 700 tokens, got 600"):
        saes.fit(model, windows, HOOKS, tmp_path, Recipe(tokens=700, batch=700))
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        Recipe(k=0)
    with pytest.raises(ValueError, match="tokens must be at least one batch of 2048, got 100"):
        replace(Recipe(), tokens=100)
    with pytest.raises(ValueError, match="eval mode"):
        saes.fit(model.train(), windows, HOOKS, tmp_path)
    with pytest.raises(ValueError, match="which must be"):
        saes.readers(None, "rows")
    with pytest.raises(ValueError, match="hook must name a hook point for an SAE that does not say"):
        saes.evaluate(model, TopKSAE(TopKSAEConfig(d_in=16, d_sae=8, k=2)), windows)
    with pytest.raises(FileNotFoundError, match="no SAE for"):
        saes.load(tmp_path, "blocks.9.hook_mlp_in")
