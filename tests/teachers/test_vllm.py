"""A teacher on a real vLLM: the same rows as in this process, and each difference named before it teaches.

With MMKD_VLLM=FOLDER (of `scripts/serve/install_vllm.sh`) a server is started. Elsewhere its recorded answers stand in, and what
cannot be recorded is left out; `scripts/serve/recording.py check` holds the recording against a real server.
"""

import json
from pathlib import Path

import pytest
import torch
from recorded_server import Exchange, load
from served_models import MODELS, llava, mixed_samples, qwen2_5_vl, saved
from tiny import the_teacher
from vllm_server import environment, vllm

from mmkd.errors import MmkdError
from mmkd.recipes.reading import validate
from mmkd.recipes.recipe import Recipe
from mmkd.runs.stages import train
from mmkd.runs.towers import build_student
from mmkd.runs.write_cache import write_cache
from mmkd.teachers import wires
from mmkd.teachers.opening import Opening
from mmkd.teachers.served import ServedTeacher
from mmkd.teachers.spec import TeacherSpec
from mmkd.towers.tower import Tower
from mmkd.train.guards import answer_loss, answer_rows

HERE = Path(__file__).parent
REAL = pytest.mark.skipif(environment() is None, reason="no vLLM is installed (MMKD_VLLM)")
K, RECORDED, SAMPLES = 20, 8, 200  # samples that were recorded, and that a real server is asked for


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("served")
    for name, make in MODELS.items():
        saved(make(), path / name)
    return path


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return mixed_samples(tmp_path_factory.mktemp("pictures"), SAMPLES if environment() else RECORDED)


@pytest.fixture(scope="module")
def servers(folder):
    """Addresses by model: of real servers, or of what they said."""
    if environment() is None:
        with Exchange(load(HERE / "vllm_llava.json.gz")) as first, Exchange(load(HERE / "vllm_qwen2_5_vl.json.gz")) as second:
            yield {"llava": first.url, "qwen2_5_vl": second.url}
    else:
        with (
            vllm(folder / "llava", folder / "llava.log") as first,
            vllm(folder / "qwen2_5_vl", folder / "qwen2_5_vl.log") as second,
        ):
            yield {"llava": first, "qwen2_5_vl": second}


def opened(url, model, **keys):
    keys = {"model": str(model), "served": url, "top_k": K, "patience": 5} | keys
    return ServedTeacher.open(TeacherSpec(**keys), Opening("teacher", 512, {}, {}))


def prepared(teacher, samples):
    return [teacher.prepared(sample, teacher.body.encode(sample)) for sample in samples]


