"""What `fuzz.py` damages and calls. A target gets (generator, whole inputs, an empty folder) and raises what the call raises."""

from __future__ import annotations

import json
import os
import random
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import mutate
import numpy as np
import torch
import yaml
from PIL import Image

from mmkd.base.cards import list_cards, load_card
from mmkd.data.entries import DataCard, read_samples
from mmkd.data.samples import ImageRef
from mmkd.data.spec import DataSpec
from mmkd.errors import ImageError, MmkdError
from mmkd.evaluation.benchmarks import Benchmark
from mmkd.recipes.reading import load_recipe
from mmkd.retrieval.recipe import load_ranking_recipe
from mmkd.runs.data import stage_samples
from mmkd.teachers.store import TeacherCache, content_key
from mmkd.towers.assemble import LanguageSpec, VisionSpec, assemble, train_tokenizer
from mmkd.towers.tower import Tower
from mmkd.train.checkpoints import last_checkpoint, writing_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
VISION = {"model_type": "vit", **SIZES, "image_size": 16, "patch_size": 8}
SECRET = (7, 7)
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")
KINDS = ("response", "prompt", "visual")


# ---- whole inputs ----------------------------------------------------------------------------------------------------


def tower(seed: int) -> Tower:
    """A LLaVA of a few thousand parameters for pictures of 16 x 16 pixels."""
    language = {"model_type": "llama", **SIZES, "num_key_value_heads": 2, "max_position_embeddings": 512}
    tokenizer = train_tokenizer(("red", "green", "round", "left of"), 300)
    spec = VisionSpec(config=VISION, image_size=(16, 16))
    return assemble(spec, LanguageSpec(config=language), tokenizer=tokenizer, seed=seed)


def picture(path: Path, seed: int, size: tuple[int, int] = (20, 16)) -> None:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)


def make_whole(folder: Path) -> Path:
    """Data, models, a recipe, a finished run, a cache and checkpoints, all whole; and a picture outside of every root."""
    data = folder / "data"
    (data / "images").mkdir(parents=True)
    picture(folder / "secret.png", 99, SECRET)
    rows = []
    for number in range(8):
        picture(data / "images" / f"{number}.png", number)
        rows.append({"image": f"images/{number}.png", "question": f"red or green {number}?", "answer": "red"})
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "test.jsonl").write_text("".join(json.dumps({**row, "id": str(n)}) + "\n" for n, row in enumerate(rows[:4])))
    turns = [{"from": "human", "value": "<image>\nred?"}, {"from": "gpt", "value": "red"}]
    llava = [{"id": str(n), "image": row["image"], "conversations": turns} for n, row in enumerate(rows)]
    (data / "llava.json").write_text(json.dumps(llava))
    for seed, name in ((5, "teacher"), (6, "student")):
        tower(seed).save(folder / name)
    recipe(folder, "recipe.yaml", folder / "run")
    from mmkd.runs.run import distill
    from mmkd.runs.write_cache import write_cache

    distill(load_recipe(folder / "recipe.yaml"))
    write_cache(load_recipe(folder / "recipe.yaml"), folder / "cache", batch_size=3)
    for step in (2, 4):
        with writing_checkpoint(folder / "stage", step, True):
            shutil.copytree(folder / "student", folder / "stage" / f"checkpoint-{step}")
    return folder


def recipe(folder: Path, name: str, output: Path) -> Path:
    (folder / "card.yaml").write_text(yaml.safe_dump({
        "title": "four questions", "format": "jsonl", "root": str(folder / "data"), "split": "test", "prompt_style": "plain",
        "metric": "exact_match", "max_new_tokens": 2,
    }))  # fmt: skip
    stage = {
        "data": [{"format": "jsonl", "root": str(folder / "data"), "prompt": "plain"}],
        "terms": {"cross_entropy": 1, "kl": {"kind": "forward_kl"}}, "steps": 2, "save_every": 1, "log_every": 1,
        "optimiser": {"batch_size": 2, "learning_rate": 1e-3},
    }  # fmt: skip
    content = {
        "title": "tiny", "output": str(output), "max_length": 128, "teacher": {"model": str(folder / "teacher")},
        "student": {"model": str(folder / "student")}, "stages": {"only": stage}, "control": False,
        "guards": {"teacher_is_better": False, "samples": 4}, "evaluation": {"benchmarks": [str(folder / "card.yaml")]},
    }  # fmt: skip
    (folder / name).write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / name


# ---- recipes, overrides, cards ---------------------------------------------------------------------------------------


def _recipes(draw: random.Random, whole: Path, place: Path) -> str:
    path = draw.choice([whole / "recipe.yaml", *sorted((ROOT / "scripts" / "recipes").glob("*.yaml"))])
    text, target = path.read_bytes(), place / path.name
    if draw.random() < 0.6:
        content = yaml.safe_load(text)
        for _ in range(draw.randint(1, 3)):
            content = mutate.value_of(draw, content)
        target.write_bytes(yaml.dump(content, allow_unicode=True).encode("utf-8", "surrogatepass"))
    else:
        target.write_bytes(mutate.bytes_of(draw, text))
    _load(target, [])
    return path.name


