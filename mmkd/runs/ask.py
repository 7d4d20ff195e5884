"""Asks models a question about pictures of the user's own, as `mmkd evaluate` asks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkd.base.run_folder import RECIPE
from mmkd.base.yaml_files import read_mapping
from mmkd.data.prompts import STYLES, render
from mmkd.data.samples import ImageRef, Question, Sample
from mmkd.errors import DataError, did_you_mean, one_line
from mmkd.evaluation.benchmarks import load_benchmark
from mmkd.evaluation.roles import ordered
from mmkd.towers.loading import device_of_process, dtype_of, to_device
from mmkd.towers.reading import AS_SAVED, Reading
from mmkd.towers.tower import Tower

NEW_TOKENS = 128  # of an answer, at most
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm")


@dataclass(frozen=True)
class Asking:
    """How questions are put. style: a prompt style.  like: a benchmark whose prompt and length of answers are taken instead."""

    style: str = "plain"
    like: str | None = None
    max_new_tokens: int | None = None

    def sample(self, pictures: Sequence[Path], text: str) -> Sample:
        """The question as a model is asked it. Raises DataError."""
        question = Question("asked", text, tuple(picture_of(path) for path in pictures))
        if self.like is not None:
            return load_benchmark(self.like).render(question)
        if self.style not in STYLES:
            raise DataError(f"there is no prompt style {self.style!r}; {did_you_mean(self.style, STYLES)}")
        return render(question, self.style, with_answer=False)

    @property
    def length(self) -> int:
        """New tokens, at most."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return NEW_TOKENS if self.like is None else load_benchmark(self.like).max_new_tokens


def answers(towers: Mapping[str, Tower], sample: Sample, max_new_tokens: int) -> Iterator[tuple[str, str]]:
    """(name, answer) of each model, as soon as it is known. Raises TowerError, SampleError, ImageError."""
    for name, tower in towers.items():
        yield name, tower.answer([sample], max_new_tokens=max_new_tokens)[0]


def sort_words(words: Sequence[str]) -> tuple[list[str], list[Path], str | None]:
    """The words of a command line as (models, pictures, question): files and names of pictures tell where models end.

    Without a picture the last word is the question if it has a space. Raises DataError.
    """
    places = [n for n, word in enumerate(words) if looks_like_picture(word)]
    if not places:
        has_question = len(words) > 1 and " " in words[-1].strip()
        return list(words[: len(words) - has_question]), [], words[-1] if has_question else None
    models, pictures, rest = words[: places[0]], words[places[0] : places[-1] + 1], words[places[-1] + 1 :]
    if not models:
        raise DataError(f"no model stands before the picture {pictures[0]}; give its folder or hub id first")
    strange = [word for n, word in enumerate(words) if places[0] < n < places[-1] and n not in places]
    if strange or len(rest) > 1:
        raise DataError(f"{(strange or rest)[0]!r}: give models, then pictures, then one question in quotes")
    return list(models), [Path(word) for word in pictures], rest[0] if rest else None


def looks_like_picture(word: str) -> bool:
    """Whether a word names a picture: by its ending, or a file that is there."""
    return word.lower().endswith(SUFFIXES) or (len(word) < 4096 and Path(word).is_file())


def picture_of(path: Path) -> ImageRef:
    """A picture by its path. Raises DataError where there is none, ImageError where it does not decode."""
    if "://" in str(path) or str(path).startswith(("http:/", "https:/")):
        raise DataError(f"{path} is a web address; save the picture first and give its file")
    if not path.expanduser().is_file():
        raise DataError(f"there is no picture {path} here (in {Path.cwd()})")
    real = path.expanduser().resolve()
    found = ImageRef.inside(real.parent, real.name)
    found.load()
    return found


def load_models(names: Sequence[str], reading: Reading = AS_SAVED, **options: Any) -> dict[str, Tower]:
    """Models by folder, hub id or run (its teacher, controls and student). Raises DataError, TowerError.

    options: `dtype`, `quantise`, `trust_remote_code`, `attn_implementation` of `Tower.load`.
    """
    wanted: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in names:
        for role, source, own in _of_run(Path(name)) or [(name, name, {})]:
            label = role if role not in wanted else f"{name}: {role}"
            wanted[label] = (source, options | {"reading": reading} | own)
    towers = {}
    for label, (source, chosen) in wanted.items():
        chosen["dtype"] = dtype_of(chosen.get("dtype") or "auto")
        towers[label] = to_device(Tower.load(source, device=device_of_process(), **chosen))
    return towers


def _of_run(folder: Path) -> list[tuple[str, str, dict[str, Any]]]:
    """(role, model, options) of what a run's folder holds; [] for any other folder."""
    if (folder / "config.json").exists() or not (folder / RECIPE).exists():
        return []
    recipe = read_mapping(folder / RECIPE, "run's recipe")
    trained = ordered(path.parent.name for path in folder.glob("*/config.json"))
    if not trained:
        raise DataError(f"the run in {folder} has trained no model yet; the same `mmkd distill` goes on with it")
    found = [(role, str(folder / role), {"dtype": "auto"}) for role in trained]
    spec = recipe.get("teacher") or {}
    if spec.get("model") and not spec.get("served"):
        keys = ("processor", "chat_template", "template", "thinking")
        reading = Reading(**{key: spec[key] for key in keys if spec.get(key) is not None})
        own = {key: spec[key] for key in ("dtype", "quantise", "trust_remote_code", "attn_implementation") if spec.get(key)}
        found.insert(0, ("teacher", spec["model"], own | {"reading": reading}))
    return found


def lines_of(name: str, answer: str, width: int) -> str:
    """An answer for the terminal; of a single model (width 0) without its name."""
    text = answer or "(an empty answer)"
    return text if not width else f"{one_line(name, width):<{width}}  " + text.replace("\n", "\n" + " " * (width + 2))
