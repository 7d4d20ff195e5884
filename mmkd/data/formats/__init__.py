"""Data formats: how the files of a data set are laid out. Training and evaluation read all of them.

A format is one class in one file. A user's own stands in a module that a recipe or a benchmark's card names by `imports:`;
this is a whole one:

    # my_formats.py
    from mmkd.data.formats import Format
    from mmkd.data.samples import Question
    from mmkd.registry import register

    @register("formats", "semicolons")
    class Semicolons(Format):
        \"\"\"Lines of picture;question;answer.\"\"\"

        files = {"annotations": "{split}.txt"}
        images = {"images": "pictures"}

        def read(self, source):
            for number, line in enumerate(source.path("annotations").read_text().splitlines()):
                picture, question, answer = line.split(";")
                image = source.image(picture, where=f"line {number}")
                yield Question(f"{source.split}-{number}", question, (image,), answer, references=(answer,))

It reads `data: [{format: semicolons, root: FOLDER, prompt: short}]`, a benchmark's card with `format: semicolons`, and is listed
by `mmkd list formats`.

Annotations are read whole, pictures only when they are asked for: whether they are there is asked by
`mmkd.data.samples.check_images`, whether they decode shows when they are loaded. Whatever is wrong with a file is a DataError
that names the file, the row and the key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from mmkd.data.lazy import Lazy, is_lazy
from mmkd.data.samples import Question, Sample
from mmkd.data.selection import choose_target, refuse_duplicates, subset, with_target
from mmkd.data.source import Patterns, Source
from mmkd.data.tally import Tally
from mmkd.errors import DataError, did_you_mean
from mmkd.registry import registry

GIVES = ("questions", "samples", "pairs", "stream")


class Format:
    """One layout of files. Subclasses are registered (`@register("formats", NAME)`) and made without arguments.

    files: annotation files by key, each a pattern below the root or several that are tried in order. `{split}` stands for
        the split, "" for a file that is not there unless it is named. These are the files that a fingerprint of the data covers.
    images: where pictures are, in the same way: a folder or .zip whose files rows name, or a pattern with fields of a row
        ("images/{image_id}.jpg").
    values: further settings with their defaults, such as names of columns.
    gives: what is read:
        "questions"  `read` gives `Question`s, which a prompt style puts into words; benchmarks ask them
        "samples"    `read` gives `Sample`s: whole conversations
        "pairs"      `read` gives samples with a preferred and another answer (see `mmkd.data.preference`)
        "stream"     `stream` gives pass after pass of `Question`s, of data too large to be read at once
    hub: whether the root may also be the name of a data set on the hub.
    own_data: whether users write such files themselves, so that keys which nobody reads are worth a word.
    pictures_by: what names a row's pictures, in words.

    `read` makes its items by `source.made` (or `made_of_file`), which leaves out rows that cannot be used, and counts them.

    All keys may be set by `files` in a recipe's data entry or in a card.
    """

    files: ClassVar[Patterns] = {}
    images: ClassVar[Patterns] = {}
    values: ClassVar[Mapping[str, str]] = {}
    gives: ClassVar[str] = "questions"
    hub: ClassVar[bool] = False
    own_data: ClassVar[bool] = False
    pictures_by: ClassVar[str] = "the keys of the format"
    options: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        cls.options = (*cls.files, *cls.images, *cls.values)
        if cls.gives not in GIVES:
            raise TypeError(f"{cls.__qualname__}.gives is {cls.gives!r}; there are {', '.join(GIVES)}")

    def read(self, source: Source) -> Iterable[Question] | Iterable[Sample]:
        """The questions or samples of one split, in the order of the files. Raises DataError."""
        raise NotImplementedError(f"{type(self).__qualname__} lacks `read`")

    def stream(self, source: Source, seed: int, number: int) -> Iterator[Question]:
        """One pass over a stream: `number` is 0, 1, 2, ..., each in an order of its own that follows from `seed`."""
        raise NotImplementedError(f"{type(self).__qualname__} lacks `stream`")

    def paths(self, source: Source) -> list[Path]:
        """The files that `read` reads, pictures not among them. Raises DataError where one is missing."""
        return [path for key in self.files if source.has(key) for path in source.paths(key)]

    def layout(self, split: str, files: Mapping[str, str] | None = None) -> str:
        """Which files and pictures are looked for below the root, in words; of a format without fixed names its docstring."""
        source = Source("", split, self.files, self.images, self.values, files)
        names = [f"{key}: {source.names(key)}" for key in (*self.files, *self.images) if source.has(key)]
        return "; ".join(names) or (type(self).__doc__ or "").partition("\n")[0].strip()

    def source(
        self, root: Path | str, split: str, files: Mapping[str, str] | None = None, *, target: str = "first", seed: int = 0
    ) -> Source:
        """What `read`, `stream` and `paths` are given. Raises DataError for a root that is missing and keys that are unknown."""
        if not self.hub and not Path(root).is_dir():
            raise DataError(f"data folder {root} does not exist; download the data set or correct the path")
        root = root if self.hub else Path(root)
        return Source(root, split, self.files, self.images, self.values, files, target=target, seed=seed)


def format_of(name: str) -> Format:
    """The format of a name. Raises DataError, with a suggestion, for one that is not registered."""
    known = registry("formats")
    if name not in known:
        raise DataError(f"there is no format {name!r}; {did_you_mean(name, known)}")
    return known.get(name)()


def read_split(
    format: str,
    root: Path | str,
    split: str,
    *,
    files: Mapping[str, str] | None = None,
    target: str = "first",
    limit: int | None = None,
    image_limit: int | None = None,
    seed: int = 0,
    allowed: float = 0.0,
    needs_pictures: bool = False,
    tally: Tally | None = None,
) -> Sequence[Question] | Sequence[Sample]:
    """The questions or samples of one split, in the order of the files: a list, or of a large file a sequence that makes them
    when they are asked for.

    - `files`: where things are under `root`, where that differs from the format's usual places.
    - `target`: which of several answers is trained (see `mmkd.data.selection.choose_target`). A ScienceQA problem has one
      answer; its target differs only where the file has the extra key `answers`. References do not depend on the target, but
      ScienceQA's `answer_index` does: evaluation reads with "first".
    - `limit`, `image_limit`, `seed`: a random part, see `mmkd.data.selection.subset`.
    - `allowed`: the share of rows, rounded up, that may be left out since they cannot be used.
    - `needs_pictures`: whether a split of which no row has a picture is refused.
    - `tally`: gets what was left out, and which keys nobody read.

    Raises DataError for an unknown format, split, target or key of `files`, for ids given twice, for a split that holds
    nothing, for malformed files, for more rows that cannot be used than are allowed (with all reasons), and for a split without
    any picture where these are needed.
    """
    found = format_of(format)
    if found.gives == "stream":
        raise DataError(f"format {format!r} is a stream; it cannot be read at once")
    choose_target(target, seed, "", None, ())  # refuses a target that there is not, whatever the data
    source = found.source(root, split, files, target=target, seed=seed)
    source.tally = tally = Tally() if tally is None else tally
    tally.own = found.own_data
    items = found.read(source)
    items = items if isinstance(items, Sequence) else list(items)
    where = f"split {split!r} of {root}"
    tally.check(allowed)
    if not items:
        raise DataError(f"{where} holds no {found.gives}")
    if not is_lazy(items):
        tally.made(items)
        if found.gives == "questions":
            refuse_duplicates(items, where)
    if needs_pictures:
        tally.refuse_no_pictures(where, found.pictures_by)
    if found.gives == "questions" and target != "first":
        chosen = partial(with_target, target=target, seed=seed)
        items = items.then(chosen) if isinstance(items, Lazy) else [chosen(question) for question in items]
    return subset(items, limit, image_limit, seed)


def read_questions(format: str, root: Path | str, split: str, **options: Any) -> Sequence[Question]:
    """`read_split` of a format that holds questions. Raises DataError for one that does not."""
    refuse_other_than_questions(format)
    return read_split(format, root, split, **options)


def refuse_other_than_questions(format: str) -> None:
    """Raises DataError for a format that does not give questions, which alone can be asked and scored."""
    gives = format_of(format).gives
    if gives != "questions":
        raise DataError(f"format {format!r} holds {gives}, not questions; benchmarks ask questions")
