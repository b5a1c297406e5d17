"""`top_interactions` against brute force over every output feature and every pair."""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bilens import BilinearTensor, top_interactions
from bilens.tensor import interactions, precision, scaled
from bilens.tensor.budget import Plan
from bilens.tensor.keeping import Pace
from bilens.tensor.screening import Block
from bilens.tensor.sharding import check_group
from bilens.tensor.state import State


def integers(g, *shape, high=2):
    return torch.randint(-high, high + 1, shape, generator=g).double()


def integer_tensor(g, out=3, hidden=4, inp=4, constant=False, high=1):
    down, left, right = integers(g, out, hidden, high=high), integers(g, hidden, inp), integers(g, hidden, inp)
    return BilinearTensor(down, left, right, constant)


def brute_force(B, out=None, inp=None):
    """Every (value, out, left, right) with left <= right, in the promised order, read off the dense cube."""
    Q = B.dense().double()
    if out is not None:
        Q = torch.einsum("po,oij->pij", out.double(), Q)
    if inp is not None:
        legs = torch.block_diag(inp.double(), torch.ones(1, 1).double()) if B.constant else inp.double()
        Q = torch.einsum("oij,ai,bj->oab", Q, legs, legs)
    n = Q.shape[-1]
    pairs = [
        (Q[o, i, j].item() * (1 if i == j else 2), o, i, j)
        for o in range(len(Q))
        for i in range(n)
        for j in range(i, n)
    ]
    return sorted(pairs, key=lambda pair: (-abs(pair[0]), *pair[1:]))


def listed(found):
    return list(
        zip(found.value.tolist(), *(part.tolist() for part in (found.out, found.left, found.right)), strict=True)
    )


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def in_pieces(g):
    """Replace the plan by one that cuts everything into small pieces."""
    some = [int(torch.randint(1, high, (), generator=g)) for high in (4, 4, 6, 12, 30)]
    rows = 2 ** int(torch.randint(0, 6, (), generator=g))
    cube, (outputs, more, inputs, align, look) = bool(torch.randint(2, (), generator=g)), some
    return lambda search, memory: Plan(
        rows,
        cube and search.layer.readers is not None,
        outputs * more,
        outputs,
        min(inputs, search.layer.n_in),
        align,
        look,
    )


