"""Private names of other libraries: few, listed in docs/decisions.md, and still there with the parameters that mmkd counts on."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
import torch
from packaging.requirements import Requirement
from transformers import AutoConfig, PreTrainedModel, Trainer

import mmkd

ROOT = Path(__file__).resolve().parents[1]
# Name -> its owner and, of a function, the parameters.
NAMES = {
    "_get_num_items_in_batch": (Trainer, ["self", "batch_samples", "device"]),
    "_get_grad_norm": (Trainer, ["self", "model", "grad_norm"]),
    "_get_train_sampler": (Trainer, ["self", "train_dataset"]),
    "_load_from_checkpoint": (Trainer, ["self", "resume_from_checkpoint", "model"]),
    "_prepare_inputs": (Trainer, ["self", "inputs"]),
    "_save": (Trainer, ["self", "output_dir", "state_dict"]),
    "_save_checkpoint": (Trainer, ["self", "model", "trial"]),
    "_init_weights": (PreTrainedModel, ["self", "module"]),
    "_no_split_modules": (PreTrainedModel, None),
    "_hf_peft_config_loaded": (PreTrainedModel, None),
    "_name_or_path": ("keys of a configuration", None),
    "_dynamo": (torch, None),
    "_weight_conversions": ("a model that was loaded, and what `save_pretrained` reads", None),
    "_parameters": (torch.nn.Module(), None),
}
PUBLIC = {"_exit"}  # of os: documented
OWN = ("mmkd", "abc", "_abc", "builtins", "collections", "pydantic", "typing")  # and Python's; pydantic's are made for each model
MADE = {"_backward_cls", "_abc_impl"}  # by torch, for each function of autograd; by Python, for each abstract class


@pytest.mark.parametrize("name", [name for name, (owner, _) in NAMES.items() if not isinstance(owner, str)])
def test_the_library_still_has_the_name(name):
    owner, parameters = NAMES[name]
    found = getattr(owner, name)
    if parameters is not None:
        assert list(inspect.signature(found).parameters) == parameters


def test_a_loaded_configuration_knows_where_it_is_from(tmp_path):
    AutoConfig.for_model("llama").save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_dict()["_name_or_path"] == str(tmp_path)


def test_dynamic_sizes_are_marked_as_before():
    assert list(inspect.signature(torch._dynamo.mark_dynamic).parameters)[:2] == ["t", "index"]


def modules() -> Iterator[ModuleType]:
    for found in pkgutil.walk_packages(mmkd.__path__, "mmkd."):
        if not found.name.endswith("__main__"):
            yield importlib.import_module(found.name)


def overridden() -> set[str]:
    """Private names of other libraries' classes that ours define anew."""
    names = set()
    for module in modules():
        for cls in vars(module).values():
            if inspect.isclass(cls) and cls.__module__ == module.__name__:
                others = [base for base in cls.__mro__[1:] if base.__module__.partition(".")[0] not in OWN]
                names |= {name for name in vars(cls) if is_private(name) and any(name in vars(base) for base in others)}
    return names - MADE


def reached() -> set[str]:
    """Private names that our code reads or sets on anything but its own objects and modules."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "mmkd").rglob("*.py"))}
    own = {name for tree in trees.values() for node in ast.walk(tree) for name in defined(node)}
    names = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                names |= set() if is_own or node.attr in own else {node.attr}
            elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(("mmkd", "__future__")):
                parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                names |= {part for part in parts if is_private(part)}
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
                names |= {a.value for a in node.args if isinstance(a, ast.Constant) and is_private(str(a.value))}
    return names


def defined(node: ast.AST) -> list[str]:
    """The names of ours that a node brings: functions, classes, fields, and what an object keeps."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and getattr(node.value, "id", "") == "self":
        return [node.attr]
    return []


def is_private(name: str) -> bool:
    return re.fullmatch(r"_[a-z]\w*", name) is not None


def test_every_private_name_is_in_the_list():
    listed = {*NAMES, *PUBLIC}
    assert overridden() <= listed
    assert reached() <= listed


def test_the_list_holds_nothing_that_is_no_longer_used():
    source = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "mmkd").rglob("*.py")))
    assert [name for name in NAMES if not re.search(rf"\b{name}\b", source)] == []


def test_the_decisions_name_them_all():
    text = (ROOT / "docs" / "decisions.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if f"`{name}`" not in text] == []


def test_what_is_installed_lies_within_the_declared_bounds():
    content = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lines = re.search(r"^dependencies = \[\n(.*?)^\]", content, re.DOTALL | re.MULTILINE)
    declared = [Requirement(text) for text in re.findall(r'^ +"([^"]+)"', lines[1], re.MULTILINE)]
    assert len(declared) >= 15
    for requirement in declared:
        if requirement.marker is None or requirement.marker.evaluate():
            assert requirement.specifier.contains(version(requirement.name), prereleases=True), str(requirement)
    (transformers,) = (requirement for requirement in declared if requirement.name == "transformers")
    assert any(bound.operator == "<" for bound in transformers.specifier)  # its private names may go with any version
