"""Dictionaries that are no SAE of a library: plain arrays, and latents that are quadratic forms."""

import pytest
import torch
from test_circuits import random_sae

import bilens
from bilens import circuits, saes
from bilens.circuits import FeatureLayer
from bilens.models.windows import Windows

OUT = "blocks.1.hook_mlp_out"


def exactly(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.fixture
def tokens(make_model):
    tokens = torch.randint(3, make_model().cfg.d_vocab, (8, 12), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = make_model().bos_id
    return tokens


def rows(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_arrays_compute_what_they_say():
    readers, writers, offsets, bias, x = rows(9, 6), rows(9, 6, seed=1), rows(9, seed=2), rows(6, seed=3), rows(4, 6)
    sae = saes.of_arrays(readers, writers, offsets=offsets, bias=bias, activation="relu", k=3)
    pre = (x @ readers.T + offsets).relu()
    exactly(sae.encode(x), pre * (pre >= pre.topk(3).values[:, -1:]))
    exactly(sae(x), sae.encode(x) @ writers + bias)
    exactly(saes.of_arrays(readers, writers, bias=bias).encode(x), (x - bias) @ readers.T)
    for one in ({"readers": readers}, {"writers": writers}):
        exactly(saes.of_arrays(**one)(x), x)  # nine rows span six dimensions


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({}, "readers or writers must be given, got neither"),
        (
            {"readers": torch.ones(3)},
            r"readers must be floating point \[feature, d\], got .* of shape \[3\]",
        ),
        ({"readers": torch.ones(3, 4), "writers": torch.ones(3, 5)}, "must have one shape"),
        ({"readers": torch.ones(3, 4), "activation": "gelu"}, "activation must be one of identity, relu, got 'gelu'"),
        ({"readers": torch.ones(3, 4), "k": 4}, "k must lie between 1 and 3"),
        ({"readers": torch.ones(3, 4), "bias": torch.ones(3)}, r"bias must have shape \[4\], got \[3\]"),
    ],
    ids=str,
)
def test_arrays_that_do_not_fit_are_refused(arrays, says):
    with pytest.raises(ValueError, match=says):
        saes.of_arrays(**arrays)


def test_principal_components_go_around_a_layer(make_model, tokens):
    model = make_model()
    basis = torch.linalg.qr(rows(16, 16))[0]
    lens = FeatureLayer(model, 1, saes.of_arrays(writers=basis, hook="blocks.1.hook_resid_mid"), random_sae(OUT))
    found = bilens.attribute(model, tokens, 1, 7, inp=lens.inp, out=lens.out)
    assert max(part.abs().max() for part in (found.error, found.feature_error, found.error_bias)) < 1e-10
    exactly(found.total, found.pre_activation)
    x = lens.at_positions(Windows.of(model, tokens), lambda x, y: lens.codes(x))
    torch.testing.assert_close(x.pow(2).sum(1), torch.full_like(x[:, 0], 16.0))  # a rotation of what the norm gives


# -- latents that are quadratic forms ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
def test_bilinear_latents_are_forms_of_the_unit_vector():
    made, x = saes.BilinearAutoencoder(rows(5, 6), rows(5, 6, seed=1), "blocks.0.hook_resid_mid"), rows(7, 6, seed=2)
    u = x / x.norm(dim=1, keepdim=True)
    f = made.encode(x)
    exactly(f, torch.stack([((u @ made.matrix(j)) * u).sum(1) for j in range(5)], 1))
    exactly(f, made.encode(3 * x))
    rebuilt = torch.einsum("nj,ja,jb->nab", f, made.left, made.right)
    exactly(made.loss(x), (torch.einsum("na,nb->nab", u, u) - rebuilt).pow(2).sum((1, 2)))
    for j in range(5):
        values, vectors = made.eigen(j)
        exactly(vectors.T * values @ vectors, made.matrix(j))
        exactly(vectors @ vectors.T, torch.eye(2, dtype=torch.float64))
    assert "5 latents of 6 dimensions at blocks.0.hook_resid_mid" in repr(made)
    with pytest.raises(ValueError, match=r"must have one shape \[feature, d\], got \[5, 6\] and \[4, 6\]"):
        saes.BilinearAutoencoder(rows(5, 6), rows(4, 6))


def test_a_bilinear_layer_is_linear_in_bilinear_latents(make_model):
    layer, eye = make_model().blocks[1].mlp.tensor().detach(), torch.eye(16, dtype=torch.float64)
    made = saes.BilinearAutoencoder(eye.repeat_interleave(16, 0), eye.repeat(16, 1))  # all products of two entries
    x = rows(7, 16)
    assert made.loss(x).abs().max() < 1e-10
    exactly(x.pow(2).sum(1, keepdim=True) * (made.encode(x) @ made.writes(layer)), layer.apply(x))


# -- what an input feature modifies -----------------------------------------------------------------------------------


def test_a_feature_modifies_the_default_feature_that_its_factor_multiplies(make_model, tokens):
    model, eye = make_model(d_hidden=16), torch.eye(16, dtype=torch.float64)
    scales = torch.arange(1, 17, dtype=torch.float64)
    with torch.no_grad():  # hidden unit h is x_h times (h + 1) x_{h+1}
        model.blocks[1].mlp.w.weight.copy_(torch.cat((eye, scales[:, None] * eye.roll(1, 1))))
    lens = FeatureLayer(model, 1, saes.of_arrays(writers=eye, hook="blocks.1.hook_resid_mid"), random_sae(OUT))
    found = circuits.modified(lens, 4, k=3)
    default = found.modified.feature[0]
    exactly(found.defaults.patterns[default].abs(), eye[4])
    exactly(found.modified.change[0], 5 * model.blocks[1].mlp.p.weight[:, 4].norm())
    assert found.modified.change[1] < 1e-9
    assert found.names[0].startswith(f"{lens.name('inp', 5)} → ")
    assert found.partners == ()
    along = circuits.modified(lens, eye[4], k=3)
    exactly(along.modified.change, found.modified.change)
    assert along.name == "a direction"
    seen = circuits.modified(lens, 4, k=1, texts=tokens)
    assert {one.together for one in seen.partners} == {1.0}  # plain coordinates are never zero
    assert found.to_dict()["modified"][0]["default"] == default


def test_partners_are_active_with_the_feature(make_model, tokens):
    lens = FeatureLayer(make_model(), 1, random_sae("blocks.1.hook_mlp_in"), random_sae(OUT, seed=1))
    z = lens.at_positions(Windows.of(lens.model, tokens), lambda x, y: lens.codes(x))
    feature = int((z != 0).sum(0).argmax())
    found = circuits.modified(lens, feature, k=4, texts=tokens)
    here = z[z[:, feature] != 0]
    assert found.partners
    for one in found.partners:
        assert one.feature != feature
        assert one.together == pytest.approx((here[:, one.feature] != 0).double().mean().item())
        assert one.by_chance == pytest.approx((z[:, one.feature] != 0).double().mean().item())
        activated = found.defaults.readers[one.default] @ lens.writers[one.feature]
        assert one.activation == pytest.approx(activated.item())
    best = (found.defaults.readers[found.modified.feature[0]] @ lens.writers.T).abs() * here.abs().sum(0)
    best[feature] = 0
    assert found.partners[0].feature == best.argmax()
    from bilens.report import tensorplots

    assert tensorplots.modified(found.modified, found.names).data[0].x[0].startswith(f"#{found.partners[0].default} ")