@pytest.fixture
def plan(monkeypatch):
    return lambda g: monkeypatch.setattr(Plan, "of", in_pieces(g))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, 70),
    constant=st.booleans(),
    read=st.booleans(),
    written=st.booleans(),
    exclude_self=st.booleans(),
    screen=st.sampled_from([torch.bfloat16, torch.float32]),
    memory=st.sampled_from([64, 1 << 30]),  # little: candidates are refined in float32 first
    enough=st.sampled_from([1, 1 << 30]),  # outputs for a basis made of features
)
def test_exact_order_with_ties(plan, seed, k, constant, read, written, exclude_self, screen, memory, enough):
    g = torch.Generator().manual_seed(seed)
    B = integer_tensor(g, constant=constant)
    out = integers(g, 5, 3, high=1) if read else None
    inp = integers(g, 3, 4 - constant, high=1) if written else None
    plan(g)
    options = {"per_output": 3, "features": 2, "exclude_self": exclude_self, "screen": screen, "memory": memory}
    with patch.object(scaled, "_ENOUGH", enough):
        found = top_interactions(B, k, out, inp, **options)
    expected = [pair for pair in brute_force(B, out, inp) if not (exclude_self and pair[2] == pair[3])]
    assert listed(found) == expected[:k]
    n_out = 5 if read else 3
    assert listed(found.per_output) == [pair for o in range(n_out) for pair in [p for p in expected if p[1] == o][:3]]
    assert found.certificate.screened == len(expected)
    largest = torch.zeros(n_out, (3 if written else 4 - constant) + constant)
    for value, *at in expected:  # of a feature with itself, or of either of a pair
        for feature in at[1:]:
            largest[at[0], feature] = max(largest[at[0], feature], abs(value))
    assert found.features.sort(1).values.diff(dim=1).all()  # each once
    assert equal(largest.gather(1, found.features), largest.sort(1, descending=True).values[:, :2])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    k=st.integers(1, 300),
    scale=st.sampled_from([1e-25, 1.0, 1e18]),
    wide=st.booleans(),
    screen=st.sampled_from([torch.bfloat16, torch.float32]),
    memory=st.sampled_from([1 << 16, 1 << 30]),
    enough=st.sampled_from([1, 1 << 30]),
)
def test_real_numbers_with_rows_of_all_kinds(plan, seed, k, scale, wide, screen, memory, enough):
    """Repeated, zero, tiny and huge rows; pairs that differ by less than bfloat16, or float32, resolves."""
    g = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if wide else torch.float32
    B = BilinearTensor(*(torch.randn(shape, generator=g, dtype=dtype) for shape in ((6, 40), (40, 33), (40, 33))))
    out, inp = torch.randn(7, 6, generator=g, dtype=dtype) * scale, torch.randn(20, 33, generator=g, dtype=dtype)
    inp[3], inp[5], inp[8], inp[9] = inp[4], 0, inp[7] * (1 + 2.0**-12), inp[7] * (1 + 2.0**-22)
    inp[11], inp[12], out[2], out[4], out[5] = inp[11] * 1e-3, inp[12] * 30, out[1], 0, out[5] * 1e-12
    plan(g)
    with patch.object(scaled, "_ENOUGH", enough):
        found = top_interactions(B, k, out, inp, screen=screen, memory=memory, per_output=4)
    every = brute_force(B.to(torch.float64), out, inp)
    expected, exact = every[:k], {tuple(pair): value for value, *pair in every}
    tolerance = 1e-11 if wide else 1e-6
    assert len(found.value) == len(expected) == len({tuple(pair) for _, *pair in listed(found)})
    for (value, *pair), (best, *_) in zip(listed(found), expected, strict=True):
        assert value == pytest.approx(exact[tuple(pair)], rel=tolerance, abs=1e-13 * scale)
        assert abs(value) == pytest.approx(abs(best), rel=tolerance, abs=1e-13 * scale)
    assert found.certificate.error <= found.certificate.bound
    small = found.per_output.value[20:24].tolist()  # of the output feature that is tiny beside the others
    strongest = [value for value, o, *_ in every if o == 5][:4]
    assert [abs(value) for value in small] == pytest.approx([abs(value) for value in strongest], rel=tolerance)


def medium(n_out=48, n_in=300, d=64, hidden=128, seed=0):
    g = torch.Generator().manual_seed(seed)
    B = BilinearTensor(*(torch.randn(shape, generator=g) for shape in ((d, hidden), (hidden, d), (hidden, d))))
    return B, torch.randn(n_out, d, generator=g), torch.nn.functional.normalize(torch.randn(n_in, d, generator=g))


def dense(B, out, inp):
    """Coefficients in float64, [out, left, right], zero below the diagonal."""
    Q = torch.einsum("po,oij,ai,bj->pab", out.double(), B.to(torch.float64).dense(), inp.double(), inp.double())
    return Q.triu() + Q.triu(1)


