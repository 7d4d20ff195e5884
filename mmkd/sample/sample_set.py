"""The embedded sample: drawn scenes with questions, written as ScienceQA and TextVQA lay out their files.

It lets a whole run (train, distil, evaluate, compare) happen offline in minutes, through the same readers
as the benchmarks themselves. It says nothing about scores on the benchmarks.

**Scenes.** A 64 x 64 RGB picture with one to three things of one shape and colour on a grid and a printed sign (a
word of `WORDS` or a number of `NUMBERS`), see `mmkd.data.scenes`. The two sets draw from one distribution, except that a quarter
of the ScienceQA scenes carry no sign. Which set and split a scene belongs to is decided by a hash of what
it shows, whatever the seed: no scene of a test split is in any training split, also between two seeds.
Within one split a scene may recur with other sizes, offsets and tints. Each scene has a random stream of
its own, so that a training split of n scenes is the head of one of m > n scenes.

**Answers.** Within a type of question every answer is equally likely. In ScienceQA's form the choices of shapes,
counts and columns are all that there are, in one order; elsewhere distractors are drawn so that the set of choices
says nothing about the answer, and choices are shuffled. A model that does not see the picture stays at chance.

**Annotators.** Ten annotators answer each question, independently of each other: with probability
`annotator_accuracy` the truth; otherwise a mistake, in four of five cases one that people make (a
neighbouring colour, a count or number off by one, a similar shape, a similar word) where such an answer
exists, else any other answer of that kind. In ScienceQA a mistake is one of the choices. In TextVQA half
of the mistakes about the sign's text are one letter or digit misread, and one answer in ten carries an
article, capitals or a full stop, which the official normaliser removes. The ten are independent and
identically distributed:

- ScienceQA, train: `answer` is the first annotator's. Other splits: the majority's, ties going to the truth.
  The extra key `answers` holds all ten, as indices of the choices.
- TextVQA: `answers` holds all ten, as in the official files.

**Determinism.** Everything follows from `seed`, `sizes` and `annotator_accuracy`. The bytes of the PNG
files also depend on the zlib that Pillow was built with; their pixels do not.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmkd.data.scenes import (
    BRIGHT_COLORS,
    COLUMN_NAMES,
    DARK_COLORS,
    IMAGE_SIZE,
    NUMBERS,
    OBJECT_COLORS,
    SHAPES,
    WORDS,
    Scene,
    caption,
    captions_of_parts,
    draw_scene,
    picture_bytes,
    plural_of,
)
from mmkd.errors import DataError

GENERATOR_VERSION = 4
ANNOTATORS = 10
DEFAULT_SIZES = {"train": 3000, "val": 200, "test": 400}  # scenes of each of the two sets
SPLIT_SHARES = {"train": 8, "val": 1, "test": 1}  # tenths of the space of scenes
TEXT_SHARE = 0.2  # of the ScienceQA questions

SIMILAR_COLORS = {
    "red": ("orange", "pink"),
    "orange": ("red", "yellow"),
    "yellow": ("orange", "white"),
    "green": ("blue",),
    "blue": ("purple", "green", "black"),
    "purple": ("blue", "black"),
    "black": ("blue", "purple"),
    "white": ("yellow", "pink"),
    "pink": ("red", "white"),
}
SIMILAR_SHAPES = {
    "circle": ("square",),
    "square": ("circle",),
    "triangle": ("cross",),
    "cross": ("triangle",),
}


def _belongs_to(text: str) -> tuple[str, str]:
    """The (set, split) that owns a scene or a text, by its content alone."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    owner = ("scienceqa", "textvqa")[number % 2]
    place = number // 2 % sum(SPLIT_SHARES.values())
    for split, share in SPLIT_SHARES.items():
        if place < share:
            return owner, split
        place -= share
    raise RuntimeError("the shares of the splits do not cover the space")


def _scene_of(rng: random.Random, owner: str, split: str) -> Scene:
    """The first scene of the stream that belongs to this set and split."""
    sign_probability = 0.75 if owner == "scienceqa" else 1.0
    while True:
        scene = draw_scene(rng, sign_probability)
        if _belongs_to(scene.description) == (owner, split):
            return scene


# ------------------------------------------------------------------------------------------------- annotators


