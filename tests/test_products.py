"""Forms in factors against dense matrices, and the ranking of their entries against brute force."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bilens.tensor import products
from bilens.tensor.forms import BilinearForm, LinearMap
from bilens.tensor.products import top_entries


def random(g, *shape):
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def integers(g, *shape):
    return torch.randint(-2, 3, shape, generator=g).double()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def a_form(g, constant, make=random, hidden=3, n_query=4, n_key=5):
    biases = (make(g, hidden), make(g, hidden)) if constant else ()
    return BilinearForm.from_weights(make(g, hidden, n_query), make(g, hidden, n_key), *biases)


# -- forms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constant", [False, True])
def test_a_form_is_its_matrix(constant):
    g = torch.Generator().manual_seed(0)
    F = a_form(g, constant)
    x, y = random(g, 7, 4), random(g, 7, 5)
    one = torch.ones(7, 1, dtype=torch.float64)
    long = [torch.cat((side, one), 1) if constant else side for side in (x, y)]
    close(F.apply(x, y), torch.einsum("ni,ij,nj->n", long[0], F.dense(), long[1]))
    close(F.apply(x[:, None], y), torch.einsum("ni,ij,mj->nm", long[0], F.dense(), long[1]))
    close(F.norm(), F.dense().norm())
    close(F.inner(F.to(torch.float64)), F.dense().pow(2).sum())
    assert F.shape == tuple(F.dense().shape)


@pytest.mark.parametrize("constant", [False, True])
def test_a_forms_biases_are_its_constant_legs(constant):
    g = torch.Generator().manual_seed(1)
    Q, K, b, c = random(g, 3, 4), random(g, 3, 4), random(g, 3), random(g, 3)
    x, y = random(g, 6, 4), random(g, 6, 4)
    F = BilinearForm.from_weights(Q, K, b, c if constant else None)
    close(F.apply(x, y), ((x @ Q.T + b) * (y @ K.T + (c if constant else 0))).sum(1))
    close(F.without_constant().apply(x, y), (x @ Q.T * (y @ K.T)).sum(1))


@pytest.mark.parametrize("constant", [False, True])
def test_a_change_of_basis_is_one_of_the_inputs(constant):
    g = torch.Generator().manual_seed(2)
    F, D, E = a_form(g, constant), random(g, 6, 4), random(g, 9, 5)
    z, w = random(g, 3, 6), random(g, 3, 9)
    close(F.project(D, E).apply(z, w), F.apply(z @ D, w @ E))
    close(F.project(query=D).apply(z, w[:, :5]), F.apply(z @ D, w[:, :5]))


@pytest.mark.parametrize("constant", [False, True])
def test_a_form_is_a_tensor_of_both_inputs(constant):
    g = torch.Generator().manual_seed(3)
    F = a_form(g, constant)
    x, y = random(g, 5, 4), random(g, 5, 5)
    close(F.tensor().apply(torch.cat((x, y), 1))[:, 0], F.apply(x, y))


@pytest.mark.parametrize("sizes", [(3, 4, 5), (6, 4, 9), (6, 9, 2)])
def test_singular_vectors_make_up_the_matrix(sizes):
    g = torch.Generator().manual_seed(4)
    F = a_form(g, False, random, *sizes)
    left, values, right = F.singular()
    close(left.T @ torch.diag(values) @ right, F.dense())
    close(values, torch.linalg.svdvals(F.dense())[: len(values)])
    M = LinearMap(F.query.T, F.key)
    left, values, right = M.singular(2)
    close(M.apply(right), values[:, None] * left)


@pytest.mark.parametrize("constant", [False, True])
def test_a_map_is_its_matrix(constant):
    g = torch.Generator().manual_seed(5)
    O, V, b = random(g, 6, 3), random(g, 3, 4), random(g, 3)
    M = LinearMap.from_weights(O, V, b if constant else None)
    x, readers, writers = random(g, 7, 4), random(g, 8, 6), random(g, 5, 4)
    close(M.apply(x), (x @ V.T + (b if constant else 0)) @ O.T)
    close(M.dense()[:, :4], O @ V)
    close(M.norm(), M.dense().norm())
    z = random(g, 2, 5)
    close(M.project(readers, writers).apply(z), M.apply(z @ writers) @ readers.T)


def test_factors_that_do_not_fit_are_refused(unchecked):
    g = torch.Generator().manual_seed(6)
    with pytest.raises(ValueError, match=r"query and key must be matrices that share their hidden axis.*\[3, 4\].*\[2"):
        BilinearForm(random(g, 3, 4), random(g, 2, 4))
    with pytest.raises(ValueError, match="one floating dtype and one device"):
        LinearMap(random(g, 3, 4), random(g, 4, 4).float())
    F = a_form(g, True)
    with pytest.raises(ValueError, match=r"y must have 5 entries on its last axis, got \[3, 6\]"):
        F.apply(random(g, 3, 4), random(g, 3, 6))
    with pytest.raises(ValueError, match=r"key must have shape \[n, 5\], got \[2, 4\]"):
        F.project(key=random(g, 2, 4))
    with pytest.raises(ValueError, match="k must lie between 1 and 3, got 4"):
        F.singular(4)
    with pytest.raises(ValueError, match="same legs"):
        F.inner(a_form(g, False))


# -- ranking ----------------------------------------------------------------------------------------------------------


def brute_force(forms, query=None, key=None, cosine=False):
    """Every (value, out, left, right) in the promised order, from dense matrices in float64."""
    rows = []
    for o, branches in enumerate(forms):
        product = 1.0
        for form in branches:
            legs = []
            for basis, factor in ((query, form.query.double()), (key, form.key.double())):
                leg = factor.T
                if basis is not None:
                    eye = torch.ones(1, 1).double() if form.constant else torch.ones(0, 0).double()
                    leg = torch.block_diag(basis.double(), eye) @ factor.T
                legs.append(leg / leg.norm(dim=1, keepdim=True).clamp(min=1e-300) if cosine else leg)
            product = product * (legs[0] @ legs[1].T)
        rows += [(product[i, j].item(), o, i, j) for i in range(len(product)) for j in range(product.shape[1])]
    return sorted(rows, key=lambda row: (-abs(row[0]), *row[1:]))


def listed(found):
    columns = (found.out, found.left, found.right)
    return list(zip(found.value.tolist(), *(part.tolist() for part in columns), strict=True))


@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, 80),
    constant=st.booleans(),
    written=st.booleans(),
    branches=st.integers(1, 3),
    tile=st.sampled_from([1, 7, 1 << 22]),
)
def test_exact_order_with_ties(seed, k, constant, written, branches, tile):
    g = torch.Generator().manual_seed(seed)
    forms = [[a_form(g, constant, integers) for _ in range(branches)] for _ in range(3)]
    query, key = (integers(g, 3, 4), integers(g, 6, 5)) if written else (None, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_TILE", tile)
        found = top_entries(forms, k, query, key)
    expected = brute_force(forms, query, key)
    assert listed(found) == expected[:k]
    assert found.certificate.screened == len(expected)
    assert found.certificate.error <= found.certificate.bound


@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, 300),
    scale=st.sampled_from([1e-25, 1.0, 1e18]),
    wide=st.booleans(),
    branches=st.integers(1, 2),
    cosine=st.booleans(),
    tile=st.sampled_from([20, 1 << 22]),
)
def test_real_numbers_with_rows_of_all_kinds(seed, k, scale, wide, branches, cosine, tile):
    """Repeated, zero, tiny and huge rows; entries that differ by less than float32 resolves."""
    g = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if wide else torch.float32
    forms = []
    for o in range(2):
        size = 1e-3 if o else 1.0  # a head whose queries are a thousand times smaller
        some = [a_form(g, False, random, 8, 12, 12) for _ in range(branches)]
        factor = size * scale ** (1 / branches)  # of the product
        forms.append([BilinearForm((f.query * factor).to(dtype), f.key.to(dtype)) for f in some])
    query, key = random(g, 20, 12), random(g, 15, 12)
    for rows in (query, key):
        rows[3], rows[4], rows[5] = rows[2], 0, rows[2] * (1 + 1e-9)
        rows[6] *= 1e-6
    query, key = query.to(dtype), key.to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_TILE", tile)
        found = top_entries(forms, k, query, key, cosine)
    expected = brute_force(forms, query, key, cosine)[:k]
    assert len(found) == len(expected)
    strengths = torch.tensor([abs(value) for value, *_ in expected], dtype=torch.float64)
    precision = 1e-11 if wide else 1e-6
    torch.testing.assert_close(found.value.abs().double(), strengths, rtol=precision, atol=1e-300)
    exact = {(o, i, j): value for value, o, i, j in brute_force(forms, query, key, cosine)}
    for value, *index in listed(found):
        assert value == pytest.approx(exact[tuple(index)], rel=precision, abs=1e-300)
    assert len({tuple(index) for _, *index in listed(found)}) == len(found)
    assert found.value.dtype == dtype


def test_a_large_ranking_verifies_few():
    g = torch.Generator().manual_seed(0)
    forms = [[BilinearForm(random(g, 16, 32).float(), random(g, 16, 32).float())] for _ in range(4)]
    D = random(g, 700, 32).float()
    found = top_entries(forms, 50, D, D)
    dense = torch.stack([D.double() @ form.to(torch.float64).dense() @ D.double().T for (form,) in forms])
    torch.testing.assert_close(found.value.abs().double(), dense.abs().flatten().topk(50).values, rtol=1e-6, atol=0)
    assert found.certificate.screened == dense.numel()
    assert found.certificate.verified < 2000


def test_products_less_exact_than_granted_are_noticed(monkeypatch):
    g = torch.Generator().manual_seed(0)
    forms = [[a_form(g, False, random, 8, 30, 30)]]
    true = products._Matrix._tile
    monkeypatch.setattr(products._Matrix, "_tile", lambda self, rows: true(self, rows) * 1.001)
    with pytest.raises(RuntimeError, match="less exact than granted"):
        top_entries(forms, 5)


def test_bad_rankings_are_refused(unchecked):
    g = torch.Generator().manual_seed(7)
    F = a_form(g, True)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        top_entries([[F]], 0)
    with pytest.raises(ValueError, match="at least one form for each matrix"):
        top_entries([[F], []], 1)
    with pytest.raises(ValueError, match=r"query must have shape \[n, 4\], got \[2, 5\]"):
        top_entries([[F]], 1, random(g, 2, 5))
    with pytest.raises(ValueError, match="same legs"):
        top_entries([[F], [a_form(g, False)]], 1)
    bad = random(g, 2, 4)
    bad[1, 0] = torch.nan
    with pytest.raises(ValueError, match="query must be finite, but its row 1 is NaN"):
        top_entries([[F]], 1, bad)