@pytest.mark.parametrize("n_out", [48, 80])  # of more than 64 a float32 screen has a basis made of features
@pytest.mark.parametrize("screen", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("k", [1, 50, 3000])
def test_a_layer_against_brute_force(k, screen, n_out):
    B, out, inp = medium(n_out)
    found = top_interactions(B, k, out, inp, screen=screen, per_output=5)
    Q = dense(B, out, inp)
    order = Q.abs().flatten().argsort(descending=True)[:k]
    assert torch.equal((found.out * 300 + found.left) * 300 + found.right, order)
    torch.testing.assert_close(found.value.double(), Q.flatten()[order], rtol=1e-6, atol=0)
    each = Q.abs().flatten(1).argsort(dim=1, descending=True)[:, :5]
    assert torch.equal((found.per_output.left * 300 + found.per_output.right).view(n_out, 5), each)
    about = found.certificate
    assert about.screened == n_out * 300 * 301 // 2
    assert k <= about.verified < about.screened / 20
    assert 0 < about.error < about.bound


def test_planted_pairs_are_found_in_order():
    """Planted pairs of almost equal strength in noise: closer than bfloat16, or even float32, tells apart."""
    d, n_pairs = 64, 200
    g = torch.Generator().manual_seed(0)
    i, j = torch.triu_indices(d, d, 1)[:, torch.randperm(d * (d - 1) // 2, generator=g)[:n_pairs]]
    o = torch.randint(d, (n_pairs,), generator=g)
    strength = 1 + torch.arange(n_pairs, 0, -1).double() * 2.0**-30
    down = torch.zeros(d, n_pairs).double().index_put((o, torch.arange(n_pairs)), strength)
    left, right = torch.eye(d).double()[i], torch.eye(d).double()[j]
    noise = [torch.randn(shape, generator=g).double() * 0.02 for shape in ((d, 64), (64, d), (64, d))]
    B = BilinearTensor(torch.cat((down, noise[0]), 1), torch.cat((left, noise[1])), torch.cat((right, noise[2])))
    basis = torch.linalg.qr(torch.randn(d, d, generator=g).double()).Q
    B = B.project(out=torch.linalg.qr(torch.randn(d, d, generator=g).double()).Q, inp=basis)
    found = top_interactions(B, n_pairs, out=torch.eye(d).double(), inp=basis)
    Q = dense(B, torch.eye(d).double(), basis)
    assert torch.equal(
        (found.out * d + found.left) * d + found.right, Q.abs().flatten().argsort(descending=True)[:n_pairs]
    )


def test_values_sum_to_the_output():
    g = torch.Generator().manual_seed(0)
    B = BilinearTensor(*(torch.randn(shape, generator=g).double() for shape in ((3, 5), (5, 4), (5, 4))))
    z = torch.randn(4, generator=g).double()
    found = top_interactions(B, 10**6)
    assert len(found.value) == 3 * 10
    y = torch.zeros(3).double().index_add(0, found.out, found.value * z[found.left] * z[found.right])
    torch.testing.assert_close(y, B.apply(z))


def test_duplicate_and_zero_features_keep_their_places():
    g = torch.Generator().manual_seed(3)
    B = integer_tensor(g, high=2)
    out = integers(g, 3, 3)[[0, 1, 0, 2, 1]]
    inp = torch.cat((integers(g, 2, 4), torch.zeros(2, 4).double(), integers(g, 1, 4)))[[0, 1, 2, 3, 4, 0]]
    expected = brute_force(B, out, inp)
    assert sum(value == 0 for value, *_ in expected) > 20
    for k in (1, 7, len(expected) - 30, len(expected)):
        assert listed(top_interactions(B, k, out, inp)) == expected[:k]


@pytest.mark.parametrize("k", [1, 3, 29, 30, 31, 10**6])
def test_k_up_to_and_beyond_all_pairs(k):
    B = integer_tensor(torch.Generator().manual_seed(0))
    assert listed(top_interactions(B, k)) == brute_force(B)[:k]


@pytest.mark.parametrize("seed", range(6))
def test_pieces_do_not_matter(plan, seed):
    B, out, inp = medium(n_out=11, n_in=40)
    whole = top_interactions(B, 200, out, inp)
    plan(torch.Generator().manual_seed(seed))
    for one, other in zip(top_interactions(B, 200, out, inp), whole, strict=True):
        assert torch.equal(one, other)


def test_many_ties_go_to_the_first(plan):
    plan(torch.Generator().manual_seed(0))
    one = torch.ones(6, 1).double(), torch.ones(1, 3).double(), torch.ones(1, 3).double()
    found = top_interactions(BilinearTensor(*one), 4)
    assert listed(found) == [(2, 0, 0, 1), (2, 0, 0, 2), (2, 0, 1, 2), (2, 1, 0, 1)]


def test_more_ties_than_candidates_are_kept():
    """The pool would grow without end if it kept all that may tie with the k-th strongest."""
    B = BilinearTensor(torch.ones(30, 1), torch.ones(1, 64), torch.ones(1, 64))
    found = top_interactions(B, 10)
    assert listed(found) == [(2, 0, 0, j) for j in range(1, 11)]
    zero = BilinearTensor(torch.zeros(300, 4), torch.ones(4, 128), torch.ones(4, 128))
    assert listed(top_interactions(zero, 5)) == [(0, 0, 0, j) for j in range(5)]


@pytest.mark.parametrize("written", [True, False])
def test_the_last_index_is_the_constant(written):
    g = torch.Generator().manual_seed(0)
    down, left, right = torch.eye(2).double(), integers(g, 2, 3), integers(g, 2, 3)
    B = BilinearTensor.from_weights(down, left, right, out_bias=torch.tensor([100.0, 0.0]).double())
    n_in = 5 if written else 3
    found = top_interactions(B, 1, inp=integers(g, 5, 3, high=1) if written else None)
    assert listed(found) == [(100, 0, n_in, n_in)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    g = torch.Generator().manual_seed(0)
    B, out, inp = integer_tensor(g), integers(g, 4, 3), integers(g, 5, 4)
    found = top_interactions(B.to(dtype), 25, out.to(dtype), inp.to(dtype))
    assert found.value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert listed(found) == brute_force(B, out, inp)[:25]  # small integers are exact in every dtype


def test_float32_on_real_numbers():
    g = torch.Generator().manual_seed(0)
    B = BilinearTensor(*(torch.randn(shape, generator=g) for shape in ((6, 9), (9, 7), (9, 7))))
    found, expected = top_interactions(B, 30), brute_force(B.to(torch.float64))[:30]
    assert [pair for _, *pair in listed(found)] == [pair for _, *pair in expected]
    assert found.value.tolist() == pytest.approx([value for value, *_ in expected], rel=1e-7)


def test_no_features_no_pairs():
    B = integer_tensor(torch.Generator().manual_seed(0))
    assert repr(top_interactions(B, 3, out=torch.zeros(0, 3).double())) == "Interactions(0 pairs)"
    assert repr(top_interactions(B, 3, inp=torch.zeros(0, 4).double())) == "Interactions(0 pairs)"


def test_repr_shows_the_strongest():
    eye = torch.eye(2)
    B = BilinearTensor(torch.tensor([[1.0, -4.0]]), eye, eye)
    assert repr(top_interactions(B, 2)) == "Interactions(2 pairs; first: 1 × 1 → 0: -4)"


def test_rows_and_columns():
    B, out, inp = medium()
    found = top_interactions(B, 12, out, inp, per_output=2)
    columns = out, left, right, value = found
    assert (len(found), len(found[:5]), len(found[20:]), len(list(found))) == (12, 5, 0, 4)
    assert equal(columns, (found.out, found.left, found.right, found.value))
    assert equal(found[2:9:3], [part[2:9:3] for part in columns])
    assert found[-1] == (out[11].item(), left[11].item(), right[11].item(), value[11].item())
    assert found.to_dict() == {
        "out": out.tolist(),
        "left": left.tolist(),
        "right": right.tolist(),
        "value": value.tolist(),
    }


def test_what_was_done_stays_with_the_rows():
    B, out, inp = medium()
    found = top_interactions(B, 12, out, inp, per_output=2)
    for part in (found[:5], found._replace(out=found.out + 7)):
        assert part.certificate is found.certificate
        assert part.per_output is found.per_output
    assert found._replace(out=found.out + 7)[3][0] == found[3][0] + 7


def test_a_table_and_what_a_notebook_shows():
    B, out, inp = medium()
    found = top_interactions(B, 12, out, inp)
    table = found.to_dataframe()
    assert list(table.columns) == ["out", "left", "right", "value"]
    assert table["value"].tolist() == found.value.tolist()
    html = found._repr_html_().split("</tbody>")[0]
    assert html.split("<tbody>")[1].count("<tr>") == 10
    assert "10 of 12 pairs" in html
    cells = [f'">{cell}</td>' for cell in (found.left[9].item(), found.right[9].item(), f"{found.value[9]:.4g}")]
    assert all(cell in html for cell in cells)
    assert f"{found.value[10]:.4g}</td>" not in html


@pytest.mark.parametrize("faster", precision.SCREENS)
def test_the_faster_dtype_screens(monkeypatch, faster):
    rates = {dtype: 2e9 if dtype == faster else 1e9 for dtype in precision.SCREENS}
    monkeypatch.setattr(interactions, "product_rates", lambda device: rates)
    B, out, inp = medium()
    found, asked = top_interactions(B, 40, out, inp), top_interactions(B, 40, out, inp, screen=torch.bfloat16)
    assert found.certificate.dtype == faster
    assert found.certificate.rates == rates
    assert asked.certificate.rates is None
    assert equal(found, asked)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"k": -2}, "k must be at least 1, got -2"),
        ({"k": 1, "out": torch.ones(2, 4)}, r"out must have shape \[n_out, 3\], got \[2, 4\]"),
        ({"k": 1, "inp": torch.ones(2, 3)}, r"inp must have shape \[n_in, 4\], got \[2, 3\]"),
        ({"k": 1, "out": torch.full((2, 3), torch.nan)}, "out must be finite, but its row 0 is NaN"),
        ({"k": 1, "inp": torch.tensor([[1.0] * 4, [torch.inf] * 4])}, "inp must be finite, but its row 1 is NaN"),
        ({"k": 1, "per_output": 0}, "per_output must be at least 1, got 0"),
        ({"k": 1, "memory": 1000}, "memory must be at least [0-9]+ bytes for this layer and k, got 1000"),
        ({"k": 1, "screen": torch.float16}, "screen must be torch.bfloat16 or torch.float32, got torch.float16"),
        ({"k": 1, "out": torch.ones(2, 3, device="meta")}, "out must be on the device of B.down, cpu, but is on meta"),
        ({"k": 1, "inp": torch.full((2, 4), 1e-50, dtype=torch.float64)}, "the largest entry of inp must lie between"),
    ],
)
def test_errors_name_the_argument(unchecked, arguments, message):
    B = integer_tensor(torch.Generator().manual_seed(0)).to(torch.float32)
    with pytest.raises(ValueError, match=message):
        top_interactions(B, **arguments)


