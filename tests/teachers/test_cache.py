"""The teacher cache: the same training as with the live teacher, and what is refused, resumed and survived."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors import safe_open
from tiny import WORDS, the_teacher, tiny_picture, tiny_samples, tiny_tower

from mmkd.cli import main
from mmkd.errors import DataError, TowerError
from mmkd.recipes.reading import validate
from mmkd.recipes.recipe import Recipe
from mmkd.runs.data import stage_samples
from mmkd.runs.stages import train
from mmkd.runs.towers import build_student
from mmkd.runs.write_cache import write_cache
from mmkd.teachers.store import ShardWriter, StoredRows, TeacherCache, content_key, text_key
from mmkd.terms.spec import build_terms
from mmkd.towers.tower import Tower
from mmkd.train.collate import PairDataset
from mmkd.train.distiller import Distiller

TERMS = {
    "cross_entropy": 1,
    "said": {"kind": "cross_entropy", "positions": "prompt", "weight": 0.3},
    "kl": {"kind": "forward_kl"},
    "mdist": {"kind": "forward_kl", "positions": "visual", "weight": 0.5},
    "dbild": 0.5,
    "relation": 0.5,
    "features": {"kind": "feature_match"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two random towers and 60 questions on 20 pictures."""
    root = tmp_path_factory.mktemp("cache")
    teacher = tiny_tower(5, 32)
    teacher.save(root / "teacher")
    tiny_tower(6, 16, tokenizer=teacher.tokenizer).save(root / "student")
    draw = random.Random(0)
    with (root / "train.jsonl").open("w") as file:
        for number in range(60):
            tiny_picture(root, f"{number // 3}.png", number // 3)
            question, answer = (" ".join(draw.choices(WORDS, k=draw.randint(1, most))) for most in (9, 5))
            row = {"image": f"{number // 3}.png", "question": f"{question} {number}?", "answer": answer}
            file.write(json.dumps(row) + "\n")
    return root


def recipe(folder, terms=None, **changes):
    stage = {
        "data": [{"format": "jsonl", "root": str(folder), "prompt": "plain"}],
        "terms": TERMS if terms is None else terms,
        "steps": 6,
        "log_every": 1,
        "optimiser": {"batch_size": 6, "micro_batch_size": 3},
    }
    raw = {
        "title": "test",
        "output": str(folder / "out"),
        "teacher": {"model": str(folder / "teacher")},
        "student": {"model": str(folder / "student")},
        "stages": {"only": stage},
        "guards": {"teacher_is_better": False},
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        place = raw
        for step in path:
            place = place[step]
        place[last] = value
    return validate(raw, "test", Recipe)


@pytest.fixture(scope="module")
def cache(folder):
    write_cache(recipe(folder), folder / "cache")
    return folder / "cache"


def trained(spec, run):
    teacher = the_teacher(spec)
    tower = train(spec, "student", build_student(spec, teacher, []), teacher, run)
    rows = [json.loads(line) for line in (run / "log" / "student.jsonl").read_text().splitlines()]
    return tower, rows


def test_the_trajectory_is_that_of_the_live_teacher(folder, cache, tmp_path, monkeypatch):
    live, live_rows = trained(recipe(folder), tmp_path / "live")
    monkeypatch.setattr("mmkd.towers.tower.Tower.load", _only_students(folder))
    cached, cached_rows = trained(recipe(folder, teacher__cache=str(cache)), tmp_path / "cached")
    assert len(live_rows) == 6 and live_rows[0]["loss"] != live_rows[-1]["loss"]
    # Batches of other pictures round otherwise. The gradient of step 4 is steep: 4e-7 of the one before become 3.4e-5 there, and
    # 3e-6 behind it; the losses agree to 2e-6 throughout.
    closeness = dict.fromkeys(("loss", *TERMS), 5e-6) | {"grad_norm": 1e-4}
    for own, other in zip(live_rows, cached_rows, strict=True):
        for name, rel in closeness.items():
            assert own[name] == pytest.approx(other[name], rel=rel), (own["step"], name)
    found = cached.model.state_dict()
    for name, tensor in live.model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_the_switch_runs_live_beside_a_cache(folder, tmp_path, monkeypatch):
    """Also with samples that have no picture, which are not switched; the teacher's own passes are not run again."""
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()[:7]]
    del rows[2]["image"], rows[5]["image"]
    (folder / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"format": "jsonl", "root": str(folder), "prompt": "plain", "files": {"annotations": "mixed.jsonl"}}
    changes = {
        "terms": {"cross_entropy": 1, "kl": {"kind": "forward_kl"}, "switched": {"kind": "dbild", "path": "switch"}},
        "stages__only__data": [data],
    }
    spec = recipe(folder, **changes)
    write_cache(spec, tmp_path / "cache")
    live, cached = the_teacher(spec), the_teacher(recipe(folder, **changes, teacher__cache=str(tmp_path / "cache")))
    monkeypatch.setattr(cached.tower, "see", None)
    stage = spec.stages["only"]
    student, samples, terms = build_student(spec, live, []), stage_samples(spec, stage), build_terms(stage.terms)
    found = []
    for teacher in (live, cached):
        dataset = PairDataset(samples, student, teacher, terms)
        batch = dataset.collator([dataset[i] for i in range(len(samples))])["batch"]
        student.model.zero_grad()
        loss, log = Distiller(student, teacher, terms)(batch)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in student.model.named_parameters() if p.grad is not None}
        found.append(({name: [float(x) for x in pair] for name, pair in log.items()}, gradients))
    assert [s.images != () for s in samples].count(False) == 2 and float(found[0][0]["switched"][0]) > 0
    for name, (total, count) in found[0][0].items():
        assert found[1][0][name] == [pytest.approx(total, rel=2e-5), count], name
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def _only_students(folder):
    load = Tower.load

    def checked(path, **options):
        assert str(path) != str(folder / "teacher"), "the teacher's model was loaded"
        return load(path, **options)

    return checked


