"""Reads data sets in the formats that benchmarks and users have them in.

`read_questions` gives questions, `read_conversations` gives samples of many turns. Both read annotations
only: whether the pictures are there is asked by `check_images`, whether they decode shows when they are
loaded. Whatever is wrong with a file is a DataError that names the file, the row and the key.

Each format looks in its usual places; `files` names others:

    format      files["annotations"]                    files["images"]
    scienceqa   problems.json (and files["splits"]:     images/{split}/{pid}/{image} or
                pid_splits.json)                        {split}/{pid}/{image}
    textvqa     TextVQA_0.5.1_{split}.json              train_images/{image_id}.jpg, images/{split}/..., ...
                (and files["ocr"]: tokens, see there; files["shown"]: the embedded sample's captions)
    easy_vqa    {split}/questions.json or               {split}/images/{image_id}.png or
                {split}_questions.json                  {split}_images.zip/{image_id}.png
    jsonl       {split}.jsonl                           the folder or zip that the rows' names are in
    llava       {split}.json or {split}.jsonl           the folder or zip that the rows' names are in

Paths are relative to the data set's root. `{split}` stands for the split, other placeholders for fields of
a row. A part of a path that ends in .zip is an archive, the rest a name inside it. What a row names cannot
leave the folder or archive that stands in front of the pattern's first field of a row.
"""

from __future__ import annotations

import random
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from mmkd.data.annotations import Row as _Row
from mmkd.data.annotations import as_list as _list
from mmkd.data.annotations import kind as _kind
from mmkd.data.annotations import load as _load
from mmkd.data.annotations import load_object as _load_object
from mmkd.data.annotations import rows as _rows
from mmkd.data.annotations import shown
from mmkd.data.samples import IMAGE_MARKER, ImageRef, Question, Sample, Turn
from mmkd.data.scenes import things_of_caption
from mmkd.errors import DataError

TARGETS = ("first", "majority", "sampled")
MAX_CHOICES = 26  # one letter each

T = TypeVar("T")
# (question id, the answer the file gives first, all answers) -> the training target
_Choose = Callable[[str, Any, Sequence[Any]], Any]


def read_questions(
    format: str,
    root: Path,
    split: str,
    *,
    files: dict[str, str] | None = None,
    target: str = "first",
    limit: int | None = None,
    image_limit: int | None = None,
    seed: int = 0,
) -> list[Question]:
    """The questions of one split, in the order of the file.

    - `files`: where things are under `root`, where that differs from the format's usual places (see the
      module).
    - `target`: which of several answers is the training target: "first"; "majority", the most common, of
      equally common ones the earliest; "sampled", drawn by `seed` and the question's id. A ScienceQA problem
      has one answer; its target differs only where the file has the extra key `answers`. References do not
      depend on the target, but ScienceQA's `answer_index` does: evaluation reads with "first".
    - `image_limit`: keep a random subset of so many pictures with all their questions, and the questions
      without a picture. `limit`: then keep a random subset of so many questions. Both follow from `seed`, and
      a smaller subset is part of a larger one.

    Raises DataError for an unknown format, split, target or key of `files` and for malformed annotations.
    """
    if format == "llava":
        raise DataError("format 'llava' holds conversations, not questions; read it with read_conversations")
    if format not in _READERS:
        raise DataError(f"unknown format {format!r}; there are {', '.join(sorted(_READERS))}")
    known, reader = _READERS[format]
    source = _source(Path(root), split, files, known)
    questions = reader(source, _chooser(target, seed))
    if not questions:
        raise DataError(f"split {split!r} of {root} holds no questions")
    refuse_duplicates(questions, f"split {split!r} of {root}")
    return subset(questions, limit, image_limit, seed)


