"""Marks: how active groups of features are at each token."""

import pytest
import torch

import bilens
from bilens import circuits
from bilens.circuits.groups import Group
from bilens.circuits.marks import mark

TEXT = "the movie was not good"


@pytest.fixture(scope="module")
def lens():
    return circuits.FeatureLayer.load(bilens.load("bilens-mini"), 1)


def group(role, features):
    return Group(role, torch.tensor(features), torch.ones(len(features)))


def test_marks_are_the_activations_of_the_groups(lens):
    _, cache = lens.model.run_with_cache(TEXT, names_filter=lens.hook_in)
    z = lens.inp.encode(cache[lens.hook_in])[0, 1:]
    active = z.sum(0).argsort(descending=True)[:6].tolist()
    found = mark(lens, TEXT, [group("some", active[:4]), group("others", active[4:])])
    assert found.tokens == tuple(TEXT.split())
    assert found.roles == ("some", "others")
    torch.testing.assert_close(found.values[0], z[:, active[:4]].sum(1), rtol=1e-4, atol=1e-5)
    assert found.strongest[0].tolist() == [active[i] for i in z[:, active[:4]].argmax(1).tolist()]


def test_a_group_must_have_features(lens):
    with pytest.raises(ValueError, match="groups must each hold an input feature"):
        mark(lens, TEXT, [])
    with pytest.raises(ValueError, match="groups must each hold an input feature"):
        mark(lens, TEXT, [Group("none", torch.tensor([], dtype=torch.long), torch.tensor([]))])
