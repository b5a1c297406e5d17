"""Text and token ids in every form that users have them in."""

import numpy as np
import pytest
import torch

IDS = [[1, 5, 7, 6, 9]]
FORMS = [
    IDS,
    [tuple(row) for row in IDS],
    [np.array(row, dtype=np.int32) for row in IDS],
    *(np.array(IDS, dtype=dtype) for dtype in ("uint8", "int16", "int32", "uint32", "int64")),
    *(torch.tensor(IDS, dtype=dtype) for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32)),
]


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


@pytest.mark.parametrize("ids", FORMS, ids=lambda ids: f"{type(ids).__name__} {getattr(ids, 'dtype', '')}")
def test_token_ids_of_any_integer_type_are_the_same_ids(model, ids):
    plain = torch.tensor(IDS)
    assert torch.equal(model(ids), model(plain))
    assert model(ids, return_type="loss") == model(plain, return_type="loss")
    assert torch.equal(model.generate(ids, 3, temperature=0), model.generate(plain, 3, temperature=0))
    assert model.to_str_tokens(ids) == model.to_str_tokens(plain)
    assert model.to_string(ids) == model.to_string(plain)
    assert torch.equal(model.tokens_to_residual_directions(ids), model.tokens_to_residual_directions(plain))
    resid = model(plain, stop_at_layer=1)
    loss = model(resid, return_type="loss", start_at_layer=1, tokens=ids)
    assert loss == model(plain, return_type="loss")


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (torch.tensor([[1.0, 2.0]], dtype=torch.float32), "input must hold integer token ids, got float32"),
        (torch.tensor([[True]]), "input must hold integer token ids, got bool"),
        ([[1.5, 2.0]], "input must be text or integer token ids, got list of float64"),
        ([[1, 2], [3]], "rows of as many token ids"),
        (["good", 3], "got int 3 as text 1"),
        (["good", None], "got NoneType None as text 1"),
        (torch.tensor([[1, 255]], dtype=torch.uint8), "input must hold token ids from 0 to"),
        ([], "at least one text, got an empty list"),
    ],
)
def test_what_is_neither_text_nor_ids_is_refused(model, unchecked, ids, said):
    with pytest.raises(ValueError, match=said):
        model(ids)