def _load(path: Path, overrides: list[str]) -> Any:
    try:
        return load_recipe(path, overrides)
    except MmkdError as error:
        if "mmkd rank" not in str(error):
            raise
    return load_ranking_recipe(path, overrides)


def _overrides(draw: random.Random, whole: Path, place: Path) -> str:
    keys = [
        "seed", "stages.only.steps", "stages.only.terms.kl.weight", "stages.only.data.0.limit", "teacher.model", "workers", "x.y",
        "stages.only.optimiser.betas", "evaluation.benchmarks", "stages.only.data.9", "output", "stages", "stages.only.lora",
    ]  # fmt: skip
    key = draw.choice(keys) if draw.random() < 0.8 else mutate.bytes_of(draw, draw.choice(keys).encode()).decode("latin-1")
    value = draw.choice(mutate.ODD_VALUES)
    text = json.dumps(value) if draw.random() < 0.5 else draw.choice(mutate.ODD_TEXT).decode("latin-1")
    _load(whole / "recipe.yaml", [f"{key}={text}"])
    return key


def _cards(draw: random.Random, whole: Path, place: Path) -> str:
    kind, schema = draw.choice([("data", DataCard), ("evaluation", Benchmark)])
    path = draw.choice([path for name, path in list_cards(kind).items() if not name.startswith(("suites/", "retrieval/"))])
    target = place / f"{path.stem}.yaml"
    if draw.random() < 0.6:
        content = mutate.value_of(draw, yaml.safe_load(path.read_bytes()))
        target.write_bytes(yaml.dump(content, allow_unicode=True).encode("utf-8", "surrogatepass"))
    else:
        target.write_bytes(mutate.bytes_of(draw, path.read_bytes()))
    load_card(kind, str(target), schema)
    return path.name


# ---- data ------------------------------------------------------------------------------------------------------------


def _annotations(draw: random.Random, whole: Path, place: Path) -> str:
    root = place / "data"
    shutil.copytree(whole / "data", root)
    shutil.copy(whole / "secret.png", place / "secret.png")
    name, kind = draw.choice([("train.jsonl", "jsonl"), ("llava.json", "llava")])
    damage = mutate.file(draw, root / name)
    if draw.random() < 0.3:
        outside = draw.choice(["../secret.png", str(place / "secret.png"), "images/link.png", "images/../../secret.png"])
        (root / "images" / "link.png").symlink_to("../../secret.png")
        text = (root / name).read_bytes().replace(b"images/3.png", outside.encode())
        (root / name).write_bytes(text)
    files = {"annotations": name} if kind == "llava" else None
    spec = DataSpec.model_validate({"format": kind, "root": str(root), "prompt": "plain", **({"files": files} if files else {})})
    for sample in read_samples(spec, 0):
        for image in sample.images:
            _show(image)
    return damage


def _show(image: ImageRef) -> None:
    try:
        shown = image.load()
    except ImageError:
        return
    if shown.size == SECRET:
        from fuzz import Wrong

        raise Wrong("a picture outside its root was read")


