"""Engines that spread a student over processes: the weights of one process, resumed and saved whole; micro-batches in step."""

import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import make_term, tiny_samples, tiny_tower

from mmkd.sample.sample_set import write_sample_set
from mmkd.terms.term import Schedule
from mmkd.train.collate import PairDataset
from mmkd.train.distiller import Distiller
from mmkd.train.sharded import replace_weights

LAUNCH = Path(__file__).parents[2] / "scripts" / "launch"
PATH = os.pathsep.join(p for p in sys.path if p)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": PATH}
CLI = ["-m", "mmkd.cli", "distill"]
FSDP, ZERO = "pytorch_model_fsdp_0", "global_step*"
PARTS = {"fsdp2": FSDP, "fsdp2_kept": FSDP, "zero2": ZERO, "zero3": ZERO}  # of a checkpoint, by engine
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
VISION = {"model_type": "vit", **SIZES, "image_size": 64, "patch_size": 16}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A tied student, a teacher of other widths, questions with pictures and without, all kinds of terms' own parameters."""
    folder = tmp_path_factory.mktemp("sharded")
    write_sample_set(folder / "sample", sizes={"train": 12, "test": 4})
    tiny_tower(5, 32, vision={**VISION, "hidden_size": 24}, image_size=(64, 64)).save(folder / "teacher")
    student = {
        "assemble": {
            "vision": {"config": VISION, "feature_layer": -1},
            "language": {"config": {"model_type": "llama", **SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True}},
            "tokenizer": {"source": "teacher"},
        }
    }
    stage = {
        "data": [{"card": "sample_scienceqa"}],
        "terms": {
            "cross_entropy": 1, "kl": {"kind": "forward_kl"},
            "features": {"kind": "feature_match"}, "words": {"kind": "contrastive"},
            "vsd": {"kind": "dbild", "path": "switch", "bridge": True},
        },
        "steps": 10, "save_every": 2, "log_every": 2,
        "optimiser": {"batch_size": 4, "micro_batch_size": 1, "learning_rate": 1e-3},
    }
    content = {
        "title": "test", "output": "OUTPUT", "data_root": str(folder / "sample"), "max_length": 512, "control": False,
        "teacher": {"model": str(folder / "teacher")}, "student": student, "stages": {"only": stage},
        "evaluation": {"benchmarks": []}, "guards": {"teacher_is_better": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def one_process(recipe):
    output = recipe.parent / "one"
    subprocess.run([sys.executable, *CLI, str(recipe), f"output={output}"], env=ENVIRONMENT, capture_output=True, check=True)
    return load_file(output / "student" / "model.safetensors")


ALONE = "stages.only.terms.words=0"  # negatives of `contrastive` are those of a micro-batch, so a split changes it
BY_TOKENS = [ALONE, "stages.only.optimiser.micro_batch_size=null", "stages.only.optimiser.micro_batch_tokens=1200"]


@pytest.fixture(scope="module")
def one_split(recipe):
    output = recipe.parent / "one_split"
    command = [sys.executable, *CLI, str(recipe), f"output={output}", ALONE]
    subprocess.run(command, env=ENVIRONMENT, capture_output=True, check=True)
    return load_file(output / "student" / "model.safetensors")


def interrupt(command: list[str], folder: Path) -> Path:
    """Runs a command until `folder` has a complete checkpoint, which is returned."""
    said = folder.parents[3] / f"{folder.parents[2].name}.log"
    with said.open("w") as log, subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=log) as process:
        deadline = time.monotonic() + 250
        while not (found := list(folder.glob("checkpoint-*/complete"))):
            assert process.poll() is None, f"the run ended before it was interrupted:\n{said.read_text()[-3000:]}"
            assert time.monotonic() < deadline, "no checkpoint was written"
            time.sleep(0.005)
        process.terminate()
    return found[0].parent


@pytest.mark.parametrize("engine", PARTS)
def test_two_processes_are_one(recipe, one_process, engine):
    if engine.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    output = recipe.parent / engine
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH / f"{engine}.yaml")]
    command = [*launch, "--num_processes", "2", "--main_process_port", "0", *CLI, str(recipe), f"output={output}"]
    checkpoint = interrupt(command, output / "stages" / "student" / "0_only")
    assert list(checkpoint.glob(PARTS[engine])), "this engine did not train"
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_weights(output, one_process)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_that_split_by_tokens_are_one(recipe, one_split, engine):
    """Processes have other samples, so other numbers of micro-batches."""
    output = recipe.parent / f"{engine}_tokens"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    if engine == "fsdp2":
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(LAUNCH / "fsdp2.yaml")]
        launch += ["--num_processes", "2", "--main_process_port", "0"]
    command = [*launch, *CLI, str(recipe), f"output={output}", *BY_TOKENS]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_weights(output, one_split)


