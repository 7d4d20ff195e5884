"""Reads benchmarks in the layout in which their authors publish them.

A format has default file names below the benchmark's folder; a card's `files` gives others. `{split}` in a name
stands for the split, `{id}` in `image_name` for COCO's number of a picture with its twelve digits. "images" is a
folder or a zip archive. Files are read whole, pictures only when they are asked for. Whatever is wrong with a file
is a DataError that names file, row and key.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from string import ascii_uppercase
from typing import Any

from mmkd.data.annotations import Row, as_list, load, load_object, one_line, read_text, rows, shown
from mmkd.data.formats import refuse_duplicates
from mmkd.data.samples import ImageRef, Question
from mmkd.data.tables import parquet_rows, tsv_rows
from mmkd.errors import DataError
from mmkd.evaluation.chair import NO_OBJECT, coco_object, mentions

LETTERS = ascii_uppercase


@dataclass(frozen=True)
class Source:
    """Where one benchmark's split lies."""

    root: Path
    split: str
    files: dict[str, str]

    def name(self, key: str) -> str:
        return self.files[key].replace("{split}", self.split)

    def path(self, key: str) -> Path:
        """The file or folder of a key. Raises DataError where there is none."""
        path = self.root / self.name(key)
        if not path.exists():
            raise DataError(f"there is no {path}; get it, or name it by files['{key}'] in a card of your own")
        return path

    def entries(self, key: str, inner: str = "") -> list[Row]:
        """The rows of a file: of its list, of its JSON lines, or of the list `inner` of its object."""
        path = self.path(key)
        if not inner:
            return list(rows(path))
        value = Row(load(path), str(path)).get(inner)
        return [Row(v, f"{path} {inner} {n}") for n, v in enumerate(as_list(path, value, f" as {inner!r}"))]

    def image(self, row: Row, name: str, key: str = "images") -> ImageRef:
        try:
            return ImageRef.inside(self.root / self.name(key), name)
        except DataError as error:
            raise DataError(f"{row.where}: {error}") from error

    def coco(self, row: Row) -> ImageRef:
        """COCO's picture of the row's `image_id`."""
        number = row.integer("image_id")
        return self.image(row, self.name("image_name").replace("{id}", f"{number:012d}"))


def read_official(format: str, root: Path, split: str, files: dict[str, str] | None = None) -> list[Question]:
    """The questions of one split in the order of the files.

    Raises DataError for an unknown format or key of `files`, for a split without questions, for ids given twice, and
    for whatever is wrong with the files.
    """
    if format not in FORMATS:
        raise DataError(f"there is no format {format!r}; known: {', '.join(FORMATS)}")
    defaults, reader = FORMATS[format]
    unknown = sorted(set(files or {}) - set(defaults))
    if unknown:
        raise DataError(f"files has the unknown key {unknown[0]!r}; format {format!r} knows {', '.join(defaults)}")
    source = Source(root, split, defaults | (files or {}))
    questions = reader(source)
    if not questions:
        raise DataError(f"split {split!r} of {root} holds no questions")
    refuse_duplicates(questions, f"split {split!r} of {root}")
    return questions


def _answer_texts(row: Row, key: str = "answers") -> tuple[str, ...]:
    """The texts of a list of {"answer": text}, in order; () where the key is missing, as in test splits."""
    if not row.has(key):
        return ()
    entries = row.list_of(key, dict, "objects")
    return tuple(Row(v, f"{row.where} {key} {n}").text("answer") for n, v in enumerate(entries))


def _choice_question(row: Row, name: str, choices: list[str], answer: int | None, **fields: Any) -> Question:
    """A multiple-choice question; `answer` is None in a split without answers."""
    if not 2 <= len(choices) <= len(LETTERS):
        raise DataError(f"{row.where}: {len(choices)} choices; 2 to {len(LETTERS)} are expected")
    if answer is not None and not 0 <= answer < len(choices):
        raise DataError(f"{row.where}: the answer is choice {answer} (counted from 0) of {len(choices)}")
    given = (choices[answer],) if answer is not None else ()
    return Question(
        id=name, answer="".join(given), references=given, choices=tuple(choices), answer_index=answer, **fields
    )


def _free_question(name: str, references: tuple[str, ...], **fields: Any) -> Question:
    return Question(id=name, answer=references[0] if references else "", references=references, **fields)


