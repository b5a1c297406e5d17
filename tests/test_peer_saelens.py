"""SAELens' tools run on our model: its store of activations, its runners, and SAEs that stand in the model."""

import datasets
import pytest
import torch
from sae_lens import (
    SAE,
    CacheActivationsRunner,
    CacheActivationsRunnerConfig,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    StandardSAE,
    StandardSAEConfig,
    StandardTrainingSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activations_store import ActivationsStore

from bilens import saes

HOOK, OUT = "blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out"
ROWS = ["the cat sat on the mat.", "", "a big dog ran and saw the little cat", "once upon a time the dog sat " * 8]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # SAELens warns of raw text and of new epochs


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(dtype=torch.float32)


@pytest.fixture(scope="module")
def rows():
    return datasets.Dataset.from_dict({"text": ROWS * 8})


def random(sae, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return sae.eval()


def about(**more):
    return SAEMetadata(hook_name=OUT, context_size=16, prepend_bos=True, **more)


@pytest.fixture(scope="module")
def sae():
    return random(StandardSAE(StandardSAEConfig(d_in=16, d_sae=24, metadata=about())))


@pytest.fixture(scope="module")
def transcoder():
    metadata = SAEMetadata(hook_name="blocks.1.mlp.hook_in", hook_name_out="blocks.1.mlp.hook_out")
    cfg = TranscoderConfig(d_in=16, d_sae=24, d_out=16, apply_b_dec_to_input=False, metadata=metadata)
    return random(Transcoder(cfg), 1)


def training(folder, **more):
    options = {
        "hook_name": OUT,
        "context_size": 16,
        "training_tokens": 256,
        "train_batch_size_tokens": 32,
        "store_batch_size_prompts": 4,
        "n_batches_in_buffer": 4,
        "device": "cpu",
        "dataset_path": "",
        "is_dataset_tokenized": False,
        "prepend_bos": True,
        "output_path": str(folder / "out"),
        "checkpoint_path": str(folder / "checkpoints"),
        "logger": LoggingConfig(log_to_wandb=False),
    } | more
    return LanguageModelSAERunnerConfig(sae=StandardTrainingSAEConfig(d_in=16, d_sae=32), **options)


# -- its store and runners --------------------------------------------------------------------------------------------


def test_store_of_an_sae_reads_raw_text(model, sae, rows):
    store = ActivationsStore.from_sae(
        model, sae, rows, store_batch_size_prompts=4, n_batches_in_buffer=4, train_batch_size_tokens=16
    )
    tokens = store.get_batch_tokens()
    assert tokens.shape == (4, 16)
    assert (tokens[:, 0] == model.bos_id).all()
    first = model.token_rows([ROWS[0]])[0]
    assert tokens[0, 1 : 1 + len(first)].tolist() == first
    _, cache = model.run_with_cache(tokens, names_filter=OUT)
    torch.testing.assert_close(store.get_activations(tokens).squeeze(), cache[OUT])
    assert store.next_batch().shape[1] == 16


def test_special_tokens_are_left_out(model, rows, tmp_path):
    store = ActivationsStore.from_config(model, training(tmp_path, exclude_special_tokens=True), rows)
    assert sorted(store.exclude_special_tokens.tolist()) == sorted({model.bos_id, model.eos_id})
    tokens = store.get_batch_tokens()
    special = torch.isin(tokens, store.exclude_special_tokens)
    assert special.any()
    store.iterable_sequences = store._iterate_tokenized_sequences()
    assert len(store.get_filtered_llm_batch()) == (~special).sum()


def test_training_runner_on_raw_text(model, rows, tmp_path):
    runner = LanguageModelSAETrainingRunner(training(tmp_path), override_dataset=rows, override_model=model)
    runner.run()
    again = SAE.load_from_disk(tmp_path / "out")
    assert (again.cfg.metadata.hook_name, again.cfg.d_sae) == (OUT, 32)
    assert again(torch.zeros(2, 16)).isfinite().all()


def test_activations_are_cached_to_disk(model, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("sae_lens.cache_activations_runner.load_model", lambda **_: model)
    cfg = CacheActivationsRunnerConfig(
        dataset_path="",
        model_name="bilens",
        model_batch_size=4,
        hook_name=OUT,
        d_in=16,
        training_tokens=128,
        context_size=16,
        buffer_size_gb=0.001,
        new_cached_activations_path=str(tmp_path / "kept"),
        device="cpu",
        dtype="float32",
    )
    kept = CacheActivationsRunner(cfg, override_dataset=rows).run().with_format("torch")
    tokens = kept["token_ids"][:].long()
    _, cache = model.run_with_cache(tokens, names_filter=OUT)
    torch.testing.assert_close(kept[OUT][:].reshape(cache[OUT].shape), cache[OUT])


# -- SAEs in the model ------------------------------------------------------------------------------------------------


def test_a_model_with_an_sae_computes_with_what_the_sae_makes(model, sae):
    tokens = model.to_tokens("the cat sat")
    spliced = model.run_with_hooks(tokens, fwd_hooks=[(OUT, lambda x, hook: sae(x))])
    torch.testing.assert_close(model.run_with_saes(tokens, saes=sae), spliced)
    clean = model(tokens)
    torch.testing.assert_close(model.run_with_saes(tokens, saes=[sae], use_error_term=True), clean)
    out, cache = model.run_with_cache_with_saes(tokens, saes=sae)
    torch.testing.assert_close(out, spliced)
    _, plain = model.run_with_cache(tokens)
    torch.testing.assert_close(cache[f"{OUT}.hook_sae_acts_post"], sae.encode(plain[OUT]))
    torch.testing.assert_close(cache[OUT], sae(plain[OUT]))
    assert torch.equal(model(tokens), clean)
    assert not model.acts_to_saes
    assert not [name for name in model.hook_dict if "sae" in name]
    assert sae.hook_sae_acts_post.name == "hook_sae_acts_post"


def test_saes_stay_until_they_are_reset_and_come_back_after_others(model, sae):
    other = random(StandardSAE(StandardSAEConfig(d_in=16, d_sae=8, metadata=about())), 2)
    tokens, names = model.to_tokens("the cat sat"), list(model.hook_dict)
    clean, one, two = model(tokens), model.run_with_saes(tokens, saes=sae), model.run_with_saes(tokens, saes=other)
    model.add_sae(sae)
    assert torch.equal(model(tokens), one)
    with model.saes(other):
        assert torch.equal(model(tokens), two)
    assert torch.equal(model(tokens), one)
    with pytest.raises(KeyError), model.saes(other):
        raise KeyError
    assert model.acts_to_saes == {OUT: sae}
    model.reset_saes(OUT)
    assert torch.equal(model(tokens), clean)
    assert list(model.hook_dict) == names
    with pytest.raises(ValueError, match=r"act_names must be hook points that an SAE reads \(none\), got"):
        model.reset_saes(OUT)


@pytest.mark.parametrize("cache", [True, False])
def test_steering_a_feature_while_generating(model, sae, cache):
    hook = (f"{OUT}.hook_sae_acts_post", lambda z, hook: z + 40 * torch.eye(24)[3])
    tokens = model.to_tokens("the cat")
    with model.saes(sae):
        found = model.generate(tokens, 4, do_sample=False, stop_at_eos=False, fwd_hooks=[hook], use_past_kv_cache=cache)

    def by_hand(x, hook):
        return sae.decode(sae.encode(x) + 40 * torch.eye(24)[3])

    want = model.generate(tokens, 4, do_sample=False, stop_at_eos=False, fwd_hooks=[(OUT, by_hand)])
    assert torch.equal(found, want)
    kept = model.run_with_hooks_with_saes(tokens, saes=sae, use_error_term=True, fwd_hooks=[hook])
    clean_plus = model.run_with_hooks(tokens, fwd_hooks=[(OUT, lambda x, hook: x + 40 * sae.W_dec[3])])
    torch.testing.assert_close(kept, clean_plus)


def test_special_tokens_pass_an_sae_by(model, sae):
    tokens = model.to_tokens("the cat sat")
    _, clean = model.run_with_cache(tokens)
    _, cache = model.run_with_cache_with_saes(tokens, saes=sae, exclude_special_tokens=True)
    torch.testing.assert_close(cache[OUT][:, 0], clean[OUT][:, 0])
    torch.testing.assert_close(cache[OUT][:, 1:], sae(clean[OUT][:, 1:]))
    _, cache = model.run_with_cache_with_saes(tokens, saes=sae, exclude_special_tokens=[int(tokens[0, 2])])
    torch.testing.assert_close(cache[OUT][:, 2], clean[OUT][:, 2])
    resid = model(tokens, stop_at_layer=1)
    with model.saes(sae, exclude_special_tokens=True), pytest.raises(ValueError, match="needs token ids"):
        model(resid, start_at_layer=1)


def test_a_transcoder_stands_in_for_the_mlp(model, transcoder):
    tokens = model.to_tokens("the cat sat")
    _, clean = model.run_with_cache(tokens)
    out, cache = model.run_with_cache_with_saes(tokens, saes=transcoder)
    torch.testing.assert_close(cache[OUT], transcoder(clean[HOOK]))
    assert not torch.equal(out, model(tokens))
    torch.testing.assert_close(model.run_with_saes(tokens, saes=transcoder, use_error_term=True), model(tokens))
    found = saes.contexts(model, transcoder, ROWS, hook=HOOK)
    assert len(found.tokens) == 24
    with pytest.raises(ValueError, match=r"must write where it reads, got a transcoder: model\.run_with_saes"):
        saes.evaluate(model, transcoder, ROWS)


@pytest.mark.parametrize("scheme", ["constant_norm_rescale", "layer_norm"])
def test_an_sae_that_normalises_what_it_reads(model, scheme):
    cfg = StandardSAEConfig(d_in=16, d_sae=24, normalize_activations=scheme, metadata=about())
    one = random(StandardSAE(cfg))
    tokens = model.to_tokens("the cat sat")
    spliced = model.run_with_hooks(tokens, fwd_hooks=[(OUT, lambda x, hook: one(x))])
    torch.testing.assert_close(model.run_with_saes(tokens, saes=one), spliced)
    assert torch.isfinite(torch.tensor(saes.evaluate(model, one, ROWS).fvu))


def test_a_normalisation_that_is_not_in_the_sae_is_refused_everywhere(model):
    cfg = StandardSAEConfig(d_in=16, d_sae=24, normalize_activations="expected_average_only_in", metadata=about())
    one = random(StandardSAE(cfg))
    for run in (
        lambda: model.add_sae(one),
        lambda: saes.evaluate(model, one, ROWS),
        lambda: saes.contexts(model, one, ROWS),
        lambda: saes.collect(model, {OUT: one}, ROWS),
    ):
        with pytest.raises(ValueError, match="normalize_activations='expected_average_only_in'"):
            run()
    nowhere = random(StandardSAE(StandardSAEConfig(d_in=16, d_sae=24)))
    with pytest.raises(ValueError, match="sae must say where it goes"):
        model.add_sae(nowhere)
    elsewhere = StandardSAE(
        StandardSAEConfig(d_in=16, d_sae=4, metadata=SAEMetadata(hook_name="blocks.9.hook_mlp_out"))
    )
    with pytest.raises(ValueError, match=r"no hook point is named 'blocks\.9\.hook_mlp_out'"):
        model.add_sae(elsewhere)


# -- where they come from ---------------------------------------------------------------------------------------------


def test_an_embedded_sae_says_whose_it_is_and_folds_its_norms():
    one = saes.load("bilens-mini", "blocks.2.hook_mlp_out")
    assert one.cfg.metadata.model_name == "bilens-mini"
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    before, features = one(x), one.encode(x)
    one.fold_W_dec_norm()
    assert (one.W_dec.norm(dim=1) - 1).abs().max() < 1e-6
    # features change by the rounding of the stored decoder, and what is kept of near ties may
    assert ((one.encode(x) - features).abs() > 3e-3 * features.abs() + 1e-5).float().mean() < 1e-3
    assert (one(x) - before).norm() < 0.02 * before.norm()
    with torch.no_grad():
        one.W_dec[0] *= 2
    with pytest.raises(NotImplementedError, match="may change the topk"):
        one.fold_W_dec_norm()


def test_an_sae_by_place_and_hook_point_or_name(tmp_path, sae):
    saes.save(sae, tmp_path / "b" / "first")
    assert torch.equal(saes.load(tmp_path / "b", OUT).W_dec, sae.W_dec)
    saes.save(sae, tmp_path / "b" / "second")
    with pytest.raises(ValueError, match=r"hook must name one of the SAEs that read .*: first, second"):
        saes.load(tmp_path / "b", OUT)
    assert torch.equal(saes.load(tmp_path / "b", "second").W_dec, sae.W_dec)
    with pytest.raises(FileNotFoundError, match=r"has no SAE for 'blocks\.0\.hook_mlp_out'; it has 2, the nearest: .*"):
        saes.load(tmp_path / "b", "blocks.0.hook_mlp_out")