def _pictures(draw: random.Random, whole: Path, place: Path) -> str:
    kind = draw.choice(FORMATS)
    size = draw.choice([(20, 16), (1, 1), (300, 200), (2, 900)])
    mode = draw.choice(["RGB", "L", "RGBA", "P", "1"])
    made = Image.fromarray(np.random.default_rng(draw.randrange(2**32)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    made = made.convert("RGB" if kind in ("JPEG", "BMP") else mode)
    path = place / f"x.{draw.choice(['png', 'jpg', 'gif', 'tiff'])}"
    made.save(path, format=kind)
    content = path.read_bytes()
    for _ in range(draw.randint(1, 4)):
        content = mutate.bytes_of(draw, content)
    path.write_bytes(content)
    ImageRef.inside(place, path.name).load()
    return kind


def _archives(draw: random.Random, whole: Path, place: Path) -> str:
    if draw.random() < 0.5:
        with zipfile.ZipFile(place / "images.zip", "w", draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
            for number in range(3):
                archive.write(whole / "data" / "images" / f"{number}.png", f"{number}.png")
            archive.writestr("large.png", bytes(draw.choice([10, 10**6, 10**8])))
        if draw.random() < 0.8:
            mutate.file(draw, place / "images.zip")
        for name in ("0.png", "2.png", "large.png", "../secret.png", "none.png"):
            try:
                ImageRef.inside(place / "images.zip", name).load()
            except MmkdError as error:
                assert len(str(error)) < 2000
        return "zip"
    with tarfile.open(place / "0.tar", "w") as shard:
        for number in range(4):
            shard.add(whole / "data" / "images" / f"{number}.png", f"{number}.png")
            (place / "t.json").write_text(json.dumps({"question": "red?", "answer": "red"}))
            shard.add(place / "t.json", f"{number}.json")
    if draw.random() < 0.8:
        mutate.file(draw, place / "0.tar")
    spec = DataSpec.model_validate({"format": "shards", "root": str(place), "prompt": "plain", "limit": 4})
    for sample in read_samples(spec, 0):
        for image in sample.images:
            _show(image)
    return "tar"


# ---- models, runs, caches, checkpoints -------------------------------------------------------------------------------


def _models(draw: random.Random, whole: Path, place: Path) -> str:
    shutil.copytree(whole / "student", place / "model")
    damage = mutate.folder(draw, place / "model")
    if draw.random() < 0.15:
        files = {name: draw.choice(["../../secret.png", "/etc/passwd", "model.safetensors"]) for name in ("a", "b")}
        (place / "model" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    from mmkd.runs.evaluate import evaluate

    loaded = Tower.load(place / "model", dtype="float32", max_length=128)
    evaluate(loaded, str(whole / "card.yaml"), output=place / "out", batch_size=4)
    return damage


def _runs(draw: random.Random, whole: Path, place: Path) -> str:
    """A run's folder is reported, compared, and claimed again."""
    from mmkd.cli import main

    shutil.copytree(whole / "run", place / "run")
    damages = [mutate.folder(draw, place / "run", keep=(".lock",)) for _ in range(draw.randint(1, 2))]
    os.environ["COLUMNS"] = "80"
    for command in (["report", str(place / "run")], ["compare", str(place / "run"), "--output", str(place / "compared")]):
        _main(main, command)
    return ", ".join(damages)


def _main(main: Any, command: list[str]) -> None:
    code = main(command)
    if code not in (0, 2, 3):
        from fuzz import Wrong

        raise Wrong(f"exit code {code} of {command[0]}")


def _resumes(draw: random.Random, whole: Path, place: Path) -> str:
    """A damaged run goes on with the same recipe, or is refused and stays as it is."""
    from mmkd.cli import main

    shutil.copytree(whole / "run", place / "run")
    if draw.random() < 0.6:  # the student was not made yet
        for path in [path for name in ("student*", ".student*", "summary.json") for path in (place / "run").glob(name)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    damage = mutate.folder(draw, place / "run", keep=(".lock",))
    _main(main, ["distill", str(whole / "recipe.yaml"), f"output={place / 'run'}"])
    student = place / "run" / "student" / "model.safetensors"
    if student.is_file() and not student.is_symlink():
        _same_or_wrong(student, whole / "run" / "student" / "model.safetensors")
    return damage


def _same_or_wrong(path: Path, other: Path) -> None:
    from fuzz import Wrong
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except SafetensorError:
        return  # damaged and refused
    wrong = [name for name, tensor in load_file(other).items() if name in found and not torch.isfinite(found[name]).all()]
    if wrong:
        raise Wrong("a student that is not finite")


def _caches(draw: random.Random, whole: Path, place: Path) -> str:
    from fuzz import Wrong

    shutil.copytree(whole / "cache", place / "cache")
    damage = mutate.folder(draw, place / "cache" / "shards", keep=(".rank_0.lock",))
    loaded = load_recipe(whole / "recipe.yaml")
    samples = stage_samples(loaded, loaded.stages["only"])
    expected, cache = TeacherCache(whole / "cache"), TeacherCache(place / "cache")
    for sample in samples:
        one, other = (store.entry(content_key(sample), KINDS) for store in (expected, cache))
        if other is None:
            continue  # a shard that is gone: `check` says so before training
        if not torch.equal(one.signal["hidden"], other.signal["hidden"]) or not torch.equal(one.tokens, other.tokens):
            raise Wrong(f"other values were read without a word: {damage}")
    return damage


def _checkpoints(draw: random.Random, whole: Path, place: Path) -> str:
    from fuzz import Wrong

    shutil.copytree(whole / "stage", place / "stage")
    newest = place / "stage" / "checkpoint-4"
    before = {path: path.read_bytes() for path in newest.rglob("*") if path.is_file()}
    damage = mutate.folder(draw, newest)
    same = all(path.is_file() and path.read_bytes() == content for path, content in before.items())
    found = last_checkpoint(place / "stage")
    if found is None or (Path(found) == newest) != same:
        raise Wrong(f"goes on from {found}: {damage}")
    return damage


TARGETS = {
    "recipes": _recipes, "overrides": _overrides, "cards": _cards, "annotations": _annotations, "pictures": _pictures,
    "archives": _archives, "models": _models, "runs": _runs, "resumes": _resumes, "caches": _caches, "checkpoints": _checkpoints,
}  # fmt: skip
