"""What a command imports before its first step, and the means by which it imports less."""

from __future__ import annotations

import gc
import importlib
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from tiny import tiny_tower

from mmkd.cli.startup import late, quick_imports
from mmkd.sample.sample_set import write_sample_set

ROOT = Path(__file__).parents[2]
# Nothing of a run without adapters and quantised models, on data of ours, needs them. Of those that wait, a part that is there
# once the package has run.
UNUSED = (
    *("bitsandbytes.nn", "datasets.arrow_dataset", "pandas", "pyarrow", "deepspeed", "timm", "open_clip", "sklearn"),
    *("tensorboard", "wandb", "matplotlib"),
)
LOADED = f"print([name for name in {UNUSED} if name in sys.modules])"


def last_line(script: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "leaked" not in run.stderr
    return run.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    write_sample_set(folder / "sample", sizes={"train": 12, "test": 4})
    tiny_tower(5, 32).save(folder / "teacher")
    tiny_tower(6, 16).save(folder / "student")
    terms = {"cross_entropy": 1.0, "kl": {"kind": "forward_kl"}}
    stage = {"data": [{"card": "sample_scienceqa"}], "terms": terms, "steps": 1, "optimiser": {"batch_size": 4}}
    content = {
        "title": "start", "output": str(folder / "run"), "data_root": str(folder / "sample"),
        "teacher": {"model": str(folder / "teacher")}, "student": {"model": str(folder / "student")},
        "stages": {"one": stage}, "guards": {"teacher_is_better": False},
        "evaluation": {"benchmarks": ["sample_scienceqa"], "limit": 2},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_a_run_and_an_evaluation_import_nothing_that_they_do_not_use(recipe):
    """From the command to the report: data, towers, guards, control, training, evaluation."""
    command = f"import sys\nfrom mmkd.cli import main\nassert main(['distill', {str(recipe)!r}]) == 0\n"
    assert last_line(command + LOADED) == "[]"
    folder = recipe.parent
    options = ["--benchmarks", "sample_scienceqa", "--data-root", str(folder / "sample"), "--output", str(folder / "evaluated")]
    arguments = ["evaluate", str(folder / "student"), *options, "--limit", "2"]
    assert last_line(f"import sys\nfrom mmkd.cli import main\nassert main({arguments!r}) == 0\n" + LOADED) == "[]"


def test_what_waited_is_the_package_itself_when_it_is_used():
    """Also for those who imported it while it waited, and for its classes, which exist once."""
    script = """
import sys, json
from mmkd.cli.startup import quick_imports
with quick_imports():
    import transformers.trainer, peft.helpers
waited = "datasets.arrow_dataset" not in sys.modules and "bitsandbytes.nn" not in sys.modules
from bitsandbytes.nn import Linear8bitLt
import bitsandbytes, datasets
print(json.dumps([
    waited,
    transformers.trainer.datasets.Dataset is datasets.Dataset,
    peft.helpers.bnb.nn.Linear8bitLt is bitsandbytes.nn.Linear8bitLt is Linear8bitLt,
]))
"""
    assert json.loads(last_line(script)) == [True, True, True]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that counts how often it is imported."""
    folder = tmp_path / "slow_package"
    folder.mkdir()
    code = "import sys\nsys.imports_of_slow.append(1)\nvalue = 3\nfrom . import part\n"
    (folder / "__init__.py").write_text(code, encoding="utf-8")
    (folder / "part.py").write_text("value = 4\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "imports_of_slow", [], raising=False)
    yield sys.imports_of_slow
    for name in [name for name in sys.modules if name.partition(".")[0] == "slow_package"]:
        del sys.modules[name]


def test_a_late_package_runs_once_at_its_first_use(package):
    with late("slow_package"):
        import slow_package as again
        import slow_package as early

        assert find_spec("slow_package").origin.endswith("__init__.py") and again is early
    assert package == [] and sys.modules["slow_package"] is early
    assert early.value == 3 and early.part.value == 4 and package == [1]
    import slow_package

    assert slow_package is early and type(early) is type(sys) and package == [1]
    importlib.reload(early)  # by its own loader
    assert package == [1, 1]


def test_a_late_package_may_be_used_at_once(package):
    with late("slow_package"):
        from slow_package import value
    assert value == 3 and package == [1] and sys.modules["slow_package"].value == 3


@pytest.mark.parametrize("when", ["within", "later"])
def test_a_part_of_a_late_package_runs_after_the_package(package, when):
    with late("slow_package"):
        import slow_package

        if when == "within":
            from slow_package.part import value
    if when == "later":
        from slow_package.part import value
    assert value == 4 and package == [1] and slow_package.value == 3


def test_late_leaves_alone_what_is_imported_or_not_installed(package):
    import slow_package

    with late("slow_package", "no_such_package"):
        assert sys.modules["slow_package"] is slow_package
        with pytest.raises(ModuleNotFoundError):
            import no_such_package  # noqa: F401
    assert sys.modules["slow_package"] is slow_package and package == [1]


def test_what_is_imported_afterwards_runs_at_once(package):
    finders = list(sys.meta_path)
    with late("slow_package"):
        pass
    assert sys.meta_path == finders
    import slow_package  # noqa: F401

    assert package == [1]


def test_a_late_package_lacks_what_it_lacks(package):
    with late("slow_package"):
        import slow_package as early
    with pytest.raises(AttributeError, match="no_such_name"):
        early.no_such_name  # noqa: B018
    assert package == [1]


def test_the_collector_is_as_before():
    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            with pytest.raises(KeyError), quick_imports():
                assert not gc.isenabled()
                raise KeyError
            assert gc.isenabled() is enabled
        finally:
            gc.enable()


def test_no_library_function_switches_the_collector():
    """The commands' own imports alone do."""
    users = [path for path in sorted((ROOT / "mmkd").rglob("*.py")) if re.search(r"cli\.startup|\bgc\b", path.read_text("utf-8"))]
    folders = {path.relative_to(ROOT / "mmkd").parts[0] for path in users}
    assert "cli" in folders and folders <= {"cli", "testing"}
    assert {path.name for path in users if "testing" in path.parts} <= {"command.py"}
