"""Paths that users gave, and state that says when it is damaged."""

import os

import pytest
import torch
from safetensors.torch import save_file

from bilens.tensor.keeping import (
    atomic_write,
    check_folder,
    check_writable,
    read_record,
    read_state,
    user_path,
    write_record,
    write_state,
)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with atomic_write("~/a/b.txt") as path:
        path.write_text("x")
    assert (tmp_path / "a" / "b.txt").read_text() == "x"
    assert user_path("~") == tmp_path
    for odd in ("", "a\0b", "~no-such-user/x"):
        with pytest.raises(ValueError, match="a path must"):
            user_path(odd)


@pytest.mark.parametrize(("place", "says"), [("folder", "is a folder"), ("file/inner.json", "is a file")])
def test_a_place_that_cannot_be_written_to_is_refused_before_the_work(tmp_path, place, says):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises((ValueError, OSError), match=says):
        check_writable(tmp_path / place)
    with pytest.raises(ValueError, match="is a file"):
        check_folder(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_asking_makes_the_folder_and_writes_nothing(tmp_path):
    assert check_writable(tmp_path / "new" / "a.json") == tmp_path / "new" / "a.json"
    assert list((tmp_path / "new").iterdir()) == []


def test_state_comes_back_and_damage_is_told(tmp_path):
    path = tmp_path / "state.safetensors"
    tensors, about = {"a": torch.arange(3), "b": torch.zeros(0, 2).bfloat16()}, {"next": 3, "what": ["é"]}
    write_state(path, tensors, about)
    found, told = read_state(path)
    assert told == about
    assert {name: one.tolist() for name, one in found.items()} == {name: one.tolist() for name, one in tensors.items()}
    whole = path.read_bytes()
    edited = whole.replace(b'next\\": 3', b'next\\": 4')
    for damage in (whole[:-1], whole[:20], whole[:-3] + b"\x07" + whole[-2:], edited):
        assert damage != whole
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=r"state\.safetensors is damaged: .*; delete it, and the same call starts"):
            read_state(path)
    save_file({name: one.clone() for name, one in tensors.items()}, path)
    with pytest.raises(ValueError, match="it has no checksum"):
        read_state(path)


def test_a_record_that_people_read_comes_back_and_damage_is_told(tmp_path):
    path, told = tmp_path / "record.json", {"b": [1.5, None], "a": {"é": 1}}
    assert read_record(path) == {}
    write_record(path, told)
    assert read_record(path) == told
    whole = path.read_text()
    for damage in (whole.replace("1.5", "1.6"), whole[:-9], "[]", "{}", ""):
        path.write_text(damage)
        with pytest.raises(ValueError, match=r"record\.json is damaged: .*; delete it"):
            read_record(path)


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path):
    with atomic_write(tmp_path / "a") as partial:
        own = partial.name
    dead = own.replace(f"-{os.getpid()}.", "-999999999.")
    for name in (dead, own.replace(".partial", "")):
        (tmp_path / name).touch()
    with atomic_write(tmp_path / "a"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["a", own.replace(".partial", "")])