def _letter_index(row: Row, key: str) -> int:
    letter = row.text(key).strip()
    if len(letter) != 1 or letter not in LETTERS:
        raise row.wrong(key, "a capital letter")
    return LETTERS.index(letter)


# ---- VQA v2, OK-VQA, GQA, VizWiz --------------------------------------------------------------------------------------


def _read_vqa(source: Source) -> list[Question]:
    """VQA's pair of files: {"questions": [...]} and, but for test splits, {"annotations": [...]}."""
    answers: dict[str, Row] = {}
    if source.files["annotations"]:
        for row in source.entries("annotations", "annotations"):
            answers[row.identifier("question_id")] = row
    return [_vqa_question(source, row, answers) for row in source.entries("questions", "questions")]


def _vqa_question(source: Source, row: Row, answers: dict[str, Row]) -> Question:
    name = row.identifier("question_id")
    if answers and name not in answers:
        raise DataError(f"{row.where}: question {name} has no row in {source.name('annotations')}")
    found = answers.get(name)
    categories = {key: found.text(key) for key in ("answer_type", "question_type") if found and found.has(key)}
    return _free_question(
        name,
        _answer_texts(found) if found else (),
        question=row.text("question"),
        images=(source.coco(row),),
        categories=categories,
    )


def _read_gqa(source: Source) -> list[Question]:
    path = source.path("questions")
    return [_gqa_question(source, name, Row(v, f"{path} {shown(name)}")) for name, v in load_object(path).items()]


def _gqa_question(source: Source, name: str, row: Row) -> Question:
    types = Row(row.get("types"), f"{row.where} types") if row.has("types") else None
    return _free_question(
        name,
        (row.text("answer"),) if row.has("answer") else (),
        question=row.text("question"),
        images=(source.image(row, f"{row.identifier('imageId')}.jpg"),),
        categories={key: types.text(key) for key in ("structural", "semantic") if types and types.has(key)},
    )


def _read_vizwiz(source: Source) -> list[Question]:
    questions = []
    for row in source.entries("annotations"):
        image = row.text("image")
        categories = {"answer_type": row.text("answer_type")} if row.has("answer_type") else {}
        fields = {"question": row.text("question"), "images": (source.image(row, image),), "categories": categories}
        questions.append(_free_question(image, _answer_texts(row), **fields))
    return questions


# ---- A-OKVQA, ST-VQA, DocVQA, ChartQA, OCR-VQA -------------------------------------------------------------------------


def _read_aokvqa(source: Source) -> list[Question]:
    return [_aokvqa_choice(source, row) for row in source.entries("annotations")]


def _aokvqa_choice(source: Source, row: Row) -> Question:
    answer = row.integer("correct_choice_idx") if row.has("correct_choice_idx") else None
    fields = {"question": row.text("question"), "images": (source.coco(row),)}
    return _choice_question(row, row.identifier("question_id"), row.texts("choices"), answer, **fields)


def _read_aokvqa_direct(source: Source) -> list[Question]:
    """The questions for direct answers: those marked as too difficult for one are left out, as officially."""
    kept = [row for row in source.entries("annotations") if not _is_difficult(row)]
    return [
        _free_question(
            row.identifier("question_id"),
            tuple(row.texts("direct_answers")) if row.has("direct_answers") else (),
            question=row.text("question"),
            images=(source.coco(row),),
        )
        for row in kept
    ]


def _is_difficult(row: Row) -> bool:
    value = row.value.get("difficult_direct_answer", False)
    if not isinstance(value, bool):
        raise row.wrong("difficult_direct_answer", "true or false")
    return value


def _read_document(source: Source, name: str, image: str, category: str) -> list[Question]:
    """The layout of the Robust Reading Competition: {"data": [...]}, `name` and `image` being its keys."""
    questions = []
    for row in source.entries("annotations", "data"):
        groups = row.texts(category) if category and row.has(category) else []
        questions.append(
            _free_question(
                row.identifier(name),
                tuple(row.texts("answers")) if row.has("answers") else (),
                question=row.text("question"),
                images=(source.image(row, row.text(image)),),
                categories={"kind": groups[0]} if groups else {},
            )
        )
    return questions


def _read_docvqa(source: Source) -> list[Question]:
    return _read_document(source, "questionId", "image", "question_types")