def test_one_nan_among_many_is_refused_rather_than_dropped():
    B = integer_tensor(torch.Generator().manual_seed(0), out=5)
    B.down[3, 1] = torch.nan
    with pytest.raises(ValueError, match=r"B\.down must be finite, but its row 3 is NaN or infinite"):
        top_interactions(B, 2)


def test_products_less_exact_than_granted_are_noticed(monkeypatch):
    B, out, inp = medium()
    monkeypatch.setattr(Block, "row_bounds", lambda self, *norms: 1e-9 * torch.ones(3, 300, self.n))
    with pytest.raises(RuntimeError, match=r"off by .* times its bound.*pass screen=torch\.float32"):
        top_interactions(B, 50, out, inp, screen=torch.bfloat16)


# -- memory -----------------------------------------------------------------------------------------------------------

PEAK = """
import resource, sys, torch
from bilens import BilinearTensor, top_interactions
n_out, n_in, d, hidden, k, memory, per_output = map(int, sys.argv[1:])
g = torch.Generator().manual_seed(0)
rand = lambda *shape: torch.randn(shape, generator=g)
B, out, inp = BilinearTensor(rand(d, hidden), rand(hidden, d), rand(hidden, d)), rand(n_out, d), rand(n_in, d)
small = BilinearTensor(rand(64, 99), rand(99, 64), rand(99, 64))
top_interactions(small, 50, rand(70, 64), rand(300, 64), per_output=2)  # libraries take their own memory once
open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
peak = lambda name: next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(name))
before = peak("VmRSS")
top_interactions(B, k, out, inp, memory=memory, per_output=per_output or None)
print(peak("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure peak memory")
@pytest.mark.parametrize(
    ("n_out", "n_in", "d", "hidden", "k", "memory", "per_output"),
    [
        (128, 2048, 256, 512, 1000, 128 << 20, 0),  # all matrices together: 2 GiB
        (64, 1536, 128, 256, 1000, 80 << 20, 0),
        (256, 1024, 128, 256, 100, 100 << 20, 20),
        (40, 1024, 64, 64, 50_000, 128 << 20, 0),
    ],
)
def test_peak_memory_stays_within_the_budget(n_out, n_in, d, hidden, k, memory, per_output):
    arguments = map(str, (n_out, n_in, d, hidden, k, memory, per_output))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < memory


def test_the_least_memory_named_is_enough():
    B, out, inp = medium()
    whole = top_interactions(B, 20, out, inp)
    with pytest.raises(ValueError, match="at least") as refused:
        top_interactions(B, 20, out, inp, memory=1)
    least = int(str(refused.value).split()[5])
    with pytest.raises(ValueError, match=f"at least {least} bytes"):
        top_interactions(B, 20, out, inp, memory=least - 16)
    assert torch.equal(top_interactions(B, 20, out, inp, memory=least).value, whole.value)


# -- interrupted and shared searches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_a_killed_search_goes_on(tmp_path, monkeypatch, plan, stop_at):
    B, out, inp = medium()
    whole = top_interactions(B, 40, out, inp, per_output=3)
    plan(torch.Generator().manual_seed(0))
    monkeypatch.setattr(Pace, "due", lambda self: True)
    save, saves = State.save, []

    def die(self, following, pools):
        if len(saves) == stop_at:
            raise KeyboardInterrupt
        save(self, following, pools)
        saves.append(following)

    monkeypatch.setattr(State, "save", die)
    with pytest.raises(KeyboardInterrupt):
        top_interactions(B, 40, out, inp, per_output=3, checkpoint=tmp_path / "state")
    monkeypatch.setattr(State, "save", save)
    starts, screen = [], Block.screen
    monkeypatch.setattr(Block, "screen", lambda self, plan: starts.append(self.first) or screen(self, plan))
    found = top_interactions(B, 40, out, inp, per_output=3, checkpoint=tmp_path / "state")
    assert equal(found, whole)
    assert equal(found.per_output, whole.per_output)
    assert starts[0] == saves[-1]
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["rank-0-of-1.safetensors"]


def test_the_state_of_another_search_is_refused(tmp_path):
    B, out, inp = medium()
    top_interactions(B, 40, out, inp, checkpoint=tmp_path)
    top_interactions(B, 40, out, inp, checkpoint=tmp_path)
    changed = inp.clone()
    changed[7, 3] += 1e-6
    for other in ((B, 41, out, inp), (B, 40, out, changed), (B, 40, out[:-1], inp)):
        with pytest.raises(ValueError, match=r"checkpoint must be of this call, but .*rank-0-of-1\.safetensors is of"):
            top_interactions(*other, checkpoint=tmp_path)


def test_a_search_goes_on_in_another_dtype(tmp_path, plan):
    """What a machine multiplies faster is no argument, and may be another one after a kill."""
    B, out, inp = medium()
    plan(torch.Generator().manual_seed(0))
    whole = top_interactions(B, 40, out, inp, per_output=3, features=6)
    save, saved = State.save, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pace, "due", lambda self: True)
        patch.setattr(State, "save", lambda self, *args: (save(self, *args), saved.append(args), stop()))
        with pytest.raises(KeyboardInterrupt):
            top_interactions(B, 40, out, inp, per_output=3, features=6, checkpoint=tmp_path, screen=torch.bfloat16)
    assert 0 < saved[0][0] < len(out)
    found = top_interactions(B, 40, out, inp, per_output=3, features=6, checkpoint=tmp_path, screen=torch.float32)
    assert equal(found, whole)
    assert torch.equal(found.features, whole.features)
    assert equal(found.per_output, whole.per_output)


def stop():
    raise KeyboardInterrupt


SHARED = """
import sys, torch, torch.distributed as dist
from safetensors.torch import load_file, save_file
from bilens import BilinearTensor, top_interactions
from bilens.tensor.keeping import Pace
from bilens.tensor.state import State

