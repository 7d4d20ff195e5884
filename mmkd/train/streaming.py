"""A stream of samples as the training set of a stage."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import IterableDataset, get_worker_info

from mmkd.data.entries import stream_of
from mmkd.data.stream import Stream
from mmkd.errors import DataError
from mmkd.train.batch import Pair
from mmkd.train.collate import Collator, PairDataset
from mmkd.train.skips import Skip, Skips
from mmkd.train.spec import StageSpec


class StreamDataset(IterableDataset):
    """Pairs of an endless stream, prepared as `head` (the stage's data set of the stream's first samples) prepares them.

    together: samples of one micro-batch of all processes. Workers take turns by these, so that their number does not matter.
    """

    def __init__(self, head: PairDataset, stream: Stream, together: int, begin: int = 0):
        self.head, self.stream, self.together, self.begin = head, stream, together, begin

    @property
    def collator(self) -> Collator:
        return self.head.collator

    @property
    def skips(self) -> Skips:
        return self.head.skips

    def __iter__(self) -> Iterator[Pair | Skip]:
        worker = get_worker_info()
        mine, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for number, sample in enumerate(self.stream):
            if number >= self.begin and (number - self.begin) // self.together % workers == mine:
                yield self.head.prepare(sample)


def stage_stream(stage: StageSpec, seed: int, data_root: str | None, allowed: float = 0.0) -> Stream | None:
    """The stream that a stage's data are, or None. Raises DataError for what does not go together with one.

    allowed: the share of rows that may be left out since they cannot be used.
    """
    apart = bool(stage.one_answer)
    streams = [stream for spec in stage.data if (stream := stream_of(spec, seed, data_root, allowed, apart)) is not None]
    if not streams:
        return None
    wrong = ["further data entries"] * (len(stage.data) > 1) + ["`epochs` (give `steps`)"] * (stage.steps is None)
    for key in ("mixup", "views", "asked"):
        wrong += [f"`{key}`"] * any(getattr(spec, key) is not None for spec in stage.data)
    wrong += ["`group_by_length`"] * stage.group_by_length + ["`sampler`"] * (stage.sampler is not None)
    if wrong:
        raise DataError(f"a stage of streamed data goes together with no {', no '.join(wrong)}")
    return streams[0]