def _similar(answer: str) -> tuple[str, ...]:
    """Answers that people mistake for this one: colours, shapes, numbers, words, or "colour shape"."""
    if answer.isdigit():
        number = int(answer)
        return tuple(str(n) for n in (number - 1, number + 1) if n >= 0)
    if " " in answer:
        color, shape = answer.split(" ", 1)
        return tuple(f"{c} {shape}" for c in SIMILAR_COLORS.get(color, ())) + tuple(
            f"{color} {s}" for s in SIMILAR_SHAPES.get(shape, ())
        )
    if answer in SIMILAR_COLORS:
        return SIMILAR_COLORS[answer]
    if answer in SIMILAR_SHAPES:
        return SIMILAR_SHAPES[answer]
    return tuple(
        w for w in WORDS if len(w) == len(answer) and sum(a != b for a, b in zip(w, answer, strict=True)) == 1
    )


_MISREAD = dict(zip("abcdefghiklmnoprstuxz", "odobctcnlxinmcrpzfoks", strict=True))


def _misread(rng: random.Random, answer: str) -> str:
    """A word with one letter, or a number with one digit, taken for another."""
    place = rng.randrange(len(answer))
    letter = answer[place]
    other = rng.choice([d for d in "0123456789" if d != letter]) if letter.isdigit() else _MISREAD[letter]
    text = answer[:place] + other + answer[place + 1 :]
    return str(int(text)) if text.isdigit() else text


def _opinion(rng: random.Random, truth: str, pool: Sequence[str], accuracy: float) -> str:
    """One annotator's answer out of `pool` (which holds the truth)."""
    if rng.random() < accuracy:
        return truth
    likely = [a for a in _similar(truth) if a in pool]
    if likely and rng.random() < 0.8:
        return rng.choice(likely)
    return rng.choice([a for a in pool if a != truth])


def _choice_opinions(rng: random.Random, truth: int, choices: Sequence[str], accuracy: float) -> list[int]:
    return [choices.index(_opinion(rng, choices[truth], choices, accuracy)) for _ in range(ANNOTATORS)]


def _format_harmlessly(rng: random.Random, answer: str) -> str:
    if rng.random() >= 0.1:
        return answer
    return rng.choice((f"the {answer}", f"a {answer}", answer.upper(), answer.capitalize(), f"{answer}."))


def _open_opinions(rng: random.Random, truth: str, pool: Sequence[str], accuracy: float) -> list[str]:
    """Ten free-form answers. Half of the mistakes about a sign's text are one letter or digit misread."""
    answers = []
    for _ in range(ANNOTATORS):
        answer = _opinion(rng, truth, pool, accuracy)
        if answer != truth and pool in (WORDS, NUMBERS) and rng.random() < 0.5:
            answer = _misread(rng, truth)
        answers.append(_format_harmlessly(rng, answer))
    return answers


def _majority(answers: Sequence[int], truth: int) -> int:
    counts = Counter(answers)
    most = max(counts.values())
    return truth if counts[truth] == most else min(a for a in counts if counts[a] == most)


# -------------------------------------------------------------------------------------------- multiple choice


@dataclass(frozen=True)
class _Item:
    """A multiple-choice question; `truth` is the index of the right choice."""

    kind: str
    question: str
    choices: tuple[str, ...]
    truth: int
    hint: str = ""


# kind -> subject, topic, skill, grade with two choices (one more with each further choice), lecture
_KINDS = {
    "color": ("natural science", "physics", "Name the color of an object", 1, "Objects differ in color."),
    "shape": ("natural science", "physics", "Name the shape of an object", 1, "Objects differ in shape."),
    "count": ("natural science", "science-and-engineering-practices", "Count objects", 2,
              "To count objects, look at each of them once."),
    "place": ("social science", "geography", "Read a position in a picture", 4,
              "Left, middle and right tell where something is."),
    "legend": ("social science", "geography", "Use the legend of a map", 8,
               "A legend tells what the symbols of a map mean."),
    "sign": ("language science", "word-study", "Read a word on a sign", 2, "Signs give names and numbers."),
    "boxes": ("natural science", "physics", "Find a fact in a text", 3, "A text can tell where things are."),
    "homes": ("social science", "geography", "Find who lives where", 5, "A text can tell where people live."),
    "meanings": ("language science", "vocabulary", "Find the meaning of a word", 7,
                 "A glossary tells what unknown words mean."),
}  # fmt: skip


def _make_item(
    rng: random.Random,
    kind: str,
    question: str,
    truth: str,
    first: Sequence[str],
    rest: Sequence[str],
    hint: str = "",
) -> _Item:
    """A question with 2-4 choices: distractors from `first` before those from `rest`, all in random order."""
    count = rng.randint(2, 4) - 1
    near = [a for a in first if a != truth]
    far = [a for a in rest if a != truth and a not in near]
    distractors = (rng.sample(near, len(near)) + rng.sample(far, len(far)))[:count]
    choices = [truth, *distractors]
    rng.shuffle(choices)
    return _Item(kind, question, tuple(choices), choices.index(truth), hint)