dist.init_process_group("gloo")
groups = {size: dist.new_group(range(size)) for size in map(int, sys.argv[3:])}
given, folder, names = load_file(sys.argv[1]), sys.argv[2], ("out", "left", "right", "value")
Pace.due, save = lambda self: True, State.save

def killed(self, *args):
    save(self, *args)
    raise KeyboardInterrupt

for size, group in groups.items():
    if dist.get_rank() >= size:
        continue
    for dtype in (torch.float32, torch.float64):
        down, left, right, out, inp = (part.to(dtype) for part in given.values())
        options = {"per_output": 3, "features": 5, "group": group, "checkpoint": f"{folder}/{dtype}-of-{size}"}
        State.save = killed
        try:
            top_interactions(BilinearTensor(down, left, right), 500, out, inp, **options)
        except KeyboardInterrupt:
            State.save = save
        found = top_interactions(BilinearTensor(down, left, right), 500, out, inp, **options)
        parts = dict(zip(names, found)) | {"each." + name: part for name, part in zip(names, found.per_output)}
        parts["features"] = found.features
        save_file(parts, f"{folder}/{dtype}-{dist.get_rank()}-of-{size}.safetensors")
dist.barrier()
dist.destroy_process_group()
"""


def test_every_number_of_ranks_gives_the_same_bits(tmp_path):
    """Also where each rank was killed after its first pieces, and went on from what it had kept."""
    B, out, inp = medium(n_out=13)
    given = {"down": B.down, "left": B.left, "right": B.right, "out": out, "inp": inp}
    save_file({str(number): tensor for number, tensor in enumerate(given.values())}, tmp_path / "given.safetensors")
    (tmp_path / "shared.py").write_text(SHARED)
    sizes = (1, 2, 4)  # groups within one run of four processes, which take seconds to start
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={max(sizes)}"]
    done = subprocess.run(
        [*command, tmp_path / "shared.py", tmp_path / "given.safetensors", tmp_path, *map(str, sizes)],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = ("out", "left", "right", "value")
    for dtype in (torch.float32, torch.float64):
        weights = BilinearTensor(*(part.to(dtype) for part in (B.down, B.left, B.right)))
        alone = top_interactions(weights, 500, out.to(dtype), inp.to(dtype), per_output=3, features=5)
        for size in sizes:
            for rank in range(size):
                found = load_file(tmp_path / f"{dtype}-{rank}-of-{size}.safetensors")
                assert equal([found[name] for name in names], alone)
                assert equal([found[f"each.{name}"] for name in names], alone.per_output)
                assert torch.equal(found["features"], alone.features)


def test_a_group_that_cannot_hold_the_tensors(monkeypatch):
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "xpu:ccl")
    with pytest.raises(ValueError, match="the tensors are on cpu, where group cannot communicate: it is xpu:ccl"):
        check_group(Mock(spec=dist.ProcessGroup), torch.device("cpu"))
