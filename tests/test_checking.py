"""The shape checks under which the suite runs: they see each argument, the result, and sizes that must agree."""

import jaxtyping
import pytest
import torch
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation
from checking import checked
from jaxtyping import Float
from torch import Tensor

from bilens import BilinearTensor
from bilens.tensor.statistics import pearson


@checked(typechecker=beartype)
def twice(x: Float[Tensor, "row col"], y: Float[Tensor, "row"], out: Tensor | None = None) -> Float[Tensor, "row col"]:
    return x + y[:, None] if out is None else out


@pytest.mark.parametrize(
    "given",
    [
        (torch.ones(2, 3), torch.ones(3)),  # rows that differ
        (torch.ones(2), torch.ones(2)),
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(2)),
        (torch.ones(2, 3), None),
        (torch.ones(2, 3), torch.ones(2), torch.ones(3, 2)),  # a result of another shape than the argument
    ],
    ids=["sizes", "axes", "dtype", "type", "result"],
)
def test_what_does_not_fit_its_annotation_is_refused(given):
    with pytest.raises(BeartypeCallHintViolation):
        twice(*given)


@pytest.mark.usefixtures("unchecked")
def test_a_test_may_ask_for_no_checks():
    assert twice(torch.ones(2, 3), torch.ones(2), torch.ones(3, 2)).shape == (3, 2)


def test_sizes_of_one_call_say_nothing_of_the_next():
    assert twice(torch.ones(2, 3), torch.ones(2)).shape == (2, 3)
    assert twice(torch.ones(4, 5), torch.ones(4)).shape == (4, 5)


def test_the_package_is_checked(monkeypatch):
    with pytest.raises(BeartypeCallHintViolation):
        pearson(torch.ones(4), torch.ones(5))
    B = BilinearTensor(torch.ones(2, 3), torch.ones(3, 4), torch.ones(3, 4))
    assert B.diagonal().shape == (2, 4)  # whose annotation names sizes by the tensor's own
    monkeypatch.setattr(BilinearTensor, "out", 3)
    with pytest.raises(jaxtyping.TypeCheckError):
        B.diagonal()
