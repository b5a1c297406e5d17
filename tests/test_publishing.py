"""Models with their SAEs and cards, published to a folder and to the Hub, and loaded back by name."""

import math

import pytest
import torch
from test_circuits import random_sae

import bilens
from bilens import EmbedConfig, Facts, NormConfig, saes
from bilens.circuits import FeatureLayer
from bilens.models.files import fingerprint

# the client's own way of sending a large file
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")

REPO, TEXTS = "me/tiny", ["the big dog sat on the mat", "a cat ran and a dog saw the cat", "once upon a time"]
HOOKS = ("blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out")
FACTS = Facts(licence="mit", data=["roneneldan/TinyStories", "a few sentences"], losses={"stories": 1.25})


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(dtype=torch.float32, n_layers=3, attn_scale=1 / math.sqrt(6))


@pytest.fixture
def dictionaries(model, tmp_path, monkeypatch):
    """SAEs of the model, bound to its weights, and their cards in the user's cache."""
    monkeypatch.setenv("BILENS_CACHE", str(tmp_path / "cache"))
    made = [random_sae(hook, seed=seed).float() for seed, hook in enumerate(HOOKS)]
    for sae in made:
        sae.cfg.metadata["settings"] = {"model": fingerprint(model)}
    saes.keep_cards(model, made, TEXTS, "a few sentences")
    return made


def assert_read_back(name, dictionaries, model):
    """Check that the model, its SAEs and their cards load by one name."""
    back = bilens.load(name)
    ids = model.to_tokens(TEXTS)
    torch.testing.assert_close(back(ids), model(ids), rtol=1e-5, atol=1e-5)
    for hook, sae in zip(HOOKS, dictionaries, strict=True):
        assert torch.equal(saes.load(name, hook).W_dec, sae.W_dec)
        assert saes.FeatureCards.load(name, hook, back).provenance["texts"] == "3"
    lens = FeatureLayer.load(back, 1, name)
    assert lens.inp_cards is not None
    assert lens.out_cards is not None
    assert repr(FeatureLayer.load(back, 1, name, inp=HOOKS[0], out=HOOKS[1])) == repr(lens)
    return back


@pytest.mark.parametrize("layout", [None, "llama"])
@torch.no_grad()
def test_a_folder_holds_all_of_it(model, dictionaries, tmp_path, layout):
    folder = bilens.publish(model, tmp_path / "out", saes=dictionaries, texts=TEXTS, facts=FACTS, layout=layout)
    back = assert_read_back(folder, dictionaries, model)
    assert torch.equal(back.W_O, model.W_O)
    again = bilens.publish(back, tmp_path / "again", saes=folder)
    assert torch.equal(saes.load(again, HOOKS[0]).W_enc, dictionaries[0].W_enc)
    assert [sae.cfg.metadata["settings"] for sae in dictionaries] == [{"model": fingerprint(model)}] * 2
    card = (folder / "README.md").read_text()
    found = saes.evaluate(model, dictionaries[1], TEXTS)
    assert "license: mit" in card
    assert "- roneneldan/TinyStories" in card.split("---")[1]
    assert "| stories | 1.2500 |" in card
    row = next(line for line in card.splitlines() if line.startswith(f"| {HOOKS[1]} |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3] == str(dictionaries[1].cfg.d_sae)
    assert cells[6:8] == [f"{found.fvu:.4g}", f"{found.l0:.4g}"]


@torch.no_grad()
def test_the_hub_gets_one_commit_and_gives_all_of_it_back(hub, model, dictionaries, offline):
    address = bilens.push_to_hub(model, REPO, saes=dictionaries, facts=FACTS)
    assert address == f"{hub.url}/{REPO}/commit/{hub.sha(REPO, 'main')}"
    (commit,) = hub.commits
    large = [f"saes/{hook}/{file}" for hook in HOOKS for file in ("cards.safetensors", "sae_weights.safetensors")]
    assert sorted(commit["lfsFile"]) == sorted(["model.safetensors", *large])
    assert_read_back(REPO, dictionaries, model)
    assert f"bilens.load('{REPO}')" in hub.repos[REPO]["main"]["README.md"].decode()
    offline()
    assert_read_back(REPO, dictionaries, model)


@torch.no_grad()
def test_a_second_push_takes_what_the_first_left_and_nothing_else(hub, make_model, model, dictionaries):
    bilens.push_to_hub(model, REPO, saes=dictionaries)
    hub.commit(REPO, hub.repos[REPO]["main"] | {"figure.png": b"mine", "saes/notes.md": b"mine"})
    newer = make_model(seed=3, dtype=torch.float32, tokenizer=None, attn_scale=0.3)
    bilens.push_to_hub(newer, REPO, layout="llama")
    assert set(hub.repos[REPO]["main"]) == {
        *("config.json", "model.safetensors", "README.md", "figure.png", "saes/notes.md")
    }
    ids = torch.arange(8)[None]
    with pytest.warns(UserWarning, match="without a tokenizer"):
        torch.testing.assert_close(bilens.load(REPO)(ids), newer(ids), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_published_is_refused_before_anything_is_sent(hub, make_model, model, dictionaries, tmp_path):
    other = make_model(seed=5, dtype=torch.float32)
    shifted = make_model(dtype=torch.float32, norm="rms_gain_shift")
    shifted.ln_final.bias.data.zero_()
    rescaled = make_model(dtype=torch.float32, embed=EmbedConfig(3.0, NormConfig(1e-5)))
    loose, scaled = (random_sae(hook).float() for hook in (HOOKS[0], "hook_embed"))
    for says, pushed, options in (
        ("repo must be 'owner/name'", model, {"repo": "tiny"}),
        ("it was fitted to one with other weights", other, {"saes": dictionaries}),
        ("saes must have names of their own", model, {"saes": [*dictionaries, dictionaries[0]]}),
        ("attention.kind must be 'softmax'", make_model(attention="bilinear"), {"layout": "llama"}),
        ("layout must be None with an SAE at", shifted, {"layout": "llama", "saes": [loose]}),
        ("what it reads at hook_embed is not", rescaled, {"layout": "llama", "saes": [scaled]}),
    ):
        with pytest.raises(ValueError, match=says):
            bilens.push_to_hub(pushed, **{"repo": REPO, **options})
    assert not hub.repos
    folder = bilens.publish(model, tmp_path / "out", saes=dictionaries)
    with pytest.raises(ValueError, match="folder must not hold SAEs of another publication"):
        bilens.publish(model, folder, saes=dictionaries[:1])


def test_an_sae_that_the_hub_does_not_have_is_said(hub, model, dictionaries):
    bilens.push_to_hub(model, REPO, saes=dictionaries[:1])
    with pytest.raises(
        FileNotFoundError, match=rf"{REPO} has no SAE for 'blocks.0.hook_mlp_in'; it has 1, .*{HOOKS[0]}"
    ):
        saes.load(REPO, "blocks.0.hook_mlp_in")
