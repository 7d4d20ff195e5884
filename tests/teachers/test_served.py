"""A teacher behind an endpoint: it says what the same teacher says here, and no fault of a server teaches a wrong row."""

from dataclasses import replace

import pytest
import torch
from fake_server import Server
from pydantic import ValidationError
from tiny import VISIONS, tiny_samples, tiny_stage, tiny_stage_trainer, tiny_tokenizer, tiny_tower, weights_of

from mmkd.engine.rows import Head
from mmkd.errors import DataError, GuardError, MmkdError, TowerError
from mmkd.runs.write_cache import top_rows
from mmkd.teachers import wires
from mmkd.teachers.live import LiveTeacher
from mmkd.teachers.opening import Opening
from mmkd.teachers.served import ServedTeacher
from mmkd.teachers.spec import TeacherSpec
from mmkd.towers.tower import Tower
from mmkd.train.batch import Pair
from mmkd.train.skips import Skip

TOKENIZER = tiny_tokenizer()
KL = {"kl": {"kind": "forward_kl"}}
K = 8


def model(seed=2, **options):
    return tiny_tower(seed, 32, **{"tokenizer": TOKENIZER} | options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher")
    model().save(path)
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(wires, "FIRST_WAIT", 0.01)


def opened(server, folder, **keys):
    spec = TeacherSpec(**{"model": str(folder), "served": server.url, "top_k": K, "patience": 0.3} | keys)
    return ServedTeacher.open(spec, Opening("teacher", 256, {}, {}))


def samples_of(tmp_path, pictures=1, **options):
    count = {1: {"n": 6}, 2: {"n": 0, "two_images": 6}}[pictures]
    return tiny_samples(tmp_path / "pictures", text_only=2, **count, **options)


def student():
    return tiny_tower(1, 16, tokenizer=TOKENIZER)


def test_rows_are_those_of_the_same_teacher_in_this_process(tmp_path, folder):
    samples = samples_of(tmp_path)
    with Server(model()) as server:
        teacher = opened(server, folder)
        stage = tiny_stage(student(), teacher, samples, KL)
        batch = stage.batch_of(6)
        said = teacher.say(batch.teacher, batch.teacher).rows({"response"})
        asked = len(server.log)
        loss, _ = stage.distiller(batch)
        assert len(server.log) == asked  # what is known by content is not asked again
    tower = Tower.load(folder)
    inputs = tower.prepare(samples[:6])
    with torch.no_grad():
        hidden = tower.read(inputs, tower.see(inputs))[inputs.response]
    wanted = top_rows(hidden, Head(tower.head.weight, None), len(TOKENIZER), K)
    torch.testing.assert_close(said["log_probs"], wanted["log_probs"].float(), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(said["tail"], wanted["tail"].float(), atol=1e-4, rtol=1e-4)
    assert torch.equal(said["ids"], wanted["ids"].long())
    # The loss by hand, with all other tokens in one bucket.
    own = batch.student
    out = stage.student.model(input_ids=own.input_ids, attention_mask=own.attention_mask, **own.pixels).logits.double()
    q = out[own.response].log_softmax(-1)
    near = q.gather(-1, said["ids"])
    rest = (1 - near.exp().sum(-1)).log()
    p, tail = said["log_probs"].double(), said["tail"].double()
    expected = ((p.exp() * (p - near)).sum(-1) + tail.exp() * (tail - rest)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_on_policy_from_a_server_is_on_policy_from_the_same_teacher_with_all_its_tokens(tmp_path, folder):
    """With nearly all tokens asked for, the loss is the live teacher's."""
    samples, answers = samples_of(tmp_path), {"student": {"share": 1, "max_new_tokens": 4}}
    weights = []
    with Server(model(), max_logprobs=10**6) as server:
        for teacher in (opened(server, folder, top_k=len(TOKENIZER) - 1), LiveTeacher(model())):
            stage = tiny_stage(student(), teacher, samples, KL, answers, steps=2, optimiser={"kind": "sgd"})
            tiny_stage_trainer(tmp_path / type(teacher).__name__, stage).train()
            weights.append(weights_of(stage.student))
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-3, atol=1e-4)


TALL = {"vision": VISIONS["vit"] | {"image_size": 24}, "image_size": (24, 24)}


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ({"tower": model(**TALL)}, "makes 9 visual tokens, ours 4"),
        ({"tower": model(chat_template="chatml")}, "another chat template or tokenizer"),
        ({"drops_pictures": True}, "does not get the pictures"),
        ({"blind": True}, "does not see them"),
        ({"mixes": True}, "asked alone and at once"),
        ({"tower": model(seed=9), "verify": True}, "is not the model"),
        ({"swaps": True, "verify": True, "pictures": 2}, "is not the model"),
        ({"max_logprobs": 3}, "greater than max allowed: 3"),
        ({"fewer": True}, "fewer than teacher.top_k 8"),
        ({"short": True}, "log-probabilities come for"),
        ({"other_tokens": True}, "is not of token"),
        ({"end": "B"}, "ends answers otherwise"),
        ({"status": [500] * 1000}, "answers 500"),
        ({"cut": 1000}, "does not answer|no JSON"),
        ({"sleep": [0.3] * 1000}, "does not answer"),
        ({"status": [302] * 1000}, "refuses the request .302"),
        ({"name": "another", "served_name": "m"}, "serves another, not 'm'"),
    ],
)  # fmt: skip
def test_a_faulty_server_is_named_before_a_row_is_taught(tmp_path, folder, monkeypatch, faults, words):
    faults = {"tower": model(), **faults}
    keys = {name: faults.pop(name) for name in ("verify", "served_name") if name in faults}
    samples = samples_of(tmp_path, pictures=faults.pop("pictures", 1))
    if "sleep" in faults:
        monkeypatch.setattr(wires, "TIMEOUT", 0.1)
    with Server(**faults) as server, pytest.raises(MmkdError, match=words):
        tiny_stage(student(), opened(server, folder, **keys), samples, KL)