def read_conversations(
    root: Path,
    split: str,
    *,
    files: dict[str, str] | None = None,
    limit: int | None = None,
    image_limit: int | None = None,
    seed: int = 0,
) -> list[Sample]:
    """Conversations in LLaVA's JSON: a list of {id, image, conversations: [{from, value}, ...]}.

    `image` is a name, a list of names, or left out.
    The marker <image> says which turn shows a picture. It stands at the start or the end of the turn; the
    picture comes at the head, as in LLaVA. Turns alternate between human and gpt, after at most one of
    system, and end with gpt. The published mixtures repeat ids: later samples of an id get "#2", "#3" ...
    appended. `limit`, `image_limit` and `seed` are as in `read_questions`.

    Raises DataError for malformed annotations, for a marker in the middle of a text, and where the markers
    and the pictures differ in number.
    """
    source = _source(Path(root), split, files, ("annotations", "images"))
    path = source.annotations("{split}.json", "{split}.jsonl")
    rows = list(_rows(path))
    if not rows:
        raise DataError(f"{path} holds no conversations")
    samples = [Sample(name, refs, _conversation(row, len(refs))) for row, name, refs in named_rows(rows, source)]
    return subset(samples, limit, image_limit, seed)


def named_rows(rows: Sequence[_Row], source: _Source) -> Iterator[tuple[_Row, str, tuple[ImageRef, ...]]]:
    """Each row with its id, to which later rows of an id get "#2", "#3" ... appended, and its pictures."""
    images = source.image_folder(_first_names(rows))
    seen: Counter[str] = Counter()
    for number, row in enumerate(rows):
        name = row.identifier("id", default=f"{source.split}-{number}")
        seen[name] += 1
        unique = name if seen[name] == 1 else f"{name}#{seen[name]}"
        yield row, unique, tuple(images.ref(row.where, name=image) for image in _image_names(row))


def check_images(items: Iterable[Question | Sample], *, allowed_missing: int = 0) -> int:
    """The number of pictures that are not there; more than `allowed_missing` raise DataError.

    A picture counts once however many questions it has. Looks only for the file or the archive's member;
    nothing is decoded.
    """
    refs = {ref.key: ref for item in items for ref in item.images}
    missing = [key for key, ref in refs.items() if not _exists(ref)]
    if len(missing) > allowed_missing:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise DataError(
            f"{len(missing)} of {len(refs)} images are missing (allowed: {allowed_missing}): {names}; "
            "complete the download or correct the pattern of the images"
        )
    return len(missing)


# ------------------------------------------------------------------------------------------- targets, subsets


def _chooser(target: str, seed: int) -> _Choose:
    if target == "first":
        return lambda name, first, answers: first
    if target == "majority":
        # Counter keeps the order of appearance, so that the earlier of two equally common answers wins.
        return lambda name, first, answers: Counter(answers).most_common(1)[0][0] if answers else first
    if target == "sampled":
        return lambda name, first, answers: (
            random.Random(f"{seed} {name}").choice(answers) if answers else first
        )
    raise DataError(f"unknown target {target!r}; there are {', '.join(TARGETS)}")


def subset(items: list[T], limit: int | None, image_limit: int | None = None, seed: int = 0) -> list[T]:
    """A random part in the order of the file; arguments and errors as in `read_questions`."""
    for name, value in (("limit", limit), ("image_limit", image_limit)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise DataError(
                f"{name} is {value!r}; it must be a whole number of at least 1, or nothing for all"
            )
    if image_limit is not None:
        keys = list(dict.fromkeys(ref.key for item in items for ref in item.images))
        random.Random(f"images {seed}").shuffle(keys)
        kept = set(keys[:image_limit])
        items = [item for item in items if all(ref.key in kept for ref in item.images)]
    if limit is not None:
        order = list(range(len(items)))
        random.Random(f"questions {seed}").shuffle(order)
        items = [items[i] for i in sorted(order[:limit])]
    return items


def refuse_duplicates(questions: list[Question], where: str) -> None:
    """Raises DataError for two questions with one id; `where` they are from leads the message."""
    places: dict[str, int] = {}
    for place, question in enumerate(questions):
        first = places.setdefault(question.id, place)
        if first != place:
            raise DataError(
                f"{where}: questions {first} and {place} (counted from 0) have the same id {shown(question.id)}; "
                "ids must be unique"
            )


# ------------------------------------------------------------------------------------------------------ files


_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class _Images:
    """Where pictures are: names made from `tail` inside the folder or archive `base`."""

    base: Path
    tail: str

    def ref(self, where: str, **fields: str) -> ImageRef:
        name = _PLACEHOLDER.sub(lambda found: fields[found[1]], self.tail)
        try:
            return ImageRef.inside(self.base, name)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error


@lru_cache(maxsize=16)
def _members(archive: Path, changed: int) -> frozenset[str]:
    """The names in an archive; `changed`, its time of change, keeps the cache from outliving the file."""
    try:
        with zipfile.ZipFile(archive) as opened:
            return frozenset(opened.namelist())
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{archive} is no readable zip archive: {error}; is the download complete?"
        ) from error