def _whole_list(kind: str, question: str, truth: str, pool: Sequence[str]) -> _Item:
    """A question that offers all there is, in the order of the list, as schoolbooks do with counts and scales."""
    return _Item(kind, question, tuple(pool), pool.index(truth))


def _ask_color(rng: random.Random, scene: Scene) -> _Item:
    plural = len(scene.things) > 1
    template = rng.choice(("Which color are the {}?", "What is the color of the {}?")) if plural else rng.choice(
        ("Which color is the {}?", "What is the color of the {}?")
    )
    question = template.format(plural_of(scene.thing.shape) if plural else scene.thing.shape)
    return _make_item(rng, "color", question, scene.thing.color, (), OBJECT_COLORS)


def _ask_shape(rng: random.Random, scene: Scene) -> _Item:
    question = rng.choice(("Which shape is {}?", "What is the shape of the {} objects?")).format(scene.thing.color)
    return _whole_list("shape", question, scene.thing.shape, SHAPES)


def _ask_count(rng: random.Random, scene: Scene) -> _Item:
    question = rng.choice(("How many objects are there?", "How many shapes are in the picture?"))
    return _whole_list("count", question, str(len(scene.things)), ("1", "2", "3"))


def _ask_place(rng: random.Random, scene: Scene) -> _Item | None:
    if len(scene.things) > 1:
        return None
    question = rng.choice(("Where is the {}?", "In which part of the picture is the {}?")).format(scene.thing.shape)
    return _whole_list("place", question, COLUMN_NAMES[scene.thing.column], COLUMN_NAMES)


_SYMBOLS = ("a lake", "a school", "a bridge", "a forest", "a station", "a museum", "a harbor", "a market")


def _ask_legend(rng: random.Random, scene: Scene) -> _Item:
    """Needs the picture (which shape there is) and the hint (what that shape means)."""
    thing = scene.thing
    shapes = [thing.shape, *rng.sample([s for s in SHAPES if s != thing.shape], 3)]
    rng.shuffle(shapes)
    meanings = rng.sample(_SYMBOLS, len(shapes))
    hint = " ".join(
        f"On the map, a {shape} means {what}." for shape, what in zip(shapes, meanings, strict=True)
    )
    truth = meanings[shapes.index(thing.shape)]
    return _make_item(rng, "legend", f"What does the {thing.color} symbol mean?", truth, meanings, (), hint)


def _ask_sign(rng: random.Random, scene: Scene) -> _Item | None:
    if scene.sign is None:
        return None
    pool = NUMBERS if scene.sign.is_number else WORDS
    what = "number" if scene.sign.is_number else "word"
    question = rng.choice(("Which {} is on the sign?", "Which {} does the sign show?")).format(what)
    return _make_item(rng, "sign", question, scene.sign.text, (), pool)


def _picture_items(rng: random.Random, scene: Scene) -> list[_Item]:
    """Up to three questions, of different kinds."""
    kinds = [_ask_color, _ask_shape, _ask_count, _ask_place, _ask_sign, _ask_legend]
    items = [item for ask in rng.sample(kinds, len(kinds)) if (item := ask(rng, scene))]
    return items[:3]


_THINGS = tuple(
    "ball bell book brush cake coin cup drum fan fork hat key lamp map pen ring rope shell shoe spoon".split()
)
_PEOPLE = tuple("Ada Ben Cleo Dan Emma Finn Gus Hana Ivan Jill Kim Leo Mia Noah".split())
_PLACES = (
    "by the sea",
    "by the river",
    "in the city",
    "in the desert",
    "in the forest",
    "in the hills",
    "in the port",
    "in the valley",
    "near the lake",
    "on a farm",
    "on an island",
    "on the plain",
)
_NEW_WORDS = tuple("bim dax fep gorp jik kulo lorn mip nuv pell quon rasp soma tal vek wug yost zif".split())
_MEANINGS = tuple(
    "bird bread cloud dog fire flower friend horse house "
    "king milk night rain salt snow tree water wind".split()
)
_TEXTS = (
    ("boxes", OBJECT_COLORS, _THINGS, "In the {} box there is a {}.", "What is in the {} box?"),
    ("homes", _PEOPLE, _PLACES, "{} lives {}.", "Where does {} live?"),
    ("meanings", _NEW_WORDS, _MEANINGS, "The word {} means {}.", "What does the word {} mean?"),
)


