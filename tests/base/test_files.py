"""Files and folders appear whole or not at all, and are known again."""

import os
import resource
import shutil

import pytest
import torch
from safetensors.torch import save_file

from mmkd.base.checksums import changed, check_whole, hash_of, sums_of
from mmkd.base.files import copy_whole, is_full, save_whole, write_sums, write_whole
from mmkd.errors import DataError


@pytest.fixture
def small_files():
    """Files of at most 64 KiB for this process, as a full disk or a quota has it."""
    import signal

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def make(folder):
    folder.mkdir(parents=True)
    (folder / "a.bin").write_bytes(os.urandom(5000))
    (folder / "b.json").write_text("{}")


def test_a_folder_is_known_again_and_its_copy_too(tmp_path):
    save_whole(tmp_path / "model", make)
    copy_whole(tmp_path / "model", tmp_path / "copy")
    for name in ("model", "copy"):
        check_whole(tmp_path / name, "put it back")
    content = (tmp_path / "copy" / "a.bin").read_bytes()
    (tmp_path / "copy" / "a.bin").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match=r"a\.bin is not what was written; put it back"):
        check_whole(tmp_path / "copy", "put it back")


def test_a_file_that_came_later_does_not_count(tmp_path):
    make(tmp_path / "x")
    write_sums(tmp_path / "x", tmp_path / "x" / "sums")
    (tmp_path / "x" / "notes.txt").write_text("mine")
    assert changed(tmp_path / "x", tmp_path / "x" / "sums") == ""


ODD = ["", "[]", "[1]", "{}", '{"files": {}}', '{"files": {"a.bin": 1}}', '{"files": {"a.bin": ["x", 2]}}', "\x00",
       '{"files": {"a.bin": [1' + "0" * 5000 + ', "y"]}}']  # fmt: skip


@pytest.mark.parametrize("text", ODD)
def test_damaged_sums_say_so(tmp_path, text):
    make(tmp_path / "x")
    (tmp_path / "sums").write_text(text)
    assert changed(tmp_path / "x", tmp_path / "sums")


def test_a_file_that_was_taken_out_of_the_sums_is_noticed(tmp_path):
    import json

    make(tmp_path / "x")
    write_sums(tmp_path / "x", tmp_path / "sums")
    content = json.loads((tmp_path / "sums").read_text())
    del content["files"]["a.bin"]
    (tmp_path / "sums").write_text(json.dumps(content, indent=1) + "\n")
    assert changed(tmp_path / "x", tmp_path / "sums") == "sums is not what was written"


def test_hashes_are_xxh3_of_128_bits(tmp_path):
    (tmp_path / "x").write_bytes(b"")
    assert hash_of(tmp_path / "x") == "99aa06d3014798d86001c324468d497f"  # of nothing, as XXH3's authors give it


def test_where_files_cannot_grow_the_message_says_room_and_nothing_is_left(tmp_path, small_files):
    def big(folder):
        folder.mkdir()
        save_file({"w": torch.zeros(100_000)}, folder / "model.safetensors")

    with pytest.raises(DataError, match=r"no room for .*about 0\.4 MiB are needed, [\d,.]+ MiB are left"):
        save_whole(tmp_path / "model", big, 400_000)
    with pytest.raises(DataError, match="no room"):
        write_whole(tmp_path / "report.html", "x" * 100_000)
    assert list(tmp_path.iterdir()) == []
    write_whole(tmp_path / "old", "before")
    with pytest.raises(DataError, match="no room"):
        write_whole(tmp_path / "old", "y" * 100_000)
    assert (tmp_path / "old").read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_torch_says_it_in_its_own_words(tmp_path, small_files):
    with pytest.raises(Exception) as caught:
        torch.save({"w": torch.zeros(100_000)}, tmp_path / "x.pt")
    assert is_full(caught.value)


def test_copying_says_it_as_a_list(tmp_path):
    make(tmp_path / "x")
    error = shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")])
    assert is_full(error) and not is_full(shutil.Error([("a", "b", "[Errno 13] Permission denied")]))
    assert not is_full(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_sums_stand_beside_the_folder(tmp_path):
    save_whole(tmp_path / "student", make)
    assert sorted(path.name for path in (tmp_path / "student").iterdir()) == ["a.bin", "b.json"]
    assert sums_of(tmp_path / "student").exists()
