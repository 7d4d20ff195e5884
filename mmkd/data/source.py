"""Where one split's files and pictures lie: what a format reads from.

Paths are relative to the data set's root. `{split}` in a pattern stands for the split, other placeholders for fields of a
row. A part of a path that ends in .zip is an archive, the rest a name inside it. What a row names cannot leave the folder or
archive that stands in front of the pattern's first field of a row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mmkd.data.annotations import Row, as_list, load, load_object, one_line, shown
from mmkd.data.large import large_items
from mmkd.data.row_files import Unread, is_large, unread_rows
from mmkd.data.samples import ImageRef
from mmkd.data.selection import choose_target
from mmkd.data.tables import parquet_rows, tsv_rows
from mmkd.data.tally import Tally
from mmkd.errors import DataError, did_you_mean

T = TypeVar("T")
Patterns = Mapping[str, str | Sequence[str]]  # key -> pattern, or patterns that are tried in order

_PLACEHOLDER = re.compile(r"\{(\w*)\}")
_SPLIT_NAME = re.compile(r"[\w.-]*\w[\w.-]*")


@dataclass(frozen=True)
class _Place:
    """Where pictures are: names made from `tail` inside the folder or archive `base`."""

    base: Path
    tail: str

    def ref(self, where: str, fields: Mapping[str, str]) -> ImageRef:
        name = _PLACEHOLDER.sub(lambda found: fields[found[1]], self.tail)
        try:
            return ImageRef.inside(self.base, name)
        except DataError as error:
            raise DataError(f"{where}: {error}" if where else str(error)) from error


class Source:
    """One split of a data set, and the places of its files by the keys that its format declares.

    root: the folder (of a data set on the hub, its id as text). split: its name.
    """

    def __init__(
        self,
        root: Path | str,
        split: str,
        files: Patterns,
        images: Patterns,
        values: Mapping[str, str],
        given: Mapping[str, str] | None = None,
        *,
        target: str = "first",
        seed: int = 0,
    ) -> None:
        """`files`, `images` and `values` are the format's (see `mmkd.data.formats.Format`); what is `given` wins.

        Raises DataError for an unknown or empty key of `given`, and for a split that is no name.
        """
        if not _SPLIT_NAME.fullmatch(split):
            raise DataError(f"split {split!r} is no name of a split")
        self.root, self.split = root, split
        self._target, self._seed = target, seed
        self.tally = Tally()
        self._patterns = {key: _listed(value) for key, value in {**files, **images}.items()}
        self._values = dict(values)
        self.places: dict[str, _Place] = {}
        for key, value in dict(given or {}).items():
            self._take(key, value, images)

    def _take(self, key: str, value: Any, images: Patterns) -> None:
        known = (*self._patterns, *self._values)
        if key not in known:
            raise DataError(f"files has the unknown key {key!r}; {did_you_mean(key, known)}")
        if not isinstance(value, str) or (not value and key in images):
            raise DataError(f"files['{key}'] is {value!r}; a path or pattern is expected")
        if key in self._values:
            self._values[key] = value
            return
        if key not in images:
            _check_placeholders(value, {"split"})
        self._patterns[key] = (value,)

    def of_split(self, split: str) -> Source:
        """The same files' other split."""
        other = copy(self)
        other.split, other.places = split, {}
        return other

    # ---- annotations -------------------------------------------------------------------------------------------------

    def value(self, key: str) -> str:
        """The text of a key of `values`."""
        return self._fill(self._values[key])

    def names(self, key: str) -> str:
        """The patterns of a key with the split's name in them, for messages."""
        return " or ".join(map(self._fill, self._patterns[key]))

    def has(self, key: str) -> bool:
        """Whether there is such a file at all: files of the pattern "" are left out."""
        return any(self._patterns[key])

    def path(self, key: str = "annotations") -> Path:
        """The file of a key: the first of its patterns under which there is one. Raises DataError where there is none."""
        return self._first(key, Path.is_file, "file")

    def folder(self, key: str) -> Path:
        """The folder of a key. Raises DataError where there is none."""
        return self._first(key, Path.is_dir, "folder")

    def paths(self, key: str) -> list[Path]:
        """All files of a key, whose pattern may hold `*`, in the order of their names. Raises DataError where there is none."""
        patterns = [self._fill(pattern) for pattern in self._patterns[key] if pattern]
        found = next((sorted(there) for pattern in patterns if (there := list(self._glob(pattern)))), [])
        if patterns and not found:
            return [self.path(key)]
        return found

    def _first(self, key: str, is_there: Any, what: str) -> Path:
        if not self.has(key):
            raise DataError(f"files['{key}'] is ''; a path or pattern is expected")
        patterns = self._patterns[key]
        for pattern in patterns:
            path = Path(self.root) / self._fill(pattern)
            if is_there(path):
                return path
        others = sorted({split for pattern in patterns for split in self._splits(pattern)})
        if others:
            raise DataError(f"{self.root} has no split {self.split!r} ({self.names(key)}); there are {', '.join(others)}")
        raise DataError(f"{self.root} has no {what} {self.names(key)}; get it, or name the {what} by files['{key}']")

    def rows(self, key: str = "annotations", inner: str = "", names: Mapping[str, str] | None = None) -> list[Row]:
        """The rows of a file: of its list, of its JSON lines, or of the list `inner` of its object.

        `names`: as in `Row`. Raises DataError for whatever is wrong with the file or a row.
        """
        return [row() for row in self.unread(key, inner, names)]

    def unread(self, key: str = "annotations", inner: str = "", names: Mapping[str, str] | None = None) -> Sequence[Unread]:
        """The same rows, each still to be read, so that `made` can count those that are none."""
        path, used = self.path(key), self.tally.used
        if not inner:
            return unread_rows(path, names, used)
        entries = as_list(path, Row(load(path), str(path)).get(inner), f" as {inner!r}")
        return [partial(Row, value, f"{path} entry {n}", names, n, used) for n, value in enumerate(entries)]

    def made(self, rows: Iterable[Row | Unread], make: Callable[[Row], T]) -> list[T]:
        """What `make` makes of each row. Rows for which it raises DataError are left out and counted in `tally`.

        Who reads the split says how many may be left out: none in an evaluation, a small share in training.
        """
        items = []
        for entry in rows:
            self.tally.rows += 1
            try:
                row = entry if isinstance(entry, Row) else entry()
                row.used = self.tally.used
                self.tally.keys.update(row.value.keys())
                items.append(make(row))
            except DataError as error:
                self.tally.drop(_where(entry), error)
        return items

    def made_of_file(
        self, make: Callable[[Row], T], key: str = "annotations", names: Mapping[str, str] | None = None
    ) -> Sequence[T]:
        """What `make` makes of the rows of a JSON list or of JSON lines, as `made`. Of a large file items are made when they are
        asked for, so `make` must not remember other rows, and must be something that processes can send to one another."""
        path = self.path(key)
        if is_large(path):
            return large_items(path, dict(names or {}), make, self.tally, [self.split, self._values, self._patterns])
        return self.made(self.unread(key, names=names), make)

    def objects(self, key: str = "annotations") -> dict[str, Row]:
        """The rows of a file that is an object of objects, by their names. Raises DataError as `rows` does."""
        path = self.path(key)
        return {name: Row(value, f"{path} {shown(name)}") for name, value in load_object(path).items()}

    def _fill(self, pattern: str) -> str:
        return pattern.replace("{split}", self.split)

    def _glob(self, pattern: str) -> Iterator[Path]:
        if Path(pattern).is_absolute():
            path = Path(pattern)
            return iter([path] if path.is_file() else [])
        return (path for path in Path(self.root).glob(pattern) if path.is_file())

    def _splits(self, pattern: str) -> list[str]:
        """The splits that have a file of this pattern."""
        if "{split}" not in pattern or Path(pattern).is_absolute():
            return []
        head, _, tail = pattern.partition("{split}")
        expression = re.compile(re.escape(head) + r"([^/]+?)" + re.escape(tail.replace("{split}", "*")))
        there = (path.relative_to(self.root).as_posix() for path in Path(self.root).glob(pattern.replace("{split}", "*")))
        return [match[1] for name in there if (match := expression.fullmatch(name))]

    # ---- pictures ----------------------------------------------------------------------------------------------------

    def image(self, name: str | None = None, *, where: str = "", key: str = "images", **fields: str) -> ImageRef:
        """The picture called `name`, or the one that a pattern makes of a row's `fields`.

        The first picture that is asked for settles which of several patterns holds for all: the first under which it exists.
        `split` among the fields stands for the split. `where` leads the DataError for a name that leaves its root.
        """
        if name is not None:
            fields = {"name": name, **fields}
        place = self.places.get(key)
        if place is None:
            place = self.places[key] = self._find(key, fields)
        return place.ref(where, fields)

    def _find(self, key: str, fields: Mapping[str, str]) -> _Place:
        patterns = self._patterns[key]
        for pattern in patterns:
            _check_placeholders(pattern, {*fields, "split"})
        places = [self._place(pattern, fields) for pattern in patterns]
        if len(places) == 1:
            return places[0]
        for place in places:
            try:
                ref = place.ref("", fields)
            except DataError:  # a wrong name; the error comes with its row
                continue
            if ref.exists():
                return place
        return next((place for place in places if place.base.exists()), places[0])

    def _place(self, pattern: str, fields: Mapping[str, str]) -> _Place:
        pattern = pattern if "split" in fields else self._fill(pattern)
        if "name" in fields and "{" not in pattern:
            pattern += "/{name}"  # a folder or archive of pictures that rows name
        parts = pattern.split("/")
        fixed = next((i for i, part in enumerate(parts) if "{" in part), len(parts))
        archive = next((i + 1 for i, part in enumerate(parts[:fixed]) if part.endswith(".zip")), fixed)
        if archive == len(parts):
            names = ", ".join(f"{{{name}}}" for name in fields)
            raise DataError(f"files['images'] is {pattern!r}, the same for all rows; it needs {names}")
        return _Place(Path(self.root) / "/".join(parts[:archive]), "/".join(parts[archive:]))

    # ---- answers -----------------------------------------------------------------------------------------------------

    def choose(self, name: str, first: T, answers: Sequence[T]) -> T:
        """Which of several answers to the question `name` is trained, by the entry's `target`.

        Of a question's references it is chosen after reading; a format asks only where others are to be chosen from.
        """
        return choose_target(self._target, self._seed, name, first, answers)


def _where(entry: Row | Unread) -> str:
    """Where a row stands that may not have been read."""
    if isinstance(entry, Row):
        return entry.where
    given = getattr(entry, "args", ())
    return next((text for text in given[1:2] if isinstance(text, str)), "")


def table(path: Path) -> tuple[dict[str, Any], ...]:
    """The rows of a .tsv or .parquet file. Raises DataError."""
    reader = tsv_rows if path.suffix == ".tsv" else parquet_rows
    try:
        return reader(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not in UTF-8 (byte {error.start}); convert it to UTF-8") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}; is the download complete?") from error


def _listed(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _check_placeholders(pattern: str, known: set[str]) -> None:
    unknown = set(_PLACEHOLDER.findall(pattern)) - known
    if unknown:
        raise DataError(
            f"pattern {pattern!r} has the unknown placeholder {{{min(unknown)}}}; "
            f"there are {', '.join('{' + name + '}' for name in sorted(known))}"
        )
