"""Samples that training leaves out, and why: counted by reason, the first few named, up to a limit."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from mmkd.base.distributed import of_all
from mmkd.base.files import write_whole
from mmkd.base.jsonl import JsonLines, lines_of
from mmkd.base.run_folder import SKIPPED
from mmkd.data.samples import Sample
from mmkd.errors import DataError, ImageError, SampleError

logger = logging.getLogger(__name__)

NAMED = 5  # samples of one reason that are named
LEFT_OUT = (ImageError, SampleError)  # errors that concern one sample alone


@dataclass(frozen=True)
class Skip:
    """A sample that is left out. index: its place in the data set, -1 in a stream.  reason: the same words for all like it."""

    index: int
    id: str
    reason: str
    message: str

    @staticmethod
    def of(sample: Sample, error: Exception, index: int = -1, where: str = "") -> Skip:
        """`where`: the tower that could not prepare it."""
        message = f"{where}{error}"
        return Skip(index, sample.id, reason_of(message, sample), message)


def reason_of(message: str, sample: Sample) -> str:
    """What a message says of any sample: without names, numbers and addresses."""
    for name in sorted({repr(sample.id), *(ref.key for ref in sample.images)}, key=len, reverse=True):
        message = message.replace(f" {name}", "")
    return re.sub(r"0x[0-9a-f]+|\d[\d,]*(\.\d+)?", "N", " ".join(message.split()))[:160]


def allowance(share: float, samples: int) -> int:
    """How many of so many samples may be left out: the share, rounded up."""
    return math.ceil(share * samples)


def by_reason(skips: Iterable[Skip]) -> dict[str, list[Skip]]:
    """The skips of each reason, the commonest first."""
    found: dict[str, list[Skip]] = {}
    for skip in skips:
        found.setdefault(skip.reason, []).append(skip)
    return dict(sorted(found.items(), key=lambda entry: -len(entry[1])))


def in_words(skips: Iterable[Skip]) -> str:
    """Counts by reason, the first few samples of each named."""
    return "; ".join(
        f"{len(own)} {reason} ({', '.join(skip.id for skip in own[:NAMED])}{', ...' if len(own) > NAMED else ''})"
        for reason, own in by_reason(skips).items()
    )


class Skips:
    """The samples of one stage that were left out so far.

    allowed: so many may be; one more raises.  of: samples of the stage; None of a stream, of which `share` may be left out of
    those that were `seen`.
    """

    def __init__(self, allowed: int, of: int | None, share: float | None = None):
        self.allowed, self.of, self.share = allowed, of, share
        self.seen = 0
        self.found: dict[tuple[int, str], Skip] = {}
        self._file: JsonLines | None = None
        self._stage = ""

    def __len__(self) -> int:
        return len(self.found)

    def add(self, skip: Skip) -> None:
        """Counts a sample, once however often it comes. Raises DataError for one too many."""
        key = (skip.index, skip.id)
        if key in self.found:
            return
        self.found[key] = skip
        alike = sum(other.reason == skip.reason for other in self.found.values())
        if alike <= NAMED:
            more = "; further ones are counted" if alike == NAMED else ""
            logger.warning("skipped %s (%d so far): %s%s", skip.id, len(self), skip.message, more)
        if self._file is not None:
            self._file.append([{"stage": self._stage, **asdict(skip)}])
        limit = self.allowed if self.of is not None else max(self.allowed, allowance(self.share or 0.0, self.seen))
        if len(self) > limit:
            of = f"{self.of} training samples" if self.of is not None else f"the first {self.seen} samples of a stream"
            raise DataError(
                f"{len(self)} of {of} cannot be used, more than the {limit} that guards.max_skipped allows: "
                f"{in_words(self.found.values())}. The last: {skip.message}"
            )

    def of_all_processes(self) -> list[Skip]:
        """What all processes left out; the main one, whose file it is, writes what others met. All must call it."""
        new = {key: skip for part in of_all(self.found) for key, skip in part.items() if key not in self.found}
        if self._file is not None and new:
            self._file.append([{"stage": self._stage, **asdict(skip)} for skip in new.values()])
        self.found |= new
        return list(self.found.values())

    def keep_in(self, file: JsonLines | None, stage: str, *, anew: bool = False) -> None:
        """Goes on with what `file` says of the stage, and writes what comes to it; None for a process that writes nothing.

        anew: the stage begins now, so what an earlier try left out no longer counts.
        """
        self._stage, self._file = stage, file
        if file is not None:
            file.path.parent.mkdir(parents=True, exist_ok=True)
            file.drop_torn_line()
            rows = file.rows()
            if anew and any(row.get("stage") == stage for row in rows):
                write_whole(file.path, lines_of(row for row in rows if row.get("stage") != stage))
            names = Skip.__dataclass_fields__
            for row in () if anew else rows:
                if row.get("stage") == stage:
                    skip = Skip(**{name: row[name] for name in names})
                    self.found.setdefault((skip.index, skip.id), skip)
            known = {(row["index"], row["id"]) for row in (() if anew else rows) if row.get("stage") == stage}
            new = [{"stage": stage, **asdict(skip)} for key, skip in self.found.items() if key not in known]
            if new:
                file.append(new)


def skipped_file(run: Path, role: str) -> Path:
    """Where a run says which samples were left out of the training of its control or its student."""
    return run / "log" / f"{role}{SKIPPED}"


def skipped_counts(run: Path, role: str) -> dict[str, dict[str, int]]:
    """By stage how many samples were left out for which reason."""
    counts: dict[str, dict[str, int]] = {}
    for row in JsonLines(skipped_file(run, role)).rows():
        stage = counts.setdefault(row["stage"], {})
        stage[row["reason"]] = stage.get(row["reason"], 0) + 1
    return counts
