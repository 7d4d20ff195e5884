"""A teacher whose signals are on disk, as `mmkd cache` writes them: its processor and head are here, its weights are not."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig

import mmkd.towers.encoders  # noqa: F401  registers the encoders that transformers does not know
from mmkd.data.samples import ImageRef, Sample
from mmkd.engine.positions import rows_at
from mmkd.errors import DataError, TowerError
from mmkd.registry import register
from mmkd.teachers.live import load_tower
from mmkd.teachers.opening import Opening
from mmkd.teachers.spec import TeacherSpec
from mmkd.teachers.store import OPEN_SHARDS, About, StoredRows, TeacherCache, content_key
from mmkd.teachers.teacher import Gives, Teacher, TeacherSignals
from mmkd.towers.loading import device_of_process
from mmkd.towers.reading import Reading
from mmkd.towers.tower import Encoded, Seen, Tower

HEAD = "head.safetensors"
_VIEWS = 4096  # bytes of the objects that one sample's views are, about


@register("teachers", "stored")
class StoredTeacher(Teacher):
    """A cache of the teacher's rows; the model itself is loaded only for the visual switch.

    live: the model, through whose projector and language model the switch goes.
    """

    stored = True
    options: ClassVar[tuple[str, ...]] = ("cache",)

    def __init__(
        self,
        folder: str | Path,
        *,
        max_length: int,
        trust_remote_code: bool = False,
        live: Tower | None = None,
        name: str = "teacher",
        positions: Iterable[str] = (),
        features: bool = False,
    ):
        self.name, self.tower = name, live
        self.cache = TeacherCache(folder)
        self.about = self.cache.about
        self.body = _body(self.cache.folder / "teacher", self.about, max_length, trust_remote_code, live)
        self.positions, self.features = frozenset(positions), features
        self._pictures: dict[ImageRef, bytes] = {}  # their hashes: each is read once
        self._agreed = np.zeros(len(self.cache), np.uint64)  # hashes of the tokens that were compared with each entry

    @classmethod
    def open(cls, spec: TeacherSpec, opening: Opening) -> StoredTeacher:
        """The cache of a recipe as its teacher.

        Raises DataError for a cache of another teacher or recipe (with every difference) and for terms that it cannot serve.
        """
        folder = Path(spec.cache)
        about = About.load(folder)
        differences = about.differences(wanted(spec, opening))
        if differences:
            raise DataError(
                f"the teacher cache {folder} does not fit:\n  " + "\n  ".join(differences) + "\nWrite another with "
                "`mmkd cache RECIPE teacher.cache=ANOTHER_FOLDER`, or correct the recipe"
            )
        refused = [
            f"stages.{stage}.terms.{term.name}: {why}"
            for stage, terms in opening.terms.items() for term in terms if (why := term.refusal(gives(about))) is not None
        ]  # fmt: skip
        if refused:
            raise DataError(
                f"these terms cannot run from the {about.mode} cache {folder}:\n  "
                + "\n  ".join(refused)
                + "\nTake them out, or take teacher.cache out to use the live teacher"
            )
        terms = [term for own in opening.terms.values() for term in own]
        spec = spec.model_copy(update={"date": _date(about)})
        live = load_tower(spec, opening.max_length) if any(t.switched for t in terms) else None
        teacher = cls(
            folder, max_length=opening.max_length, trust_remote_code=spec.trust_remote_code, live=live, name=opening.name,
            positions=frozenset().union(*(t.teacher_positions for t in terms)),
            features=any(t.asks("teacher.features") for t in terms),
        )  # fmt: skip
        return teacher.to(device_of_process())

    def to(self, device: torch.device | str) -> StoredTeacher:
        """With the head on a device; a live teacher is where it was loaded to."""
        if self.tower is None and self.about.top_k is None:
            self.body.head.to(device)
        return self

    @property
    def gives(self) -> Gives:
        return gives(self.about)

    def fingerprint(self) -> str:
        return self.about.fingerprint

    def answer_loss(self, inputs: StoredRows) -> float | None:
        rows = int(inputs.where(["response"]).sum())
        return -float(inputs.scores.sum()) / rows if rows else None

    def bytes_to_keep(self, prepared: StoredRows) -> int | None:
        """Rows are views of the mapped shards, unless only some kinds of them were copied out. Where not all shards stay open,
        kept views would hold them open."""
        if len(self.cache.paths) > OPEN_SHARDS:
            return None
        if {*self.about.rows} <= self.positions:
            return _VIEWS
        return _VIEWS + sum(tensor.numel() * tensor.element_size() for tensor in prepared.signal.values())

    def storage(self) -> str:
        return f"teacher cache: {len(self.cache):,} samples, {self.cache.rows:,} rows in {self.cache.folder}"

    def reference_folder(self, default: Path) -> Path:
        return self.cache.folder / "references"

    def running(self) -> Tower:
        if self.tower is None:
            raise TowerError(
                f"the teacher is the cache {self.cache.folder}, which cannot read anything new; add what is missing with "
                "`mmkd cache`, or take teacher.cache out"
            )
        return self.tower

    def check(self, samples: Sequence[Sample]) -> None:
        """Raises DataError for samples whose texts are not in the cache."""
        missing = self.cache.missing(samples)
        if missing:
            names = ", ".join(repr(s.id) for s in missing[:3])
            raise DataError(
                f"{len(missing):,} of {len(samples):,} samples are not in the teacher cache {self.cache.folder} (first: "
                f"{names}): the data or its prompts are others than it was written from; add them with "
                f"`mmkd cache RECIPE teacher.cache={self.cache.folder}`"
            )

    def prepare(self, sample: Sample, encoded: Encoded, *, student: Tower, alike: bool) -> StoredRows:
        """The rows of a sample from the cache. Raises DataError, ImageError."""
        key = content_key(sample, self._pictures)
        stored = self.cache.entry(key, self.positions, self.features)
        if stored is None:
            raise DataError(
                f"sample {sample.id!r} is not in the teacher cache {self.cache.folder}, though its text is: its pictures "
                f"changed; add it with `mmkd cache RECIPE teacher.cache={self.cache.folder}`"
            )
        self._check_once(key, student, encoded, stored)
        return stored

    def _check_once(self, key: bytes, student: Tower, encoded: Encoded, stored: StoredRows) -> None:
        """`_check_tokens`, unless these tokens have passed it before."""
        digest = xxhash.xxh3_64(key)
        for tensor in (encoded.input_ids, encoded.targets):
            digest.update(tensor.contiguous().numpy())
        number, found = self.cache.find(key), digest.intdigest()
        if self._agreed[number] != found:
            self._check_tokens(student, encoded, stored)
            self._agreed[number] = found

    def _check_tokens(self, student: Tower, encoded: Encoded, stored: StoredRows) -> None:
        """Raises DataError where the student does not predict the same tokens at the same rows."""
        inputs = student.collate([Encoded(encoded.id, encoded.input_ids, encoded.targets, {}, encoded.images)])
        tokens = torch.where(inputs.response, inputs.targets, inputs.next_ids)  # [1, L]
        for name in sorted(self.positions):
            own, other = tokens[rows_at(inputs, name)], stored.tokens[stored.where([name])].long()
            if len(own) != len(other) or (name != "visual" and not torch.equal(own, other)):
                raise DataError(
                    f"sample {encoded.id!r}: the student has {len(own)} {name} rows, the cached teacher {len(other)}, or others; "
                    "both need the same tokenizer and chat template, max_length must hold the answer in both, and terms on "
                    "visual positions need as many visual tokens in both"
                )

    def collate(self, prepared: Sequence[StoredRows]) -> StoredRows:
        return StoredRows.join(prepared)

    def say(self, inputs: StoredRows, host: Any, *, shared: Seen | None = None, differentiable: bool = False) -> StoredSignals:
        return StoredSignals(inputs)


@dataclass
class StoredSignals(TeacherSignals):
    """What a cache has of a batch."""

    stored: StoredRows

    def rows(self, positions: Iterable[str], samples: Sequence[bool] | None = None) -> dict[str, Tensor]:
        return self.stored.at(positions, samples)

    def visual_rows(self) -> Sequence[Tensor]:
        return self.stored.at(["visual"])["hidden"].split(self.stored.images)

    def features(self) -> list[Tensor]:
        return self.stored.features


def gives(about: About) -> Gives:
    """What a cache gives."""
    exact = ("visual_rows", "gram") if about.top_k is None else ()
    signals = {"rows", "switch", *exact, *(("features",) if about.features else ())}
    return Gives("the cache", frozenset(signals), frozenset(about.rows), about.top_k, about.mode)


def wanted(spec: TeacherSpec, opening: Opening) -> dict[str, Any]:
    """What entries depend on, as a recipe has it (see `About`). Raises DataError for stages of different precision."""
    precisions = dict(opening.precision)
    if len(set(precisions.values())) > 1:
        raise DataError(f"the stages' precision differs ({precisions}), but a cache is of one; give them the same `precision`")
    return {
        "model": spec.model,
        "dtype": spec.dtype,
        "quantise": spec.quantise,
        "max_length": opening.max_length,
        "precision": next(iter(precisions.values()), "float32"),
        "reading": spec.reading_keys,
    } | ({"date": spec.date.isoformat()} if spec.date else {})


def _body(folder: Path, about: About, max_length: int, trust_remote_code: bool, live: Tower | None) -> Tower:
    """Configuration, processor and (exact mode) head of a teacher, as a tower whose other weights are absent."""
    about.check_body(folder.parent)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    if live is not None:
        model.set_output_embeddings(live.head)
    elif about.top_k is None:
        model.set_output_embeddings(_head(folder / HEAD))
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    reading = Reading(thinking=about.reading.get("thinking"), date=_date(about))  # the rest was saved with the processor
    body = Tower(model, processor, max_length=max_length, reading=reading)
    body.logit_rule = tuple(about.logit_rule)
    return body.freeze()


def _date(about: About) -> dt.date | None:
    return None if about.date is None else dt.date.fromisoformat(about.date)


def _head(path: Path) -> nn.Linear:
    tensors = load_file(path)
    rows, width = tensors["weight"].shape
    head = nn.Linear(width, rows, bias="bias" in tensors, dtype=tensors["weight"].dtype, device="meta")
    head.load_state_dict(tensors, assign=True)
    return head


def save_body(teacher: Tower, folder: Path, with_head: bool) -> None:
    """What `StoredTeacher.body` is made of."""
    teacher.model.config.save_pretrained(folder)
    teacher.model.generation_config.save_pretrained(folder)
    teacher.processor.save_pretrained(folder)
    if with_head:
        head = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in teacher.head.state_dict().items()}
        save_file(head, folder / HEAD)