@pytest.mark.parametrize("model", MODELS)
def test_its_rows_are_those_of_the_same_teacher_in_this_process(folder, servers, samples, model):
    teacher = opened(servers[model], folder / model)
    teacher.check(samples[:RECORDED])
    asked = prepared(teacher, samples)
    assert {one.images for one in asked} == {0, 1, 2}
    said = teacher.tops(asked)
    tower = Tower.load(folder / model)
    for one, top in zip(asked, said, strict=True):
        inputs = tower.collate([one])
        with torch.no_grad():
            hidden = tower.read(inputs, tower.see(inputs))[inputs.response]
        every = (hidden @ tower.head.weight.T).double().log_softmax(-1)
        wanted = every.topk(K).values
        torch.testing.assert_close(top.log_probs, every.gather(-1, top.ids).float(), atol=1e-4, rtol=0)
        torch.testing.assert_close(top.log_probs, wanted.float(), atol=1e-4, rtol=0)  # no likelier token is left out
        torch.testing.assert_close(top.tail, (1 - wanted.exp().sum(-1)).log().float(), atol=1e-3, rtol=0)
        tokens = one.targets[one.targets >= 0, None]
        torch.testing.assert_close(top.own, every.gather(-1, tokens)[:, 0].float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("model", MODELS)
def test_it_passes_the_check_against_its_weights(folder, servers, samples, model):
    opened(servers[model], folder / model, verify=True).check(samples[:RECORDED])


class Blind(wires.VLLM):
    """Every picture that goes over is grey."""

    def render(self, sample, pictures=None, **options):
        shown = [ref.load() for ref in sample.images] if pictures is None else pictures
        return super().render(sample, [picture.point(lambda _: 128) for picture in shown], **options)


class Swapped(wires.VLLM):
    """The pictures of a sample change places."""

    def render(self, sample, pictures=None, **options):
        shown = [ref.load() for ref in sample.images] if pictures is None else list(pictures)
        return super().render(sample, shown[::-1], **options)


class NoPictures(wires.VLLM):
    """No picture goes over."""

    def render(self, sample, pictures=None, **options):
        return super().render(sample.without_images(), None, **options)


@REAL
@pytest.mark.parametrize(
    ("model", "own", "keys", "wire", "words"),
    [
        ("qwen2_5_vl", lambda: qwen2_5_vl(max_pixels=1024), {}, None, "its processor makes [0-9]+ visual tokens, ours [0-9]+"),
        ("llava", lambda: llava(template="chatml"), {}, None, "another chat template or tokenizer"),
        ("llava", lambda: llava(seed=9), {"verify": True}, None, "is not the model"),
        ("qwen2_5_vl", lambda: qwen2_5_vl(seed=9), {"verify": True}, None, "is not the model"),
        ("llava", llava, {"top_k": 21}, None, "refuses the request .400.*logprobs.*max"),
        ("llava", llava, {"served_name": "n"}, None, "serves m, not 'n'"),
        ("llava", llava, {}, Blind, "does not see them"),
        ("llava", llava, {}, NoPictures, "does not get the pictures"),
        ("qwen2_5_vl", qwen2_5_vl, {"verify": True}, Swapped, "pictures stand in another order"),
        ("llava", llava, {"verify": True}, Swapped, "is not the model"),
    ],
)  # fmt: skip
def test_each_difference_is_named_before_a_row_is_taught(tmp_path, servers, samples, model, own, keys, wire, words):
    folder = saved(own(), tmp_path / "own")
    with pytest.raises(MmkdError, match=words):
        teacher = opened(servers[model], folder, **keys)
        if wire is not None:
            teacher.wire = wire(teacher.wire.client, teacher.wire.model)
        teacher.check(samples[:RECORDED])


@REAL
def test_a_server_that_takes_no_pictures_is_named(tmp_path, folder, samples):
    limit = ("--limit-mm-per-prompt", '{"image": 0}')
    with vllm(folder / "llava", tmp_path / "log", "m", *limit) as url, pytest.raises(MmkdError, match="image"):
        opened(url, folder / "llava").check(samples[:RECORDED])


def recipe(folder, root, **teacher):
    stage = {
        "data": [{"format": "jsonl", "root": str(root), "prompt": "plain"}],
        "terms": {"cross_entropy": 1, "kl": {"kind": "forward_kl"}}, "steps": 30, "log_every": 1,
        "optimiser": {"batch_size": 8, "micro_batch_size": 8, "learning_rate": 2e-3},
    }  # fmt: skip
    raw = {
        "title": "test", "output": str(root / "out"), "teacher": {"model": str(folder / "llava"), **teacher},
        "student": {"model": str(root / "student")}, "stages": {"only": stage}, "guards": {"teacher_is_better": False},
    }  # fmt: skip
    return validate(raw, "test", Recipe)


@REAL
def test_training_from_its_signals_is_training_from_the_top_k_cache(tmp_path, folder, servers, samples):
    saved(llava(seed=3), tmp_path / "student")
    with (tmp_path / "train.jsonl").open("w") as file:
        for sample in (sample for sample in samples if len(sample.images) == 1):
            sample.images[0].load().save(tmp_path / f"{sample.id}.png")
            row = {"image": f"{sample.id}.png", "question": sample.turns[0].text, "answer": sample.answer}
            file.write(json.dumps(row) + "\n")
    write_cache(recipe(folder, tmp_path), tmp_path / "cache", top_k=K)
    rows, towers = [], []
    for name, teacher in (("cached", {"cache": str(tmp_path / "cache")}), ("served", {"served": servers["llava"], "top_k": K})):
        spec = recipe(folder, tmp_path, **teacher)
        opened = the_teacher(spec)
        towers.append(train(spec, "student", build_student(spec, opened, []), opened, tmp_path / name))
        rows.append([json.loads(line) for line in (tmp_path / name / "log" / "student.jsonl").read_text().splitlines()])
    assert len(rows[0]) == 30 and rows[0][-1]["loss"] < rows[0][0]["loss"]
    # The cache keeps log-probabilities in half precision.
    gaps = [abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(*rows, strict=True)]
    print(f"largest relative difference of losses {max(gaps):.2e}, first {gaps[0]:.2e}, last {gaps[-1]:.2e}")
    assert max(gaps) < 1e-3
    held = [sample for sample in samples if len(sample.images) == 2]
    ends = [float(answer_loss(tower, inputs := tower.prepare(held), answer_rows(tower, inputs))) for tower in towers]
    print(f"loss on other samples {ends}")
    assert ends[0] == pytest.approx(ends[1], rel=1e-3)