def _exists(ref: ImageRef) -> bool:
    if ref.root.suffix == ".zip":
        return ref.root.is_file() and ref.name in _members(ref.root, ref.root.stat().st_mtime_ns)
    return (ref.root / ref.name).is_file()


@dataclass(frozen=True)
class _Source:
    root: Path
    split: str
    files: dict[str, str]

    def fill(self, pattern: str) -> str:
        return pattern.replace("{split}", self.split)

    def annotations(self, *defaults: str, key: str = "annotations") -> Path:
        """The annotation file of the split: by `files`, else the first of the patterns that exists."""
        patterns = [self.files[key]] if key in self.files else list(defaults)
        for pattern in patterns:
            path = self.root / self.fill(pattern)
            if path.is_file():
                return path
        others = sorted({split for pattern in patterns for split in self._splits(pattern)})
        looked = " or ".join(self.fill(pattern) for pattern in patterns)
        if others:
            raise DataError(
                f"{self.root} has no split {self.split!r} ({looked}); there are {', '.join(others)}"
            )
        raise DataError(f"{self.root} has no file {looked}; name the file by files['{key}']")

    def _splits(self, pattern: str) -> list[str]:
        """The splits that have a file of this pattern."""
        if "{split}" not in pattern:
            return []
        head, _, tail = pattern.partition("{split}")
        expression = re.compile(re.escape(head) + r"([^/]+?)" + re.escape(tail.replace("{split}", "*")))
        found = (expression.fullmatch(p.relative_to(self.root).as_posix()) for p in self._glob(pattern))
        return [match[1] for match in found if match]

    def _glob(self, pattern: str) -> Iterator[Path]:
        return iter(()) if Path(pattern).is_absolute() else self.root.glob(pattern.replace("{split}", "*"))

    def images(self, fields: dict[str, str] | None, *defaults: str, row_split: bool = False) -> _Images:
        """The pictures' place: by `files`, else the first of the patterns under which a picture exists.

        `fields` are those of the first row with a picture, None if no row has one. `row_split`: {split} is
        one of them.
        """
        patterns = [self.files["images"]] if "images" in self.files else list(defaults)
        if fields:
            for pattern in patterns:
                _check_placeholders(pattern, {*fields, "split"})
        places = [self._place(pattern, row_split) for pattern in patterns]
        if not all(place.tail for place in places):
            names = ", ".join(f"{{{name}}}" for name in fields or ())
            raise DataError(f"files['images'] is {patterns[0]!r}, the same for all rows; it needs {names}")
        return _first_with(places, fields)

    def image_folder(self, names: list[str]) -> _Images:
        """The folder or archive of pictures that rows name: by `files`, else where the first of them is."""
        folders = ("{split}_images.zip", "images/{split}", "images", ".")
        folders = (self.files["images"],) if "images" in self.files else folders
        for folder in folders:
            _check_placeholders(folder, {"split"})
        places = [self._place(f"{folder}/{{name}}", False) for folder in folders]
        return _first_with(places, {"name": names[0]} if names else None)

    def _place(self, pattern: str, row_split: bool) -> _Images:
        parts = (pattern if row_split else self.fill(pattern)).split("/")
        fixed = next((i for i, part in enumerate(parts) if "{" in part), len(parts))
        archive = next((i + 1 for i, part in enumerate(parts[:fixed]) if part.endswith(".zip")), fixed)
        return _Images(self.root / "/".join(parts[:archive]), "/".join(parts[archive:]))


