"""MME (Fu et al. 2023): perception and cognition."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mmkd.data.annotations import read_text, shown
from mmkd.data.formats import Format
from mmkd.data.reading import free_question
from mmkd.data.samples import ImageRef, Question
from mmkd.data.source import Source
from mmkd.errors import DataError
from mmkd.registry import register

TASKS = {
    "perception": (
        "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
    ),
    "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}  # fmt: skip
_PICTURES = (".jpg", ".png", ".jpeg")
_REMARK = "Please answer yes or no."  # LLaVA asks for a single word or phrase instead


@register("formats", "mme")
class MME(Format):
    """MME: a folder a task, with a text file of two questions for each picture; splits all, perception, cognition."""

    def read(self, source: Source) -> list[Question]:
        return [
            question
            for part, task in _tasks(source)
            for question in _questions(source.root / task, {"part": part, "task": task})
        ]

    def paths(self, source: Source) -> list[Path]:
        return [path for _, task in _tasks(source) for path in _texts(source.root / task)]


def _tasks(source: Source) -> Iterator[tuple[str, str]]:
    """(part, task) of the split."""
    if not any((source.root / task).is_dir() for tasks in TASKS.values() for task in tasks):
        raise DataError(f"{source.root} has none of MME's folders, such as {TASKS['perception'][0]}")
    parts = TASKS if source.split == "all" else {source.split: TASKS.get(source.split, ())}
    if not any(parts.values()):
        raise DataError(f"MME has no split {source.split!r}; there are all, {', '.join(TASKS)}")
    return ((part, task) for part, tasks in parts.items() for task in tasks)


def _texts(folder: Path) -> list[Path]:
    """One task's files of questions; some tasks keep questions and pictures in folders of their own."""
    if not folder.is_dir():
        raise DataError(f"there is no {folder}; is the download complete?")
    apart = folder / "questions_answers_YN"
    return sorted((apart if apart.is_dir() else folder).glob("*.txt"))


def _questions(folder: Path, categories: dict[str, str]) -> list[Question]:
    pictures = folder / "images" if (folder / "images").is_dir() else folder
    texts = _texts(folder)
    names = {path.stem: path.name for path in sorted(pictures.iterdir()) if path.suffix.lower() in _PICTURES}
    questions = []
    for path in texts:
        image = ImageRef.inside(pictures, names.get(path.stem, f"{path.stem}.jpg"))
        questions += _pair(path, image, categories)
    return questions


def _pair(path: Path, image: ImageRef, categories: dict[str, str]) -> list[Question]:
    lines = [line for line in read_text(path).split("\n") if line.strip()]
    pairs = [line.split("\t") for line in lines]
    if len(pairs) != 2 or any(len(pair) != 2 or pair[1].strip().lower() not in ("yes", "no") for pair in pairs):
        raise DataError(f"{path}: two lines of question, tab, Yes or No are expected, got {shown(lines[:2])}")
    task = categories["task"]
    return [
        free_question(
            f"{task}/{path.stem}#{number}",
            (answer.strip().lower(),),
            question=question.replace(_REMARK, "").strip(),
            images=(image,),
            categories=categories,
        )
        for number, (question, answer) in enumerate(pairs)
    ]