def assert_weights(output: Path, expected: dict) -> None:
    whole = load_file(output / "student" / "model.safetensors")
    assert whole.keys() == expected.keys() and "lm_head.weight" not in whole
    for name, tensor in expected.items():
        torch.testing.assert_close(whole[name], tensor, rtol=2e-4, atol=2e-5, msg=name)


def makes_namespaces() -> bool:
    """Whether this machine lets us have network namespaces."""
    name = f"mmkdtry{os.getpid()}"
    if shutil.which("ip") is None or subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return False
    return subprocess.run(["ip", "netns", "delete", name], capture_output=True).returncode == 0


def test_two_hosts_are_one_process(recipe, one_process):
    if not makes_namespaces():
        pytest.skip("network namespaces need root and iproute2")
    output = recipe.parent / "hosts"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where torchrun is
    command = [str(LAUNCH / "two_hosts.sh"), str(recipe), f"output={output}"]
    with subprocess.Popen(command, env=ENVIRONMENT | {"PATH": path}, stderr=subprocess.PIPE, text=True) as process:
        said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said[-3000:]
    assert_weights(output, one_process)
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert f"mmkd{process.pid}" not in left


def test_micro_batches_without_pictures_keep_step(tmp_path):
    """Every trained parameter gets its gradient, in the order of a micro-batch with pictures: ZeRO-2 takes them as they come."""
    vision = {"model_type": "vit", **SIZES, "image_size": 16, "patch_size": 8}
    teacher = tiny_tower(2, 32, vision={**vision, "hidden_size": 24})
    student = tiny_tower(1, 16, vision=vision, tokenizer=teacher.tokenizer)
    kinds = ("cross_entropy", "forward_kl", "feature_match", "contrastive", "tags")
    terms = [make_term(kind, kind, Schedule(1, 1)) for kind in kinds]
    terms.append(make_term("switch", "dbild", Schedule(1, 1), path="switch", bridge=True))
    samples = tiny_samples(tmp_path, 2, text_only=2)
    dataset = PairDataset(samples, student, teacher, terms)
    pictured, plain = (dataset.collator([dataset[i] for i in part])["batch"] for part in ((0, 1), (2, 3)))
    model = Distiller(student, teacher, terms)
    assert {*model.extras} == {"feature_match", "contrastive", "tags", "switch"}
    order: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))

    def arrived(batch, lockstep):
        model.lockstep = lockstep
        order.clear()
        loss, _ = model(batch)
        loss.backward()
        model.zero_grad()
        return float(loss.detach()), list(order)

    in_step, plain_loss = arrived(pictured, True)[1], arrived(plain, False)[0]
    assert any("vision" in name for name in in_step) and any("extras" in name for name in in_step)
    loss, arrived_without = arrived(plain, True)
    assert arrived_without == in_step
    assert loss == pytest.approx(plain_loss)


def test_replaced_weights_keep_their_ties():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    state = {name: torch.full_like(p, 3.0) for name, p in model.named_parameters(remove_duplicate=False)}
    replace_weights(model, state)
    assert model["a"].weight is model["b"].weight and float(model["b"].weight.sum()) == 12
    with pytest.raises(KeyError):
        replace_weights(model, {})
