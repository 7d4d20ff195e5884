"""Teacher hacking: proxy against golden loss on held-out prompts, on made-up curves and with right and wrong teachers."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import tiny_picture, tiny_tokenizer, tiny_tower

from mmkd.errors import DataError, MmkdError, RecipeError
from mmkd.evaluation.report.curves import charts
from mmkd.recipes.reading import load_recipe
from mmkd.runs import hacking
from mmkd.runs.control import control_recipe
from mmkd.runs.data import entry_samples
from mmkd.runs.hacking import facts_of, hacked, in_words, monitor_facts, monitor_lines
from mmkd.runs.preflight import preflight
from mmkd.runs.stages import train
from mmkd.runs.towers import build_student, load_teachers
from mmkd.towers.tower import Tower
from mmkd.train.monitor import never_trained_on

ANSWERS = {"train": "red", "val": "green"}  # what the wrong teacher says, and what is right where nothing is trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Data whose labels say one thing in training and another on validation, teachers that have learned the one or the other, and
    a student that has begun to learn both."""
    root = tmp_path_factory.mktemp("hacking")
    for n in range(4):
        tiny_picture(root, f"{n}.png", n)
    for first, (split, answer) in zip((0, 1), ANSWERS.items(), strict=True):  # no question tells of which split it is
        rows = [{"image": f"{n % 4}.png", "question": f"what is {n}?", "answer": answer} for n in range(first, 16, 2)]
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tiny_tokenizer()
    tiny_tower(3, 16, tokenizer=tokenizer).save(root / "new")
    for name, splits, steps in (("wrong", ["train"], 40), ("right", ["val"], 40), ("start", [*ANSWERS], 5)):
        data = [{"format": "jsonl", "root": str(root), "split": split} for split in splits]
        optimiser = {"batch_size": 8, "learning_rate": 1e-2}
        stage = {"data": data, "steps": steps, "terms": {"cross_entropy": 1.0}, "optimiser": optimiser}
        run = root / f"{name}_run"
        trained(recipe_of(root, run, stage, student={"model": str(root / "new")}), run)
        (run / "student").rename(root / name)
    return root


def recipe_of(root: Path, output: Path, stage: dict, **changes) -> dict:
    return {
        "title": "t", "output": str(output), "controls": False, "student": {"model": str(root / "start")},
        "stages": {"distil": stage}, "guards": {"pixels_matter": False, "teacher_is_better": False}, "teachers": {},
    } | changes  # fmt: skip


def distilling(root: Path, output: Path, teacher: str, watched: dict, **changes) -> dict:
    entry = {"format": "jsonl", "root": str(root)}
    stage = {
        "data": [entry], "terms": {"kl": {"kind": "forward_kl", "teacher": "it"}}, "steps": 16, "save_every": 3, "log_every": 4,
        "optimiser": {"batch_size": 4, "learning_rate": 6e-3, "schedule": "constant"},
        "monitor": {"data": [entry | {"split": "val"}], "every": 2} | watched,
    }  # fmt: skip
    teachers = {"it": {"model": str(root / teacher)}, "other": {"model": str(root / "right")}}
    return recipe_of(root, output, stage | changes, teachers=teachers)


def trained(content: dict, run: Path) -> dict[str, torch.Tensor]:
    run.mkdir(parents=True, exist_ok=True)
    path = run.parent / f"{run.name}.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    recipe = load_recipe(path, [])
    teachers = load_teachers(recipe)
    train(recipe, "student", build_student(recipe, teachers, []), teachers, run)
    return load_file(run / "student" / "model.safetensors")


def curves_of(run: Path) -> dict[int, tuple[float, float]]:
    rows = [json.loads(line) for line in (run / "stages/student/0_distil/monitor.jsonl").read_text().splitlines()]
    return {row["step"]: (row["proxy"], row["golden"]) for row in rows}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- made-up curves --------------------------------------------------------------------------------------------------


def curve(proxy: list[float], golden: list[float]) -> dict[int, tuple[float, float]]:
    return {10 * n: pair for n, pair in enumerate(zip(proxy, golden, strict=True))}