def _read_stvqa(source: Source) -> list[Question]:
    return _read_document(source, "question_id", "file_path", "")


def _read_chartqa(source: Source) -> list[Question]:
    questions = []
    for part in ("human", "augmented"):
        for number, row in enumerate(source.entries(part)):
            fields = {"question": row.text("query"), "images": (source.image(row, row.text("imgname")),)}
            name = f"{part}-{number}"
            questions.append(_free_question(name, (row.text("label"),), categories={"part": part}, **fields))
    return questions


_OCRVQA_SPLITS = {"train": 1, "val": 2, "test": 3}


def _read_ocrvqa(source: Source) -> list[Question]:
    if source.split not in _OCRVQA_SPLITS:
        raise DataError(f"OCR-VQA has no split {source.split!r}; there are {', '.join(_OCRVQA_SPLITS)}")
    path = source.path("annotations")
    books = [(name, Row(value, f"{path} {shown(name)}")) for name, value in load_object(path).items()]
    wanted = _OCRVQA_SPLITS[source.split]
    return [q for name, row in books if row.integer("split") == wanted for q in _book(source, name, row)]


def _book(source: Source, name: str, row: Row) -> Iterator[Question]:
    questions, answers = row.texts("questions"), row.texts("answers")
    if len(questions) != len(answers):
        raise DataError(f"{row.where}: {len(questions)} questions and {len(answers)} answers")
    # The authors' download script names a picture by its id and the ending of its address.
    image = source.image(row, name + PurePosixPath(row.text("imageURL")).suffix)
    genre = {"genre": row.text("genre")} if row.has("genre") else {}
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        yield _free_question(f"{name}-{number}", (answer,), question=question, images=(image,), categories=genre)


# ---- AI2D, SEED-Bench, MMBench, MMMU ------------------------------------------------------------------------------------


def _read_ai2d(source: Source) -> list[Question]:
    folder, ids = source.path("questions"), source.path("ids")
    names = [line.strip() for line in read_text(ids).split("\n") if line.strip()]
    wrong = next((name for name in names if not name.isdecimal()), None)
    if wrong is not None:
        raise DataError(f"{ids}: {shown(wrong)} is no number of a picture")
    return [q for name in names if (folder / f"{name}.png.json").exists() for q in _diagram(source, folder, name)]


def _diagram(source: Source, folder: Path, name: str) -> Iterator[Question]:
    path = folder / f"{name}.png.json"
    asked = Row(Row(load(path), str(path)).get("questions"), f"{path} questions")
    for text in asked.value:
        row = Row(asked.value[text], f"{path} {shown(text)}")
        # Where a question is about labels, they are replaced by letters in a picture of their own.
        lettered = row.value.get("abcLabel") is True
        image = source.image(row, f"{name}.png", "abc_images" if lettered else "images")
        fields = {"question": text, "images": (image,), "categories": {"labels": "letters" if lettered else "text"}}
        answer = row.integer("correctAnswer")
        yield _choice_question(row, row.identifier("questionId"), row.texts("answerTexts"), answer, **fields)


def _read_seed(source: Source) -> list[Question]:
    """SEED-Bench's questions on single images; those on videos are left out."""
    path = source.path("annotations")
    content = Row(load(path), str(path))
    types = Row(content.get("question_type"), f"{path} question_type") if content.has("question_type") else None
    names = {str(number): name for name, number in types.value.items()} if types else {}
    return [
        _seed_question(source, row, names)
        for row in source.entries("annotations", "questions")
        if row.text("data_type") == "image"
    ]


def _seed_question(source: Source, row: Row, names: dict[str, str]) -> Question:
    choices = [row.text(f"choice_{letter}") for letter in "abcd"]
    kind_id = row.identifier("question_type_id") if row.has("question_type_id") else ""
    fields = {
        "question": row.text("question"),
        "images": (source.image(row, row.text("data_id")),),
        "categories": {"kind": names.get(kind_id, kind_id)} if kind_id else {},
    }
    return _choice_question(row, row.identifier("question_id"), choices, _letter_index(row, "answer"), **fields)


MMBENCH_CIRCLE = 1_000_000  # rotations of question n have the indices n + k * this
_SHORTEST_PICTURE = 64  # shorter cells of MMBench's picture column are the index of the row that holds it


