"""A search that is killed at any of its states goes on to the same result; other and damaged states are refused."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from bilens import circuits
from bilens.__main__ import run_coupling_test, run_tests
from bilens.circuits import costs
from bilens.tensor import keeping, resuming
from bilens.tensor.bilinear import BilinearTensor
from bilens.tensor.keeping import Pace, damaged, read_state, write_state
from bilens.tensor.resuming import Stages

NULLS = ["readers", "rotation", "untrained", "signs"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def layer():
    def normal(rows, columns, seed):
        return torch.randn(rows, columns, generator=seeded(seed)) / columns**0.5

    B = BilinearTensor(normal(24, 32, 0), normal(32, 12, 1), normal(32, 12, 2))
    return B, torch.nn.functional.normalize(normal(10, 24, 3)), torch.nn.functional.normalize(normal(36, 12, 4))


@pytest.fixture
def small_chunks(monkeypatch):
    """Three outputs are dealt with at a time, and a state is written after each."""
    monkeypatch.setattr(Pace, "due", lambda self: True)
    monkeypatch.setattr(circuits.scoring, "NUMBERS", 36 * 36 * 3)


def searched(layer, folder=None, **changes):
    options = {"generator": seeded(), "null": NULLS, "n": 40, "tail": False, "features": 16} | changes
    return circuits.search(layer, checkpoint=folder, **options)


def same(one, other):
    nulls = zip(one.nulls, other.nulls, strict=True)
    return (
        all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("score", "p", "q"))
        and all(torch.equal(a.scores, b.scores) for a, b in nulls)
        and [repr(a) for a in one.found] == [repr(b) for b in other.found]
    )


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        ("outputs", 0),
        ("outputs", 1),
        ("null-readers", 2),
        ("null-rotation", 3),
        ("null-untrained", 1),
        ("null-signs", 2),
    ],
)
def test_a_killed_search_goes_on(layer, small_chunks, monkeypatch, tmp_path, stage, number):
    null = list(dict.fromkeys(["readers", stage.removeprefix("null-")])) if "null" in stage else "readers"
    whole = searched(layer, null=null)
    save, saves = resuming._Kept.save, []

    def die(self, done, rows):
        mine = self.path.stem == stage
        if mine and len(saves) == number:
            raise KeyboardInterrupt
        save(self, done, rows)
        saves.extend([done] if mine else [])

    monkeypatch.setattr(resuming._Kept, "save", die)
    with pytest.raises(KeyboardInterrupt):
        searched(layer, tmp_path, null=null)
    monkeypatch.setattr(resuming._Kept, "save", save)
    starts, run = {}, Stages.run

    def note(self, name, n, find, *args, **options):
        return run(self, name, n, lambda start: [starts.update({name: start}), find(start)][1], *args, **options)

    monkeypatch.setattr(Stages, "run", note)
    assert same(searched(layer, tmp_path, null=null), whole)
    assert starts[stage] == (saves[-1] if saves else 0)
    assert (starts["outputs"] == len(layer[1])) == (stage != "outputs")


def test_a_search_that_is_whole_is_read(layer, monkeypatch, tmp_path):
    whole, generator = searched(layer, tmp_path), seeded()
    monkeypatch.setattr(circuits.scoring.Scoring, "score", None)
    assert same(searched(layer, tmp_path, generator=generator), whole)
    other = seeded()
    monkeypatch.undo()
    searched(layer, generator=other)
    assert torch.equal(generator.get_state(), other.get_state())  # what comes after draws the same


def test_the_state_of_another_search_is_refused(layer, tmp_path):
    B, readers, writers = layer
    searched(layer, tmp_path)
    changed = writers.clone()
    changed[3, 3] += 1e-6
    refused = r"checkpoint must be of this call, but .*{}\.safetensors is of one with other .*remove it"
    for other, changes in (((B, readers, changed), {}), (layer, {"features": 12}), (layer, {"motifs": ["and"]})):
        with pytest.raises(ValueError, match=refused.format("outputs")):
            searched(other, tmp_path, **changes)
    for changes in ({"n": 41}, {"generator": seeded(1)}):
        with pytest.raises(ValueError, match=refused.format("null-readers")):
            searched(layer, tmp_path, **changes)


def test_a_damaged_state_is_refused_by_name(layer, tmp_path):
    searched(layer, tmp_path)
    path = tmp_path / "null-rotation.safetensors"
    written, (rows, about) = path.read_bytes(), read_state(path)
    path.write_bytes(written[:-3] + bytes([written[-3] ^ 1]) + written[-2:])
    with pytest.raises(ValueError, match=r"null-rotation\.safetensors is damaged: its checksum does not match; delete"):
        searched(layer, tmp_path)
    short = {name: column[:-1] if name == "score" else column for name, column in rows.items()}
    generator = {"generator": rows["generator"]}
    for changed, said, why in (
        (short, about, "every column must have"),
        (rows, about | {"next": 0}, "next must lie between 1 and"),
        (generator, about, "it holds nothing"),
        ({"score": rows["score"]}, about, "it holds score"),
    ):
        write_state(path, changed, said)
        with pytest.raises(ValueError, match=rf"null-rotation\.safetensors is damaged: {why}"):
            searched(layer, tmp_path)
    path.write_bytes(written)
    assert same(searched(layer, tmp_path), searched(layer))


def test_what_is_kept_takes_little_of_the_time(monkeypatch, tmp_path):
    """A state is written after a second, but a large one only when a twentieth of the time pays for it."""
    now, writes = [0.0], []
    monkeypatch.setattr(keeping.time, "monotonic", lambda: now[0])

    def write(path, rows, about):
        writes.append(now[0])
        now[0] += 2.0

    monkeypatch.setattr(resuming, "write_state", write)

    def find(start):
        for row in range(start, 200):
            now[0] += 1.0
            yield {"row": torch.tensor([row])}

    assert Stages(tmp_path, "").run("rows", 200, find)["row"].tolist() == list(range(200))
    assert len(writes) == 1 + 200 // 40 + 1 - (200 % 40 == 0)


def test_rows_that_are_read_go_where_they_were_found(tmp_path):
    def find(start):
        yield {"row": torch.arange(start, 3)}

    Stages(tmp_path).run("rows", 3, find)
    there = torch.device("meta")
    assert Stages(tmp_path, device=there).run("rows", 3, find)["row"].device == there


def test_a_damaged_state_is_not_taken_for_a_text_that_does_not_fit(unchecked, monkeypatch, tmp_path):
    """The command passes over circuits that are never active in the text, and says so; not over a damaged state."""
    raised = []

    def fail(*args, **options):
        raise raised[-1]

    monkeypatch.setattr(circuits, "test", fail)
    monkeypatch.setattr(circuits.couplings, "test_coupling", fail)
    monkeypatch.setattr(circuits.Circuit, "of", lambda lens, one: circuits.Circuit(0, 5, 1, 2))
    args, console, run = SimpleNamespace(controls=1), Console(quiet=True), {"checkpoint": tmp_path}
    found, layer = [SimpleNamespace(out=5)], SimpleNamespace(layer=0)
    coupled = SimpleNamespace(layers=[layer])
    raised.append(ValueError("texts must hold a position where the pair is active"))
    assert run_tests(args, console, None, found, [], None, run) == []
    assert run_coupling_test(layer, coupled, [], 1, None, run) is None
    raised.append(damaged(tmp_path / "text.safetensors", "its checksum does not match"))
    with pytest.raises(ValueError, match=r"text\.safetensors is damaged"):
        run_tests(args, console, None, found, [], None, run)
    with pytest.raises(ValueError, match=r"text\.safetensors is damaged"):
        run_coupling_test(layer, coupled, [], 1, None, run)


# -- some of the outputs ----------------------------------------------------------------------------------------------


def test_some_outputs_are_searched_as_if_there_were_no_others(layer):
    B, readers, writers = layer
    some = torch.tensor([3, 7, 4, 9])
    found, alone = searched(layer, outputs=some), searched((B, readers[some], writers))
    assert torch.equal(found.score, alone.score)
    assert torch.equal(found.q, alone.q)
    dual = 50 * torch.linalg.pinv(readers).T[7]  # a strong product in output 7 alone
    legs = (torch.cat((leg, row[None])) for leg, row in ((B.left, writers[0]), (B.right, writers[1])))
    planted = BilinearTensor(torch.cat((B.down, dual[:, None]), 1), *legs)
    found = searched((planted, readers, writers), outputs=some, fdr=0.6, null="readers")
    assert {one.out for one in found.found} == {7}
    assert found.to_dict()["left_out"] == 6
    assert "4 of 10 outputs" in repr(found)
    assert "left_out" not in alone.to_dict()


@pytest.mark.parametrize(
    "outputs", [[1, 2], torch.tensor([0, 10]), torch.tensor([1, 1]), torch.tensor([0.0]), torch.tensor([])]
)
def test_outputs_that_are_none_are_named(layer, unchecked, outputs):
    with pytest.raises(ValueError, match="outputs must be"):
        searched(layer, outputs=outputs)


class Given:
    def __init__(self, layer):
        self.tensor, self.readers, self.writers = layer


def test_the_strongest_outputs_have_the_largest_interactions(layer):
    B, readers, writers = layer
    scaled = readers * torch.linspace(2, 1, 10)[:, None]
    chosen = circuits.strongest_outputs(Given((B, scaled, writers)), 5)
    norms = torch.stack([(writers @ B.matrix(reader) @ writers.T).norm() for reader in scaled])
    assert chosen.tolist() == sorted(norms.topk(5).indices.tolist())
    with pytest.raises(ValueError, match="n must lie between 1 and 10, got 11"):
        circuits.strongest_outputs(Given(layer), 11)


def test_only_what_takes_hours_is_left_out(layer, monkeypatch):
    """The published sizes: the embedded model and ts-medium whole, a power of two of fw-medium."""
    sizes = {"embedded": (256, 1024, 1024, 1024), "ts-medium": (512, 2048, 2048, 2048), "fw": (1024, 4096, 8192, 8192)}
    plans = {}
    for name, (d, hidden, n_in, n_out) in sizes.items():
        cost = costs.Cost(n_out, n_in, d, hidden)
        monkeypatch.setattr(
            costs.Cost, "of", lambda layer, n=None, cost=cost: dataclasses.replace(cost, n_out=n or cost.n_out)
        )
        given = Given((None, torch.empty(n_out, 0), None))
        plans[name] = costs.affordable(given), costs.affordable_draws(given)
    assert plans == {"embedded": (1024, 512), "ts-medium": (2048, 512), "fw": (128, 256)}


def test_a_plan_counts_what_was_asked_for(layer, monkeypatch):
    monkeypatch.setattr(costs, "product_rates", lambda device: {torch.float32: 1e3})
    given = Given(layer)
    whole, some = costs.Plan.of(given, None, None, ["readers"]), costs.Plan.of(given, 5, 512, ["readers"])
    assert whole.outputs is None
    assert whole.every == pytest.approx(whole.ranking + whole.search)
    assert some.ranking == pytest.approx(whole.ranking / 2)
    assert some.search < whole.search
    assert some.every == pytest.approx(whole.every)
    assert len(some.outputs) == 5
    assert costs.Plan.of(given, 5, 512, ["readers", "rotation"]).search > some.search
    with pytest.raises(ValueError, match=r"null must be among .*'readers'.*, got \['raeders'\]"):
        costs.Plan.of(given, 5, 512, ["raeders"])
    assert not whole.fewer
    monkeypatch.setattr(costs, "BUDGET", 1.0)
    assert [costs.Plan.of(given, 1, n, ["readers"]).fewer for n in (None, 200)] == [True, False]
