"""Checkpointing of frozen language models in evaluation mode: the same numbers from fewer kept bytes."""

import pytest
import torch
from tiny import language_config, make_term, the_teacher, tiny_family, tiny_samples, tiny_tokenizer, tiny_tower
from torch import nn

from mmkd.errors import TowerError
from mmkd.recipes.recipe import Recipe
from mmkd.teachers.spec import TeacherSpec
from mmkd.terms.term import Schedule
from mmkd.towers.recompute import recompute_layers
from mmkd.train.collate import Collator, PairDataset
from mmkd.train.distiller import Distiller
from mmkd.train.spec import StageSpec
from mmkd.train.trainable import set_trainable

TOKENIZER = tiny_tokenizer()
SWITCH = make_term("vsd", "dbild", Schedule(1.0, 1.0), path="switch")
LAYERS = 6


def teacher_of(**changes):
    return tiny_tower(2, language=language_config("llama", 32, LAYERS, **changes), tokenizer=TOKENIZER).freeze()


def kept_bytes(function):
    """(result, bytes of the tensors that autograd keeps between forward and backward)"""
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return result, sum(seen.values())


def step(student, teacher, folder):
    dataset = PairDataset(tiny_samples(folder, 4), student, teacher, [SWITCH])
    batch = Collator(student, teacher)([dataset[i] for i in range(4)])["batch"]
    distiller = Distiller(student, teacher, [SWITCH]).train()
    student.model.zero_grad()
    (loss, _), kept = kept_bytes(lambda: distiller(batch))
    loss.backward()
    return loss.detach(), kept, {n: p.grad.clone() for n, p in student.model.named_parameters() if p.grad is not None}


def test_the_switch_gives_the_same_from_fewer_bytes(tmp_path):
    """With dropout in the teacher's configuration: it must stay off, or the two would differ."""
    student, teacher = tiny_tower(1, tokenizer=TOKENIZER), teacher_of(attention_dropout=0.5)
    loss, kept, gradients = step(student, teacher, tmp_path)
    assert recompute_layers(teacher) == LAYERS
    again, fewer, others = step(student, teacher, tmp_path)
    assert torch.equal(loss, again) and gradients.keys() == others.keys()
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)
    assert not teacher.model.training and not any(m.training for m in teacher.model.modules())
    # Per layer only its input [B, L, D] is left of some twenty tensors; what else is kept belongs to the student and the head.
    parameters = sum(p.numel() * p.element_size() for p in (*student.model.parameters(), *teacher.model.parameters()))
    assert fewer - parameters < 0.35 * (kept - parameters), (kept, fewer, parameters)


def test_each_layer_runs_again_in_backward_and_not_without_gradients(tmp_path):
    student, teacher = tiny_tower(1, tokenizer=TOKENIZER), teacher_of()
    runs = []
    for layer in teacher.language.layers:
        layer.self_attn.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    step(student, teacher, tmp_path)
    once = len(runs)  # the ordinary pass without, the switched one with gradients
    runs.clear()
    recompute_layers(teacher)
    step(student, teacher, tmp_path)
    assert once == 2 * LAYERS and len(runs) == 3 * LAYERS and runs.count(False) == LAYERS


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3", "paligemma"])
def test_other_families_have_layers_too(family, tmp_path):
    tower = tiny_family(family).freeze()
    assert recompute_layers(tower) == len(tower.language.layers)
    inputs = tower.prepare(tiny_samples(tmp_path, 2))
    seen = tower.see(inputs)
    plain = tiny_family(family).freeze()
    leaves = [[t.detach().clone().requires_grad_() for t in seen.tokens] for _ in range(2)]
    for own, leaf in zip((tower, plain), leaves, strict=True):
        own.read(inputs, leaf)[inputs.response].square().sum().backward()
    for one, other in zip(*leaves, strict=True):
        assert one.grad.abs().sum() > 0
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-9)


def test_a_frozen_student_language_model_is_checkpointed_too():
    """DPT trains the projector alone: the language model is then in evaluation mode, where transformers would keep it all."""
    stage = {"data": [{"card": "a"}], "steps": 1, "terms": {"cross_entropy": 1}, "gradient_checkpointing": True}
    for train, wrapped in ((["projector"], True), (["projector", "language"], False)):
        student = tiny_tower(1, tokenizer=TOKENIZER)
        set_trainable(student, StageSpec.model_validate(stage | {"train": train}))
        assert all(("forward" in vars(layer)) == wrapped for layer in student.language.layers)


def test_nothing_to_checkpoint_is_said():
    teacher = teacher_of()
    teacher.language.layers = nn.ModuleList()
    with pytest.raises(TowerError, match="gradient_checkpointing has nothing to act on"):
        recompute_layers(teacher)


def test_it_is_a_key_of_the_teacher():
    assert not TeacherSpec(model="m").gradient_checkpointing
    assert TeacherSpec(model="m", gradient_checkpointing=True).model_dump()["gradient_checkpointing"]
    assert "gradient_checkpointing" not in TeacherSpec(model="m").model_dump()  # records of earlier versions stay valid


def test_a_recipe_turns_it_on(tmp_path):
    teacher_of().save(tmp_path / "teacher")
    stage = {"data": [{"card": "a"}], "steps": 1, "terms": {"vsd": {"kind": "dbild", "path": "switch"}}}
    for asked in (True, False):
        teacher = {"model": str(tmp_path / "teacher"), "gradient_checkpointing": asked}
        fields = {"title": "t", "output": "o", "teacher": teacher, "student": {"model": "s"}, "stages": {"a": stage}}
        tower = the_teacher(Recipe.model_validate(fields)).running()
        assert all(("forward" in vars(layer)) == asked for layer in tower.language.layers)