def _text_item(rng: random.Random) -> _Item:
    """A question without a picture about one of 2-4 facts; the hint holds all of the choices."""
    kind, keys, values, fact, question = rng.choice(_TEXTS)
    count = rng.randint(2, 4)
    names, facts = rng.sample(keys, count), rng.sample(values, count)
    hint = " ".join(fact.format(name, value) for name, value in zip(names, facts, strict=True))
    asked = rng.randrange(count)
    return _make_item(rng, kind, question.format(names[asked]), facts[asked], facts, (), hint)


def _text_item_of(rng: random.Random, split: str, seen: set[tuple[str, str]]) -> _Item:
    """The first text question of the stream that belongs to this split and has not been asked in it."""
    while True:
        item = _text_item(rng)
        # The order of the facts does not make another question.
        content = ".".join(sorted(fact.strip() for fact in item.hint.split("."))) + item.question
        if _belongs_to(content)[1] == split and (item.hint, item.question) not in seen:
            seen.add((item.hint, item.question))
            return item


def _problem(rng: random.Random, item: _Item, split: str, has_image: bool, accuracy: float) -> dict[str, Any]:
    subject, topic, skill, grade, lecture = _KINDS[item.kind]
    answers = _choice_opinions(rng, item.truth, item.choices, accuracy)
    return {
        "question": item.question,
        "choices": list(item.choices),
        "answer": answers[0] if split == "train" else _majority(answers, item.truth),
        "answers": answers,
        "hint": item.hint,
        "image": "image.png" if has_image else None,
        "task": "closed choice",
        "grade": f"grade{grade + len(item.choices) - 2}",
        "subject": subject,
        "topic": topic,
        "category": item.kind,
        "skill": skill,
        "lecture": lecture,
        "solution": f"The answer is {item.choices[item.truth]}.",
        "split": split,
    }


# --------------------------------------------------------------------------------------------- open questions


@dataclass(frozen=True)
class _OpenItem:
    kind: str
    question: str
    truth: str
    pool: Sequence[str]  # what an annotator may answer


def _open_sign_text(rng: random.Random, scene: Scene) -> _OpenItem:
    what = "number" if scene.sign.is_number else "word"
    templates = (
        f"What {what} is on the sign?",
        f"What {what} does the sign show?",
        "What is written on the sign?",
    )
    return _OpenItem(
        "text", rng.choice(templates), scene.sign.text, NUMBERS if scene.sign.is_number else WORDS
    )


def _open_sign_color(rng: random.Random, scene: Scene) -> _OpenItem:
    question = rng.choice(("What color is the sign?", "What is the color of the sign?"))
    return _OpenItem("sign color", question, scene.sign.fill, DARK_COLORS + BRIGHT_COLORS)


def _open_letter_color(rng: random.Random, scene: Scene) -> _OpenItem:
    question = rng.choice(("What color are the letters on the sign?", "In what color is the sign written?"))
    return _OpenItem("letter color", question, scene.sign.letters, DARK_COLORS + BRIGHT_COLORS)


def _open_color(rng: random.Random, scene: Scene) -> _OpenItem:
    shape = scene.thing.shape
    template = rng.choice(("What color is the {}?", "What is the color of the {}?"))
    if len(scene.things) > 1:
        template, shape = template.replace("What color is", "What color are"), plural_of(shape)
    return _OpenItem("color", template.format(shape), scene.thing.color, OBJECT_COLORS)


def _open_shape(rng: random.Random, scene: Scene) -> _OpenItem:
    question = rng.choice(("What shape is {}?", "What shape are the {} objects?")).format(scene.thing.color)
    return _OpenItem("shape", question, scene.thing.shape, SHAPES)


def _open_count(rng: random.Random, scene: Scene) -> _OpenItem:
    question = rng.choice(("How many objects are there?", "How many shapes are in the picture?"))
    return _OpenItem("count", question, str(len(scene.things)), ("1", "2", "3"))


def _open_items(rng: random.Random, scene: Scene) -> list[_OpenItem]:
    """What the sign says, and one or two other questions."""
    kinds = [_open_sign_color, _open_letter_color, _open_color, _open_shape, _open_count]
    chosen = rng.sample(kinds, rng.randint(1, 2))
    return [_open_sign_text(rng, scene), *(ask(rng, scene) for ask in chosen)]


