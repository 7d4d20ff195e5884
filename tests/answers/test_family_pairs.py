"""Any pair of the families' table can be distilled on-policy: other encoders, other templates, other tokenizers by spans."""

import json
import os
from functools import cache

import pytest
import torch
from tiny import tiny_samples, tiny_stage, tiny_stage_trainer, tiny_tokenizer, tiny_tower, weights_of

from mmkd.teachers.live import LiveTeacher
from mmkd.testing.tiny_families import tiny_family

STEPS = int(os.environ.get("MMKD_PAIR_STEPS", "2"))  # 10 steps by `MMKD_PAIR_STEPS=10`; the second sees the first's student
ANSWERS = {"student": {"share": 1, "max_new_tokens": 3}}
SAME = {"jsd": {"kind": "jsd"}}
SPANS = {"spans": {"kind": "spans"}}

# Student, teacher, what compares them: tokens where both tokenizers give the same ids, else pieces of text.
PAIRS = [
    ("internvl", "paligemma", SPANS),
    ("internvl", "gemma3", SPANS),
    ("gemma3", "smolvlm", SPANS),
    ("smolvlm", "qwen2_5_vl", SPANS),
    ("qwen2_5_vl", "qwen3_vl", SAME),
    ("qwen2_vl", "qwen2_5_vl", SAME),
    ("idefics3", "qwen2_5_vl", SPANS),
    ("aya_vision", "mistral3", SPANS),
    ("paligemma", "gemma3", SPANS),
    ("janus", "mllama", SPANS),
    ("mistral3", "blip-2", SPANS),
    ("lfm2_vl", "florence2", SPANS),
    ("llava", "own tokenizer", SPANS),
    ("own tokenizer", "llava_next", SPANS),
    ("own", "own wider", SAME),
]


@cache
def tower(name):
    if name.startswith("own"):
        tokenizer = tiny_tokenizer(280 if name == "own tokenizer" else 300)
        return tiny_tower(3, 32 if "wider" in name else 16, tokenizer=tokenizer)
    return tiny_family(name)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return tiny_samples(tmp_path_factory.mktemp("pictures"), 3, text_only=1, sizes=((32, 32),))


@pytest.mark.parametrize(("own", "other", "terms"), PAIRS, ids=[f"{own}-{other}" for own, other, _ in PAIRS])
def test_a_pair_of_families_is_distilled_on_policy(tmp_path, samples, own, other, terms):
    student = tower(own)
    before = weights_of(student)
    stage = tiny_stage(student, LiveTeacher(tower(other)), samples, terms, ANSWERS, steps=STEPS, save_every=1000, log_every=1)
    tiny_stage_trainer(tmp_path, stage).train()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if "loss" in row]
    assert len(losses) == STEPS and all(loss > 0 for loss in losses)
    assert all(row["generated_share"] == 1 for row in log if "loss" in row)
    after = weights_of(student)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    student.model.load_state_dict(before)