def _first_with(places: list[_Images], fields: dict[str, str] | None) -> _Images:
    """The first place that has the picture of `fields`, else the first that exists, else the first."""
    for place in places if fields else ():
        try:
            ref = place.ref("", **fields)
        except DataError:  # a wrong name; the error comes with its row when the row is read
            continue
        if _exists(ref):
            return place
    return next((place for place in places if place.base.exists()), places[0])


def _check_placeholders(pattern: str, known: set[str]) -> None:
    unknown = set(re.findall(r"\{(\w*)\}", pattern)) - known
    if unknown:
        raise DataError(
            f"pattern {pattern!r} has the unknown placeholder {{{min(unknown)}}}; "
            f"there are {', '.join('{' + name + '}' for name in sorted(known))}"
        )


def _source(root: Path, split: str, files: Mapping[str, str] | None, known: Sequence[str]) -> _Source:
    if not root.is_dir():
        raise DataError(f"data folder {root} does not exist; download the data set or correct the path")
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", split):
        raise DataError(f"split {split!r} is no name of a split")
    files = dict(files or {})
    for key, value in files.items():
        if key not in known:
            raise DataError(f"files has the unknown key {key!r}; this format knows {', '.join(known)}")
        if not isinstance(value, str) or not value:
            raise DataError(f"files['{key}'] is {value!r}; a path or pattern is expected")
        if key != "images" and not key.startswith("field."):
            _check_placeholders(value, {"split"})
    return _Source(root, split, files)


# -------------------------------------------------------------------------------------------------- ScienceQA


def _read_scienceqa(source: _Source, choose: _Choose) -> list[Question]:
    path = source.annotations("problems.json")
    problems = _load_object(path)
    rows = []
    for pid in _science_pids(source, problems, path):
        rows.append((pid, _Row(problems[pid], f"{path} problem {pid!r}")))
    with_image = next(((pid, row) for pid, row in rows if row.text("image", default="")), None)
    fields = _science_fields(*with_image, source.split) if with_image else None
    images = source.images(fields, "images/{split}/{pid}/{image}", "{split}/{pid}/{image}", row_split=True)
    return [_science_question(pid, row, images, source.split, choose) for pid, row in rows]


def _science_pids(source: _Source, problems: dict[str, Any], path: Path) -> list[str]:
    split_path = source.annotations("pid_splits.json", key="splits")
    splits = _Row(_load_object(split_path), str(split_path))
    if source.split not in splits.value:
        raise DataError(f"{split_path} has no split {source.split!r}; there are {', '.join(splits.value)}")
    pids = splits.texts(source.split)
    unknown = next((pid for pid in pids if pid not in problems), None)
    if unknown is not None:
        raise DataError(
            f"{split_path} split {source.split!r} names problem {unknown!r}, which {path} does not hold"
        )
    return pids


def _science_fields(pid: str, row: _Row, split: str) -> dict[str, str]:
    # A part such as minival has its pictures under the split of the problem.
    return {"pid": pid, "image": row.text("image"), "split": row.text("split", default=split)}


def _science_question(pid: str, row: _Row, images: _Images, split: str, choose: _Choose) -> Question:
    choices = _choices(row)
    answer = _choice_index(row, "answer", len(choices))
    answers = [answer]
    if row.has("answers"):
        answers = row.list_of("answers", int, "whole numbers")
        outside = [index for index in answers if not 0 <= index < len(choices)]
        if outside:
            raise DataError(f"{row.where}: 'answers' holds {outside[0]}, there are {len(choices)} choices")
    chosen = choose(pid, answer, answers)
    has_image = bool(row.text("image", default=""))
    refs = (images.ref(row.where, **_science_fields(pid, row, split)),) if has_image else ()
    return Question(
        id=pid,
        question=row.text("question"),
        images=refs,
        answer=choices[chosen],
        references=(choices[answer],),
        choices=tuple(choices),
        answer_index=chosen,
        hint=row.text("hint", default=""),
        categories=_science_categories(row),
    )


def _science_categories(row: _Row) -> dict[str, str]:
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