def _entry(
    rng: random.Random,
    item: _OpenItem,
    scene: Scene,
    split: str,
    image_id: str,
    question_id: int,
    accuracy: float,
) -> dict[str, Any]:
    classes = [*sorted({t.shape.capitalize() for t in scene.things}), "Sign"]
    return {
        "question": item.question,
        "image_id": image_id,
        "image_classes": classes,
        "flickr_original_url": "",
        "flickr_300k_url": "",
        "image_width": IMAGE_SIZE,
        "image_height": IMAGE_SIZE,
        "answers": _open_opinions(rng, item.truth, item.pool, accuracy),
        "question_tokens": item.question.lower().rstrip("?").split(),
        "question_id": question_id,
        "set_name": split,
        "category": item.kind,
    }


# ---------------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class _Plan:
    folder: Path
    seed: int
    accuracy: float

    def rng(self, owner: str, split: str, index: int) -> random.Random:
        """A stream for each scene: the first n scenes are the same whatever the size of the split."""
        return random.Random(f"mmkd sample {GENERATOR_VERSION} {self.seed} {owner} {split} {index}")


# Identifiers do not depend on the sizes of the other splits.
_FIRST_ID = {"train": 1, "val": 1_000_001, "test": 2_000_001}


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        json.dump(value, stream, indent=1, ensure_ascii=False)
        stream.write("\n")


def _write_science_split(
    plan: _Plan, split: str, size: int, captions: _Captions, tick: Callable[[], None]
) -> dict[str, dict[str, Any]]:
    """The problems of one split; adds the captions of its scenes. Writes a picture for each question."""
    problems: dict[str, dict[str, Any]] = {}
    seen: set[tuple[str, str]] = set()
    text_share = 0.0
    for index in range(size):
        rng = plan.rng("scienceqa", split, index)
        scene = _scene_of(rng, "scienceqa", split)
        png = picture_bytes(scene)
        items = _picture_items(rng, scene)
        for place, item in enumerate(items):
            pid = str(_FIRST_ID[split] + len(problems))
            problems[pid] = _problem(rng, item, split, True, plan.accuracy)
            name = f"scienceqa/images/{split}/{pid}/image.png"
            (plan.folder / name).parent.mkdir(parents=True)
            (plan.folder / name).write_bytes(png)
            if place == 0:
                captions.add(f"scienceqa-{pid}", name, scene)
        text_share += len(items) * TEXT_SHARE / (1 - TEXT_SHARE)
        while text_share >= 1:
            text_share -= 1
            item = _text_item_of(rng, split, seen)
            pid = str(_FIRST_ID[split] + len(problems))
            problems[pid] = _problem(rng, item, split, False, plan.accuracy)
        tick()
    return problems


def _write_text_split(plan: _Plan, split: str, size: int, captions: _Captions, tick: Callable[[], None]) -> None:
    """Writes the annotations and pictures of one split; adds the captions of its scenes."""
    data: list[dict[str, Any]] = []
    folder = plan.folder / "textvqa" / "images" / split
    folder.mkdir(parents=True)
    for index in range(size):
        rng = plan.rng("textvqa", split, index)
        scene = _scene_of(rng, "textvqa", split)
        image_id = f"{rng.getrandbits(64):016x}"
        (folder / f"{image_id}.png").write_bytes(picture_bytes(scene))
        for item in _open_items(rng, scene):
            question_id = _FIRST_ID[split] + len(data)
            data.append(_entry(rng, item, scene, split, image_id, question_id, plan.accuracy))
        captions.add(f"textvqa-{image_id}", f"textvqa/images/{split}/{image_id}.png", scene)
        tick()
    document = {"dataset_type": split, "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": data}
    _write_json(plan.folder / "textvqa" / f"TextVQA_0.5.1_{split}.json", document)


@dataclass
class _Captions:
    """Rows of the two files of captions: of whole pictures and of their parts."""

    whole: list[dict[str, str]] = field(default_factory=list)
    parts: list[dict[str, str]] = field(default_factory=list)

    def add(self, name: str, image: str, scene: Scene) -> None:
        self.whole.append({"id": name, "image": image, "question": "Describe the picture.", "answer": caption(scene)})
        self.parts += [
            {"id": f"{name}-{part}", "image": image, "question": f"Describe the {part}.", "answer": text}
            for part, text in captions_of_parts(scene)
        ]

    def write(self, folder: Path, split: str) -> None:
        _write_rows(folder / "captions" / f"{split}.jsonl", self.whole)
        _write_rows(folder / "captions" / f"{split}_parts.jsonl", self.parts)


