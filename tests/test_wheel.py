"""The wheel: it holds cards, recipes, the sample's models, templates and tables, and works where no checkout is."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CATALOGUES = {"models": "models", "data": "data", "evaluation": "evaluation", "prompts": "prompts", "scripts/recipes": "recipes"}

# Run from an empty folder with the wheel's mmkd: its place first, then what each command and recipe says.
PROGRAM = """
import contextlib, io, sys
from pathlib import Path
import mmkd
from mmkd.cli import main
from mmkd.recipes.reading import load_recipe, read_raw
from mmkd.retrieval.recipe import load_ranking_recipe
from mmkd.runs.ablation import load_grid

home = Path(mmkd.__file__).parent
print(home)
for kind in ("models", "data", "evaluation", "prompts", "terms", "formats"):
    with contextlib.redirect_stdout(io.StringIO()) as told:
        assert main(["list", kind]) == 0
    assert len(told.getvalue().splitlines()) > 5, kind
assert main(["sample", "runs/sample", "--sizes", "train=2,val=2,test=2"]) == 0
towers = []
for path in sorted((home / "_cards" / "recipes").rglob("*.yaml")):
    name = path.relative_to(home / "_cards" / "recipes").with_suffix("").as_posix()
    kind = read_raw(name).get("kind")
    if kind == "ablation":
        recipes = [run.recipe for run in load_grid(name, [])[1]]
    elif kind is not None:
        load_ranking_recipe(name)
        recipes = []
    else:
        recipes = [load_recipe(name)]
    print("read", name)
    for recipe in recipes:
        for tower in (recipe.teacher, recipe.student):
            model = getattr(tower, "model", None)
            if isinstance(model, str) and "models/" in model:
                assert (Path(model) / "model.safetensors").is_file(), (name, model)
                towers.append(model)
print("towers", len(towers))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    build = pytest.importorskip("hatchling.build", reason="hatchling, which builds the wheel, is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    here = os.getcwd()
    os.chdir(ROOT)
    try:
        return folder / build.build_wheel(str(folder))
    finally:
        os.chdir(here)


def test_it_holds_all_that_is_read_at_run_time(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    of_package = {p for p in (ROOT / "mmkd").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    wanted = {p.relative_to(ROOT).as_posix() for p in of_package if p.suffix != ".pyc"}
    for folder, copy in CATALOGUES.items():
        files = [p for p in (ROOT / folder).rglob("*") if p.is_file()]
        wanted |= {f"mmkd/_cards/{copy}/{p.relative_to(ROOT / folder).as_posix()}" for p in files}
    assert not wanted - names
    others = {name for name in names - wanted if ".dist-info/" not in name}
    assert not others
    assert {Path(name).suffix for name in wanted} >= {".py", ".j2", ".yaml", ".safetensors", ".jinja"}


def test_it_says_what_it_is(wheel):
    with zipfile.ZipFile(wheel) as files:
        of = {Path(name).name: name for name in files.namelist() if ".dist-info/" in name}
        metadata = files.read(of["METADATA"]).decode()
        assert files.read(of["LICENSE"]) == (ROOT / "LICENSE").read_bytes()
        assert "mmkd = mmkd.cli:run" in files.read(of["entry_points.txt"]).decode()
    head, _, readme = metadata.partition("\n\n")
    assert "License-Expression: Apache-2.0" in head and "Description-Content-Type: text/markdown" in head
    assert "Classifier: Programming Language :: Python :: 3" in head
    assert readme.startswith("# mmkd")


def test_it_works_from_an_empty_folder(wheel, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(wheel) as files:
        files.extractall(site)
    environment = {key: value for key, value in os.environ.items() if key not in ("MMKD_CARDS", "DATA_ROOT")}
    environment |= {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=empty, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[0] == str(site / "mmkd")
    read = {line.removeprefix("read ") for line in lines if line.startswith("read ")}
    folder = ROOT / "scripts" / "recipes"
    assert read == {p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml")}
    assert int(lines[-1].removeprefix("towers ")) > 10
    assert [path.name for path in empty.iterdir()] == ["runs"]
