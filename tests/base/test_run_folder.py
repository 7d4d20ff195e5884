"""A run's folder belongs to one recipe."""

from __future__ import annotations

import json

import pytest
import yaml

from mmkd.base.files import save_whole
from mmkd.base.jsonl import log_rows
from mmkd.base.run_folder import claim, differences, restart, take_control
from mmkd.errors import DataError
from mmkd.recipes.recipe import CHANGEABLE

RECIPE = {"seed": 1, "stages": {"sft": {"steps": 3, "terms": ["a", "b"]}}}


def begin(folder):
    (folder / "log").mkdir()
    (folder / "log" / "student.jsonl").write_text("{}\n")


def test_the_same_recipe_goes_on_and_another_is_refused_with_what_differs(tmp_path):
    folder = tmp_path / "runs" / "one"
    for _ in range(2):
        claim(folder, RECIPE, title="a title", seed=1)
    assert yaml.safe_load((folder / "recipe.yaml").read_text()) == RECIPE
    assert json.loads((folder / "run.json").read_text())["title"] == "a title"
    begin(folder)
    other = {"seed": 1, "stages": {"sft": {"steps": 4, "terms": ["a"], "epochs": 1}}}
    with pytest.raises(DataError, match=r"differs in stages.sft.epochs, stages.sft.steps, stages.sft.terms\)"):
        claim(folder, other, title="a title", seed=1)


def test_keys_that_change_nothing_learnt_may_change_by_name(tmp_path, caplog):
    recipe = {"max_length": 2048, "guards": {"max_skipped_images": 0.0}, "stages": {"sft": {"steps": 3, "save_every": 200}}}
    claim(tmp_path, recipe, title="a title", seed=1)
    begin(tmp_path)
    changed = {
        "max_length": 512, "guards": {"max_skipped": 0.1}, "workers": 4, "stages": {"sft": {"steps": 3, "save_every": 50}},
    }  # fmt: skip
    with caplog.at_level("INFO"):
        claim(tmp_path, changed, title="a title", seed=1, changeable=CHANGEABLE)
    assert "from here on max_length is 512; it was 2048" in caplog.text and "workers is 4; it was its default" in caplog.text
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text()) == changed
    for key, other in (("steps", {"stages": {"sft": {"steps": 4, "save_every": 50}}}), ("seed", {"seed": 2})):
        with pytest.raises(DataError, match=rf"differs in [\w.]*{key}\)"):
            claim(tmp_path, {**changed, **other}, title="a title", seed=1, changeable=CHANGEABLE)


def test_a_folder_in_which_nothing_was_trained_is_free_for_a_mended_recipe(tmp_path):
    claim(tmp_path, RECIPE, title="a title", seed=1)
    claim(tmp_path, {"seed": 2}, title="a title", seed=2)
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text()) == {"seed": 2}


def test_a_run_of_other_data_is_refused_with_the_file(tmp_path):
    data = {"sft": {"0": {"train.jsonl": "aa", "more.jsonl": "bb"}}}
    claim(tmp_path, RECIPE, title="a title", seed=1, data=data)
    begin(tmp_path)
    claim(tmp_path, RECIPE, title="a title", seed=1, data=data)
    changed = {"sft": {"0": {"train.jsonl": "cc", "more.jsonl": "bb"}}}
    with pytest.raises(DataError, match=r"run of other data \(differs in sft.0.train.jsonl\)"):
        claim(tmp_path, RECIPE, title="a title", seed=1, data=changed)


def test_a_run_of_before_that_recorded_no_data_goes_on(tmp_path):
    claim(tmp_path, RECIPE, title="a title", seed=1)
    begin(tmp_path)
    claim(tmp_path, RECIPE, title="a title", seed=1, data={"sft": {"0": {"train.jsonl": "aa"}}})


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    claim(tmp_path / "one", RECIPE, title="a title", seed=1)
    assert not (tmp_path / "one").exists()


def test_differences():
    assert differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 1}, "c": 2}) == []
    assert sorted(differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 2, "d": 3}})) == ["a.b", "a.d", "c"]
    assert differences({"a": {"b": 1}}, {"a": 1}) == ["a"]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00binary", b"", b"[1, 2]", b"a: &a [*a]", b"x: " + b"[" * 3000])
def test_a_damaged_record_is_one_line_with_the_way_out(tmp_path, content):
    claim(tmp_path, RECIPE, title="a title", seed=1)
    begin(tmp_path)
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(DataError, match="--restart") as caught:
        claim(tmp_path, RECIPE, title="a title", seed=1)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("content", ["", "[1]", "\x00", "{"])
def test_a_damaged_run_json_is_one_line(tmp_path, content):
    claim(tmp_path, RECIPE, title="a title", seed=1, data={})
    begin(tmp_path)
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(DataError, match=r"run\.json"):
        claim(tmp_path, RECIPE, title="a title", seed=1, data={})


def test_restart_deletes_a_run_and_nothing_else(tmp_path):
    run, other = tmp_path / "run", tmp_path / "photos"
    claim(run, RECIPE, title="a title", seed=1)
    begin(run)
    (run / "student").mkdir()
    restart(run)
    assert list(run.iterdir()) == []
    claim(run, {"seed": 2}, title="a title", seed=2)
    other.mkdir()
    (other / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match="holds no run but holiday.jpg; nothing of it is deleted"):
        restart(other)
    restart(tmp_path / "nowhere")


def test_a_control_and_its_log_never_mix(tmp_path):
    def make(text):
        def save(folder):
            folder.mkdir(parents=True)
            (folder / "model.safetensors").write_text(text)

        return save

    for name in ("one", "two"):
        save_whole(tmp_path / name / "control", make(name))
        (tmp_path / name / "log").mkdir()
        (tmp_path / name / "log" / "control.jsonl").write_text(name)
        take_control(tmp_path / name, tmp_path / "run", "control")
        take_control(tmp_path / name, tmp_path / "run", "control")  # again, as a resumed run does
        assert (tmp_path / "run" / "control" / "model.safetensors").read_text() == name
        assert (tmp_path / "run" / "log" / "control.jsonl").read_text() == name


def test_odd_rows_of_a_log_are_left_out_by_line(tmp_path, caplog):
    odd = ["[1]", "nothing", '{"stage": 1, "step": 2}', '{"stage": "a", "step": NaN}', '{"stage": "a"}', "\x00"]
    rows = ['{"stage": "a", "step": 1}', *odd, '{"stage": "a", "step": 2}', '{"stage": "a", "st']
    (tmp_path / "log.jsonl").write_text("\n".join(rows))
    assert [row["step"] for row in log_rows(tmp_path / "log.jsonl")] == [1, 2]
    assert all(f"line {number} is left out" in caplog.text for number in (2, 3, 4, 5, 6, 7, 9))
    (tmp_path / "log.jsonl").write_bytes(b"\xff\xff")
    with pytest.raises(DataError, match="no log of a training"):
        list(log_rows(tmp_path / "log.jsonl"))
