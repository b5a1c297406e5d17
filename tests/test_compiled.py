"""Compiled models: everything that was stated is there when the checkpoint is read back, and nothing else."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bilens
from bilens import circuits
from bilens.circuits.compiled import Compiled, Move, Plan, Product, Shape, compile_plan
from bilens.circuits.layer import FeatureLayer
from bilens.models.windows import Windows

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
script = pytest.importorskip("compiled_models")
sys.path.remove(str(SCRIPTS))

NOT, GOOD, BAD, NEGATED, HAPPY, SAD, SQUARE = 3, 7, 11, 40, 90, 17, 21
WORDS = {
    "not": {0: 1.0, NOT: 1.5},
    "good": {0: 1.0, GOOD: 1.0, SQUARE: 0.5},
    "bad": {0: 1.0, BAD: 2.0},
    "so": {0: 1.0, 60: 1.0},
}
PRODUCTS = [
    Product(SAD, NEGATED, GOOD, 1.0),
    Product(HAPPY, NEGATED, BAD, 0.8),
    Product(SAD, SQUARE, SQUARE, -0.5),
]
SHAPE = Shape(d_model=32, d_hidden=64, n_heads=2, n_ctx=32)
PLAN = Plan(WORDS, PRODUCTS, [Move(NOT, NEGATED, 0.5)], {"good": {HAPPY: 2.0}, "bad": {SAD: 1.0}}, shape=SHAPE)


def build(plan: Plan, seed: int = 0) -> Compiled:
    return compile_plan(plan, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def made() -> Compiled:
    return build(PLAN)


@pytest.fixture(scope="module")
def lens(made, tmp_path_factory) -> FeatureLayer:
    folder = tmp_path_factory.mktemp("compiled")
    made.save(folder)
    return FeatureLayer.load(bilens.load(folder / "model"), SHAPE.layer, folder / "scope", *SHAPE.names)


def expected(feature: int, n: int) -> torch.Tensor:
    Q = torch.zeros(n, n)
    for one in PRODUCTS:
        if one.out == feature:
            Q[one.left, one.right] += one.value / 2
            Q[one.right, one.left] += one.value / 2
    return Q


def test_the_files_are_those_of_the_published_format(made, lens, tmp_path):
    made.save(tmp_path)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["bilinear"]
    assert config["scale_attn"]
    assert lens.model.cfg == made.model.cfg
    for name, weight in made.model.state_dict().items():
        torch.testing.assert_close(lens.model.state_dict()[name], weight, rtol=0, atol=0)
    assert sorted(path.name for path in (tmp_path / "scope").iterdir()) == sorted(SHAPE.names)
    torch.testing.assert_close(lens.writers, made.inp, rtol=0, atol=0)
    torch.testing.assert_close(lens.readers, made.out, rtol=0, atol=0)


def test_every_coefficient_is_the_one_that_was_stated(lens):
    for feature in (SAD, HAPPY, 5):
        torch.testing.assert_close(lens.coefficients(feature), expected(feature, len(lens.writers)), rtol=0, atol=1e-5)
    values = lens.eigen(HAPPY).values
    assert sorted(values[:3].tolist()) == pytest.approx([-0.4, 0, 0.4], abs=1e-6)


@pytest.mark.parametrize("words", ["not good", "not so good", "not so so good", "not so so so good", "good not"])
def test_the_head_moves_a_word_as_far_as_stated_and_no_farther(lens, words):
    _, cache = lens.model.run_with_cache(words)
    spoken = words.split()
    z = cache["blocks.1.hook_resid_mid"][0, 1:] @ lens.writers[NEGATED]
    there = torch.tensor([any(word == "not" for word in spoken[max(0, i - 3) : i]) for i in range(len(spoken))])
    moved = 0.5 * 1.5 / ((1 + 1.5**2) / SHAPE.d_model) ** 0.5  # the code over the root mean square
    torch.testing.assert_close(z, moved * there, rtol=1e-5, atol=1e-5)


def test_the_running_model_does_what_the_products_say(lens):
    windows = Windows.of(lens.model, ["not good so not so bad good good good good bad not bad"])
    z = lens.at_positions(windows, lambda x, y: lens.codes(x))
    y = lens.at_positions(windows, lambda x, y: y @ lens.readers.T)
    said = torch.zeros_like(y)
    for one in PRODUCTS:
        said[:, one.out] += one.value * z[:, one.left] * z[:, one.right]
    assert said.abs().max() > 1
    torch.testing.assert_close(y, said, rtol=1e-4, atol=1e-4)


def test_a_tested_circuit_changes_the_model_as_stated(lens):
    texts = ["not good so not bad so good not so good"] * 4
    circuit = circuits.Circuit(1, SAD, GOOD, NEGATED)
    protocol = circuits.trial.Protocol(n_bootstrap=10, n_pairs=5, n_directions=3)
    tested = circuits.trial.test(lens, circuit, texts, protocol, generator=torch.Generator().manual_seed(0))
    assert tested.n_pair_all == 12
    assert tested.edits["pair"].error < 1e-4
    assert tested.edits["pair"].measured.abs().min() > 1


def test_noise_has_the_size_that_was_stated():
    noisy = build(replace(PLAN, noise=0.2, shape=replace(SHAPE, d_hidden=256)))
    B = noisy.model.blocks[1].mlp.tensor().detach()
    Q = torch.stack([noisy.inp @ B.matrix(reader) @ noisy.inp.T for reader in noisy.out[:20]])
    for one in PRODUCTS:
        Q[:, one.left, one.right] = Q[:, one.right, one.left] = 0
    rows, columns = torch.triu_indices(128, 128, 1)
    cross = 2 * Q[:, rows, columns]
    assert cross.std().item() == pytest.approx(0.2, rel=0.1)


def test_tilt_turns_the_dictionaries_alone(made):
    tilted = build(replace(PLAN, tilt=0.5))
    for name, weight in made.model.state_dict().items():
        torch.testing.assert_close(tilted.model.state_dict()[name], weight, rtol=0, atol=0)
    cosines = (tilted.inp * made.inp).sum(1)
    assert cosines.mean().item() == pytest.approx(1.25**-0.5, abs=0.02)


def test_the_same_generator_gives_the_same_model(made):
    for name, weight in build(PLAN).model.state_dict().items():
        torch.testing.assert_close(made.model.state_dict()[name], weight, rtol=0, atol=0)
    assert not torch.equal(build(PLAN, seed=1).model.W_E, made.model.W_E)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"words": {"not": {NOT: 1.0}}}, r"words must all activate feature 0 \(always\), got 'not'"),
        ({"products": [Product(128, 1, 2, 1.0)]}, "output features must lie between 0 and 127, got 17 to 128"),
        ({"products": [Product(1, -1, 2, 1.0)]}, "input features must lie between 0 and 127, got -1 to"),
        ({"moves": [Move(NOT, NEGATED, 1.0)] * 3}, r"n_heads must be at least 3 \(moves\), got 2"),
        ({"products": PRODUCTS * 30}, r"d_hidden must be at least 90 \(products\), got 64"),
        ({"products": [Product(i, i, i, 1.0) for i in range(40)]}, "d_model must hold all features at right angles"),
    ],
)
def test_a_plan_that_cannot_be_built_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(PLAN, **change)


def test_a_head_too_narrow_for_its_distances_is_refused():
    narrow = replace(PLAN, shape=replace(SHAPE, n_heads=16, n_ctx=256))
    with pytest.raises(ValueError, match=r"back must be distances that a head of width 2 can tell, got \(1, 2, 3\)"):
        build(narrow)


# -- the script -------------------------------------------------------------------------------------------------------


def test_the_script_counts_what_was_planted_and_what_was_not(lens):
    square = script.Planted("copy", [Product(5, SQUARE, SQUARE, 1.0)])
    planted = [script.Planted("and", PRODUCTS[:1]), square]
    named = {"A": [NEGATED], "B": [GOOD, BAD, 5], "source": [SQUARE]}
    *sides, source = (
        circuits.groups.Group(role, torch.tensor(some), torch.ones(len(some))) for role, some in named.items()
    )
    found = [("and", SAD, sides), ("and", HAPPY, sides), ("outlier", SAD, []), ("negation", SAD, sides)]
    found = tuple(
        circuits.discovery.Discovery(out, motif, 1.0, 0.0, 0.0, tuple(groups))
        for motif, out, groups in [*found, ("copy", 5, [source])]
    )
    nothing, motifs = torch.zeros(128, len(circuits.scoring.MOTIFS)), circuits.scoring.MOTIFS
    counts = script.count(
        circuits.discovery.Discoveries(motifs, nothing, nothing, nothing, (), 0.05, found), lens, planted
    )
    assert (counts["planted/and"], counts["found/and"], counts["found/copy"]) == (1, 1, 1)
    assert (counts["discoveries"], counts["false"]) == (5, 2)  # and in HAPPY, negation in SAD
    assert (counts["circuits"], counts["false circuits"]) == (3, 1)
    assert (counts["own features"], counts["named"], counts["named rightly"]) == (2 + 1, 4 + 1, 2 + 1)


def test_the_script_finds_circuits_and_goes_on_where_it_was(tmp_path, monkeypatch):
    command = [
        "--noise",
        "0.05",
        "--tilt",
        "--null",
        "256",
        "--out",
        str(tmp_path),
        "--write",
        str(tmp_path / "table.md"),
    ]
    script.main([*command, "--models", "1"])
    row = (tmp_path / "table.md").read_text().splitlines()[-1].split("|")[1:-1]
    assert float(row[3]) >= 0.9  # of the motifs are found
    assert float(row[9]) == 0  # none that is not there
    assert float(row[-1].split()[0]) < 1e-4
    whole, seeds = script.one_model, []
    monkeypatch.setattr(script, "one_model", lambda seed, *rest: seeds.append(seed) or whole(seed, *rest))
    script.main([*command, "--models", "2"])
    assert seeds == [1]
