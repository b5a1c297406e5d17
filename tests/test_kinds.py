"""Every kind of SAE that SAELens has, before and behind the norm: read, written, ranked, attributed, tested."""

import pytest
import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

import bilens
from bilens import circuits, saes
from bilens.circuits import Circuit, FeatureLayer, Protocol
from bilens.models.windows import Windows, observe
from bilens.saes.stored import as_inference

PLAIN = ("standard", "topk", "abstopk", "jumprelu", "gated", "bilens_signed_topk", "bilens_arrays")
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
SCHEMES = ("none", "constant_norm_rescale", "layer_norm")
POINTS = ("hook_mlp_in", "ln2.hook_normalized", "hook_resid_mid")
NORMS = {
    "plain": {},
    "gain": {"norm": "rms_gain"},
    "gain, shift, biases": {"norm": "rms_gain_shift", "mlp_bias": (True, True)},
}
HARD = NORMS["gain, shift, biases"]
OUT = "blocks.1.hook_mlp_out"


def random_sae(kind, hook, seed=0, d_in=16, d_sae=40, **options):
    generator = torch.Generator().manual_seed(seed)
    options |= {"k": 9} if "topk" in kind else {}
    scheme = options.pop("normalize_activations", "none")
    options |= {"d_out": d_in, "apply_b_dec_to_input": False} if "transcoder" in kind else {}
    config = {"architecture": kind, "d_in": d_in, "d_sae": d_sae, "dtype": "float64", **options}
    sae = SAE.from_dict(config)
    sae.cfg.normalize_activations = scheme  # not in the constructor: its annotation does not know every scheme
    sae._setup_activation_normalization()
    sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out = hook, OUT
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise.abs() / 9 if name == "threshold" else noise / d_in**0.5)
    return sae.eval()


