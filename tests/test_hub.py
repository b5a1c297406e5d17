"""Loading from the Hub: the real client against a small server on this machine that speaks the Hub's file endpoints."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import contents
from test_circuits import random_sae
from test_elriggs import FAMILIES, FLAT, SIZES, flat_shapes, gpt_shapes, random_state, write
from test_loading_saes import write_scope
from tokenizers import Tokenizer

import bilens
from bilens import saes
from bilens.circuits import FeatureLayer

MODEL = "tdooms/ts-tiny-test"


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(dtype=torch.float32)


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """The files of a published model: config, weights and tokenizer."""
    folder = tmp_path_factory.mktemp("published")
    bilens.save(model, folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def without(files, *gone, **config):
    """Leave files out and set keys of the config."""
    config = json.loads(files["config.json"]) | config
    kept = {name: data for name, data in files.items() if name not in gone}
    return kept | {"config.json": json.dumps(config).encode()}


def assert_same(model, other):
    assert other.cfg == model.cfg
    state = model.state_dict()
    assert all(torch.equal(weight, state[name]) for name, weight in other.state_dict().items())


def refusal(name, error=FileNotFoundError, **kwargs):
    with pytest.raises(error) as caught:
        bilens.load(name, **kwargs)
    return str(caught.value)


# -- what loads -------------------------------------------------------------------------------------------------------


def test_model_and_its_own_tokenizer_load_from_the_hub(hub, model, files):
    hub.commit(MODEL, files | {"modeling.py": b"raise SystemExit", "pytorch_model.bin": b"pickle"})
    loaded = bilens.load(MODEL)
    assert_same(model, loaded)
    assert loaded.tokenizer.backend_tokenizer.to_str() == model.tokenizer.backend_tokenizer.to_str()
    got = {line.split()[-1] for line in hub.asked}
    assert got >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not [file for file in got if not file.endswith((".json", ".safetensors", ".jinja"))]  # no code, no pickle


@pytest.mark.parametrize(
    ("config", "repo"),
    [
        ({"tokenizer": "ts-4096"}, "tdooms/ts-tokenizer-4096"),
        ({"tokenizer": "mistral"}, "mistral-community/Mixtral-8x22B-v0.1"),
        ({"tokenizer": "gpt2"}, "openai-community/gpt2"),
    ],
    ids=str,
)
def test_tokenizer_comes_from_the_repository_that_the_config_names(hub, model, files, config, repo):
    hub.commit(MODEL, without(files, "tokenizer.json", **config))
    hub.commit(repo, {"tokenizer.json": files["tokenizer.json"]})
    assert bilens.load(MODEL).tokenizer.backend_tokenizer.to_str() == model.tokenizer.backend_tokenizer.to_str()


def test_tokenizer_of_the_older_generations_goes_by_the_vocabulary(hub, make_model, files, tmp_path):
    older = make_model(dtype=torch.float32, norm="rms_gain_shift", attn_scale=1.0)
    bilens.save(older, tmp_path / "older")
    hub.commit(MODEL, {name: (tmp_path / "older" / name).read_bytes() for name in ("config.json", "model.safetensors")})
    hub.commit(f"tdooms/TinyStories-{older.cfg.d_vocab}", {"tokenizer.json": files["tokenizer.json"]})
    loaded = bilens.load(MODEL)
    assert_same(older, loaded)
    assert loaded.tokenizer.backend_tokenizer.to_str() == older.tokenizer.backend_tokenizer.to_str()


def test_tokenizer_argument_names_a_repository(hub, model, files):
    hub.commit(MODEL, without(files, "tokenizer.json", tokenizer="ts-4096"))
    hub.commit("someone/words", {"tokenizer.json": files["tokenizer.json"]})
    assert (
        bilens.load(MODEL, tokenizer="someone/words").tokenizer.backend_tokenizer.to_str()
        == model.tokenizer.backend_tokenizer.to_str()
    )
    assert not any("ts-tokenizer" in line for line in hub.asked)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"tokenizer": "unheard-of"}, "its config names no tokenizer that is known here"),
        ({"tokenizer": None}, "its config names no tokenizer that is known here"),
        ({"tokenizer": ["ts-4096"]}, "its config names no tokenizer that is known here"),
        ({"tokenizer": "ts-4096"}, "'tdooms/ts-tokenizer-4096' is neither a folder here nor a repository on the Hub"),
    ],
    ids=str,
)
def test_model_without_a_tokenizer_loads_with_a_warning_that_says_so(hub, model, files, config, reason):
    hub.commit(MODEL, without(files, "tokenizer.json", **config))
    with pytest.warns(UserWarning, match=rf"{MODEL} was loaded without a tokenizer: {reason}.*pass tokenizer= for one"):
        loaded = bilens.load(MODEL)
    assert_same(model, loaded)
    assert loaded.tokenizer is None


def test_sharded_repository_loads(hub, model, files, tmp_path):
    from safetensors.torch import load, save

    tensors = load(files["model.safetensors"])
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    written = {shard: save({name: tensors[name] for name in held}) for shard, held in shards.items()}
    written["model.safetensors.index.json"] = json.dumps(index).encode()
    hub.commit(MODEL, without(files, "model.safetensors") | written)
    assert_same(model, bilens.load(MODEL))


# -- revisions --------------------------------------------------------------------------------------------------------


def test_revision_is_a_branch_a_tag_or_a_commit(hub, make_model, model, files, tmp_path):
    newer = make_model(seed=1, dtype=torch.float32)
    bilens.save(newer, tmp_path / "newer")
    sha = hub.commit(MODEL, files, "v1", "old-branch")
    hub.commit(MODEL, {path.name: path.read_bytes() for path in (tmp_path / "newer").iterdir()})
    assert_same(newer, bilens.load(MODEL))
    for revision in ("v1", "old-branch", sha):
        assert_same(model, bilens.load(MODEL, revision=revision))


def test_revision_that_does_not_exist_is_refused(hub, files):
    hub.commit(MODEL, files)
    assert refusal(MODEL, revision="v9") == f"{MODEL} on the Hub has no revision 'v9'"


def test_a_push_between_two_files_does_not_mix_two_states(hub, make_model, model, files, tmp_path):
    newer = make_model(seed=1, dtype=torch.float32, norm="none")
    bilens.save(newer, tmp_path / "newer")
    newer_files = {path.name: path.read_bytes() for path in (tmp_path / "newer").iterdir()}
    hub.commit(MODEL, files)
    hub.push_after["config.json"] = lambda: hub.commit(MODEL, newer_files)
    assert_same(model, bilens.load(MODEL))
    assert_same(newer, bilens.load(MODEL))


# -- the cache --------------------------------------------------------------------------------------------------------


def test_second_load_downloads_nothing_and_a_new_state_only_once_it_is_there(hub, model, files):
    hub.commit(MODEL, files)
    bilens.load(MODEL)
    first = [line for line in hub.asked if line.startswith("GET")]
    assert len(first) == len(files)
    assert_same(model, bilens.load(MODEL))
    assert [line for line in hub.asked if line.startswith("GET")] == first
    hub.commit(MODEL, without(files, n_ctx=7))
    assert bilens.load(MODEL).cfg.n_ctx == 7


@pytest.mark.parametrize("own_tokenizer", [True, False])
def test_offline_a_cached_model_loads_whole(hub, offline, model, files, own_tokenizer):
    gone = () if own_tokenizer else ("tokenizer.json",)
    hub.commit(MODEL, without(files, *gone, tokenizer="ts-4096"))
    hub.commit("tdooms/ts-tokenizer-4096", {"tokenizer.json": files["tokenizer.json"]})
    bilens.load(MODEL)
    hub.asked.clear()
    offline()
    loaded = bilens.load(MODEL)
    assert_same(model, loaded)
    assert loaded.tokenizer.backend_tokenizer.to_str() == model.tokenizer.backend_tokenizer.to_str()
    assert hub.asked == []


def test_offline_an_unknown_model_is_refused(hub, offline, files):
    hub.commit(MODEL, files)
    offline()
    message = refusal(MODEL)
    assert message.startswith(f"config.json of {MODEL} is not in the local cache and the Hub cannot be reached")
    assert "HF_HUB_OFFLINE" in message


def test_offline_a_half_cached_model_is_refused(hub, offline, files):
    hub.commit(MODEL, files)
    huggingface_hub.hf_hub_download(MODEL, "config.json")
    offline()
    assert f"model.safetensors of {MODEL} is not in the local cache" in refusal(MODEL)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [404, 401])
def test_repository_that_does_not_exist_is_refused_with_near_names(hub, files, status):
    hub.commit(MODEL, files)
    hub.errors["tdooms/ts-tiny-tset"] = (status, "RepoNotFound")
    message = refusal("tdooms/ts-tiny-tset")
    assert message.startswith("'tdooms/ts-tiny-tset' is neither a folder here nor a repository on the Hub")
    assert re.search(rf"did you mean {MODEL}( or |\?)", message), message


@pytest.mark.parametrize("listing_breaks", [True, False])
def test_published_names_are_suggested_without_a_listing(hub, listing_breaks):
    hub.listing_breaks = listing_breaks
    assert "did you mean tdooms/ts-medium" in refusal("tdooms/ts-meduim")
    assert "did you mean" not in refusal("someone/resnet50")


def test_gated_repository_is_refused(hub, files):
    hub.commit(MODEL, files)
    hub.errors[MODEL] = (403, "GatedRepo")
    assert "is gated: accept its terms and log in" in refusal(MODEL)


def test_repository_with_pickled_weights_only_is_refused(hub, files):
    hub.commit(MODEL, without(files, "model.safetensors") | {"pytorch_model.bin": b"\x80\x02"})
    message = refusal(MODEL)
    assert message.startswith(f"{MODEL} has no model.safetensors, only pytorch_model.bin: a pickle")
    assert "bilens reads safetensors only" in message


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_repository_without_a_file_it_must_have_is_refused(hub, files, file):
    hub.commit(MODEL, {name: data for name, data in files.items() if name != file})
    assert refusal(MODEL) == f"{MODEL} has no {file}"


def test_name_that_cannot_be_a_repository_is_refused(hub):
    assert "is neither a folder here nor a valid Hub name" in refusal("who/what?")
    assert hub.asked == []


def test_weights_that_contradict_the_config_are_refused_from_the_hub_too(hub, files):
    hub.commit(MODEL, without(files, n_layer=3))
    message = refusal(MODEL, bilens.CheckpointError)
    assert "model.safetensors: tensor transformer.h.2." in message


# -- broken connections -----------------------------------------------------------------------------------------------


def test_download_that_breaks_off_is_resumed_and_bit_identical(hub, model, files):
    hub.commit(MODEL, files)
    hub.drop_once.add("model.safetensors")
    assert_same(model, bilens.load(MODEL))
    assert len([line for line in hub.asked if line.startswith("GET") and "safetensors" in line]) == 2


def test_truncated_download_is_raised_and_the_next_load_is_bit_identical(hub, model, files):
    hub.commit(MODEL, files)
    hub.cut.add("model.safetensors")
    with pytest.raises(OSError, match="file should be of size"):
        bilens.load(MODEL)
    hub.cut.clear()
    assert_same(model, bilens.load(MODEL))


# -- repositories of torch archives -----------------------------------------------------------------------------------


def archived(tmp_path, config, shapes):
    """The files of a repository that has nothing but a torch archive."""
    folder = write(tmp_path / "archived", config, random_state(shapes(config)))
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_repository_of_a_torch_archive_loads_with_the_tokenizer_that_its_format_names(hub, files, tmp_path, offline):
    config = SIZES | FAMILIES["two branches, bilinear"] | {"vocab_size": 97}
    hub.commit("Elriggs/some", archived(tmp_path, config, gpt_shapes) | {"README.md": b"no tokenizer"})
    hub.commit("openai-community/gpt2", {"tokenizer.json": files["tokenizer.json"]})
    model = bilens.load("Elriggs/some")
    assert model.to_string(model.to_tokens("the cat")[0]) == "the cat"
    assert len(list((tmp_path / "home" / "bilens").rglob("*.safetensors"))) == 1
    offline()
    assert_same(model, bilens.load("Elriggs/some"))


@pytest.mark.parametrize("name", ["datasets/some/one", "melephant/2l-bilinear-attn-normalised-v2"])
def test_a_dataset_repository_of_checkpoints_loads(hub, files, tmp_path, name):
    config = FLAT | {"norm_type": "tok0_batch", "use_bias_qk": True, "vocab_size": 97}
    one = archived(tmp_path, config, flat_shapes)
    one["config.json"] = json.dumps({"model": config, "data": {"tokenizer": "some/tokenizer"}}).encode()
    one["checkpoints/step_00000008.pt"] = one["checkpoints/step_00000007.pt"]
    hub.commit(f"datasets/{name.removeprefix('datasets/')}", one)
    hub.commit("some/tokenizer", {"tokenizer.json": files["tokenizer.json"]})
    model = bilens.load(name, checkpoint="step_00000007.pt")
    assert model.tokenizer.backend_tokenizer.to_str() == Tokenizer.from_buffer(files["tokenizer.json"]).to_str()
    assert "one of the 2 of" in refusal(name, ValueError)
    assert "did you mean step_00000008.pt" in refusal(name, checkpoint="step_8.pt")


def test_token_ids_modulo_the_vocabulary_ask_for_no_tokenizer(hub, tmp_path):
    hub.commit("Elriggs/flat", archived(tmp_path, FLAT | {"norm_type": "layernorm"}, flat_shapes))
    model = bilens.load("Elriggs/flat")
    with pytest.raises(ValueError, match="modulo 23"):
        model.to_tokens("the cat")


# -- as a user runs it ------------------------------------------------------------------------------------------------


def test_environment_variables_choose_cache_and_offline_mode(hub, model, files, tmp_path):
    hub.commit(MODEL, without(files, "tokenizer.json", tokenizer="ts-4096"))
    hub.commit("tdooms/ts-tokenizer-4096", {"tokenizer.json": files["tokenizer.json"]})
    bilens.load(MODEL)
    hub.asked.clear()
    code = """
