"""Files that are too large to be read at once: the same samples, made when they are asked for."""

import json
import pickle

import pytest

from mmkd.data import large, row_files
from mmkd.data.entries import read_samples
from mmkd.data.fingerprint import samples_fingerprint
from mmkd.data.lazy import is_lazy, joined, taken
from mmkd.data.samplers.length import ByLength
from mmkd.data.spec import DataSpec
from mmkd.errors import DataError
from mmkd.runs.data import AnswersApart
from mmkd.runs.write_cache import each_once

COUNT = 300


def conversation(number: int) -> dict:
    words = "Was ist das? éü日本 " * (number % 4) + "\"{[,]}\\ x"
    turns = [{"from": "human", "value": f"<image>\n{words}"}, {"from": "gpt", "value": f"answer {number}"}]
    return {"id": f"id{number}", "image": f"{number % 7}.png", "model": "x", "conversations": turns}


def rows(bad: dict[int, dict] | None = None) -> list[dict]:
    return [(bad or {}).get(number, conversation(number)) for number in range(COUNT)]


@pytest.fixture
def as_large(tmp_path, monkeypatch):
    """A function: makes all files large ones that are read in small pieces."""
    monkeypatch.setenv("MMKD_CACHE", str(tmp_path / "cache"))

    def make() -> None:
        monkeypatch.setattr(row_files, "LARGE", 0)
        monkeypatch.setattr(row_files, "_BLOCK", 97)

    return make


def written(folder, content: str, name: str) -> DataSpec:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(content, encoding="utf-8")
    return DataSpec(format="llava", root=str(folder), files={"annotations": name, "images": "."})


FORMS = {
    "train.json": lambda rows: json.dumps(rows),
    "indented.json": lambda rows: "\ufeff \n" + json.dumps(rows, indent=3, ensure_ascii=False) + "\n",
    "train.jsonl": lambda rows: "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n",
}


@pytest.mark.parametrize("name", FORMS)
def test_a_large_file_has_the_samples_of_a_small_one(tmp_path, as_large, name):
    spec = written(tmp_path / "data", FORMS[name](rows()), name)
    changes = [{}, {"limit": 50}, {"image_limit": 3}, {"weight": 2.5}]
    small = [read_samples(spec.model_copy(update=change), 3) for change in changes]
    as_large()
    for change, whole in zip(changes, small, strict=True):
        found = read_samples(spec.model_copy(update=change), 3)
        assert is_lazy(found) and not is_lazy(whole) and len(found) == len(whole)
        assert list(found) == whole and found[-1] == whole[-1] and list(found[5:40:3]) == whole[5:40:3]
        assert list(pickle.loads(pickle.dumps(found))) == whole
    both = joined([found, whole])
    assert len(both) == 2 * len(whole) and both[len(whole)] == whole[0] and list(both[-2:]) == whole[-2:]


def test_a_list_is_read_through_once_for_all(tmp_path, as_large, monkeypatch):
    bad = {7: {"conversations": 3}, 100: conversation(100) | {"video": "a.mp4"}}
    spec = written(tmp_path / "data", json.dumps(rows(bad)), "train.json")
    as_large()
    found = read_samples(spec, 0, allowed=0.01)
    assert [sample.id for sample in found] == [f"id{n}" for n in range(COUNT) if n not in bad]
    monkeypatch.setattr(large, "list_entries", None)  # reading again would fail
    again = read_samples(spec, 0, allowed=0.01)
    assert list(again) == list(found)
    (kept,) = (tmp_path / "cache" / "rows").glob("*.npz")
    monkeypatch.undo()
    monkeypatch.setenv("MMKD_CACHE", str(tmp_path / "cache"))
    as_large()
    kept.write_bytes(kept.read_bytes()[:-90])
    assert list(read_samples(spec, 0, allowed=0.01)) == list(found)  # what is damaged is made anew
    monkeypatch.setattr(large, "list_entries", None)
    with pytest.raises(DataError, match="In all 2 of 300 rows cannot be used"):
        read_samples(spec, 0)
    (tmp_path / "data" / "train.json").write_text(json.dumps(rows()))
    with pytest.raises(TypeError):  # other content is read
        read_samples(spec, 0)


def test_a_bad_line_of_a_large_file_gives_way_to_the_next(tmp_path, as_large):
    spec = written(tmp_path / "data", FORMS["train.jsonl"](rows({4: {"id": 3}})), "train.jsonl")
    as_large()
    found = read_samples(spec, 0, allowed=0.01)
    assert len(found) == COUNT and [found[n].id for n in (3, 4, 5)] == ["id3", "id5", "id5"]
    with pytest.raises(DataError, match="line 5: key 'conversations' is missing"):
        read_samples(spec, 0)


@pytest.mark.parametrize("end", [40, 2000, -1, -2])
def test_a_list_that_was_cut_is_refused(tmp_path, as_large, end):
    spec = written(tmp_path / "data", json.dumps(rows())[:end], "train.json")
    as_large()
    with pytest.raises(DataError, match=r"train\.json.*(complete)"):
        read_samples(spec, 0, allowed=0.5)
    assert not list((tmp_path / "cache").glob("rows/*.npz"))


def test_answers_of_a_large_set_are_taken_apart(tmp_path, as_large):
    several = {n: {"id": f"id{n}", "image": "0.png", "conversations": conversation(n)["conversations"] + [
        {"from": "human", "value": "And?"}, {"from": "gpt", "value": "More."}]} for n in range(0, COUNT, 3)}  # fmt: skip
    spec = written(tmp_path / "data", json.dumps(rows(several)), "train.json")
    whole = [one for sample in read_samples(spec, 0) for one in sample.by_answer()]
    as_large()
    apart = AnswersApart(read_samples(spec, 0))
    assert len(apart) == COUNT + len(several) and list(apart) == whole and list(apart[4:9]) == whole[4:9]


def test_what_walks_over_a_large_set_finds_what_it_finds_in_a_small_one(tmp_path, as_large):
    content = rows({n: conversation(n % 5) | {"id": f"again {n}"} for n in range(0, COUNT, 3)})
    specs = [written(tmp_path / name, json.dumps(content[start:]), "train.json") for name, start in (("data", 0), ("more", 200))]
    small = [read_samples(spec, 0) for spec in specs]
    as_large()
    large = [read_samples(spec, 0) for spec in specs]
    orders = [list(ByLength().build(joined(sets), (), 8, seed=3)) for sets in (small, large)]
    assert orders[0] == orders[1] and sorted(orders[0]) == list(range(COUNT + 100))
    once = [each_once(sets) for sets in (small, large)]
    assert is_lazy(once[1]) and list(once[1]) == once[0] and COUNT / 2 < len(once[0]) < COUNT
    assert list(taken(once[1], [5, 2])) == [once[0][5], once[0][2]]


def test_large_data_are_known_by_content_too(tmp_path, as_large):
    spec = written(tmp_path / "data", json.dumps(rows()), "train.json")
    as_large()
    before = samples_fingerprint(read_samples(spec, 0))
    other = written(tmp_path / "data", json.dumps(rows({8: conversation(9)})), "train.json")
    assert samples_fingerprint(read_samples(spec, 0)) != before and other == spec