def _choices(row: _Row) -> list[str]:
    choices = row.texts("choices")
    if not 2 <= len(choices) <= MAX_CHOICES:
        raise DataError(f"{row.where}: {len(choices)} choices; 2 to {MAX_CHOICES} are expected")
    return choices


def _choice_index(row: _Row, key: str, count: int) -> int:
    index = row.integer(key)
    if not 0 <= index < count:
        raise DataError(f"{row.where}: key {key!r} is {index}, there are {count} choices (counted from 0)")
    return index


# ---------------------------------------------------------------------------------------------------- TextVQA

_TEXTVQA_IMAGES = (
    "{split}_images/{image_id}.jpg",
    "train_images/{image_id}.jpg",  # officially of train and val
    "train_val_images.zip/train_images/{image_id}.jpg",
    "images/{split}/{image_id}.jpg",
    "images/{split}/{image_id}.png",
    "images/{image_id}.jpg",
)


def _read_textvqa(source: _Source, choose: _Choose) -> list[Question]:
    path = source.annotations("TextVQA_0.5.1_{split}.json")
    data = _Row(_load(path), str(path)).get("data")
    rows = [_Row(v, f"{path} entry {i}") for i, v in enumerate(_list(path, data, " as 'data'"))]
    fields = {"image_id": rows[0].identifier("image_id")} if rows else None
    images = source.images(fields, *_TEXTVQA_IMAGES)
    tokens = _ocr_tokens(source.annotations(key="ocr")) if "ocr" in source.files else {}
    shown = _things_shown(source.annotations(key="shown")) if "shown" in source.files else {}
    return [_textvqa_question(row, images, tokens, shown, choose) for row in rows]


def _things_shown(path: Path) -> dict[str, tuple[str, ...]]:
    """Image id -> everything in the picture, from captions of the embedded sample, whose ids end in the image's."""
    return {row.identifier("id").rpartition("-")[2]: things_of_caption(row.text("answer")) for row in _rows(path)}


def _textvqa_question(
    row: _Row, images: _Images, tokens: dict[str, tuple[str, ...]], shown: dict[str, tuple[str, ...]], choose: _Choose
) -> Question:
    name, image_id = row.identifier("question_id"), row.identifier("image_id")
    # The official test split has no answers.
    answers = row.texts("answers") if row.has("answers") else []
    return Question(
        id=name,
        question=row.text("question"),
        images=(images.ref(row.where, image_id=image_id),),
        answer=choose(name, answers[0], answers) if answers else "",
        references=tuple(answers),
        ocr_tokens=tokens.get(image_id, ()),
        shown=shown.get(image_id, ()),
        categories={key: row.text(key) for key in ("category", "field") if row.has(key)},
    )


def _ocr_tokens(path: Path) -> dict[str, tuple[str, ...]]:
    """Image id -> tokens, from the official {data: [{image_id, ocr_tokens}]} or a .jsonl of such rows."""
    if path.suffix == ".jsonl":
        rows = _rows(path)
    else:
        data = _list(path, _Row(_load(path), str(path)).get("data"), " as 'data'")
        rows = (_Row(value, f"{path} entry {number}") for number, value in enumerate(data))
    return {row.identifier("image_id"): tuple(row.texts("ocr_tokens")) for row in rows}


# --------------------------------------------------------------------------------------------------- easy-VQA


_YES_NO = "yes/no"
_EASY_THINGS = {
    *("circle", "rectangle", "triangle"),
    *("black", "gray", "red", "blue", "green", "yellow", "teal", "brown"),
}


def _read_easy_vqa(source: _Source, choose: _Choose) -> list[Question]:
    path = source.annotations("{split}/questions.json", "{split}_questions.json")
    entries = _list(path, _load(path))
    rows = [_easy_row(entry, f"{path} entry {number}") for number, entry in enumerate(entries)]
    fields = {"image_id": rows[0].identifier("image_id")} if rows else None
    images = source.images(fields, "{split}/images/{image_id}.png", "{split}_images.zip/{image_id}.png")
    questions = [_easy_question(row, f"{source.split}-{number}", images) for number, row in enumerate(rows)]
    shown: dict[ImageRef, dict[str, None]] = {}  # what the true answers to all questions on a picture say of its one shape
    for question in questions:
        is_open = question.categories["kind"] != _YES_NO
        thing = question.answer if is_open else question.claims.get(question.answer)
        shown.setdefault(question.images[0], {}).update({thing: None} if thing else {})
    return [replace(question, shown=tuple(shown[question.images[0]])) for question in questions]


