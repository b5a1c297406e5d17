"""A seeded part of the fuzzing campaign: nothing hangs, raises what it must not, or is silently wrong."""

import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
import fuzz  # noqa: E402
from fuzz_things import Bench, Wrong  # noqa: E402

sys.path.remove(str(SCRIPTS))
CASES = {"checkpoints": 30, "interrupts": 40, "kills": 0}  # of each family; 10 of the others


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"), 0)


@pytest.mark.parametrize("family", [name for name in fuzz.FAMILIES if CASES.get(name, 1)])
def test_every_case_is_refused_by_name_or_right(bench, family, unchecked):
    found = [fuzz.outcome(family, number, 0, bench) for number in range(CASES.get(family, 10))]
    assert [line for what, line in found if what not in ("right", "refused by name")] == []


def test_what_may_not_happen_is_told(bench, monkeypatch):
    def wrong(rng, bench):
        raise Wrong("another table")

    for case, told in ((wrong, "silent"), (lambda rng, bench: 1 / 0, "wrong exception"), (_forever, "hung")):
        monkeypatch.setitem(fuzz.FAMILIES, "cards", (case, 1))
        monkeypatch.setattr(fuzz, "LIMIT", 0.2)
        assert fuzz.outcome("cards", 0, 0, bench)[0] == told


def _forever(rng, bench):
    while True:
        pass


def test_cases_are_the_same_for_a_seed(bench, unchecked):
    assert len({fuzz.outcome("SAEs", 3, 0, bench)[1] for _ in range(2)}) == 1