@pytest.mark.parametrize(
    ("proxy", "golden", "at"),
    [
        ([5, 4, 3, 2, 1], [5, 4, 3, 2, 1], None),
        ([5, 4, 3, 2, 1], [5, 3, 4, 5, 6], 30),  # worse at 20, and for the second time at 30
        ([5, 4, 3, 2, 1], [5, 3, 4, 2, 3], None),  # never twice in a row
        ([5, 4, 5, 6, 7], [5, 3, 4, 5, 6], None),  # nor does the student come closer: it overfits, or diverges
        ([5, 4, 3.99, 3.98, 3.97], [5, 3, 4, 5, 6], None),  # the proxy stands still
        ([5, 4, 3, 2, 1], [5, 3, 3.01, 3.02, 3.02], None),  # golden stands still
        ([5, 4, 3, 2, 1], [1, 2, 3, 4, 5], 20),  # the start is the best student
        ([5, 4, 3, 2, 1], [5, 3, 4, 5, 1], 30),  # it was so once, whatever comes later
        ([5, 4, 3, 2, 1], [5, 3, float("nan"), float("nan"), 2], None),
        ([5], [5], None),
    ],
)
def test_hacking_is_a_proxy_that_falls_while_golden_rises_twice_in_a_row(proxy, golden, at):
    assert hacked(curve(proxy, golden)) == at


def test_facts_of_a_curve():
    facts = facts_of(curve([5, 4, 3, 2], [5, 3, 3, 6]), 2)
    assert facts["first"] == {"step": 0, "proxy": 5, "golden": 5} and facts["last"] == {"step": 30, "proxy": 2, "golden": 6}
    assert facts["lowest"]["step"] == facts["kept"] == 10  # of equal ones the first
    assert facts["reached"] and facts["steps"] == 30 and facts["hacked"] is None
    assert not facts_of(curve([5, 4, 3, 2], [5, 3, 3, 6]), 3)["reached"]
    free = facts_of(curve([5, 4, 3, 2], [5, 3, 4, 6]), None)
    assert free["kept"] is None and not free["reached"] and "teacher hacking" in in_words(free)
    assert "no teacher hacking seen" in in_words(facts)
    assert monitor_lines({"a": facts})[0].endswith("; ended there, and step 10 kept")


# ---- trainings -------------------------------------------------------------------------------------------------------


def test_a_wrong_teacher_turns_the_golden_curve_and_the_student_of_its_minimum_is_kept(folder, tmp_path, caplog):
    """First the student learns that an answer is a word and ends, and then the teacher's wrong word."""
    with caplog.at_level(logging.WARNING):
        last = trained(distilling(folder, tmp_path / "free", "wrong", {}), tmp_path / "free")
    curves = curves_of(tmp_path / "free")
    proxy, golden = ([curves[step][n] for step in sorted(curves)] for n in (0, 1))
    assert sorted(curves) == [*range(0, 17, 2)] and proxy[-1] < proxy[0] / 2 and golden[-1] > min(golden) * 1.1
    assert sum("teacher hacking" in record.message for record in caplog.records) == 1
    facts = monitor_facts(tmp_path / "free", "student")["distil"]
    best = min(curves, key=lambda step: curves[step][1])
    assert facts["hacked"] and facts["kept"] is None and 0 < facts["lowest"]["step"] == best < 16
    logged = [json.loads(line) for line in (tmp_path / "free/log/student.jsonl").read_text().splitlines()]
    assert [row["held-out golden"] for row in logged if "held-out golden" in row] == golden
    drawn = [chart["name"] for chart in charts({"student": tmp_path / "free/log/student.jsonl"})]
    assert {"held-out proxy", "held-out golden"} <= {*drawn}

    kept = trained(distilling(folder, tmp_path / "a", "wrong", {}, until={"kind": "golden", "patience": 2}), tmp_path / "a")
    facts = monitor_facts(tmp_path / "a", "student")["distil"]
    assert facts["reached"] and facts["kept"] == best and facts["steps"] < 16
    assert curves_of(tmp_path / "a") == {step: pair for step, pair in curves.items() if step <= facts["steps"]}
    assert not same(kept, last) and not list((tmp_path / "a").rglob("best.*"))
    expected = weights_after(folder, tmp_path, best)
    assert same(kept, expected)