def test_a_good_server_passes_the_check_against_its_weights(tmp_path, folder):
    with Server(model()) as server:
        tiny_stage(student(), opened(server, folder, verify=True), samples_of(tmp_path, pictures=2), KL)


def test_what_is_longer_than_the_server_reads_is_left_out_and_never_sent(tmp_path, folder):
    samples = samples_of(tmp_path)
    with Server(model(), max_model_len=24) as server:
        teacher = opened(server, folder)
        assert teacher.body.max_length == 23
        stage = tiny_stage(student(), teacher, samples, KL, {"student": {"share": 1, "max_new_tokens": 30}})
        found = [stage.dataset.look(n) for n in range(len(samples))]
        assert any("more than max_length 23" in one.message for one in found if isinstance(one, Skip))
        pairs = [stage.dataset.answered(one, [41] * 30) for one in found if isinstance(one, Pair)]
        assert max(len(pair.teachers["teacher"].inputs.input_ids) for pair in pairs) == 23
        assert torch.isfinite(stage.distiller(stage.dataset.collator(pairs)["batch"])[0])


def test_failures_that_pass_are_waited_for(tmp_path, folder):
    with Server(model()) as server:
        teacher = opened(server, folder, patience=20)
        stage = tiny_stage(student(), teacher, samples_of(tmp_path), KL)
        server.status, server.cut = [500, 503, 429], 4
        assert torch.isfinite(stage.distiller(stage.batch_of(6))[0])
        assert teacher.wire.client.lost > 0


def test_a_server_that_comes_back_as_another_model_stops_the_run_before_its_rows_are_used(tmp_path, folder):
    with Server(model()) as server:
        stage = tiny_stage(student(), opened(server, folder, patience=20), samples_of(tmp_path), KL)
        batch = stage.batch_of(6)
        stage.teachers["teacher"]._known.clear()
        server.status, server.after_failure = [503], model(seed=9)
        with pytest.raises(GuardError, match="before and after it was away"):
            stage.distiller(batch)


def test_a_server_that_stays_away_ends_the_run_with_a_word(tmp_path, folder):
    with Server(model()) as server:
        stage = tiny_stage(student(), opened(server, folder), samples_of(tmp_path), KL)
        batch = stage.batch_of(6)
        stage.teachers["teacher"]._known.clear()
    with pytest.raises(TowerError, match="goes on from the last checkpoint"):
        stage.distiller(batch)


@pytest.mark.parametrize("kind", ["reverse_kl", "dbild", "policy_gradient", "relation"])
def test_what_a_top_k_cannot_serve_is_refused(tmp_path, folder, kind):
    terms = {kind: {"positions": "generated"} if kind == "policy_gradient" else {}}
    answers = {"student": 1} if kind == "policy_gradient" else None
    with Server(model()) as server, pytest.raises((DataError, TowerError), match=f"{kind}.*(server|top 8)"):
        tiny_stage(student(), opened(server, folder), samples_of(tmp_path), terms, answers)


def test_a_marker_of_pictures_in_the_words_of_a_question_is_found(tmp_path, folder):
    """The server takes it for a picture, or at least for another token than the word that it is to us."""
    samples = samples_of(tmp_path)
    turn = replace(samples[0].turns[0], text="what is <image> here")
    odd = replace(samples[0], turns=(turn, *samples[0].turns[1:]))
    with Server(model()) as server:
        server_reads = server.render

        def careless(body):
            found = server_reads(body)
            if "<image>" in str(body["messages"]):
                found["token_ids"].insert(3, server.tower.image_token_id)
            return found

        server.render = careless
        with pytest.raises(DataError, match="visual tokens"):
            tiny_stage(student(), opened(server, folder), [odd, *samples[1:]], KL)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"served": "localhost:8000"}, "served"),
        ({"served": "file:///etc/passwd"}, "served"),
        ({"served": "http://user:word@host/"}, "served"),
        ({"served": "http://h", "cache": "c"}, "cannot go with `served`"),
        ({"served": "http://h", "wire": "vlm"}, "vllm"),
        ({"served": "http://h", "wire": "openai"}, "never of an answer that it is handed"),
        ({"served": "http://h", "wire": "sglang"}, "tells neither the ids"),
        ({"top_k": 5}, "belong to a served teacher"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(given, words):
    with pytest.raises(ValidationError, match=words):
        TeacherSpec(model="x", **given)