@pytest.fixture
def tokens(make_model):
    tokens = torch.randint(3, make_model().cfg.d_vocab, (8, 12), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = make_model().bos_id
    return tokens


def exactly(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# -- what they read and write -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("apply", [True, False])
def test_activations_and_reconstructions_are_what_readers_and_writers_say(kind, scheme, apply):
    sae = random_sae(kind, None, normalize_activations=scheme, apply_b_dec_to_input=apply)
    x = torch.randn(50, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3
    scale = saes.scale_of(sae, x)
    pre = x @ saes.readers(sae).T / scale.read + saes.offsets(sae)
    z = sae.encode(x)
    assert (z != 0).any()
    exactly(z[z != 0], pre[z != 0])
    exactly(sae(x), scale.written * (z @ saes.writers(sae) + sae.b_dec) + scale.centre)


@pytest.mark.parametrize("kind", TRANSCODERS)
def test_a_transcoder_writes_what_its_decoder_says(kind):
    sae = random_sae(kind, "blocks.1.hook_mlp_in")
    x = torch.randn(5, 16, dtype=torch.float64)
    skip = x @ sae.W_skip.T if "skip" in kind else 0
    exactly(sae(x), sae.encode(x) @ saes.writers(sae) + sae.b_dec + skip)
    exactly(saes.readers(sae), sae.W_dec)
    with pytest.raises(ValueError, match="which must be 'decoder' for a"):
        saes.readers(sae, "encoder")


# -- before and behind the norm ---------------------------------------------------------------------------------------


def made(model, point, kind="topk", scheme="none", out="topk", **options):
    inp = random_sae(kind, f"blocks.1.{point}", normalize_activations=scheme)
    return FeatureLayer(model, 1, inp, random_sae(out, options.pop("at", OUT), seed=1, **options))


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("norm", NORMS)
def test_what_enters_the_mlp_is_codes_times_writers_and_what_is_left_over(make_model, tokens, point, scheme, norm):
    lens = made(make_model(**NORMS[norm]), point, scheme=scheme)
    seen = observe(lens.model, Windows.of(lens.model, tokens), [lens.hook_in, lens.hook_entering])
    x, entering = seen[lens.hook_in], seen[lens.hook_entering]
    exactly(lens.entering(x), entering)
    factor, shift = bilens.circuits.entry.Entry.of(lens.model, 1, lens.hook_in).linear(x)
    scale = saes.scale_of(lens.inp, x)
    rest = x - scale.written * (lens.activations(x) @ saes.writers(lens.inp))
    exactly(lens.codes(x) @ lens.writers + rest * factor + shift, entering)


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("norm", NORMS)
def test_the_ranking_is_that_of_all_pairs_by_the_running_layer(make_model, point, norm):
    lens = made(make_model(**NORMS[norm]), point)
    found = bilens.top_interactions(lens.tensor.without_constant(), 50, out=lens.readers, inp=lens.writers)
    mlp, norm = lens.model.blocks[1].mlp, lens.model.blocks[1].ln2
    d = saes.writers(lens.inp) * (1 if point == "hook_mlp_in" else norm.affine(lens.readers)[0])
    zero = mlp(torch.zeros_like(d[:1]))
    alone = mlp(d) - zero
    both = mlp(d[:, None] + d[None]) - zero - alone[:, None] - alone[None]  # 2 B(d_i, d_j), the biases cancel
    values = both @ lens.readers.T
    values[range(40), range(40)] /= 2
    left, right = torch.triu_indices(40, 40)
    flat = values[left, right]
    best = flat.abs().flatten().topk(50)
    exactly(found.value.abs(), best.values)
    exactly(found.value, flat.flatten()[best.indices])


@pytest.mark.parametrize("point", [*POINTS, "hook_resid_pre"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("out", ["topk", "gated", "skip_transcoder"])
def test_attribution_is_exact(make_model, tokens, point, scheme, out):
    model = make_model(**HARD)
    inp = random_sae("jumprelu", f"blocks.1.{point}", normalize_activations=scheme)
    options = {} if "transcoder" in out else {"normalize_activations": scheme}
    behind = random_sae(out, "blocks.1.hook_mlp_in" if "transcoder" in out else OUT, seed=1, **options)
    found = bilens.attribute(model, tokens, 1, 7, inp=inp, out=behind)
    y = observe(model, Windows.of(model, tokens), [OUT])[OUT][:, 1:].flatten(0, 1)
    exactly(found.total, found.pre_activation)
    if "transcoder" in out:
        exactly(found.total, y @ behind.W_dec[7])
    else:
        z = behind.encode(y)[:, 7]
        exactly(found.total[z != 0], z[z != 0])


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_traces_of_features_are_exact(make_model, tokens, point, scheme):
    model = make_model(**HARD)
    inp = random_sae("topk", f"blocks.1.{point}", normalize_activations=scheme)
    found = bilens.attribute(model, tokens, 1, token="cat", inp=inp)
    traced = circuits.traces.trace(circuits.sources.sources(model, tokens, 1), inp, found.features)
    exactly(traced.pre_activation[found.features >= 0], found.activations[found.features >= 0])


def often(lens, tokens):
    """Return the pair that is active together most often, and the output feature that is active most often."""
    windows = Windows.of(lens.model, tokens)
    z, out = ((lens.at_positions(windows, of) != 0).double() for of in (lambda x, y: lens.codes(x), lens.outputs))
    left, right = divmod(int((z.T @ z).triu(1).argmax()), z.shape[1])
    return Circuit(1, int(out.sum(0).argmax()), left, right)


def protocol():
    return Protocol(n_bootstrap=3, n_pairs=2, n_directions=1, prompts=["the"], words=(["cat"], ["dog"]))


CASES = [
    *(("hook_resid_mid", kind, "none", "topk") for kind in (*PLAIN, "matching_pursuit")),
    *(("hook_resid_mid", "topk", "none", kind) for kind in (*PLAIN, "matching_pursuit", *TRANSCODERS)),
    *((point, "jumprelu", scheme, "skip_transcoder") for point in POINTS for scheme in SCHEMES),
]


@pytest.mark.parametrize(("point", "kind", "scheme", "out"), CASES)
def test_edits_do_what_the_weights_say(make_model, tokens, point, kind, scheme, out):
    model = make_model(**HARD)
    options = {"at": f"blocks.1.{point}" if "transcoder" in out else OUT}
    lens = made(model, point, kind, scheme, out, **options)
    tested = circuits.test(lens, often(lens, tokens), tokens, protocol(), generator=torch.Generator().manual_seed(0))
    for edit in tested.edits.values():
        assert edit.measured.abs().max() > 0
        assert edit.error < 1e-9
    removed = circuits.remove(lens, tested.circuit.left, 7, tokens)
    exactly(removed.predicted, removed.measured)
    assert circuits.predict(lens, 7, tokens).predicted.isfinite().all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_output_that_is_normalised_is_predicted_with_its_factor(make_model, tokens, scheme):
    lens = made(make_model(), "hook_resid_mid", normalize_activations=scheme)
    found = circuits.predict(lens, 7, tokens, k=16)
    active = found.actual != 0
    exactly(found.predicted[active] + lens.offsets[7], found.actual[active])
    removed = circuits.remove(lens, 3, 7, tokens)
    exactly(removed.predicted, removed.measured)


@pytest.mark.usefixtures("unchecked")
def test_a_prediction_says_how_the_norm_was_taken(make_model, tokens):
    lens = made(make_model(), "hook_resid_mid")
    measured, mean = (circuits.predict(lens, 7, tokens, k=16, factor=one) for one in ("measured", "mean"))
    windows = Windows.of(lens.model, tokens)
    rms = lens.at_positions(windows, lambda x, y: (x.pow(2).mean(1) + 1e-8).sqrt())
    exactly(mean.predicted, measured.predicted * rms.pow(2) * (1 / rms).mean() ** 2)
    assert (measured.to_dict()["factor"], mean.to_dict()["factor"]) == ("measured", "mean")
    assert "mean" in repr(mean)
    with pytest.raises(ValueError, match="factor must be 'measured' or 'mean', got 'none'"):
        circuits.predict(lens, 7, tokens, factor="none")
    behind = made(make_model(), "hook_mlp_in")
    measured, mean = (circuits.predict(behind, 7, tokens, factor=one) for one in ("measured", "mean"))
    exactly(measured.predicted, mean.predicted)


def test_output_features_are_read_with_encoder_or_decoder(make_model, tokens):
    model, out = make_model(), random_sae("topk", OUT, seed=1)
    inp = random_sae("topk", "blocks.1.hook_resid_mid")
    encoder, decoder = (FeatureLayer(model, 1, inp, out, read=read) for read in ("encoder", "decoder"))
    exactly(encoder.readers, out.W_enc.T)
    exactly(decoder.readers, out.W_dec)
    removed = circuits.remove(decoder, 3, 7, tokens)
    exactly(removed.predicted, removed.measured)


# -- those that SAELens trains ----------------------------------------------------------------------------------------

TRAINED = {
    "standard": (StandardTrainingSAE, StandardTrainingSAEConfig, {}),
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig, {"k": 8}),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {"k": 8}),
    "matryoshka": (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
        {"k": 8, "matryoshka_widths": [10, 40]},
    ),
    "gated": (GatedTrainingSAE, GatedTrainingSAEConfig, {"l1_coefficient": 0.1}),
    "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, {}),
}


def train(kind, hook, x):
    """Train an SAE on some thousand activations."""
    made, config, options = TRAINED[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sae = made(config(d_in=16, d_sae=40, **options))
    sae.cfg.metadata.hook_name = hook
    settings = SAETrainerConfig(
        total_training_samples=8000, train_batch_size_samples=len(x), lr=3e-3, lr_end=3e-4, lr_warm_up_steps=0,
        lr_decay_steps=0, device="cpu", autocast=False, dead_feature_window=20, feature_sampling_window=100,
        n_checkpoints=0, checkpoint_path=None, logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    return SAETrainer(settings, sae, iter(lambda: x.clone(), None)).fit()


@pytest.mark.parametrize("kind", TRAINED)
def test_whatever_saelens_trains_goes_around_a_layer(make_model, kind, tmp_path):
    model = make_model(dtype=torch.float32)
    tokens = torch.randint(3, model.cfg.d_vocab, (16, 26), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = model.bos_id
    hooks = {"inp": "blocks.1.hook_resid_mid", "out": OUT}
    seen = observe(model, Windows.of(model, tokens), list(hooks.values()))
    trained = {side: train(kind, hook, seen[hook][:, 1:].flatten(0, 1)) for side, hook in hooks.items()}
    lens = FeatureLayer(model, 1, **trained)
    for side, sae in trained.items():
        sae.save_inference_model(tmp_path / side)
    again = FeatureLayer.load(model, 1, tmp_path)
    assert {one.hook for one in saes.catalogue(tmp_path)} == set(hooks.values())
    for one in (lens, again):
        circuit = often(one, tokens)
        found = bilens.attribute(model, tokens, 1, circuit.feature, inp=one.inp, out=one.out)
        assert found.miss.max() < 1e-5
        tested = circuits.test(one, circuit, tokens, protocol(), generator=torch.Generator().manual_seed(0))
        assert tested.edits["pair"].error < 1e-4
    exactly(lens.coefficients(3), again.coefficients(3), 1e-6)


@pytest.mark.usefixtures("unchecked")
def test_an_sae_in_training_is_taken_as_what_it_is_saved_as():
    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=16, d_sae=40, k=8))
    sae.topk_threshold += 0.3
    made = as_inference(sae)
    assert made.cfg.architecture() == "jumprelu"
    assert made.threshold.unique().tolist() == [pytest.approx(0.3)]
    assert as_inference(made) is made
    with pytest.raises(ValueError, match="an SAE must be one of SAELens"):
        as_inference(torch.nn.Linear(2, 2))
