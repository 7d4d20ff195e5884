"""Samples that come one after another: order, resume, what is refused; and a stage that trains on them."""

import io
import itertools
import json
import tarfile
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet as parquet_file
from tiny import WORDS, the_teacher, tiny_picture, tiny_tower
from torch.utils.data import DataLoader

from mmkd.data.entries import read_samples, stream_of
from mmkd.data.formats.shards import Shards
from mmkd.data.samples import Sample, Turn
from mmkd.data.spec import DataSpec
from mmkd.errors import DataError, ImageError
from mmkd.recipes.reading import validate
from mmkd.recipes.recipe import Recipe
from mmkd.runs.stages import train
from mmkd.runs.towers import build_student
from mmkd.terms.spec import build_terms
from mmkd.train.collate import PairDataset
from mmkd.train.spec import StageSpec
from mmkd.train.streaming import StreamDataset, stage_stream
from mmkd.train.trainer import DistillTrainer


def add(shard, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    shard.addfile(info, io.BytesIO(data))


def row(number):
    return json.dumps({"question": f"{WORDS[number % len(WORDS)]} {number}?", "answer": WORDS[number % 7]}).encode()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three shards of 20 samples, every fourth without a picture, and two towers."""
    folder = tmp_path_factory.mktemp("stream")
    for number in range(3):
        with tarfile.open(folder / f"part-{number}.tar", "w") as shard:
            for sample in range(20 * number, 20 * number + 20):
                if sample % 4:
                    add(shard, f"{sample:06d}.png", tiny_picture(folder, "p.png", sample).read_bytes())
                add(shard, f"{sample:06d}.json", row(sample))
    teacher = tiny_tower(5, 32)
    teacher.save(folder / "teacher")
    tiny_tower(6, 16, tokenizer=teacher.tokenizer).save(folder / "student")
    return folder


def spec(root, **fields):
    return DataSpec(**{"format": "shards", "root": str(root), "prompt": "plain", **fields})


def names(stream, count):
    return [sample.id for sample in itertools.islice(stream, count)]


def test_a_pass_holds_each_sample_once_in_an_order_of_its_own(root):
    stream = stream_of(spec(root), seed=0)
    both = names(stream, 120)
    first, second = both[:60], both[60:]
    assert len(set(first)) == 60 and sorted(first) == sorted(second) and first != second
    assert both == names(stream_of(spec(root), seed=0), 120) != names(stream_of(spec(root), seed=1), 120)
    assert read_samples(spec(root), 0)[:60] == list(itertools.islice(stream, 60))


def test_a_small_buffer_still_gives_every_sample(root):
    from mmkd.data.stream import Stream

    stream = stream_of(spec(root), seed=0)
    assert sorted(names(Stream(stream.passes, 0, buffer=5), 60)) == sorted(names(stream, 60))


def test_samples_are_those_of_the_shards(root, tmp_path):
    samples = {s.id.rpartition("/")[2]: s for s in itertools.islice(stream_of(spec(root), 0), 60)}
    for number in (0, 5, 59):
        sample, expected = samples[f"{number:06d}"], json.loads(row(number))
        assert (sample.turns[0].text, sample.turns[1].text) == (expected["question"], expected["answer"])
        assert len(sample.images) == (number % 4 > 0)
        if sample.images:
            assert sample.images[0].read_bytes() == tiny_picture(tmp_path, "q.png", number).read_bytes()


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"limit": 3}, "takes no limit"),
        ({"weight": 2.0}, "takes no weight"),
        ({"files": {"shards": "*.tgz"}}, "has no tar shards"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(root, fields, said):
    with pytest.raises(DataError, match=said):
        stream_of(spec(root, **fields), 0)


def test_damaged_shards_are_named(tmp_path):
    for number, (name, data) in enumerate([("a.png", b"x"), ("a.json", b"{"), ("a.json", b'{"question": 1}')]):
        folder = tmp_path / str(number)
        folder.mkdir()
        with tarfile.open(folder / "one.tar", "w") as shard:
            add(shard, name, data)
        with pytest.raises(DataError, match=r"one\.tar.*(no \.json|no valid JSON|must be text)"):
            read_samples(spec(folder), 0)
    (tmp_path / "0" / "one.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(DataError, match="no whole, uncompressed tar"):
        read_samples(spec(tmp_path / "0"), 0)


def test_a_shard_that_ends_early_costs_its_picture(root, tmp_path):
    whole = (root / "part-0.tar").read_bytes()
    (tmp_path / "part-0.tar").write_bytes(whole)
    sample = next(s for s in read_samples(spec(tmp_path), 0) if s.images)
    (tmp_path / "part-0.tar").write_bytes(whole[: sample.images[0].offset + 3])
    with pytest.raises(ImageError, match="the shard ends in it"):
        sample.images[0].read_bytes()


def test_datasets_streams_files_of_any_kind(root, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from datasets import Dataset

    (tmp_path / "data").mkdir()
    for part in range(2):
        rows = [
            {"picture": {"bytes": tiny_picture(tmp_path, "p.png", n).read_bytes(), "path": None}, **json.loads(row(n))}
            for n in range(5 * part, 5 * part + 5)
        ]
        Dataset.from_list(rows).to_parquet(tmp_path / "data" / f"train-{part}.parquet")
    entry = spec(tmp_path / "data", format="datasets", files={"image": "picture"})
    found = read_samples(entry, 0)
    assert sorted(s.turns[0].text for s in found) == sorted(json.loads(row(n))["question"] for n in range(10))
    picture = next(s for s in found if s.turns[0].text.endswith(" 7?")).images[0]
    assert picture.read_bytes() == tiny_picture(tmp_path, "q.png", 7).read_bytes() and picture.load().size == (20, 16)
    with pytest.raises(DataError, match="has no column reply"):
        read_samples(spec(tmp_path / "data", format="datasets", files={"answer": "reply"}), 0)


# ---- training --------------------------------------------------------------------------------------------------------


def recipe(root, **changes):
    stage = {
        "data": [{"format": "shards", "root": str(root), "prompt": "plain"}], "steps": 6, "save_every": 2, "log_every": 1,
        "terms": {"cross_entropy": 1, "kl": {"kind": "forward_kl"}}, "optimiser": {"batch_size": 4, "micro_batch_size": 2},
    }
    raw = {
        "title": "t", "output": str(root / "out"), "stages": {"only": stage | changes}, "guards": {"teacher_is_better": False},
        **{role: {"model": str(root / role)} for role in ("teacher", "student")},
    }
    return validate(raw, "test", Recipe)


def trained(wanted, run):
    teacher = the_teacher(wanted)
    return train(wanted, "student", build_student(wanted, teacher, []), teacher, run).model.state_dict()


def test_an_interrupted_stage_goes_on_with_the_next_sample(root, tmp_path, monkeypatch):
    whole = trained(recipe(root), tmp_path / "whole")
    step, calls = DistillTrainer.training_step, []

    def interrupted(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 10:  # in the fifth step of two micro-batches
            raise InterruptedError
        return step(self, *arguments, **options)

    monkeypatch.setattr(DistillTrainer, "training_step", interrupted)
    with pytest.raises(InterruptedError):
        trained(recipe(root), tmp_path / "resumed")
    resumed = trained(recipe(root), tmp_path / "resumed")
    assert len(calls) == 10 + 4, "it went on behind the fourth step"
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_workers_and_beginnings_do_not_change_the_order(root):
    wanted = recipe(root)
    teacher = the_teacher(wanted)
    student = build_student(wanted, teacher, [])
    head = PairDataset(read_samples(spec(root), 0), student, teacher, build_terms(wanted.stages["only"].terms))

    def order(workers, begin=0):
        dataset = StreamDataset(head, stream_of(spec(root), 0), 4, begin)
        loader = DataLoader(dataset, batch_size=4, num_workers=workers, collate_fn=lambda pairs: [p.student.id for p in pairs])
        return [name for batch in itertools.islice(loader, 5) for name in batch]

    assert order(0) == order(2) == names(stream_of(spec(root), 0), 20)
    assert order(2, begin=8)[:12] == order(0)[8:]


def test_talks_of_a_stream_are_taught_answer_by_answer(tmp_path, monkeypatch):
    def talk(number):
        turns = [turn for n in range(1 + number % 3) for turn in (Turn("user", f"q{n}?"), Turn("assistant", f"a{n}"))]
        return Sample(f"talk {number}", (), tuple(turns))

    monkeypatch.setattr(Shards, "stream", lambda self, source, seed, number: map(talk, range(6)))
    monkeypatch.setattr(Shards, "paths", lambda self, source: [])
    stage = dict(data=[spec(tmp_path, text_only=True)], terms={"cross_entropy": 1.0}, steps=2)
    whole = stage_stream(StageSpec(**stage), 0, None)
    apart = stage_stream(StageSpec(**stage, one_answer=True), 0, None)
    assert sorted(sample.answers for sample in itertools.islice(whole, 6)) == [1, 1, 2, 2, 3, 3]
    found = list(itertools.islice(apart, 12))
    assert all(sample.answers == 1 for sample in found) and len({sample.id for sample in found}) == 12
    assert sorted(sample.answer for sample in found) == ["a0"] * 6 + ["a1"] * 4 + ["a2"] * 2


@pytest.mark.parametrize("changes", [{"epochs": 1, "steps": None}, {"group_by_length": True}])
def test_what_needs_to_know_all_samples_is_refused(root, tmp_path, changes):
    with pytest.raises(DataError, match="a stage of streamed data goes together with no"):
        trained(recipe(root, **changes), tmp_path / "run")


# ---- pictures of streams


def parquet(folder: Path, **columns) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    count = len(next(iter(columns.values())))
    rows = {"question": ["what?"] * count, "answer": ["red"] * count} | columns
    parquet_file.write_table(pyarrow.table(rows), folder / "train.parquet")


def stored(folder: Path, *numbers: int) -> list[dict]:
    return [{"bytes": tiny_picture(folder, f"{n}.png", n).read_bytes(), "path": None} for n in numbers]


def test_lists_of_pictures_in_any_form_are_read(tmp_path):
    (tmp_path / "data" / "sub").mkdir(parents=True)
    for number in range(3):
        tiny_picture(tmp_path / "data" / "sub", f"{number}.png", number)
    parquet(tmp_path / "data", images=[["sub/0.png", "sub/1.png"], ["sub/2.png"], []])
    first, second, third = read_samples(spec(tmp_path / "data", format="datasets"), 0)[:3]
    by_count = {len(sample.images): sample for sample in (first, second, third)}
    assert sorted(by_count) == [0, 1, 2] and by_count[2].turns[0].images == 2
    assert [ref.load().size for ref in by_count[2].images] == [(20, 16)] * 2
    parquet(tmp_path / "bytes", image=[stored(tmp_path / "a", 0, 1), stored(tmp_path / "a", 2)])
    assert sorted(len(s.images) for s in read_samples(spec(tmp_path / "bytes", format="datasets"), 0)) == [1, 2]
    parquet(tmp_path / "named", photo=stored(tmp_path / "a", 0, 1))
    with pytest.raises(DataError, match="pictures in 0 of 2 samples; keys or columns not used: photo.*text_only"):
        read_samples(spec(tmp_path / "named", format="datasets"), 0)
    named = spec(tmp_path / "named", format="datasets", files={"image": "photo"})
    assert all(sample.images for sample in read_samples(named, 0))
    assert len(read_samples(spec(tmp_path / "named", format="datasets", text_only=True), 0)) == 2


@pytest.mark.parametrize("name", ["/dev/zero", "/etc/hostname", "../outside.png", "link.png"])
def test_no_row_of_a_stream_reaches_outside_its_folder(tmp_path, name):
    tiny_picture(tmp_path, "outside.png", 0)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "outside.png")
    tiny_picture(tmp_path / "data", "in.png", 1)
    parquet(tmp_path / "data", image=[name] + ["in.png"] * 30)
    with pytest.raises(DataError, match="row 0: .*leaves its root"):
        read_samples(spec(tmp_path / "data", format="datasets"), 0)
    assert len(read_samples(spec(tmp_path / "data", format="datasets"), 0, allowed=0.01)) == 30


@pytest.mark.parametrize("bytes_left", [-1, -600, 1100, 1600])
def test_a_shard_that_was_cut_is_refused(tmp_path, bytes_left):
    content = tiny_picture(tmp_path, "a.png", 1, (30, 30)).read_bytes()
    with tarfile.open(tmp_path / "one.tar", "w") as shard:
        for name, data in (("a.json", b'{"question": "q", "answer": "a"}'), ("a.png", content)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))
    whole = (tmp_path / "one.tar").read_bytes()
    (tmp_path / "one.tar").write_bytes(whole[:bytes_left])
    with pytest.raises(DataError, match="one.tar is no whole, uncompressed tar: its end is missing"):
        read_samples(spec(tmp_path), 0)