def _read_mmbench(source: Source) -> list[Question]:
    path = source.path("annotations")
    table = _table(path)
    place = _picture_rows(table, path)
    return [_mmbench_question(path, Row(row, f"{path} row {n}"), place[n]) for n, row in enumerate(table)]


def _table(path: Path) -> tuple[dict[str, Any], ...]:
    reader = tsv_rows if path.suffix == ".tsv" else parquet_rows
    try:
        return reader(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not in UTF-8 (byte {error.start}); convert it to UTF-8") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}; is the download complete?") from error


def _picture_rows(table: tuple[dict[str, str], ...], path: Path) -> list[int]:
    """The row whose cell holds each row's picture: the first with the same content, so that it is seen once."""
    first: dict[str, int] = {}
    by_index = {row.get("index", ""): number for number, row in enumerate(table)}
    found = []
    for number, row in enumerate(table):
        cell = row.get("image", "")
        if not cell or (len(cell) <= _SHORTEST_PICTURE and cell not in by_index):
            raise DataError(f"{path} row {number}: column 'image' is {shown(cell)}, neither base64 nor another row's index")
        other = by_index[cell] if len(cell) <= _SHORTEST_PICTURE else number
        found.append(first.setdefault(table[other].get("image", ""), other))
    return found


def _mmbench_question(path: Path, row: Row, picture: int) -> Question:
    index = row.text("index")
    if not index.isdecimal():
        raise row.wrong("index", "a whole number")
    choices = []
    for letter in "ABCD":
        if _is_none(row.text(letter, default="")):
            break
        choices.append(row.text(letter))
    hint = row.text("hint", default="")
    categories = {key: row.text(key) for key in ("category", "l2-category") if not _is_none(row.text(key, default=""))}
    return _choice_question(
        row,
        index,
        choices,
        _letter_index(row, "answer") if not _is_none(row.text("answer", default="")) else None,
        question=row.text("question") if _is_none(hint) else f"{hint}\n{row.text('question')}",
        images=(ImageRef(path, f"{picture}/image"),),
        categories=categories | {"circle": str(int(index) % MMBENCH_CIRCLE)},
    )


def _is_none(text: str) -> bool:
    """An empty cell, or what pandas writes for one."""
    return text.strip().lower() in ("", "nan", "none")


def _read_mmmu(source: Source) -> list[Question]:
    paths = sorted(source.root.glob(source.name("annotations")))
    if not paths:
        raise DataError(f"{source.root} has no file {source.name('annotations')}; name it by files['annotations']")
    return [_mmmu_question(path, row, n) for path in paths for n, row in enumerate(_table(path))]


def _mmmu_question(path: Path, values: dict[str, Any], number: int) -> Question:
    row = Row(values, f"{path} row {number}")
    question, choices = row.text("question"), _literal_list(row, "options")
    there = [n for n in range(1, 8) if row.has(f"image_{n}")]
    named = {int(n) for n in re.findall(r"<image (\d)>", " ".join([question, *choices]))}
    images = tuple(ImageRef(path, f"{number}/image_{n}") for n in there if n in named or not named)
    fields = {"question": question, "images": images, "categories": {"subject": path.parent.name}}
    if row.text("question_type") == "multiple-choice":
        hidden = row.text("answer") == "?"  # the test split
        answer = None if hidden else _letter_index(row, "answer")
        return _choice_question(row, row.text("id"), choices, answer, **fields)
    answer = row.text("answer")
    several = answer.startswith("[")
    return _free_question(row.text("id"), tuple(_literal_list(row, "answer")) if several else (answer,), **fields)


def _literal_list(row: Row, key: str) -> list[str]:
    """A list of strings, written as Python writes it."""
    try:
        value = ast.literal_eval(row.text(key))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise row.wrong(key, "a list in Python's notation") from error
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise row.wrong(key, "a list of strings in Python's notation")
    return value


# ---- MME ---------------------------------------------------------------------------------------------------------------

