"""Texts are the same texts whatever holds them."""

import json

import numpy as np
import pytest
import torch

from bilens.circuits import places, verdict
from bilens.models.texts import list_of, rows_of, text_of
from bilens.models.windows import Windows
from bilens.saes.roles import names_of

TEXTS = ["the cat sat", None, "a dog ran on the mat"]
ROWS = [{"text": text, "stars": index} for index, text in enumerate(TEXTS)]


def files(folder):
    """Write texts as every kind of file that is read; a line of text is empty where there is none."""
    import pyarrow as pa
    from pyarrow import parquet

    (folder / "a.txt").write_text("\n".join(text or "" for text in TEXTS) + "\n")
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    (folder / "a.csv").write_text("stars,text\n" + "".join(f"{row['stars']},{row['text'] or ''}\n" for row in ROWS))
    parquet.write_table(pa.Table.from_pylist(ROWS), folder / "a.parquet")
    return {path.name: path for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def holders(tmp_path_factory):
    """Return the same texts in all that can hold them."""
    import datasets
    import pandas

    data, frame = datasets.Dataset.from_list(ROWS), pandas.DataFrame(ROWS)
    held = {
        "list": lambda: TEXTS,
        "tuple": lambda: tuple(TEXTS),
        "generator": lambda: (text for text in TEXTS),
        "rows": lambda: ROWS,
        "dataset": lambda: data,
        "column": lambda: data["text"],
        "slice of a dataset": lambda: data[:3],
        "stream": lambda: data.to_iterable_dataset(),
        "array": lambda: np.array(TEXTS, dtype=object),
        "data frame": lambda: frame,
        "series": lambda: frame["text"],
        "series with NaN": lambda: frame["text"].astype(object).where(frame["text"].notna(), float("nan")),
    }
    return held | {name: lambda path=path: path for name, path in files(tmp_path_factory.mktemp("texts")).items()}


def test_texts_are_the_same_from_anything(holders, make_model):
    model = make_model()
    wanted = Windows.of(model, TEXTS)
    for name, holder in holders.items():
        found = Windows.of(model, holder())
        assert torch.equal(found.tokens, wanted.tokens), name
        assert found.text.tolist() == [0, 2], name


def test_one_text_is_one_text_wherever_texts_are_taken(make_model, home, tmp_path, monkeypatch):
    model, one = make_model(n_ctx=32), "the cat sat"
    path = tmp_path / "~one.txt"
    path.write_text(one)
    row = {"text": one}
    for holder in (one, [one], row, [row], np.array(one), np.array([one]), path):
        assert list_of(holder) == [one]
        assert torch.equal(Windows.of(model, holder).tokens, model.to_tokens(one))
        assert len(places.locate(model, holder)) == 3
        readout = verdict.Readout("on", ("cat",), ("dog",))
        assert verdict.behaviour(model, holder, readout).statements == (one,)
    assert names_of("we saw Ann , and Ann and Ann", least=1) == {"ann"}
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list_of(type(path)("~") / path.name) == [one]


@pytest.mark.usefixtures("unchecked")
def test_what_holds_no_text_is_named(tmp_path):
    path = tmp_path / "numbers.jsonl"
    path.write_text('{"text": "the cat"}\n{"text": 7}\n')
    says = r"numbers\.jsonl must hold (strings, got int 7 as text 1, in column 'text'|rows of one)"
    with pytest.raises(ValueError, match=says):
        list(rows_of(path))
    for suffix in (".txt", ".jsonl", ".csv", ".parquet"):
        empty = tmp_path / f"empty{suffix}"
        empty.touch()
        with pytest.raises(ValueError, match=rf"empty\{suffix} must hold texts, but it is empty"):
            list(rows_of(empty))
    for texts, message in (
        ({"train": ROWS}, "must have a column 'text', got a mapping of 'train'"),
        ({"text": ["a"], "stars": []}, "columns of one length, 1, got another for 'stars'"),
        ({"text": 7}, "must hold strings in column 'text', got int 7"),
        (7, "must be texts or windows of token ids, got int"),
    ):
        with pytest.raises(ValueError, match=message):
            list(rows_of(texts))
    with pytest.raises(ValueError, match="prompts must hold a text in each row, got None in row 1"):
        list_of(TEXTS, "prompts")
    with pytest.raises(ValueError, match="statements must hold at least one text, got none"):
        list_of([], "statements")
    with pytest.raises(FileNotFoundError, match=r"no such file: .*gone\.txt"):
        rows_of(tmp_path / "gone.txt")
    with pytest.raises(ValueError, match=r"a\.pdf must be a \.parquet, .* file"):
        rows_of(tmp_path / "a.pdf")
    assert text_of({"body": "the"}, 0, "body") == "the"


def test_a_dataset_of_splits_says_to_choose_one():
    import datasets

    data = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    with pytest.raises(ValueError, match=r"must be one split, such as \['train'\]"):
        list(rows_of(data))
