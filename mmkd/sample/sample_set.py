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

import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mmkd.base.bars import bar
from mmkd.data.scenes import Scene, caption, captions_of_parts, picture_bytes
from mmkd.errors import DataError
from mmkd.sample.choice_questions import TEXT_SHARE, picture_items, problem, text_item_of
from mmkd.sample.open_questions import entry, open_items
from mmkd.sample.splits import SPLIT_SHARES, scene_of
from mmkd.sample.statements import statements
from mmkd.sample.writings import writings

GENERATOR_VERSION = 4
DEFAULT_SIZES = {"train": 3000, "val": 200, "test": 400}  # scenes of each of the two sets


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
        scene = scene_of(rng, "scienceqa", split)
        png = picture_bytes(scene)
        items = picture_items(rng, scene)
        for place, item in enumerate(items):
            pid = str(_FIRST_ID[split] + len(problems))
            problems[pid] = problem(rng, item, split, True, plan.accuracy)
            name = f"scienceqa/images/{split}/{pid}/image.png"
            (plan.folder / name).parent.mkdir(parents=True)
            (plan.folder / name).write_bytes(png)
            if place == 0:
                captions.add(f"scienceqa-{pid}", name, scene)
        text_share += len(items) * TEXT_SHARE / (1 - TEXT_SHARE)
        while text_share >= 1:
            text_share -= 1
            item = text_item_of(rng, split, seen)
            pid = str(_FIRST_ID[split] + len(problems))
            problems[pid] = problem(rng, item, split, False, plan.accuracy)
        tick()
    return problems


def _write_text_split(plan: _Plan, split: str, size: int, captions: _Captions, tick: Callable[[], None]) -> None:
    """Writes the annotations and pictures of one split; adds the captions of its scenes."""
    data: list[dict[str, Any]] = []
    folder = plan.folder / "textvqa" / "images" / split
    folder.mkdir(parents=True)
    for index in range(size):
        rng = plan.rng("textvqa", split, index)
        scene = scene_of(rng, "textvqa", split)
        image_id = f"{rng.getrandbits(64):016x}"
        (folder / f"{image_id}.png").write_bytes(picture_bytes(scene))
        for item in open_items(rng, scene):
            question_id = _FIRST_ID[split] + len(data)
            data.append(entry(rng, item, scene, split, image_id, question_id, plan.accuracy))
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


_TEXTS = {"writings": writings, "statements": statements}


def _write_texts(of: str, plan: _Plan, sizes: dict[str, int], tick: Callable[[], None]) -> None:
    """Rows of `writings` or `statements`, a file a split, with the pictures of the TextVQA set's scenes."""
    for split, size in sizes.items():
        rows: list[dict[str, str]] = []
        (plan.folder / "images" / split).mkdir(parents=True)
        for index in range(size):
            scene = scene_of(plan.rng("textvqa", split, index), "textvqa", split)
            name = f"images/{split}/{index}.png"
            (plan.folder / name).write_bytes(picture_bytes(scene))
            for kind, question, answer in _TEXTS[of](plan.rng(of, split, index), scene):
                rows.append({"id": f"{index}-{kind}", "image": name, "question": question, "answer": answer})
            tick()
        _write_rows(plan.folder / f"{split}.jsonl", rows)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    with bar(total, "writing the sample", "scene") as told:
        yield lambda: told.update(1)


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
    keys = [k for k in {**wanted, **found} if found.get(k) != wanted.get(k)]
    differing = [f"{k}: {found.get(k)!r} there, {wanted.get(k)!r} wanted" for k in keys]
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
    root: Path, *, seed: int = 0, sizes: dict[str, int] | None = None, annotator_accuracy: float = 0.75, of: str | None = None
) -> None:
    """Writes the sample into the new folder `root`, or keeps it if this very sample is there already.

    `sizes`: scenes of each of the two sets by split, `DEFAULT_SIZES` if None; with each scene come about four
    ScienceQA or two and a half TextVQA questions. What is written:

        scienceqa/problems.json, pid_splits.json, images/<split>/<pid>/image.png
        textvqa/TextVQA_0.5.1_<split>.json, images/<split>/<image_id>.png
        captions/<split>.jsonl      {id, image (a path under root), question, answer}: all scenes of both sets
        captions/<split>_parts.jsonl  the same of the objects, the sign and its letters, each by itself
        sample.json                 seed, sizes, annotator_accuracy, generator_version

    `of`: instead of these, rows that teach a model to write ("writings", `mmkd.sample.writings`) or to state and to judge
    ("statements", `mmkd.sample.statements`), on the TextVQA set's scenes:

        <split>.jsonl               {id, image, question, answer}
        images/<split>/<n>.png

    The folder appears complete or not at all. Raises DataError for wrong parameters and for a folder that
    holds something else.
    """
    root = Path(root)
    sizes = dict(DEFAULT_SIZES if sizes is None else sizes)
    _check_parameters(seed, sizes, annotator_accuracy)
    if of is not None and of not in _TEXTS:
        raise DataError(f"of is {of!r}; a sample set is of questions (None) or of {list(_TEXTS)}")
    sizes = {split: sizes[split] for split in SPLIT_SHARES if split in sizes}
    record = {
        "generator_version": GENERATOR_VERSION,
        "seed": seed,
        "sizes": sizes,
        "annotator_accuracy": annotator_accuracy,
        **({f"of_{of}": True} if of else {}),
    }
    if _is_written(root, record):
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
    try:
        folder.chmod(0o755)  # mkdtemp's 0700 would keep other users of the machine out
        write = partial(_write_texts, of) if of else _write_all
        with _progress((1 if of else 2) * sum(sizes.values())) as tick:
            write(_Plan(folder, seed, annotator_accuracy), sizes, tick)
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