def test_top_k_is_the_kl_of_the_likeliest_tokens_and_a_tail(folder, tmp_path):
    terms = {"cross_entropy": 1, "kl": {"kind": "forward_kl"}, "mdist": {"kind": "forward_kl", "positions": "visual"}}
    spec = recipe(folder, terms)
    write_cache(spec, tmp_path / "top", top_k=8)
    cached = recipe(folder, terms, teacher__cache=str(tmp_path / "top"))
    live, teacher = the_teacher(spec), the_teacher(cached)
    student, own = build_student(spec, live, []), build_terms(spec.stages["only"].terms)
    samples = tiny_rows(cached)
    dataset = PairDataset(samples, student, teacher, own)
    batch = dataset.collator([dataset[i] for i in range(len(samples))])["batch"]
    _, log = Distiller(student, teacher, own)(batch)
    inputs = live.running().prepare(samples)
    with torch.no_grad():
        given = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask, **inputs.pixels}
        p, q = (tower.model(**given).logits.double().softmax(-1) for tower in (live.running(), student))
    for name, where in (("kl", inputs.response), ("mdist", inputs.visual)):
        top = p[where].topk(8, -1)
        p_k, q_k = top.values, q[where].gather(-1, top.indices)
        p_rest, q_rest = 1 - p_k.sum(-1), 1 - q_k.sum(-1)
        expected = (p_k * (p_k / q_k).log()).sum(-1) + p_rest * (p_rest / q_rest).log()
        assert float(log[name][0]) == pytest.approx(float(expected.sum()), rel=2e-3), name  # float16 log-probabilities
        assert float(log[name][1]) == int(where.sum())


def tiny_rows(spec):
    return stage_samples(spec, spec.stages["only"])[:5]


def test_bytes_are_as_forecast(folder, cache, tmp_path):
    """Also where rows are counted on a part of the samples only."""
    facts = write_cache(recipe(folder), tmp_path / "again")
    assert facts["forecast"].rows == pytest.approx(facts["rows"], rel=0.02)
    # A shard's header is a kilobyte, which in 64 MiB is nothing and here is a part of the whole.
    data = sum(path.stat().st_size - _header(path) for path in (tmp_path / "again" / "shards").glob("*.safetensors"))
    assert data == pytest.approx(facts["forecast"].total - facts["forecast"].head_bytes, rel=0.02)


