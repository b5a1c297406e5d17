"""A layer between stored SAEs: the published layout, SAELens' own, what there is, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import bilens
from bilens import circuits, saes
from bilens.circuits import FeatureLayer
from bilens.models.sources import CheckpointError
from bilens.saes.stored import releases

PUBLISHED = Path(__file__).parents[1] / "../shared/fixtures/published-format"


def write_scope(root, name, d=16, expansion=2, seed=0, **config):
    """Write a random SAE in the published layout; the name says where it goes."""
    layer, rest = name.split("-", 1)
    point, k = rest.split("-x")[0], int(rest.split("-k")[1].split("-")[0])
    generator = torch.Generator().manual_seed(seed)
    n = expansion * d
    shapes = {"w_enc.weight": (n, d), "w_dec.weight": (d, n), "b_dec": (d,)}
    tensors = {key: torch.randn(shape, generator=generator) / d**0.5 for key, shape in shapes.items()}
    (root / name).mkdir(parents=True)
    save_file(tensors, root / name / "model.safetensors")
    about = {"point": [point, int(layer)], "expansion": expansion, "d_model": d, "k": k, "normalize": None}
    (root / name / "config.json").write_text(json.dumps(about | config))


NAMES = ("0-mlp-out-x2-k6", "1-mlp-out-x2-k6", "1-resid-mid-x2-k9", "1-resid-mid-x2-k9-v1", "0-resid-mid-x2-k9")


@pytest.fixture
def scope(tmp_path):
    for seed, name in enumerate(NAMES):
        write_scope(tmp_path, name, seed=seed)
    return tmp_path


@pytest.fixture
def model(make_model):
    return make_model(dtype=torch.float32)


def test_the_catalogue_prints_what_there_is(scope):
    there = saes.catalogue(scope)
    assert [one.name for one in there] == sorted(NAMES, key=lambda name: (name[0], name))
    one = there[-1]
    assert (one.layer, one.point, one.expansion, one.k, one.tag) == (1, "hook_resid_mid", 2, 9, "v1")
    assert one.size == (scope / one.name / "model.safetensors").stat().st_size
    lines = repr(there).splitlines()
    assert lines[0] == f"5 SAEs in {scope}"
    assert lines[1].split() == ["name", "layer", "point", "kind", "expansion", "k", "tag", "size"]
    assert lines[-1].split()[:2] == ["1-resid-mid-x2-k9-v1", "1"]
    own = saes.catalogue("bilens-mini")
    assert [(one.layer, one.point, one.k) for one in own[:2]] == [(0, "hook_mlp_in", 32), (0, "hook_mlp_out", 32)]


def test_names_may_be_left_out_where_there_is_one_of_each(model, scope):
    lens = FeatureLayer.load(model, 0, scope)
    named = FeatureLayer.load(model, 0, scope, inp="0-resid-mid-x2-k9", out="0-mlp-out-x2-k6")
    assert lens.hook_in == "blocks.0.hook_resid_mid"
    assert torch.equal(lens.writers, named.writers)
    assert torch.equal(lens.readers, named.readers)
    assert lens.inp_cards is None
    with pytest.raises(ValueError, match=r"inp must name one of those before the MLP(.|\n)*1-resid-mid-x2-k9-v1"):
        FeatureLayer.load(model, 1, scope)
    assert FeatureLayer.load(model, 1, scope, inp="1-resid-mid-x2-k9-v1").layer == 1


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"inp": "1-resid-mid-x2-k8"}, FileNotFoundError, "it has 5, the nearest: 1-resid-mid-x2-k9,"),
        ({"inp": "0-resid-mid-x2-k9"}, ValueError, "inp must be an SAE at blocks.1.*which is at blocks.0.hook_resid"),
        ({"inp": "1-mlp-out-x2-k6"}, ValueError, "inp must be an SAE at .*, got '1-mlp-out-x2-k6', which is at"),
        ({"inp": "1-mlp-up-x2-k6"}, ValueError, "point must be one of resid-pre, .*got 'mlp-up'"),
        ({"inp": "mine"}, FileNotFoundError, r"inp must name one of .*'mine'\n5 SAEs in"),
        ({"saes": "no-such-place"}, FileNotFoundError, "no folder 'no-such-place'"),
        ({"revision": "v2"}, ValueError, "revision goes with a Hub repository"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(model, scope, options, error, says):
    with pytest.raises(error, match=says):
        FeatureLayer.load(model, 1, **({"saes": scope} | options))


def test_a_place_without_a_fitting_sae_lists_the_nearest(model, tmp_path):
    for name in NAMES[:2]:
        write_scope(tmp_path, name)
    with pytest.raises(ValueError, match=r"has no SAE at blocks.1.hook_mlp_in or .*; the nearest\n2 SAEs"):
        FeatureLayer.load(model, 1, tmp_path)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"normalize": 3.1}, "normalize must be null, got 3.1"),
        ({"target": ["mlp-out", 0]}, "target must be null or the point"),
        ({"bilinear_encoder": True}, "bilinear_encoder is set"),
        ({"expansion": 3}, r"must be \[16, 48\] by its config"),
    ],
    ids=str,
)
def test_published_saes_that_cannot_be_read_right_are_refused(model, scope, config, says):
    path = scope / "0-resid-mid-x2-k9" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(CheckpointError, match=says):
        FeatureLayer.load(model, 0, scope)


def test_an_sae_of_another_width_is_refused(make_model, scope):
    with pytest.raises(ValueError, match=r"must read 24 dimensions \(d_model\), got an SAE with d_in=16"):
        FeatureLayer.load(make_model(d_model=24), 0, scope)


def test_a_release_of_saelens_is_listed_without_a_download(model):
    name = next(name for name, there in releases().items() if any("blocks.1.hook_resid_pre" in one for one in there))
    there = saes.catalogue(name)
    assert len(there) == len(releases()[name])
    assert "hook_resid_pre" in {one.point for one in there}
    with pytest.raises(ValueError, match="revision goes with a Hub repository"):
        saes.catalogue(name, "v2")
    with pytest.raises(ValueError, match=r"has no SAE at .*, for inp; the nearest"):
        FeatureLayer.load(model, 1, name)


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="needs the published fixtures in ../shared")
@pytest.mark.parametrize("layer", [0, 1])
def test_the_published_fixtures_go_all_the_way(layer):
    model = bilens.load(PUBLISHED / "bilinear")
    lens = FeatureLayer.load(model, layer, PUBLISHED / "bilinear-scope")
    n, m = len(lens.writers), len(lens.readers)
    dense = torch.einsum("oa,aij,ui,vj->ouv", lens.readers, lens.tensor.dense(), lens.writers, lens.writers)
    dense = (dense + dense.mT) / 2
    pairs = dense * (2 - torch.eye(n))
    best = pairs.triu().abs().flatten().topk(20).values
    found = bilens.top_interactions(lens.tensor, 20, out=lens.readers, inp=lens.writers)
    torch.testing.assert_close(found.value.abs(), best, rtol=1e-5, atol=1e-6)
    tokens = torch.randint(3, model.cfg.d_vocab, (12, 20), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = model.bos_id
    attributed = bilens.attribute(model, tokens, layer, m - 1, inp=lens.inp, out=lens.out)
    torch.testing.assert_close(attributed.total, attributed.pre_activation, rtol=1e-5, atol=1e-5)
    generator = torch.Generator().manual_seed(0)
    assert circuits.search(lens, generator=generator, n=4, tail=False).score.isfinite().all()