MME_TASKS = {
    "perception": (
        "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
    ),
    "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}  # fmt: skip
_MME_PICTURES = (".jpg", ".png", ".jpeg")
_MME_REMARK = "Please answer yes or no."  # LLaVA asks for a single word or phrase instead


def _read_mme(source: Source) -> list[Question]:
    if not any((source.root / task).is_dir() for tasks in MME_TASKS.values() for task in tasks):
        raise DataError(f"{source.root} has none of MME's folders, such as {MME_TASKS['perception'][0]}")
    parts = MME_TASKS if source.split == "all" else {source.split: MME_TASKS.get(source.split, ())}
    if not any(parts.values()):
        raise DataError(f"MME has no split {source.split!r}; there are all, {', '.join(MME_TASKS)}")
    return [q for part, tasks in parts.items() for task in tasks for q in _mme_task(source, part, task)]


def _mme_task(source: Source, part: str, task: str) -> list[Question]:
    """One task's questions; some tasks keep pictures and questions in folders of their own."""
    folder = source.root / task
    texts = folder / "questions_answers_YN" if (folder / "questions_answers_YN").is_dir() else folder
    pictures = folder / "images" if (folder / "images").is_dir() else folder
    if not folder.is_dir():
        raise DataError(f"there is no {folder}; is the download complete?")
    names = {path.stem: path.name for path in sorted(pictures.iterdir()) if path.suffix.lower() in _MME_PICTURES}
    questions = []
    for path in sorted(texts.glob("*.txt")):
        image = ImageRef.inside(pictures, names.get(path.stem, f"{path.stem}.jpg"))
        questions += _mme_pair(path, image, {"part": part, "task": task})
    return questions


def _mme_pair(path: Path, image: ImageRef, categories: dict[str, str]) -> list[Question]:
    lines = [line for line in read_text(path).split("\n") if line.strip()]
    pairs = [line.split("\t") for line in lines]
    if len(pairs) != 2 or any(len(pair) != 2 or pair[1].strip().lower() not in ("yes", "no") for pair in pairs):
        raise DataError(f"{path}: two lines of question, tab, Yes or No are expected, got {shown(lines[:2])}")
    task = categories["task"]
    return [
        _free_question(
            f"{task}/{path.stem}#{number}",
            (answer.strip().lower(),),
            question=question.replace(_MME_REMARK, "").strip(),
            images=(image,),
            categories=categories,
        )
        for number, (question, answer) in enumerate(pairs)
    ]


# ---- POPE --------------------------------------------------------------------------------------------------------------

POPE_SAMPLINGS = ("random", "popular", "adversarial")


def _read_pope(source: Source) -> list[Question]:
    """The questions of one sampling of absent objects, or of all three with split "all"."""
    if source.split not in (*POPE_SAMPLINGS, "all"):
        raise DataError(f"POPE has no split {source.split!r}; there are {', '.join(POPE_SAMPLINGS)}, all")
    wanted = POPE_SAMPLINGS if source.split == "all" else (source.split,)
    return [question for sampling in wanted for question in _pope_sampling(replace(source, split=sampling))]


def _pope_sampling(source: Source) -> Iterator[Question]:
    for row in source.entries("annotations"):
        label = row.text("label").strip().lower()
        if label not in ("yes", "no"):
            raise row.wrong("label", "'yes' or 'no'")
        yield _free_question(
            f"{source.split}-{row.identifier('question_id')}",
            (label,),
            question=row.text("text"),
            images=(source.image(row, row.text("image")),),
            categories={"sampling": source.split},
        )


# ---- CHAIR on COCO's objects -----------------------------------------------------------------------------------------------


def _read_chair(source: Source) -> list[Question]:
    """A description of every picture of COCO's split, or of those in a file of {image_id, question}.

    The references are the objects in the picture: those that are outlined and those that its captions name.
    """
    there = _coco_objects(source)
    question = source.files["question"]
    if not source.files["questions"]:
        return [_description(source, Row({"image_id": n}, f"picture {n}"), question, there) for n in there]
    return [_description(source, row, row.text("question"), there) for row in source.entries("questions")]


def _coco_objects(source: Source) -> dict[int, set[str]]:
    """COCO's objects in each picture of the split."""
    kinds = {row.integer("id"): coco_object(row.text("name")) for row in source.entries("instances", "categories")}
    there = {row.integer("id"): set() for row in source.entries("instances", "images")}
    for row in source.entries("instances", "annotations"):
        if row.integer("category_id") not in kinds:
            raise row.wrong("category_id", "the id of a category of the file")
        _objects_of(there, row).add(kinds[row.integer("category_id")])
    for row in source.entries("captions", "annotations"):
        _objects_of(there, row).update(mentions(row.text("caption")))
    return there


def _objects_of(there: dict[int, set[str]], row: Row) -> set[str]:
    if row.integer("image_id") not in there:
        raise row.wrong("image_id", "the id of a picture of the split")
    return there[row.integer("image_id")]


def _description(source: Source, row: Row, question: str, there: dict[int, set[str]]) -> Question:
    references = tuple(sorted(_objects_of(there, row))) or (NO_OBJECT,)
    return _free_question(row.identifier("image_id"), references, question=question, images=(source.coco(row),))


# ---- MATH-Vision -------------------------------------------------------------------------------------------------------

_BOXED = (
    'Please solve the problem and put your answer in one "\\boxed{}". '
    'If it is a multiple choice question, only one letter is allowed in the "\\boxed{}".'
)


def _read_math_vision(source: Source) -> list[Question]:
    """Free answers, and letters of options: right is the letter or the option's own words."""
    return [_math_question(source, row) for row in source.entries("annotations")]


def _math_question(source: Source, row: Row) -> Question:
    options, answer = row.texts("options"), row.text("answer")
    references = (answer,)
    if options:
        index = _letter_index(row, "answer")
        if index >= len(options):
            raise DataError(f"{row.where}: the answer is {answer}, there are {len(options)} options")
        references = (answer, options[index])
    lines = [_BOXED, re.sub(r"\s*<image\d>", "", row.text("question"))]
    lines += [f"({LETTERS[place]}) {option}" for place, option in enumerate(options)]
    return _free_question(
        row.identifier("id"),
        references,
        question="\n".join(lines),
        images=(source.image(row, row.text("image")),),
        categories={key: row.identifier(key) for key in ("subject", "level") if row.has(key)},
    )


# ---- the formats ---------------------------------------------------------------------------------------------------------


_COCO = {"images": "{split}", "image_name": "COCO_{split}_{id}.jpg"}

# format -> (default files, reader)
FORMATS: dict[str, tuple[dict[str, str], Callable[[Source], list[Question]]]] = {
    "vqa": (
        _COCO
        | {
            "questions": "v2_OpenEnded_mscoco_{split}_questions.json",
            "annotations": "v2_mscoco_{split}_annotations.json",
        },
        _read_vqa,
    ),
    "gqa": ({"questions": "{split}_questions.json", "images": "images"}, _read_gqa),
    "vizwiz": ({"annotations": "{split}.json", "images": "{split}"}, _read_vizwiz),
    "aokvqa": (
        {"annotations": "aokvqa_v1p0_{split}.json", "images": "{split}2017", "image_name": "{id}.jpg"},
        _read_aokvqa,
    ),
    "aokvqa_direct": (
        {"annotations": "aokvqa_v1p0_{split}.json", "images": "{split}2017", "image_name": "{id}.jpg"},
        _read_aokvqa_direct,
    ),
    "stvqa": ({"annotations": "{split}_task_3.json", "images": "."}, _read_stvqa),
    "docvqa": ({"annotations": "{split}_v1.0_withQT.json", "images": "."}, _read_docvqa),
    "chartqa": (
        {
            "human": "{split}/{split}_human.json",
            "augmented": "{split}/{split}_augmented.json",
            "images": "{split}/png",
        },
        _read_chartqa,
    ),
    "ocrvqa": ({"annotations": "dataset.json", "images": "images"}, _read_ocrvqa),
    "ai2d": (
        {
            "questions": "ai2d/questions",
            "ids": "ai2d_{split}_ids.csv",
            "images": "ai2d/images",
            "abc_images": "ai2d/abcImages",
        },
        _read_ai2d,
    ),
    "seed": ({"annotations": "SEED-Bench.json", "images": "SEED-Bench-image"}, _read_seed),
    "mmbench": ({"annotations": "mmbench_{split}.tsv"}, _read_mmbench),
    "mmmu": ({"annotations": "*/{split}-*.parquet"}, _read_mmmu),
    "mme": ({}, _read_mme),
    "pope": ({"annotations": "coco_pope_{split}.json", "images": "val2014"}, _read_pope),
    "math_vision": ({"annotations": "{split}.jsonl", "images": "."}, _read_math_vision),
    "chair": (
        _COCO
        | {
            "instances": "annotations/instances_{split}.json",
            "captions": "annotations/captions_{split}.json",
            "questions": "",
            "question": "Please describe this image in detail.",
        },
        _read_chair,
    ),
}
