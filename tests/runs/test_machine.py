"""Each process puts teacher, student and batches on its own device; what a machine cannot do is refused with the reason.

Devices are simulated: PyTorch is told of two GPUs, and what would be put on one is written down.
"""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from tiny import language_config, tiny_samples, tiny_tower
from torch import nn

from mmkd.cli import main
from mmkd.errors import DataError, TowerError
from mmkd.recipes.reading import load_recipe
from mmkd.runs import machine, write_cache
from mmkd.runs.evaluate import EvaluationOptions, _load_tower
from mmkd.runs.towers import build_student, load_student, load_teachers
from mmkd.towers import loading
from mmkd.towers.loading import device_of_process
from mmkd.train.optimisers import OPTIMISERS, build_optimiser


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    tiny_tower(1).save(folder)
    return folder


def recipe_of(folder, teacher, **changes):
    """A recipe of one stage; `stage`, `optimiser`, `teacher_keys` and `student` change parts of it, others the head."""
    if not (folder / "train.jsonl").exists():
        (folder / "train.jsonl").write_text('{"question": "which", "answer": "red"}\n' * 4)
    blind = "image" not in (folder / "train.jsonl").read_text()
    stage = {
        "data": [{"format": "jsonl", "root": str(folder), "prompt": "plain", "text_only": blind}],
        "terms": {"forward_kl": 1.0}, "steps": 1,
        "optimiser": {"batch_size": 2, **changes.pop("optimiser", {})}, **changes.pop("stage", {}),
    }  # fmt: skip
    content = {
        "title": "t", "output": str(folder / "out"), "teacher": {"model": str(teacher), **changes.pop("teacher_keys", {})},
        "student": {"model": str(teacher), **changes.pop("student", {})}, "stages": {"only": stage}, "control": False, **changes,
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def devices(monkeypatch):
    """Two GPUs and process 1; what is set, loaded and moved, in order."""
    seen = SimpleNamespace(events=[], maps=[])
    current = SimpleNamespace(index=0)

    def set_device(index):
        seen.events.append(("set_device", index))
        current.index = index

    real = loading.AutoModelForImageTextToText.from_pretrained

    def from_pretrained(folder, **options):
        seen.events.append(("load", options.get("device_map")))
        seen.maps.append((options.pop("device_map", None), options.pop("quantization_config", None)))
        return real(folder, **options)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current.index)
    monkeypatch.setattr(loading.AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    monkeypatch.setattr(nn.Module, "to", lambda self, device: seen.events.append(("to", device)) or self)
    monkeypatch.setenv("LOCAL_RANK", "1")
    return seen


@pytest.mark.parametrize("quantise", [None, "8bit", "4bit"])
def test_weights_go_straight_to_the_device_of_the_process(tmp_path, teacher, devices, quantise):
    recipe = load_recipe(recipe_of(tmp_path, teacher, teacher_keys={"quantise": quantise}))
    teachers = load_teachers(recipe)
    build_student(recipe, teachers, [])
    load_student(recipe, teacher)
    _load_tower(teacher, EvaluationOptions(quantise=quantise))
    own = torch.device("cuda", 1)
    assert devices.events[0] == ("set_device", 1)  # before anything is loaded
    assert [placed for placed, _ in devices.maps] == [{"": own}] * 4
    assert [given is not None for _, given in devices.maps] == [quantise is not None, False, False, quantise is not None]
    assert {where for what, where in devices.events if what == "to"} <= {own}
    assert {where for what, where in devices.events if what == "set_device"} == {1}


def test_the_reference_of_preferences_is_the_same_teacher(tmp_path, teacher, devices, monkeypatch):
    """`mmkd preferences` loads both models onto the device, too."""
    monkeypatch.setattr("mmkd.evaluation.preferences.preference_accuracy", lambda *towers: {})
    monkeypatch.setattr("mmkd.data.formats.read_split", lambda *given, **options: [])
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("")
    command = ["preferences", str(teacher), "--reference", str(teacher), "--pairs", str(pairs), "--data-root", str(tmp_path)]
    main([*command, "--cache", str(tmp_path / "cache")])
    assert [placed for placed, _ in devices.maps] == [{"": torch.device("cuda", 1)}] * 2


def test_a_student_from_parts_and_a_cpu(tmp_path, teacher, devices, monkeypatch):
    parts = {
        "vision": {"config": {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                              "intermediate_size": 32, "image_size": 16, "patch_size": 8}, "image_size": 16},
        "language": {"config": language_config()}, "tokenizer": {"source": "teacher"},
    }  # fmt: skip
    recipe = load_recipe(recipe_of(tmp_path, teacher, student={"model": None, "assemble": parts, "attn_implementation": "eager"}))
    student = build_student(recipe, load_teachers(recipe), [])
    assert ("to", torch.device("cuda", 1)) in devices.events
    assert student.language.config._attn_implementation == "eager"
    devices.events.clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of_process() == torch.device("cpu")
    load_teachers(recipe)
    assert devices.events == [("load", None)]


def test_more_processes_than_gpus_are_refused(monkeypatch, devices):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(TowerError, match=r"process 2 of this host .* but 2 can be seen"):
        device_of_process()


PROCESS = """
import sys
from pathlib import Path

import torch

from mmkd.recipes.reading import load_recipe
from mmkd.towers.loading import device_of_process
from mmkd.train.trainer import training_arguments

folder, recipe, rank = Path(sys.argv[1]), load_recipe(sys.argv[2]), int(sys.argv[3])
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 2
chosen = []
torch.cuda.set_device = lambda device: chosen.append(torch.device("cuda", device) if isinstance(device, int) else device)
own = device_of_process()
arguments = training_arguments(recipe.stages["only"], "only", folder / "stage", 0, 2)
print(arguments.device, own, *{str(device) for device in chosen})
torch.distributed.destroy_process_group()
"""


def test_batches_go_where_the_towers_are(tmp_path, teacher):
    """Two processes: the trainer's device, which its batches are moved to, is that of teacher and student."""
    recipe = recipe_of(tmp_path, teacher, optimiser={"batch_size": 4})
    started = []
    for rank in ("0", "1"):
        own = {"LOCAL_RANK": rank, "RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        environment = os.environ | own | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        command = [sys.executable, "-c", PROCESS, str(tmp_path), str(recipe), rank]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    for rank, process in enumerate(started):
        assert process.communicate(timeout=240)[0].split() == [f"cuda:{rank}"] * 3


# ---- what a machine cannot do ----------------------------------------------------------------------------------------


def test_all_that_a_machine_cannot_do_is_said_at_once(tmp_path, teacher, capsys):
    path = recipe_of(
        tmp_path, teacher, teacher_keys={"attn_implementation": "flash_attention_2"}, tf32=True,
        student={"attn_implementation": "flex_attention"}, stage={"precision": "float16"}, optimiser={"kind": "adamw_paged_8bit"},
    )  # fmt: skip
    assert main(["distill", str(path), "--dry-run"]) == 2
    said = capsys.readouterr().err
    for words in (
        "teacher.attn_implementation: flash_attention_2 needs a GPU", "student.attn_implementation: flex_attention",
        "stages.only.precision: float16 needs a GPU", "stages.only.optimiser.kind: adamw_paged_8bit pages", "tf32: needs",
    ):  # fmt: skip
        assert words in said
    assert "Traceback" not in said and not (tmp_path / "out").joinpath("stages").exists()


@pytest.mark.parametrize(
    ("changes", "patches", "words"),
    [
        ({"teacher_keys": {"attn_implementation": "flash_attention_2"}}, {}, "needs flash-attn, which is not installed"),
        ({"student": {"attn_implementation": "flash_attention_3", "dtype": "float32"}}, {}, "student.dtype is float32"),
        ({"tf32": True}, {"capability": (7, 5)}, "from Ampere on"),
        ({"optimiser": {"kind": "adamw_8bit"}}, {"missing": "bitsandbytes"}, "bitsandbytes, which is not installed"),
        ({"teacher_keys": {"quantise": "4bit"}}, {"missing": "bitsandbytes"}, "teacher.quantise: needs bitsandbytes"),
        ({"optimiser": {"kind": "adamw_8bit"}}, {"fsdp": "true"}, "does not take weights that FSDP2 spreads"),
    ],
)
def test_each_reason_on_a_machine_with_gpus(tmp_path, teacher, devices, monkeypatch, changes, patches, words):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: patches.get("capability", (9, 0)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", patches.get("fsdp", "false"))
    found = lambda name: None if name in ("kernels", patches.get("missing")) else object()  # noqa: E731
    monkeypatch.setattr(machine, "find_spec", found)
    monkeypatch.setattr("mmkd.train.optimisers.find_spec", found)
    with pytest.raises(DataError, match=words):
        machine.use_machine(load_recipe(recipe_of(tmp_path, teacher, **changes)))
    assert devices.events == []


def test_evaluate_takes_the_attention_that_this_machine_has(tmp_path, teacher, capsys):
    tower = _load_tower(teacher, EvaluationOptions(attn_implementation="eager"))
    assert {tower.language.config._attn_implementation, tower.model.config._attn_implementation} == {"eager"}
    asked = ["evaluate", str(teacher), "--benchmarks", "jsonl", "--data-root", str(tmp_path), "--dtype", "float32"]
    assert main([*asked, "--attn-implementation", "flash_attention_2"]) == 2
    said = capsys.readouterr().err
    assert "attn_implementation: flash_attention_2 needs a GPU" in said and "dtype is float32" in said and "Traceback" not in said
    with pytest.raises(SystemExit):
        main([*asked, "--attn-implementation", "flash"])
    assert "flash_attention_2" in capsys.readouterr().err


def test_what_a_gpu_can_do_is_let_through(tmp_path, teacher, devices, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    before = torch.get_float32_matmul_precision()
    path = recipe_of(tmp_path, teacher, tf32=True, stage={"precision": "float16"}, optimiser={"kind": "adamw_paged"})
    try:
        machine.use_machine(load_recipe(path))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert devices.events == [("set_device", 1)]


def test_attention_is_the_chosen_one(tmp_path, teacher):
    recipe = load_recipe(
        recipe_of(tmp_path, teacher, teacher_keys={"attn_implementation": "eager"}, student={"attn_implementation": "sdpa"})
    )
    teachers = load_teachers(recipe)
    assert teachers["teacher"].tower.language.config._attn_implementation == "eager"
    assert build_student(recipe, teachers, []).language.config._attn_implementation == "sdpa"
    assert write_cache.half_of("float16") == torch.float16 and write_cache.half_of("float32") is None


# ---- optimisers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [name for name, one in OPTIMISERS.items() if not one.paged])
def test_every_optimiser_learns_here(kind):
    torch.manual_seed(0)
    layer, inputs = nn.Linear(64, 64), torch.randn(256, 64)
    wanted = inputs @ torch.randn(64, 64).T / 8
    groups = [{"params": [layer.weight], "lr": 1e-2, "weight_decay": 0.0}, {"params": [layer.bias], "weight_decay": 0.0}]
    optimiser = build_optimiser(kind, groups, learning_rate=1e-2, betas=(0.9, 0.99), momentum=0.9)
    losses = []
    for _ in range(60):
        loss = nn.functional.mse_loss(layer(inputs), wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    kept = sum(t.numel() * t.element_size() for state in optimiser.state.values() for t in state.values() if torch.is_tensor(t))
    assert kept / sum(4 * p.numel() for p in layer.parameters()) == pytest.approx(OPTIMISERS[kind].moments, abs=0.3)


def test_an_optimiser_that_is_unknown_is_refused_with_a_suggestion(tmp_path, teacher):
    with pytest.raises(DataError, match="no optimiser 'adamw8bit'; did you mean 'adamw_8bit'"):
        load_recipe(recipe_of(tmp_path, teacher, optimiser={"kind": "adamw8bit"}))


def test_records_of_recipes_without_the_new_keys_stay_as_they_were(tmp_path, teacher):
    content = load_recipe(recipe_of(tmp_path, teacher)).model_dump(mode="json")
    assert not {"kind", "momentum"} & set(content["stages"]["only"]["optimiser"])
    assert "tf32" not in content and "attn_implementation" not in content["student"] | content["teacher"]


def test_a_run_with_another_optimiser(tmp_path, teacher):
    samples = tiny_samples(tmp_path, 4)
    lines = [
        f'{{"image": "{s.images[0].name}", "question": "{s.turns[0].text}", "answer": "{s.answer}"}}' for s in samples
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    path = recipe_of(tmp_path, teacher, optimiser={"kind": "adamw_fused"}, guards={"teacher_is_better": False})
    assert main(["distill", str(path)]) == 0
    assert (tmp_path / "out" / "student" / "config.json").exists()