def _easy_row(entry: Any, where: str) -> _Row:
    if not isinstance(entry, list) or len(entry) != 3:
        raise DataError(f"{where}: {_kind(entry)} where [question, answer, image id] is expected")
    return _Row(dict(zip(("question", "answer", "image_id"), entry, strict=True)), where)


def _easy_question(row: _Row, name: str, images: _Images) -> Question:
    question, answer = row.text("question"), row.text("answer")
    kind = _YES_NO if answer in ("yes", "no") else "color" if "color" in question else "shape"
    return Question(
        id=name,
        question=question,
        images=(images.ref(row.where, image_id=row.identifier("image_id")),),
        answer=answer,
        references=(answer,),
        categories={"kind": kind},
        claims=_easy_claims(question) if kind == _YES_NO else {},
    )


def _easy_claims(question: str) -> dict[str, str]:
    """{answer: the colour or shape that it says is there}, of "is there a red shape?" as of "is no circle present?"."""
    words = re.findall("[a-z]+", question.lower())
    thing = next((word for word in words if word in _EASY_THINGS), None)
    return {} if thing is None else {"no" if {"no", "not"} & set(words) else "yes": thing}


# ------------------------------------------------------------------------------------------------- JSON lines


_JSONL_FIELDS = ("id", "question", "image", "images", "answer", "answers", "choices", "hint", "ocr_tokens")


def _read_jsonl(source: _Source, choose: _Choose) -> list[Question]:
    """Rows of {question, image or images, answer or answers, id, choices, hint, ocr_tokens, categories}.

    Only `question` must be there; rows without answers can be predicted, not trained on. With choices,
    `answer` is an index (from 0) or one of the choices, word for word. `categories` is an object of
    strings. Where a file has other names, `files` says so: {"field.question": "text", "field.answer":
    "label"}, and {"field.categories": "type, level"} names the keys whose values are the categories.
    """
    path = source.annotations("{split}.jsonl")
    names = {key: source.files[f"field.{key}"] for key in _JSONL_FIELDS if f"field.{key}" in source.files}
    rows = list(_rows(path, names))
    images = source.image_folder(_first_names(rows))
    groups = [name.strip() for name in source.files.get("field.categories", "").split(",") if name.strip()]
    return [_jsonl_question(row, f"{source.split}-{n}", images, groups, choose) for n, row in enumerate(rows)]


def _first_names(rows: Iterable[_Row]) -> list[str]:
    """The pictures of the first row that has any."""
    return next((names for names in map(_image_names, rows) if names), [])


def _image_names(row: _Row) -> list[str]:
    """`image` (a name or a list of names) or `images` (a list); none where both are absent or null."""
    if row.has("image") and row.has("images"):
        raise DataError(f"{row.where}: both 'image' and 'images'; one of them names the pictures")
    key = "images" if row.has("images") else "image"
    if not row.has(key):
        return []
    names = row.texts(key) if isinstance(row.get(key), list) else [row.text(key)]
    if "" in names:
        raise DataError(
            f"{row.where}: key {key!r} holds an empty name; leave the key out where there is no picture"
        )
    return names


def _jsonl_question(row: _Row, default: str, images: _Images, groups: list[str], choose: _Choose) -> Question:
    name = row.identifier("id", default=default)
    choices = _choices(row) if row.has("choices") else []
    answers = _jsonl_choice_answers(row, choices) if choices else _jsonl_answers(row)
    chosen = choose(name, answers[0], answers) if answers else None
    answer = "" if chosen is None else choices[chosen] if choices else chosen
    return Question(
        id=name,
        question=row.text("question"),
        images=tuple(images.ref(row.where, name=image) for image in _image_names(row)),
        answer=answer,
        references=tuple(choices[index] for index in answers) if choices else tuple(answers),
        choices=tuple(choices),
        answer_index=chosen if choices else None,
        hint=row.text("hint", default=""),
        ocr_tokens=tuple(row.texts("ocr_tokens")) if row.has("ocr_tokens") else (),
        categories=_jsonl_categories(row, groups),
    )