import sys, bilens
bilens.save(bilens.load(sys.argv[1]), sys.argv[2])
try:
    bilens.load("tdooms/other")
except FileNotFoundError as error:
    print(error)
"""
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, MODEL, str(tmp_path / "out")]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("config.json of tdooms/other is not in the local cache")
    assert hub.asked == []
    again = bilens.load(tmp_path / "out")
    assert_same(model, again)
    assert again.tokenizer.backend_tokenizer.to_str() == model.tokenizer.backend_tokenizer.to_str()


# -- SAEs -------------------------------------------------------------------------------------------------------------

SCOPE = "tdooms/ts-tiny-test-scope"


def scope_files(folder, names, seed=0):
    """The files of random SAEs in the published layout."""
    for number, name in enumerate(names):
        write_scope(folder, name, seed=seed + number)
    return contents(folder)


def test_a_layer_is_put_between_saes_from_the_hub(hub, model, tmp_path, offline):
    names = ("1-mlp-out-x2-k6", "1-resid-mid-x2-k9")
    first = scope_files(tmp_path / "one", names)
    second = scope_files(tmp_path / "two", names, seed=5)
    old = hub.commit(SCOPE, first)
    hub.commit(SCOPE, second)
    there = saes.catalogue(SCOPE)
    assert [(one.name, one.size) for one in there] == [
        (name, len(second[f"{name}/model.safetensors"])) for name in names
    ]
    lens = FeatureLayer.load(model, 1, SCOPE)
    assert torch.equal(lens.writers, FeatureLayer.load(model, 1, tmp_path / "two").writers)
    before = FeatureLayer.load(model, 1, SCOPE, revision=old)
    assert torch.equal(before.writers, FeatureLayer.load(model, 1, tmp_path / "one").writers)
    offline()
    again = FeatureLayer.load(model, 1, SCOPE)
    assert torch.equal(again.readers, lens.readers)
    assert "in the local cache" in repr(saes.catalogue(SCOPE))
    named = FeatureLayer.load(model, 1, SCOPE, inp=names[1], out=names[0], revision=old)
    assert torch.equal(named.readers, before.readers)
    with pytest.raises(FileNotFoundError, match="tdooms/other is not in the local cache and the Hub cannot be reached"):
        saes.catalogue("tdooms/other")


def test_what_the_hub_does_not_have_is_said(hub, model, tmp_path):
    hub.commit(SCOPE, scope_files(tmp_path, ["0-mlp-out-x2-k6", "1-mlp-in-x2-k6"]))
    with pytest.raises(FileNotFoundError, match="neither a folder here nor a repository on the Hub"):
        FeatureLayer.load(model, 1, "tdooms/ts-tiny-test-scoop")
    with pytest.raises(FileNotFoundError, match="has no revision 'v9'"):
        FeatureLayer.load(model, 1, SCOPE, revision="v9")
    with pytest.raises(
        ValueError, match=r"has no SAE at blocks.1.hook_mlp_out, for out; the nearest\n(.|\n)*0-mlp-out"
    ):
        FeatureLayer.load(model, 1, SCOPE)
    with pytest.raises(FileNotFoundError, match="has no SAE for '1-mlp-out-x2-k7'; it has 2, the nearest: "):
        FeatureLayer.load(model, 1, SCOPE, out="1-mlp-out-x2-k7")


def test_saes_of_saelens_in_any_repository_are_found_by_their_configs(hub, model, tmp_path):
    for seed, hook in enumerate(("blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out")):
        saes.save(random_sae(hook, seed=seed).float(), tmp_path / "saes" / f"sae-{seed}")
    files = contents(tmp_path / "saes")
    old = hub.commit("someone/saes", files)
    hub.commit("someone/saes", {})
    with pytest.raises(ValueError, match="has no SAE at"):
        FeatureLayer.load(model, 1, "someone/saes")
    lens = FeatureLayer.load(model, 1, "someone/saes", revision=old)
    assert torch.equal(lens.writers, FeatureLayer.load(model, 1, tmp_path / "saes").writers)
    assert FeatureLayer.load(model, 1, "someone/saes", inp="sae-0", out="sae-1", revision=old).layer == 1
