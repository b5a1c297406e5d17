"""The whole way for a model with SAEs of the published layout: cards, circuits and report, features, attribution."""

import json

import pytest
import torch
from test_circuits import random_sae
from test_loading_saes import write_scope

import bilens
from bilens import saes
from bilens.__main__ import main
from bilens.circuits import FeatureLayer
from bilens.saes.shelf import cached_cards, cards_folder, cards_path
from bilens.tensor import keeping, resuming, state

TEXTS = ["the cat sat on the mat", "a dog", "once upon a time the big dog ran and the cat saw", "a little cat ran"] * 6


@pytest.fixture
def place(make_model, tmp_path, monkeypatch):
    """A published model, SAEs around its second MLP, text, and an empty cache."""
    monkeypatch.setenv("BILENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")
    bilens.save(make_model(dtype=torch.float32), tmp_path / "model")
    for seed, name in enumerate(("1-resid-mid-x2-k9", "1-mlp-out-x2-k6")):
        write_scope(tmp_path / "scope", name, seed=seed)
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text, "kind": text[0]}) for text in TEXTS))
    return tmp_path


def run(capsys, *args):
    assert main([*map(str, args)]) == 0, capsys.readouterr().err
    return capsys.readouterr()


def test_from_files_to_the_report(place, capsys):
    model, scope, text = place / "model", ("--saes", place / "scope"), place / "text.jsonl"
    made = run(capsys, "cards", model, *scope, "--layer", 1, "--text", text, "--label", "kind", "--json")
    kept = json.loads(made.out)
    assert [path.name for path in cards_folder().iterdir() if path.is_dir()] == []
    lens = FeatureLayer.load(bilens.load(model), 1, place / "scope")
    assert [str(cards_path(lens.model, sae)) for sae in (lens.inp, lens.out)] == list(kept["kept"].values())
    assert set(lens.inp_cards.labels) == {"a", "o", "t"}
    assert lens.out_cards.hook == "blocks.1.hook_mlp_out"
    brief = ("--draws", 200, "--controls", 3, "--features", 2, "--text", text, "--resume", place / "state")
    done = run(capsys, "circuits", model, *scope, *brief, "--out", place / "report.html", "--json")
    found = json.loads(done.out)
    assert (found["layer"], len(found["findings"])) == (1, 2)
    assert (place / "state" / "layer-1").is_dir()
    assert "32 features at each end of an MLP" in done.err
    html = (place / "report.html").read_text()
    assert all(part in html for part in ("Eigenvalues;", "Feature cards"))
    shown = run(capsys, "features", model, *scope, "--layer", 1, "--side", "inp", "--json")
    assert json.loads(shown.out)["hook"] == "blocks.1.hook_resid_mid"
    exact = run(capsys, "attribute", TEXTS[0], "--model", model, *scope, "--layer", 1, "--feature", 3, "--json")
    sums = json.loads(exact.out)
    assert sums["total"] == pytest.approx(sums["model"], rel=1e-5)


