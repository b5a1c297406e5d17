"""Motifs: planted ones are found with their groups, null weights give none, and every score is what it says."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

import bilens
from bilens.circuits import discovery, motifs, nulls, scoring, search
from bilens.circuits.groups import split
from bilens.circuits.nulls import Null
from bilens.tensor.bilinear import BilinearTensor


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_layer(seed=0, n_out=48, d=48, hidden=192, n_in=128, dtype=torch.float32):
    """Gaussian weights between random dictionaries of unit rows."""
    generator = seeded(seed)

    def normal(rows, columns):
        return torch.randn(rows, columns, generator=generator, dtype=dtype) / columns**0.5

    B = BilinearTensor(normal(2 * n_out, hidden), normal(hidden, d), normal(hidden, d))
    readers, writers = (torch.nn.functional.normalize(normal(n, size)) for n, size in ((n_out, 2 * n_out), (n_in, d)))
    return B, readers, writers


def planted_layer(seed=0, strength=8.0, per=2, n_out=64, d=96, hidden=384, n_in=192):
    """Plant each motif in a few outputs, every coefficient `strength` times the typical one, by extra hidden units."""
    B, readers, writers = random_layer(seed, n_out, d, hidden, n_in)
    generator, duals = seeded(seed + 1), torch.linalg.pinv(readers.double()).T.float()
    terms, truth = [], {}
    for o, motif in zip(torch.randperm(len(readers), generator=generator).tolist(), scoring.MOTIFS * per, strict=False):
        M = B.matrix(readers[o])
        Q = writers @ M @ writers.T
        unit = 2 * Q[~torch.eye(len(Q), dtype=torch.bool)].square().mean().sqrt()
        c, a, b = torch.randperm(len(writers), generator=generator)[:8].split((2, 3, 3))
        C, A, B_ = (writers[group].sum(0) for group in (c, a, b))
        if motif == "and":
            rank_one, groups = [(A, B_, 1)], (a, b)
        elif motif == "xor":
            rank_one, groups = [(C, A, 1), (C, B_, -1)], (c, a, b)
        elif motif == "negation":
            rank_one, groups = [(C, A, -1), (C, B_, 1)], (c, a, b)
            rank_one += [(writers[k], writers[k], 1 if k in a else -1) for k in (*a, *b)]
        elif motif == "copy":
            rank_one, groups = [(writers[a[0]], writers[a[0]], 2)], (a[:1],)
        else:
            far = 2 * torch.linalg.eigvalsh(M).abs().max() / unit / strength
            u, v = torch.nn.functional.normalize(torch.randn(2, M.shape[0], generator=generator))
            rank_one, groups = [(u, u, far), (v, v, -far)], ()
        terms += [(duals[o] * strength * unit * weight, left, right) for left, right, weight in rank_one]
        truth[o] = motif, [set(group.tolist()) for group in groups]
    down, left, right = (torch.stack(parts) for parts in zip(*terms, strict=True))
    planted = BilinearTensor(torch.cat((B.down, down.T), 1), torch.cat((B.left, left)), torch.cat((B.right, right)))
    return (planted, readers, writers), truth


# -- scores -----------------------------------------------------------------------------------------------------------


def random_coefficients(n=5, m=12, seed=0):
    T = torch.randn(n, m, m, generator=seeded(seed), dtype=torch.float64)
    return T + T.mT


def pair(T, sign, i, j):
    return (sign * T[i, j] - abs(T[i, i]) - abs(T[j, j])).item()


def block(score, rows, columns):
    return sum(score(i, j) for i in rows for j in columns) / math.sqrt(len(rows) * len(columns))


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_the_groups_they_name(seed):
    T = random_coefficients(seed=seed)
    for name, score in motifs.GROUPED.items():
        found = score(T, 3)
        for o in range(len(T)):
            groups, t = [mask[o].nonzero()[:, 0].tolist() for mask in found.masks], T[o]
            assert all(1 <= len(group) <= 3 for group in groups[:3])
            assert len(set().union(*groups)) == sum(map(len, groups))
            if name == "and":
                expected = max(block(lambda i, j, t=t, s=sign: pair(t, s, i, j), *groups) for sign in (1, -1))
            else:
                plus, minus = _opposed(t, *groups[3:])
                expected = min(block(plus, groups[0], groups[1]), block(minus, groups[0], groups[2]))
            assert found.score[o].item() == pytest.approx(expected)


def _opposed(t, reference=None):
    if reference is None:  # xor
        return lambda i, j: pair(t, 1, i, j), lambda i, j: pair(t, -1, i, j)
    if not reference:
        return (
            lambda c, p: min(t[p, p], -t[c, p]).item() - abs(t[c, c].item()),
            lambda c, p: min(-t[p, p], t[c, p]).item() - abs(t[c, c].item()),
        )
    (r,) = reference
    return (
        lambda c, p: min(pair(t, 1, r, p), pair(t, -1, c, p)),
        lambda c, p: min(pair(t, -1, r, p), pair(t, 1, c, p)),
    )


def test_a_strong_block_is_the_best_of_all_pairs_of_groups():
    T = random_coefficients(1, 7, seed=4) / 4
    T[0, :2, 2:4] -= 5
    T[0, 2:4, :2] -= 5
    found, sets = (
        motifs.GROUPED["and"](T, 3),
        [s for k in (1, 2, 3) for s in itertools.combinations(range(7), k)],
    )
    best = max(
        block(lambda i, j, s=sign: pair(T[0], s, i, j), a, b)
        for sign in (1, -1)
        for a in sets
        for b in sets
        if not {*a} & {*b}
    )
    assert found.score[0].item() == pytest.approx(best)
    assert {tuple(mask[0].nonzero()[:, 0].tolist()) for mask in found.masks} == {(0, 1), (2, 3)}


def test_the_square_of_one_direction_has_no_group_motif():
    v = torch.randn(3, 20, generator=seeded(), dtype=torch.float64)
    T = 2 * v[:, :, None] * v[:, None, :]
    T.diagonal(dim1=1, dim2=2).div_(2)
    for T_signed in (T, -T):
        for score in motifs.GROUPED.values():
            assert (score(T_signed, 8).score <= 1e-12).all()


def test_strongest_features_and_their_coefficients_are_those_of_the_dense_matrix(monkeypatch):
    B, readers, D = random_layer(dtype=torch.float64, n_in=50)
    M = B.matrix(readers[:3])
    monkeypatch.setattr(scoring, "NUMBERS", 50 * 3 * 16)  # several blocks of rows
    found = scoring.strongest_features(M, D, 9)
    Q = D @ M @ D.T
    coefficient = 2 * Q - torch.diag_embed(Q.diagonal(dim1=1, dim2=2))
    largest = coefficient.abs().amax(-1)  # the two features of a pair tie, up to the last bits of this product
    torch.testing.assert_close(largest.gather(1, found.features), largest.topk(9).values)
    assert all(len(set(some)) == 9 for some in found.features.tolist())
    cross = coefficient[:, ~torch.eye(50, dtype=torch.bool)]
    torch.testing.assert_close(found.unit, cross.square().mean(1).sqrt())
    torch.testing.assert_close(found.own, Q.diagonal(dim1=1, dim2=2))
    for o, features in enumerate(found.features):
        torch.testing.assert_close(found.T[o] * found.unit[o], coefficient[o][features][:, features])


def test_outlier_and_copy_are_what_they_say():
    B, readers, D = random_layer(dtype=torch.float64, n_in=50)
    found = search((B, readers, D), ["outlier", "copy"], generator=seeded(), n=200)
    values = torch.linalg.eigvalsh(B.matrix(readers)).abs().sort(1, descending=True).values
    torch.testing.assert_close(found.score[:, 0], values[:, 1] / (2 * values[:, 2:].square().mean(1).sqrt()))
    squares = 3 * torch.einsum("fi,fj->fij", D, D)
    M = B.matrix(readers)
    cosine = torch.nn.functional.cosine_similarity(M.flatten(1)[:, None], squares.flatten(1)[None], dim=-1)
    torch.testing.assert_close(found.score[:, 1], cosine.abs().amax(1))


def test_scores_do_not_depend_on_scale():
    B, readers, D = random_layer(dtype=torch.float64)
    one, other = (
        search((B, readers * scale, D), generator=seeded(), n=1, tail=False, null="readers") for scale in (1, 8)
    )
    torch.testing.assert_close(one.score, other.score)


@pytest.mark.parametrize("sign", [1, -1])
def test_split_finds_the_two_factors_of_a_product(sign):
    left, right = torch.zeros(2, 8, dtype=torch.float64)
    left[:3], right[3:6] = torch.tensor([2.0, -1.0, 1.5]), sign * torch.tensor([1.0, 1.0, -2.0])
    Q = (left[:, None] * right + right[:, None] * left) / 2
    side, weights = split(Q)
    factors = torch.stack([torch.where(side == i, weights, 0) for i in (0, 1)])
    torch.testing.assert_close((factors[0][:, None] * factors[1] + factors[1][:, None] * factors[0]) / 2, Q)
    assert {tuple(side[:3].tolist()), tuple(side[3:6].tolist())} == {(0, 0, 0), (1, 1, 1)}


# -- discoveries ------------------------------------------------------------------------------------------------------


def test_planted_motifs_are_found_with_their_groups():
    hits, planted, false, found_outputs = 0, 0, 0, 0
    for seed in range(4):
        layer, truth = planted_layer(seed)
        found = search(layer, generator=seeded(seed), n=512)
        planted += len(truth)
        found_outputs += len({one.out for one in found.found})
        false += len({one.out for one in found.found} - set(truth))
        for o, (motif, groups) in truth.items():
            named = [one for one in found.of(motif) if one.out == o]
            hits += len(named)
            if named and groups:
                found_groups = [set(group.features.tolist()) for group in named[0].groups[: len(groups)]]
                if motif == "and":
                    found_groups.sort(key=lambda group: -len(group & groups[0]))
                shared = sum(len(a & b) for a, b in zip(found_groups, groups, strict=True))
                assert shared >= 0.7 * sum(map(len, groups))
    assert hits >= 0.95 * planted
    assert false <= 0.05 * found_outputs


def test_group_weights_carry_the_planted_signs():
    layer, truth = planted_layer(5)
    found = search(layer, generator=seeded(), n=512)
    signs = {"xor": {"shared": 1, "for": 1, "against": -1}, "negation": {"negators": -1, "positive": 1, "negative": -1}}
    checked = 0
    for motif, roles in signs.items():
        for one in found.of(motif):
            if truth.get(one.out, ("",))[0] == motif:
                for group in one.groups[:3]:
                    assert (group.weights.sign() == roles[group.role]).all()
                    assert (group.weights.abs().diff() <= 0).all()
                    checked += 1
    assert checked == 12


def test_null_weights_give_no_discoveries():
    clean = [not search(random_layer(seed, d=32, n_in=64), generator=seeded(seed), n=300).found for seed in range(10)]
    assert sum(clean) >= 9


@pytest.mark.parametrize("null", nulls.NULLS)
def test_every_null_model_finds_the_strongest_and_gates(null):
    layer, truth = planted_layer(2, strength=20, n_out=32)
    n = 1280 if null == "signs" else 320  # the signs of a few coefficients are little evidence
    found = search(layer, ["and"], null=null, generator=seeded(), n=n)
    gates = [o for o, (motif, _) in truth.items() if motif == "and"]
    assert found.nulls[0].name == null
    assert set(gates) <= {one.out for one in found.found}


def test_of_several_null_models_the_largest_p_value_counts():
    layer, _ = planted_layer(2)
    both = search(layer, ["and"], null=["readers", "signs"], generator=seeded(), n=300)
    torch.testing.assert_close(both.p, torch.maximum(*(null.p(both.score) for null in both.nulls)))
    assert [null.name for null in both.nulls] == ["readers", "signs"]


def test_the_same_generator_gives_the_same_result():
    layer, _ = planted_layer(1)
    one, two, three = (search(layer, ["xor"], generator=seeded(s), n=200) for s in (0, 0, 1))
    assert torch.equal(one.p, two.p)
    assert not torch.equal(one.p, three.p)
    assert torch.equal(one.score, three.score)


def test_the_ranking_tells_which_features_to_look_at():
    layer, _ = planted_layer(1)
    known = bilens.top_interactions(layer[0], 1, out=layer[1], inp=layer[2], features=64).features
    one, other = (search(layer, generator=seeded(), n=200, features=features) for features in (64, known))
    torch.testing.assert_close(one.score, other.score, rtol=1e-4, atol=1e-4)
    assert [(found.out, found.motif) for found in one.found] == [(found.out, found.motif) for found in other.found]


def test_a_layer_with_biases_has_the_interactions_of_the_one_without():
    B, readers, D = random_layer(dtype=torch.float64)
    biased = BilinearTensor.from_weights(B.down, B.left, B.right, B.left[:, 0], B.right[:, 1], B.down[:, 0])
    one, other = (search((layer, readers, D), generator=seeded(), n=1, tail=False) for layer in (B, biased))
    torch.testing.assert_close(one.score, other.score)


# -- statistics -------------------------------------------------------------------------------------------------------


def draws(name, layer):
    B, readers, D = layer
    task = scoring.Scoring(B, readers, D, ("and",), 16, 4)
    T = torch.cat([found.T for _, found, _ in task.observe(readers, ("and",))])
    return next(iter(nulls.draws(task, name, 20, seeded(), T))), T


def test_null_models_keep_what_they_promise():
    B, readers, D = layer = random_layer(dtype=torch.float64)
    M = B.matrix(readers[:20])
    (rotated_M, rotated), _ = draws("rotation", layer)
    torch.testing.assert_close(rotated @ rotated.T, D @ D.T)
    torch.testing.assert_close(rotated_M, M)
    assert (rotated - D).abs().max() > 0.1
    (flipped,), T = draws("signs", layer)
    torch.testing.assert_close(flipped.abs(), T[:20].abs())
    torch.testing.assert_close(flipped, flipped.mT)
    assert 0.4 < (flipped == T[:20]).double().mean() < 0.6
    untrained = nulls.untrained(B, seeded())
    for name in ("down", "left", "right"):
        torch.testing.assert_close(getattr(untrained, name).norm(), getattr(B, name).norm())
    noise = nulls.directions(scoring.Scoring(B, readers, D, ("and",), 16, 4), 20, seeded())
    torch.testing.assert_close(noise.norm(dim=1), readers[:20].norm(dim=1))
    assert torch.cosine_similarity(B.matrix(noise).flatten(1), M.flatten(1)).abs().max() < 0.9


def test_no_output_is_drawn_twice_from_one_rotation():
    B, readers, D = random_layer(n_out=10, dtype=torch.float64)
    task = scoring.Scoring(B, readers, D, ("and",), 16, 4)
    drawn = list(nulls.draws(task, "rotation", 25, seeded(), None))
    assert [len(M) for M, _ in drawn] == [10, 10, 5]
    assert (drawn[0][1] - drawn[1][1]).abs().max() > 0.1


def test_p_values_count_the_null_scores_above():
    scores = torch.tensor([[1.0], [2.0], [2.0], [3.0]])
    nothing = torch.full((1,), math.nan)
    null = Null("readers", ("and",), scores.double(), nothing, nothing, nothing, torch.zeros(1, 1), torch.ones(1, 1))
    assert null.p(torch.tensor([[0.5], [2.0], [2.5], [9.0]]))[:, 0].tolist() == [1.0, 0.8, 0.4, 0.2]


@pytest.mark.parametrize(
    ("draw", "survival"),
    [
        (lambda u: -torch.log(u), lambda x: torch.exp(-x)),
        (lambda u: 4 * (u**-0.25 - 1), lambda x: (1 + x / 4) ** -4),  # a heavy tail of shape 1/4
        (lambda u: -torch.special.ndtri(u), lambda x: torch.special.ndtr(-x)),
    ],
)
def test_the_fitted_tail_is_close_and_rather_too_heavy(draw, survival):
    x = draw(torch.tensor([1e-3, 1e-4, 1e-5], dtype=torch.float64))[:, None]
    logs = []
    for seed in range(20):
        null = nulls.fit("readers", ("and",), draw(torch.rand(2000, 1, generator=seeded(seed)).double()), 1, True)
        logs.append((null.p(x) / survival(x)).log10())
    error = torch.stack(logs).median(0).values
    assert (error > -0.4).all()
    assert (error < 1.5).all()


def test_q_values_are_those_of_benjamini_and_hochberg():
    p = torch.tensor([[0.01, 0.04], [0.03, 0.9], [0.001, 0.05]], dtype=torch.float64)
    expected = torch.tensor([[0.03, 0.06], [0.06, 0.9], [0.006, 0.06]], dtype=torch.float64)
    torch.testing.assert_close(discovery.q_values(p), expected)


def test_records_show_sizes_and_the_top_line():
    layer, _ = planted_layer(0)
    found = search(layer, ["and", "xor"], generator=seeded(), n=300)
    first = found.found[0]
    assert repr(found) == (
        f"Discoveries({len(found.found)} of 64 outputs × 2 motifs at FDR 0.05; first: {first.motif} in #{first.out})"
    )
    assert repr(first).startswith(f"Discovery({first.motif} in #{first.out}, score=")
    assert "\n" not in repr(first)
    assert repr(found.nulls[0]) == "Null('readers', 300 outputs × 2 motifs)"
    assert [one.q for one in found.found] == sorted(one.q for one in found.found)
    assert all(one.motif == "xor" for one in found.of("xor"))


@pytest.mark.parametrize("null", ["readers", "rotation"])
def test_the_smallest_layer_has_finite_scores(null):
    B, readers, D = random_layer(n_out=3, d=4, hidden=5, n_in=4)
    found = search((B, readers, D), null=null, generator=seeded(), n=200)
    assert found.score.isfinite().all()
    assert found.nulls[0].scores.isfinite().all()
    assert ((found.p > 0) & (found.p <= 1)).all()


def test_whatever_has_a_tensor_readers_and_writers_is_a_layer():
    B, readers, D = random_layer(n_in=20)
    layer = SimpleNamespace(tensor=B, readers=readers, writers=D)
    one, other = (search(each, ["and"], generator=seeded(), n=1, tail=False) for each in (layer, (B, readers, D)))
    assert torch.equal(one.score, other.score)


def test_a_draw_is_measured_against_the_other_draws_of_its_output():
    draws = torch.randn(9, 4, 2, generator=seeded()).double()
    scores, center, spread = nulls.standardized(draws)
    others = draws[[0, 1, 2, 4, 5, 6, 7, 8], 3, 1]
    expected = (draws[3, 3, 1] - others.mean()) / others.std()
    torch.testing.assert_close(scores.unflatten(0, (9, 4))[3, 3, 1], expected)
    torch.testing.assert_close((center[3, 1], spread[3, 1]), (draws[:, 3, 1].mean(), draws[:, 3, 1].std()))


@pytest.mark.usefixtures("unchecked")
def test_errors_name_the_argument():
    layer = B, readers, D = random_layer(n_in=20)
    for arguments, message in [
        ({"motifs": ["or"]}, r"motifs must be among \('outlier', 'and', 'xor', 'negation', 'copy'\), got \['or'\]"),
        ({"motifs": []}, "motifs must be among"),
        ({"motifs": ["and", "and"]}, "motifs must be named once each"),
        ({"null": "shuffle"}, r"null must be among \('readers', 'rotation', 'signs', 'untrained'\), got \['shuffle'\]"),
        ({"motifs": ["outlier"], "null": "rotation"}, r"for null=\('rotation',\), got \['outlier'\]"),
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"n": 50}, "n must be at least 200 to fit a tail"),
        ({"fdr": 0.0}, "fdr must lie between 0 and 1"),
        ({"features": 3}, "features must be at least 4, got 3"),
        ({"group": 0}, "group must be at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            search(layer, generator=seeded(), **arguments)
    with pytest.raises(ValueError, match=r"readers must have shape \[n, 96\], got \[48, 95\]"):
        search((B, readers[:, 1:], D), generator=seeded())
    with pytest.raises(ValueError, match=r"writers must have shape \[n, 48\] with n at least 4, got \[20, 47\]"):
        search((B, readers, D[:, 1:]), generator=seeded())
    with pytest.raises(ValueError, match="finite, got others in writers"):
        search((B, readers, D.clone().fill_(math.nan)), generator=seeded())
    with pytest.raises(ValueError, match=r"features must have shape \[48, m\], got \[47, 5\]"):
        search(layer, generator=seeded(), features=torch.zeros(47, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="features must lie between 0 and 19, got 20 to 20"):
        search(layer, generator=seeded(), features=torch.full((48, 5), 20))
    with pytest.raises(ValueError, match="motif must be among"):
        search(layer, ["and"], generator=seeded(), n=1, tail=False).of("xor")


@pytest.mark.parametrize("n", [1, 7, 40])
def test_the_strongest_features_are_those_of_the_dense_matrix(n):
    """Computed in blocks from the diagonal on: the number of features need not be a multiple of theirs."""
    generator = torch.Generator().manual_seed(n)
    D = torch.randn(n, 8, generator=generator, dtype=torch.float64)
    M = torch.randn(3, 8, 8, generator=generator, dtype=torch.float64)
    M = M + M.mT
    found = scoring.strongest_features(M, D, min(n, 5))
    T = 2 * D @ M @ D.T
    T.diagonal(dim1=1, dim2=2).div_(2)
    torch.testing.assert_close(found.own, T.diagonal(dim1=1, dim2=2))
    largest = T.abs().amax(2)
    torch.testing.assert_close(largest.gather(1, found.features), largest.topk(min(n, 5)).values)