def weights_after(folder: Path, tmp_path: Path, step: int) -> dict[str, torch.Tensor]:
    """Of a stage without monitor that ends after so many steps (at a constant rate)."""
    if step == 0:
        return load_file(folder / "start" / "model.safetensors")
    return trained(distilling(folder, tmp_path / "short", "wrong", {}, steps=step, monitor=None), tmp_path / "short")


def test_with_a_right_teacher_golden_falls_nobody_is_warned_and_no_bit_changes(folder, tmp_path, caplog):
    content = distilling(folder, tmp_path / "a", "right", {})
    content["teachers"]["other"]["model"] = str(folder / "wrong")
    with caplog.at_level(logging.WARNING):
        watched = trained(content, tmp_path / "a")
    curves = curves_of(tmp_path / "a")
    assert curves[16][1] < curves[0][1] and curves[16][0] < curves[0][0]
    assert not any("hacking" in record.message for record in caplog.records)
    assert monitor_facts(tmp_path / "a", "student")["distil"]["hacked"] is None
    content["stages"]["distil"].pop("monitor")
    assert same(watched, trained(content, tmp_path / "b"))


def test_the_oracle_that_is_the_teacher_gives_one_curve(folder, tmp_path):
    trained(distilling(folder, tmp_path / "a", "right", {"oracle": "other"}, steps=4), tmp_path / "a")
    curves = curves_of(tmp_path / "a")
    assert len(curves) == 3 and all(proxy == golden > 0 for proxy, golden in curves.values())
    trained(distilling(folder, tmp_path / "b", "wrong", {"oracle": "other"}, steps=4), tmp_path / "b")
    assert all(abs(proxy - golden) > 1e-3 for proxy, golden in curves_of(tmp_path / "b").values())


def test_proxy_and_golden_are_what_whole_logits_give(folder, tmp_path):
    """Of the student before step 1, whose folder is there to be read: KL a token, and cross-entropy a token."""
    recipe = distilling(folder, tmp_path / "a", "wrong", {}, steps=2)
    trained(recipe, tmp_path / "a")
    towers = [Tower.load(folder / name, max_length=2048) for name in ("start", "wrong")]
    path = tmp_path / "a.yaml"
    samples = entry_samples(load_recipe(path, []), load_recipe(path, []).stages["distil"].monitor.data[0])
    kl, nll, count = 0.0, 0.0, 0
    for sample in samples:
        q, p = (logits(tower, sample).log_softmax(-1) for tower in towers)
        inputs = towers[0].prepare([sample])
        targets = inputs.targets[inputs.response]
        kl += float((p.exp() * (p - q)).sum())
        nll += float(-q.gather(-1, targets[:, None]).sum())
        count += len(targets)
    assert curves_of(tmp_path / "a")[0] == pytest.approx((kl / count, nll / count), rel=1e-4)


@torch.no_grad()
def logits(tower, sample):
    inputs = tower.prepare([sample])
    out = tower.model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, **inputs.pixels).logits
    return out[inputs.response].double()


def test_on_policy_the_proxy_is_on_the_students_own_answers_and_draws_nothing_from_training(folder, tmp_path):
    own = {"answers": {"student": {"share": 1, "max_new_tokens": 4}}, "steps": 4}
    watched = trained(distilling(folder, tmp_path / "a", "right", {}, **own), tmp_path / "a")
    assert same(watched, trained(distilling(folder, tmp_path / "b", "right", {}, **own, monitor=None), tmp_path / "b"))
    trained(distilling(folder, tmp_path / "c", "right", {}, steps=2), tmp_path / "c")
    (proxy, golden), (of_data, labels) = curves_of(tmp_path / "a")[0], curves_of(tmp_path / "c")[0]
    assert golden == labels and proxy != pytest.approx(of_data, rel=1e-3)
    trained(distilling(folder, tmp_path / "d", "right", {"oracle": "other"}, **own), tmp_path / "d")
    assert all(proxy == golden for proxy, golden in curves_of(tmp_path / "d").values())  # on the same answers