def test_a_killed_command_goes_on_to_the_same_report(place, capsys, monkeypatch):
    """Of some output features, and what was left out is said wherever they are shown."""
    args = ["circuits", place / "model", "--saes", place / "scope", "--layer", 1, "--text", place / "text.jsonl"]
    args += ["--draws", 200, "--features", 2, "--outputs", 16, "--json", "--out"]
    whole = run(capsys, *args, place / "whole.html")
    broken = [*args, place / "again.html", "--resume", place / "state"]
    for stage in ("rank-0-of-1", "outputs", "null-readers", "text-predicted"):

        def die(path, *rest, stage=stage, write=keeping.write_state):
            if path.stem == stage:
                raise KeyboardInterrupt
            write(path, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(state, "write_state", die)
            patch.setattr(resuming, "write_state", die)
            assert main([*map(str, broken)]) == 130
        capsys.readouterr()
    again = run(capsys, *broken)
    told = json.loads(whole.out)
    assert json.loads(again.out) == told
    assert (told["outputs"], told["left_out"]) == (16, 16)
    html = (place / "whole.html").read_text()
    assert (place / "again.html").read_text() == html
    assert "layer 1: 16 of 32 output features are ranked and searched" in whole.err
    assert "weights alone, of 16 of 32 output features" in whole.err
    assert "Strongest pairs over 16 of 32 output features; the others are left out" in html
    assert "of the 16 of 32 output features with the largest interactions" in html
    assert "The search scored 16 of 32 output features" in html
    assert "(readers: 200 outputs)" in html
    assert main([*map(str, args), str(place / "x.html"), "--outputs", "33"]) == 1
    assert "--outputs must be at most 32 in layer 1, got 33" in capsys.readouterr().err


def test_what_is_missing_is_said(place, capsys):
    model, scope = str(place / "model"), str(place / "scope")
    assert main(["circuits", model, "--saes", scope, "--layer", "0"]) == 1
    assert "has no SAE at blocks.0.hook_mlp_in or" in capsys.readouterr().err
    assert main(["circuits", model]) == 1
    assert "must hold SAEs before and behind an MLP" in capsys.readouterr().err
    assert main(["features", model, "--saes", scope, "--layer", "1"]) == 1
    assert "has no cards: bilens cards makes them" in capsys.readouterr().err
    assert main(["cards", model, "--saes", scope, "--layer", "1", "--text", "none.txt"]) == 1
    assert "no such file: none.txt" in capsys.readouterr().err


def test_cards_are_found_by_the_weights_they_are_of(place, make_model):
    model, sae = make_model(dtype=torch.float32), random_sae("blocks.1.hook_resid_mid").float()
    assert cached_cards(model, sae) is None
    (made,) = saes.keep_cards(model, [sae], TEXTS, "some texts")
    again = cached_cards(model, sae)
    assert torch.equal(again.contexts.tokens, made.contexts.tokens)
    assert again.provenance == made.provenance
    assert cached_cards(model, random_sae("blocks.1.hook_resid_mid", seed=1).float()) is None
    other = make_model(seed=1, dtype=torch.float32)
    assert cached_cards(other, sae) is None
    (cards_folder() / "damaged.safetensors").write_bytes(b"not cards")
    assert cached_cards(model, sae) is not None
    with pytest.warns(UserWarning, match=r"were left out: .*damaged\.safetensors must be"):
        assert cached_cards(other, sae) is None


def test_killed_cards_resume(place, make_model, monkeypatch):
    model = make_model(dtype=torch.float32)
    made = [random_sae(f"blocks.1.{at}").float() for at in ("hook_resid_mid", "hook_mlp_out")]
    monkeypatch.setattr(saes.collecting, "CHUNK", 4)
    whole = saes.collect(model, {sae.cfg.metadata.hook_name: sae for sae in made}, TEXTS)

    def broken():
        yield from TEXTS[:10]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        saes.keep_cards(model, made, broken(), "texts")
    assert len(list(cards_folder().glob("unfinished-*/state.safetensors"))) == 1
    for sae, cards in zip(made, saes.keep_cards(model, made, TEXTS, "texts"), strict=True):
        assert torch.equal(cards.contexts.values, whole[sae.cfg.metadata.hook_name].contexts.values)
    assert not list(cards_folder().glob("unfinished-*"))


def test_without_cards_features_are_named_by_what_they_read_and_write(make_model):
    model = make_model()
    inp, out = random_sae("blocks.1.hook_resid_mid"), random_sae("blocks.1.hook_mlp_out", seed=1)
    cat, dog, mat = (model.to_single_token(word) for word in ("cat", "dog", "mat"))
    with torch.no_grad():
        inp.W_enc[:, 3] = torch.nn.functional.normalize(model.W_E[cat], dim=0) * 9
        inp.W_dec[3] = torch.nn.functional.normalize(model.W_U[:, dog], dim=0) * 9
        out.W_dec[5] = torch.nn.functional.normalize(model.W_U[:, mat], dim=0) * 9
    lens = FeatureLayer(model, 1, inp, out)
    assert "cat" in lens.name("inp", 3).split("→")[0]
    assert "→ dog" in lens.name("inp", 3)
    assert lens.name("out", 5).startswith("→ mat")
    assert lens.name("out", [5, 3], [1.0, 1e-6]) == lens.name("out", 5)
    assert lens.name("inp", 3) is lens.name("inp", 3)
    bare = FeatureLayer(make_model(tokenizer=None), 1, inp, out)
    assert (bare.name("out", 3), bare.name("inp", [3, 8])) == ("#3", "#3, #8")