def _header(path):
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_the_forecast_of_all_follows_from_some(folder, monkeypatch, tmp_path):
    monkeypatch.setattr("mmkd.runs.write_cache.PROBE", 12)
    few = write_cache(recipe(folder), tmp_path / "none", forecast_only=True)["forecast"]
    assert not (tmp_path / "none").exists()
    monkeypatch.setattr("mmkd.runs.write_cache.PROBE", 60)
    every = write_cache(recipe(folder), tmp_path / "none", forecast_only=True)["forecast"]
    assert few.rows == pytest.approx(every.rows, rel=0.02) and few.total == pytest.approx(every.total, rel=0.02)


def test_processes_share_the_samples_and_find_what_is_there(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "3")
    read = []
    for rank in ("2", "0", "1"):
        monkeypatch.setenv("RANK", rank)
        read.append(write_cache(recipe(folder), tmp_path / "shared")["read"])
    assert sorted(read) == [20, 20, 20] and len(TeacherCache(tmp_path / "shared")) == 60
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert write_cache(recipe(folder), tmp_path / "shared")["read"] == 0


@pytest.mark.parametrize(
    "change, said",
    [
        ({"max_length": 512}, "max_length: 2048 in the cache, 512 in the recipe"),
        ({"teacher__dtype": "float32"}, "dtype: auto in the cache, float32 in the recipe"),
        ({"stages__only__precision": "bfloat16"}, "precision: float32 in the cache, bfloat16 in the recipe"),
        ({"terms": {"v": {"kind": "dbild", "path": "switch", "positions": "prompt"}}}, "v: needs prompt rows, the cache has"),
        ({"terms": {"p": {"kind": "forward_kl", "positions": "prompt"}}}, "p: needs prompt rows, the cache has response and"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(folder, cache, change, said):
    with pytest.raises(DataError) as caught:
        the_teacher(recipe(folder, teacher__cache=str(cache), **{"terms": None, **change}))
    assert said in str(caught.value)


def test_a_top_k_cache_refuses_what_needs_all_logits(folder, tmp_path):
    write_cache(recipe(folder, {"kl": {"kind": "forward_kl"}}), tmp_path / "top", top_k=4)
    terms = {"r": {"kind": "reverse_kl"}, "d": {"kind": "dbild"}, "t": {"kind": "forward_kl", "temperature": 2}}
    with pytest.raises(DataError) as caught:
        the_teacher(recipe(folder, terms, teacher__cache=str(tmp_path / "top")))
    for said in ("only.terms.r: reverse_kl weighs tokens by the student", "terms.d: dbild needs all", "terms.t: temperature 2"):
        assert said in str(caught.value)


def test_another_teacher_is_refused_until_its_files_are_those(folder, cache, tmp_path):
    tiny_tower(7, 32).save(tmp_path / "other")
    with pytest.raises(DataError, match="1 files of the teacher .* changed since: model.safetensors"):
        the_teacher(recipe(folder, teacher__model=str(tmp_path / "other"), teacher__cache=str(cache)))
    tiny_tower(5, 32).save(tmp_path / "same")
    assert the_teacher(recipe(folder, teacher__model=str(tmp_path / "same"), teacher__cache=str(cache))) is not None
    with (tmp_path / "same" / "chat_template.jinja").open("a") as file:
        file.write("{# changed #}")
    with pytest.raises(DataError, match=r"chat_template.jinja"):
        write_cache(recipe(folder, teacher__model=str(tmp_path / "same")), cache)


def test_samples_that_changed_are_refused(folder, cache, tmp_path):
    spec = recipe(folder, teacher__cache=str(cache))
    teacher = the_teacher(spec)
    student, terms = build_student(spec, teacher, []), build_terms(spec.stages["only"].terms)
    with pytest.raises(DataError, match=r"3 of 3 samples are not in the teacher cache .*'s0', 's1', 's2'"):
        PairDataset(tiny_samples(tmp_path, 3), student, teacher, terms)
    sample = tiny_rows(spec)[0]
    repainted = replace(sample, images=(tiny_picture(tmp_path, "other.png", 99),))
    with pytest.raises(DataError, match="its pictures"):
        PairDataset([repainted], student, teacher, terms)[0]


def test_a_cache_asked_for_something_new_says_so(folder, cache, capsys):
    teacher = the_teacher(recipe(folder, teacher__cache=str(cache)))
    with pytest.raises(TowerError, match="cannot read anything new"):
        teacher.running()
    assert main(["cache", str(folder / "nowhere.yaml")]) == 2


def test_pairs_of_answers_need_no_live_teacher_either(folder, tmp_path, monkeypatch):
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()][:8]
    names = {"prompt": "question", "chosen": "answer"}
    pairs = [{k: r[v] for k, v in names.items()} | {"images": [r["image"]], "rejected": r["answer"] + " A"} for r in rows]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    data = [{"format": "preference", "root": str(folder), "split": "pairs"}]
    changes = {"stages__only__data": data, "stages__only__steps": 2}
    _, live = trained(recipe(folder, {"dpo": 1}, **changes), tmp_path / "live" / "run")
    assert write_cache(recipe(folder, {"dpo": 1}, **changes), tmp_path / "cache")["pairs"] == 8
    monkeypatch.setattr("mmkd.towers.tower.Tower.load", _only_students(folder))
    spec = recipe(folder, {"dpo": 1}, teacher__cache=str(tmp_path / "cache"), **changes)
    _, cached = trained(spec, tmp_path / "cached" / "run")
    assert [r["dpo"] for r in cached] == pytest.approx([r["dpo"] for r in live], rel=1e-5)
    assert not (tmp_path / "cached" / "references").exists()


def test_the_command_says_how_to_use_it(folder, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(folder, {"kl": {"kind": "forward_kl"}}).model_dump(mode="json", exclude_none=True)))
    where = f"teacher.cache={tmp_path / 'written'}"
    assert main(["cache", str(path), where, "--forecast"]) == 0
    assert "60 samples, about" in capsys.readouterr().out and not (tmp_path / "written").exists()
    assert main(["cache", str(path), where, "--workers", "0"]) == 0
    assert f"use it: mmkd distill {path} {where}" in capsys.readouterr().out
    assert main(["cache", str(path), where, "--top-k", "4"]) == 2
    assert "top_k: None in the cache, 4 in the recipe" in capsys.readouterr().err


# ---- shards ----------------------------------------------------------------------------------------------------------


def said(seed, rows=40, width=8):
    g = torch.Generator().manual_seed(seed)
    return StoredRows(
        torch.randint(1, 8, (rows,), generator=g, dtype=torch.uint8),
        torch.randint(0, 99, (rows,), generator=g, dtype=torch.int32),
        torch.randn(rows, generator=g),
        {"hidden": torch.randn(rows, width, generator=g)},
        [3, 4],
        [torch.randn(5, 2, generator=g), torch.randn(6, 2, generator=g)],
    )


def key_of(number):
    return number.to_bytes(16, "little")


def write_for_ever(folder, begin):
    writer = ShardWriter(folder, shard_bytes=6000)
    for number in range(begin, 10**9):
        writer.add(key_of(number), key_of(number), said(number))


@pytest.fixture
def about(cache, tmp_path):
    """An empty cache."""
    (tmp_path / "cache.json").write_bytes((cache / "cache.json").read_bytes())
    return tmp_path


def test_twenty_kills_lose_nothing_that_was_committed(about):
    draw, seen = random.Random(0), set()
    for kill in range(20):
        child = os.fork()
        if child == 0:
            write_for_ever(about, kill * 10**6)
            os._exit(1)
        begin, target = len(seen), len(list((about / "shards").glob("*.safetensors"))) + 1
        while len(list((about / "shards").glob("*.safetensors"))) < target:
            time.sleep(0.001)
        time.sleep(draw.random() * 0.01)
        committed = {path.name for path in (about / "shards").glob("*.safetensors")}
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert committed <= {path.name for path in (about / "shards").glob("*.safetensors")}
        cache = TeacherCache(about)  # reads the index of every shard
        assert len(cache) > begin and all(key_of(number) in cache for number in seen)
        seen |= {number for number in range(kill * 10**6, kill * 10**6 + 10**4) if key_of(number) in cache}
    for number in sorted(seen)[:: max(1, len(seen) // 50)]:
        found = cache.entry(key_of(number), ["response", "prompt", "visual"], features=True)
        expected = said(number)
        assert torch.equal(found.signal["hidden"], expected.signal["hidden"]) and torch.equal(found.tokens, expected.tokens)
        assert all(torch.equal(a, b) for a, b in zip(found.features, expected.features, strict=True))
    for path in cache.paths:
        with safe_open(path, "pt") as shard:
            assert all(len(shard.get_tensor(name)) for name in ("key", "hidden"))


def test_a_second_writer_of_a_number_is_refused(about):
    writer = ShardWriter(about, 3)
    with pytest.raises(DataError, match="as number 3"):
        ShardWriter(about, 3)
    writer.close()
    ShardWriter(about, 3).close()


def test_what_a_killed_writer_had_started_does_not_hold_its_number(about):
    script = """
import os, signal, sys, time
from pathlib import Path
from mmkd.teachers.store import ShardWriter
writer = ShardWriter(Path(sys.argv[1]), 3)
child = os.fork()  # as a loader of samples is
if child == 0:
    os.close(1)
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    killed = subprocess.run([sys.executable, "-c", script, str(about)], env=path, stdout=subprocess.PIPE, text=True)
    try:
        assert killed.returncode == -signal.SIGKILL
        ShardWriter(about, 3).close()
    finally:
        os.kill(int(killed.stdout), signal.SIGKILL)


def test_entries_give_the_rows_that_are_asked_for(about):
    writer = ShardWriter(about)
    for number in range(5):
        writer.add(key_of(number), text_key_of(number), said(number, rows=number + 1))
    writer.close()
    cache = TeacherCache(about)
    whole, part = cache.entry(key_of(4), ["response", "prompt", "visual"]), cache.entry(key_of(4), ["prompt"])
    where = (whole.kinds & 2) != 0
    assert torch.equal(part.signal["hidden"], said(4, rows=5).signal["hidden"][where]) and part.images == []
    assert cache.entry(key_of(9), ["prompt"]) is None and cache.has_text(text_key_of(2)) and not cache.has_text(key_of(2))


def text_key_of(number):
    return (1000 + number).to_bytes(16, "big")


def test_a_damaged_shard_is_named(about):
    writer = ShardWriter(about)
    writer.add(key_of(1), key_of(1), said(1))
    writer.close()
    path = next((about / "shards").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match=path.name):
        TeacherCache(about)


def test_keys_follow_turns_and_pictures_alone(tmp_path):
    first, second = tiny_samples(tmp_path, 2)
    assert content_key(replace(first, id="other")) == content_key(first) != content_key(second)
    copy = tmp_path / "copy.png"
    copy.write_bytes(first.images[0].read_bytes())
    moved = replace(first, images=(replace(first.images[0], name="copy.png"),))
    assert content_key(moved) == content_key(first)
    copy.write_bytes(second.images[0].read_bytes())
    assert content_key(moved) != content_key(first) and text_key(moved) == text_key(first)


def test_workers_prepare_what_the_training_process_would(folder, tmp_path):
    terms = {"cross_entropy": 1, "kl": {"kind": "forward_kl"}}
    alone, rows = trained(recipe(folder, terms), tmp_path / "alone")
    helped, other = trained(recipe(folder, terms, workers=2), tmp_path / "helped")
    assert [r["loss"] for r in rows] == [r["loss"] for r in other]
    for name, tensor in alone.model.state_dict().items():
        assert torch.equal(tensor, helped.model.state_dict()[name]), name


def test_a_cache_that_lost_its_last_shards_goes_on_to_the_same_bits(folder, tmp_path, monkeypatch):
    """As after a kill: some of a batch is on the disk, the rest is not. What stands beside a sample changes its last bits."""
    from functools import partial

    monkeypatch.setattr("mmkd.runs.write_cache.ShardWriter", partial(ShardWriter, shard_bytes=2000))
    for name in ("undisturbed", "killed"):
        write_cache(recipe(folder), tmp_path / name, batch_size=7)
    paths = sorted((tmp_path / "killed" / "shards").glob("*.safetensors"))
    assert len(paths) > 10
    for path in paths[::3]:
        path.unlink()
    write_cache(recipe(folder), tmp_path / "killed", batch_size=7)
    expected, found = (TeacherCache(tmp_path / name) for name in ("undisturbed", "killed"))
    samples = stage_samples(recipe(folder), recipe(folder).stages["only"])
    assert len(found) == len(expected) == len({content_key(sample) for sample in samples})
    for sample in samples:
        one, other = (c.entry(content_key(sample), ["response", "prompt", "visual"], True) for c in (expected, found))
        assert torch.equal(one.signal["hidden"], other.signal["hidden"]) and torch.equal(one.scores, other.scores)
        assert all(torch.equal(a, b) for a, b in zip(one.features, other.features, strict=True))


def flipped(path, place, bit):
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_bit_anywhere_in_a_shard_is_found(about, seed):
    writer = ShardWriter(about)
    for number in range(4):
        writer.add(key_of(number), text_key_of(number), said(number))
    writer.close()
    path = next((about / "shards").glob("*.safetensors"))
    draw = random.Random(seed)
    flipped(path, draw.randrange(path.stat().st_size) if seed else 20, draw.randrange(8))
    with pytest.raises(DataError, match=f"{path.name} is damaged.*delete it"):
        cache = TeacherCache(about)
        for number in range(4):
            cache.entry(key_of(number), ["response", "prompt", "visual"], features=True)


def test_shuffled_rows_and_zeroed_pages_are_found(about):
    writer = ShardWriter(about)
    for number in range(4):
        writer.add(key_of(number), text_key_of(number), said(number))
    writer.close()
    path = next((about / "shards").glob("*.safetensors"))
    whole = path.read_bytes()
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    save_file({**tensors, "hidden": tensors["hidden"].flip(0)}, path)
    zeroed = whole[:-4096] + bytes(min(4096, len(whole)))
    for content in (path.read_bytes(), zeroed):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is damaged"):
            TeacherCache(about).entry(key_of(1), ["response"], features=True)
    path.rename(path.with_name(f"{'0' * 32}.safetensors"))
    with pytest.raises(DataError, match="is damaged"):
        TeacherCache(about)


def test_a_changed_number_or_head_is_found(folder, cache, tmp_path):
    import shutil

    shutil.copytree(cache, tmp_path / "numbers")
    text = (tmp_path / "numbers" / "cache.json").read_text()
    (tmp_path / "numbers" / "cache.json").write_text(text.replace('"max_length": 2048', '"max_length": 2047'))
    with pytest.raises(DataError, match=r"cache\.json is damaged"):
        TeacherCache(tmp_path / "numbers")
    shutil.copytree(cache, tmp_path / "head")
    head = next((tmp_path / "head" / "teacher").glob("*.safetensors"))
    flipped(head, head.stat().st_size - 9, 3)
    with pytest.raises(DataError, match=f"{head.name} is not what was written"):
        write_cache(recipe(folder), tmp_path / "head")


def test_two_data_sets_of_one_teacher_do_not_take_each_others_rows(folder, cache):
    """The check before training and each stage make data sets of their own, with other samples at the same places."""
    spec = recipe(folder, teacher__cache=str(cache))
    stage, teacher = spec.stages["only"], the_teacher(spec)
    student, terms = build_student(spec, teacher, []), build_terms(stage.terms)
    samples = stage_samples(spec, stage)

    def rows(samples):
        dataset = PairDataset(samples, student, teacher, terms)
        return {sample.id: dataset[place].teachers["teacher"].inputs.signal["hidden"] for place, sample in enumerate(samples)}

    one_way, other_way = rows(samples), rows(samples[::-1])
    for name, hidden in one_way.items():
        assert torch.equal(hidden, other_way[name]), name


def test_tokens_are_compared_once_a_sample_and_again_where_they_are_others(folder, cache, monkeypatch):
    content = recipe(folder, teacher__cache=str(cache))
    teacher = the_teacher(content)
    student = build_student(content, teacher, [])
    sample = stage_samples(content, content.stages["only"])[0]
    encoded, compared = student.encode(sample), []
    check = teacher._check_tokens
    monkeypatch.setattr(teacher, "_check_tokens", lambda *given: (compared.append(1), check(*given)))
    rows = [teacher.prepare(sample, encoded, student=student, alike=True) for _ in range(3)]
    assert len(compared) == 1 and torch.equal(rows[0].signal["hidden"], rows[2].signal["hidden"])
    other = replace(encoded, input_ids=encoded.input_ids.clone(), targets=encoded.targets.clone())
    place = int((other.targets >= 0).nonzero()[0])
    other.targets[place] += 1
    with pytest.raises(DataError, match="or others"):
        teacher.prepare(sample, other, student=student, alike=True)
    batch = teacher.collate(rows)  # its own memory, whatever becomes of the shard
    assert batch.signal["hidden"].untyped_storage().nbytes() < 10 * batch.signal["hidden"].numel() * 4


@pytest.mark.parametrize("room, times", [(2**30, 1), (0, 3)])
def test_rows_are_looked_up_once_where_samples_are_kept(folder, cache, monkeypatch, room, times):
    content = recipe(folder, teacher__cache=str(cache))
    teacher = the_teacher(content)
    samples = stage_samples(content, content.stages["only"])[:4]
    dataset = PairDataset(samples, build_student(content, teacher, []), teacher, build_terms(content.stages["only"].terms),
                          memory=room)  # fmt: skip
    asked, entry = [], teacher.cache.entry
    monkeypatch.setattr(teacher.cache, "entry", lambda *given: asked.append(1) or entry(*given))
    epochs = [[dataset[place].teachers["teacher"].inputs for place in range(4)] for _ in range(3)]
    assert len(asked) == 4 * times
    for first, last in zip(epochs[0], epochs[2], strict=True):
        assert torch.equal(first.signal["hidden"], last.signal["hidden"]) and torch.equal(first.kinds, last.kinds)


def test_kept_rows_are_charged_for_and_not_kept_from_more_shards_than_stay_open(folder, cache, monkeypatch):
    teacher = the_teacher(recipe(folder, teacher__cache=str(cache)))
    sample = stage_samples(recipe(folder), recipe(folder).stages["only"])[0]
    stored = teacher.cache.entry(content_key(sample), teacher.positions)
    views = teacher.bytes_to_keep(stored)
    teacher.positions = frozenset(["response"])  # copies, since only some kinds of rows are taken
    copied = teacher.cache.entry(content_key(sample), teacher.positions)
    assert teacher.bytes_to_keep(copied) == views + copied.signal["hidden"].numel() * 4
    monkeypatch.setattr("mmkd.teachers.stored.OPEN_SHARDS", 0)
    assert teacher.bytes_to_keep(stored) is None


def test_keeping_rows_changes_no_bit_of_a_run(folder, cache, tmp_path, monkeypatch):
    spec = recipe(folder, teacher__cache=str(cache))
    spec.stages["only"].steps = 12  # more than an epoch
    kept, kept_rows = trained(spec, tmp_path / "kept")
    monkeypatch.setattr("mmkd.teachers.stored.StoredTeacher.bytes_to_keep", lambda *given: None)
    read, read_rows = trained(spec, tmp_path / "read")
    assert [row["loss"] for row in kept_rows] == [row["loss"] for row in read_rows]
    assert all(torch.equal(a, b) for a, b in zip(kept.model.parameters(), read.model.parameters(), strict=True))