def test_stopped_and_gone_on_with_it_ends_as_undisturbed(folder, tmp_path, monkeypatch):
    until = {"until": {"kind": "golden", "patience": 3}}
    whole = trained(distilling(folder, tmp_path / "whole", "wrong", {}, **until), tmp_path / "whole")
    measure, asked = hacking.Hacking.measured, []

    def dies(self, step):
        asked.append(step)
        if step == 4:
            raise KeyboardInterrupt
        return measure(self, step)

    monkeypatch.setattr(hacking.Hacking, "measured", dies)
    with pytest.raises(KeyboardInterrupt):
        trained(distilling(folder, tmp_path / "stopped", "wrong", {}, **until), tmp_path / "stopped")
    monkeypatch.setattr(hacking.Hacking, "measured", lambda self, step: asked.append(step) or measure(self, step))
    assert same(whole, trained(distilling(folder, tmp_path / "stopped", "wrong", {}, **until), tmp_path / "stopped"))
    assert asked[:4] == [0, 2, 4, 4]  # from the checkpoint of step 3 on; what was measured before it is remembered
    assert curves_of(tmp_path / "stopped") == curves_of(tmp_path / "whole")
    logs = [(tmp_path / run / "log/student.jsonl").read_text().splitlines() for run in ("whole", "stopped")]
    both = [[json.loads(line) for line in lines] for lines in logs]
    assert [[row["step"] for row in rows if "held-out proxy" in row] for rows in both] == [[*curves_of(tmp_path / "whole")]] * 2


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_prompts_that_are_trained_on_are_no_held_out_prompts(folder, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(distilling(folder, tmp_path / "a", "wrong", {})))
    recipe = load_recipe(path, [])
    stage = recipe.stages["distil"]
    trained_on, held_out = (entry_samples(recipe, entry) for entry in (stage.data[0], stage.monitor.data[0]))
    assert never_trained_on([*held_out, *trained_on[:3]], trained_on) == list(held_out)
    with pytest.raises(DataError, match="trains on all 8"):
        never_trained_on(trained_on, trained_on)
    same_split = load_recipe(path, ["stages.distil.monitor.data.0.split=train"])
    teachers = load_teachers(same_split)
    with pytest.raises(MmkdError, match=r"stages\.distil\.monitor: .*trains on all"):
        preflight(same_split, build_student(same_split, teachers, []), teachers)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.distil.monitor=null", "stages.distil.until=golden"], "needs `monitor`"),
        (["stages.distil.until={kind: golden, every: 3}"], "give `every` there"),
        (["stages.distil.monitor.proxy=forward_kll"], "forward_kl"),
        (["stages.distil.monitor.proxy=cross_entropy"], "compare with one teacher"),
        (["stages.distil.monitor.proxy=taid"], "compare with one teacher"),
        (["stages.distil.monitor.oracle=teacher"], "oracle is 'teacher'"),
        (["stages.distil.monitor.oracle=it"], "none that a term of the stage reads"),
        (["stages.distil.monitor.data.0.target=teacher"], "labels of their own"),
        (["stages.distil.terms={cross_entropy: 1.0}"], "no term reads one"),
        (["teachers.it.cache=somewhere"], "has not seen what is held out"),
        (["controls={equal_steps: {stages: {distil: {until: golden}}}}"], "a control has none"),
    ],
)
def test_what_cannot_be_watched_is_refused(folder, tmp_path, overrides, message):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(distilling(folder, tmp_path / "a", "wrong", {})))
    with pytest.raises(RecipeError, match=message):
        load_recipe(path, overrides)


def test_the_control_is_not_watched(folder, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(distilling(folder, tmp_path / "a", "wrong", {}, until="golden")))
    stage = control_recipe(load_recipe(path, [])).stages["distil"]
    assert stage.monitor is None and stage.until is None