def _write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def _write_all(plan: _Plan, sizes: dict[str, int], tick: Callable[[], None]) -> None:
    problems: dict[str, dict[str, Any]] = {}
    pids: dict[str, list[str]] = {}
    for split, size in sizes.items():
        captions = _Captions()
        split_problems = _write_science_split(plan, split, size, captions, tick)
        _write_text_split(plan, split, size, captions, tick)
        captions.write(plan.folder, split)
        problems |= split_problems
        pids[split] = list(split_problems)
    _write_json(plan.folder / "scienceqa" / "problems.json", problems)
    _write_json(plan.folder / "scienceqa" / "pid_splits.json", pids)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    from tqdm import tqdm

    with tqdm(total=total, desc="writing the sample", unit="scene") as bar:
        yield lambda: bar.update(1)


def _is_written(root: Path, wanted: dict[str, Any]) -> bool:
    """Whether `root` holds this very sample. Raises DataError when it holds something else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    record = root / "sample.json"
    if not record.is_file():
        raise DataError(
            f"{root} exists and is no sample set (no sample.json); choose another folder or delete it"
        )
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DataError(
            f"{record} cannot be read ({error}); delete {root} to have it written again"
        ) from error
    if not isinstance(found, dict):
        raise DataError(f"{record} holds no object; delete {root} to have it written again")
    differing = [f"{k}: {found.get(k)!r} there, {v!r} wanted" for k, v in wanted.items() if found.get(k) != v]
    if differing:
        raise DataError(
            f"{root} holds another sample ({'; '.join(differing)}); choose another folder or delete it"
        )
    return True


def _check_parameters(seed: int, sizes: dict[str, int], accuracy: float) -> None:
    unknown = [split for split in sizes if split not in SPLIT_SHARES]
    if unknown or not sizes:
        raise DataError(f"sizes names the splits {list(sizes)}; a sample set has {list(SPLIT_SHARES)}")
    for name, value in [("seed", seed), *sizes.items()]:
        if not isinstance(value, int) or isinstance(value, bool):
            raise DataError(f"{name} is {value!r}; it must be a whole number")
    wrong = {split: size for split, size in sizes.items() if size < 1}
    if wrong:
        raise DataError(
            f"sizes of {wrong} scenes; every named split needs at least 1, leave out those not wanted"
        )
    if not 0 <= accuracy <= 1:
        raise DataError(f"annotator_accuracy is {accuracy}; it is a probability, 0 to 1")


def write_sample_set(
    root: Path, *, seed: int = 0, sizes: dict[str, int] | None = None, annotator_accuracy: float = 0.75
) -> None:
    """Writes the sample into the new folder `root`, or keeps it if this very sample is there already.

    `sizes`: scenes of each of the two sets by split, `DEFAULT_SIZES` if None; with each scene come about four
    ScienceQA or two and a half TextVQA questions. What is written:

        scienceqa/problems.json, pid_splits.json, images/<split>/<pid>/image.png
        textvqa/TextVQA_0.5.1_<split>.json, images/<split>/<image_id>.png
        captions/<split>.jsonl      {id, image (a path under root), question, answer}: all scenes of both sets
        captions/<split>_parts.jsonl  the same of the objects, the sign and its letters, each by itself
        sample.json                 seed, sizes, annotator_accuracy, generator_version

    The folder appears complete or not at all. Raises DataError for wrong parameters and for a folder that
    holds something else.
    """
    root = Path(root)
    sizes = dict(DEFAULT_SIZES if sizes is None else sizes)
    _check_parameters(seed, sizes, annotator_accuracy)
    sizes = {split: sizes[split] for split in SPLIT_SHARES if split in sizes}
    record = {
        "generator_version": GENERATOR_VERSION,
        "seed": seed,
        "sizes": sizes,
        "annotator_accuracy": annotator_accuracy,
    }
    if _is_written(root, record):
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
    try:
        folder.chmod(0o755)  # mkdtemp's 0700 would keep other users of the machine out
        with _progress(2 * sum(sizes.values())) as tick:
            _write_all(_Plan(folder, seed, annotator_accuracy), sizes, tick)
        _write_json(folder / "sample.json", record)
        _move_into_place(folder, root, record)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move_into_place(folder: Path, root: Path, record: dict[str, Any]) -> None:
    try:
        folder.rename(root)
    except OSError:
        # Another process may have written the same sample meanwhile; anything else is an error.
        if not _is_written(root, record):
            raise
