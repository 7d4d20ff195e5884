"""ScienceQA (Lu et al. 2022) and sets in its layout."""

from __future__ import annotations

import re
from functools import partial

from mmkd.data.annotations import Row, load_object
from mmkd.data.formats import Format
from mmkd.data.reading import choice_index, choices_of
from mmkd.data.samples import Question
from mmkd.data.source import Source
from mmkd.errors import DataError
from mmkd.registry import register


@register("formats", "scienceqa")
class ScienceQA(Format):
    """ScienceQA: problems.json, pid_splits.json, and pictures in {split}/{pid}/."""

    files = {"annotations": "problems.json", "splits": "pid_splits.json"}
    images = {"images": ("images/{split}/{pid}/{image}", "{split}/{pid}/{image}")}

    def read(self, source: Source) -> list[Question]:
        path = source.path("annotations")
        problems = load_object(path)
        pids = _pids(source, problems)
        rows = [partial(Row, problems[pid], f"{path} problem {pid!r}", None, n) for n, pid in enumerate(pids)]
        return source.made(rows, lambda row: _question(source, pids[row.number], row))


def _pids(source: Source, problems: dict) -> list[str]:
    path = source.path("splits")
    splits = Row(load_object(path), str(path))
    if source.split not in splits.value:
        raise DataError(f"{path} has no split {source.split!r}; there are {', '.join(splits.value)}")
    pids = splits.texts(source.split)
    unknown = next((pid for pid in pids if pid not in problems), None)
    if unknown is not None:
        problems_path = source.path("annotations")
        raise DataError(f"{path} split {source.split!r} names problem {unknown!r}, which {problems_path} does not hold")
    return pids


def _question(source: Source, pid: str, row: Row) -> Question:
    choices = choices_of(row)
    answer = choice_index(row, "answer", len(choices))
    answers = [answer]
    if row.has("answers"):  # of several people, an addition to the official files
        answers = row.list_of("answers", int, "whole numbers")
        outside = [index for index in answers if not 0 <= index < len(choices)]
        if outside:
            raise DataError(f"{row.where}: 'answers' holds {outside[0]}, there are {len(choices)} choices")
    chosen = source.choose(pid, answer, answers)
    name = row.text("image", default="")
    # A part such as minival has its pictures under the split of the problem.
    fields = {"pid": pid, "image": name, "split": row.text("split", default=source.split)}
    return Question(
        id=pid,
        question=row.text("question"),
        images=(source.image(where=row.where, **fields),) if name else (),
        answer=choices[chosen],
        references=(choices[answer],),
        choices=tuple(choices),
        answer_index=chosen,
        hint=row.text("hint", default=""),
        categories=_categories(row),
        told={key: text for key in ("lecture", "solution") if (text := row.text(key, default=""))},
    )


def _categories(row: Row) -> dict[str, str]:
    """The groups of the official table (subject, context, grades), besides grade, topic and category."""
    has_hint, has_image = bool(row.text("hint", default="")), bool(row.text("image", default=""))
    named = {key: row.text(key, default="") for key in ("subject", "grade", "topic", "category")}
    grade = re.fullmatch(r"grade(\d+)", named["grade"])
    if grade:
        named["grades"] = "1-6" if int(grade[1]) <= 6 else "7-12"
    named["text_context"] = "yes" if has_hint else "no"
    named["image_context"] = "yes" if has_image else "no"
    named["no_context"] = "no" if has_hint or has_image else "yes"
    return {key: value for key, value in named.items() if value}