def _jsonl_answers(row: _Row) -> list[str]:
    if row.has("answer") and row.has("answers"):
        raise DataError(f"{row.where}: both 'answer' and 'answers'; give one answer or a list of them")
    if row.has("answer"):
        return [row.text("answer")]
    if not row.has("answers"):
        return []
    answers = row.texts("answers")
    if not answers:
        raise DataError(f"{row.where}: 'answers' is empty; leave the key out where there is no answer")
    return answers


def _jsonl_choice_answers(row: _Row, choices: list[str]) -> list[int]:
    """The answers as indices of the choices."""
    if row.has("answer") and not isinstance(row.get("answer"), str):
        return [_choice_index(row, "answer", len(choices))]
    answers = _jsonl_answers(row)
    strange = next((answer for answer in answers if answer not in choices), None)
    if strange is not None:
        raise DataError(f"{row.where}: answer {strange!r} is none of the choices {choices}")
    return [choices.index(answer) for answer in answers]


def _jsonl_categories(row: _Row, groups: list[str]) -> dict[str, str]:
    if groups:
        return {key: row.identifier(key) for key in groups if row.has(key)}
    if not row.has("categories"):
        return {}
    groups = _Row(row.get("categories"), f"{row.where} categories")
    return {key: groups.text(key) for key in groups.value}


_READERS: dict[str, tuple[tuple[str, ...], Callable[[_Source, _Choose], list[Question]]]] = {
    "scienceqa": (("annotations", "splits", "images"), _read_scienceqa),
    "textvqa": (("annotations", "images", "ocr", "shown"), _read_textvqa),
    "easy_vqa": (("annotations", "images"), _read_easy_vqa),
    "jsonl": (
        ("annotations", "images", *(f"field.{key}" for key in _JSONL_FIELDS), "field.categories"),
        _read_jsonl,
    ),
}


# ---------------------------------------------------------------------------------------------- conversations

_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def _conversation(row: _Row, image_count: int) -> tuple[Turn, ...]:
    turns = tuple(
        _turn(_Row(value, f"{row.where} turn {number}"))
        for number, value in enumerate(row.list_of("conversations", object, "turns"))
    )
    asked = turns[1:] if turns and turns[0].role == "system" else turns
    roles = [turn.role for turn in asked]
    if not roles or len(roles) % 2 or roles != ["user", "assistant"] * (len(roles) // 2):
        raise DataError(f"{row.where}: turns of {roles}; human and gpt must alternate, from human to gpt")
    marked = sum(turn.images for turn in turns)
    if marked != image_count:
        raise DataError(
            f"{row.where}: {marked} markers {IMAGE_MARKER} and {image_count} images; they must match"
        )
    return turns


def _turn(row: _Row) -> Turn:
    role, text = row.text("from"), row.text("value")
    if role not in _ROLES:
        raise DataError(f"{row.where}: speaker {role!r}; there are {', '.join(_ROLES)}")
    images = text.count(IMAGE_MARKER)
    if images and _ROLES[role] != "user":
        raise DataError(
            f"{row.where}: marker {IMAGE_MARKER} in a turn of {role!r}; only the human shows pictures"
        )
    if images:
        text = _without_markers(text, row.where)
    if not text.strip() and not images:
        raise DataError(f"{row.where}: the turn of {role!r} is empty")
    return Turn(_ROLES[role], text, images)


def _without_markers(text: str, where: str) -> str:
    text = text.strip()
    while text.startswith(IMAGE_MARKER):
        text = text[len(IMAGE_MARKER) :].lstrip()
    while text.endswith(IMAGE_MARKER):
        text = text[: -len(IMAGE_MARKER)].rstrip()
    if IMAGE_MARKER in text:
        raise DataError(f"{where}: {IMAGE_MARKER} in the middle of the text; put it at the start or the end")
    return text
