"""JSON lines that grow: whole lines are read, a torn one is dropped, what is appended stands on lines of its own."""

from __future__ import annotations

import pytest

from mmkd.base.jsonl import JsonLines


def test_rows_come_back_in_order(tmp_path):
    lines = JsonLines(tmp_path / "log.jsonl", durable=True)
    assert lines.rows() == [] and lines.whole() == b""
    lines.append([{"a": 1}, {"b": "\u2028 ä"}])
    lines.append([[3]])
    assert lines.rows() == [{"a": 1}, {"b": "\u2028 ä"}, [3]]
    assert lines.whole().count(b"\n") == 3


@pytest.mark.parametrize("torn", [b'{"c": ', b'{"c": 1}', b"\xc3"])
def test_a_torn_line_is_neither_read_nor_stood_upon(tmp_path, torn):
    path = tmp_path / "log.jsonl"
    lines = JsonLines(path)
    lines.append([{"a": 1}])
    path.write_bytes(path.read_bytes() + torn)
    assert lines.rows() == [{"a": 1}]
    lines.drop_torn_line()
    lines.append([{"d": 2}])
    assert lines.rows() == [{"a": 1}, {"d": 2}]


def test_a_file_of_one_torn_line_becomes_empty(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'{"a"')
    lines = JsonLines(tmp_path / "log.jsonl")
    lines.drop_torn_line()
    assert (tmp_path / "log.jsonl").read_bytes() == b""


def test_a_damaged_line_is_an_error_and_lone_surrogates_are_a_matter_of_choice(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"nonsense\n")
    with pytest.raises(ValueError):
        JsonLines(path).rows()
    JsonLines(tmp_path / "kept.jsonl", errors="backslashreplace").append(["\ud83d"])
    assert JsonLines(tmp_path / "kept.jsonl").rows() == ["\ud83d"]
    with pytest.raises(UnicodeEncodeError):
        JsonLines(tmp_path / "strict.jsonl").append(["\ud83d"])
