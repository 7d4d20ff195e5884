"""The teacher behind one small interface: a model in this process, a cache on disk, or whatever else answers for one.

body      configuration and processor of the teacher: prepares samples as it reads them (its weights may be absent)
gives     which signals it can give
prepare   one sample, in the process that reads data
collate   a batch of these
say       what the teacher says of the batch, computed when it is asked for
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mmkd.data.samples import Sample
from mmkd.engine.rows import Head
from mmkd.errors import TowerError
from mmkd.teachers.view import View
from mmkd.towers.inputs import with_answer_ids
from mmkd.towers.tower import Encoded, Seen, Tower, TowerInputs


@dataclass(frozen=True)
class Gives:
    """What a teacher can give.

    name: for messages, "the exact cache runs/cache".  mode: "exact" or "top-8".
    signals: names without "teacher.", and "switch" where the student's features can go through it.
    positions: kinds of rows; None for all.  top_k: how many logits of a row are known; None for all.
    why: why it gives no more, where that is the model's own nature.
    """

    name: str
    signals: frozenset[str]
    positions: frozenset[str] | None = None
    top_k: int | None = None
    mode: str = "exact"
    why: str = ""

    def lacks(self, needs: Iterable[str], positions: frozenset[str]) -> str | None:
        """Why a term with these needs cannot be served; None if it can."""
        wanted = {need.partition(".")[2] for need in needs if need.startswith("teacher.")} | {
            "switch" for need in needs if need.startswith("switch.")
        }
        short = self.positions is not None and not positions <= self.positions
        if self.why and (short or not wanted <= self.signals):
            rows = f"{_names(positions - (self.positions or frozenset()))} rows" if short else _names(wanted - self.signals)
            return f"needs {rows.replace('_', ' ')} of the teacher, but {self.why}; take the term out, or another teacher"
        if short:
            return f"needs {_names(positions)} rows, {self.name} has {_names(self.positions)}; write it anew"
        for need in needs:
            side, _, signal = need.partition(".")
            wanted = "switch" if side == "switch" else signal
            if side in ("teacher", "switch") and wanted not in self.signals:
                words = ABSENT.get(wanted, "needs {signal} of the teacher, which is not in {name}")
                return words.format(signal=signal, name=self.name)
        return None


ABSENT = {
    "features": "the teacher's vision features are not in {name}; write it with this recipe",
    "switch": "puts the student's features through the teacher, which {name} cannot do",
    "gram": "needs the teacher's head, which is not in {name}",
    "visual_rows": "needs the teacher's hidden rows at visual tokens, which are not in {name}",
}


def _names(positions: Iterable[str]) -> str:
    return " and ".join(sorted(positions)) or "no"


class TeacherSignals(ABC):
    """What a teacher says of one batch. Each signal is computed at most once, and only if it is asked for."""

    @abstractmethod
    def rows(self, positions: Iterable[str], samples: Sequence[bool] | None = None) -> dict[str, Tensor]:
        """At the rows of these kinds, of these samples or of all, in the order of the batch: "hidden" [R, Dt], or what a
        top-k cache keeps (`teachers.store.TOP_K`)."""

    @abstractmethod
    def visual_rows(self) -> Sequence[Tensor]:
        """Hidden rows at the visual tokens, one [N, Dt] an image."""

    @abstractmethod
    def features(self) -> list[Tensor]:
        """Vision features of each image, [n_i, Dv], as tensors that autograd may keep."""

    def hidden(self) -> Tensor:
        """Last hidden states. [B, L, Dt]"""
        raise TowerError("this teacher has no hidden states of whole sequences")


class Teacher(ABC):
    """A frozen model that a student is compared with."""

    name: str = "teacher"
    body: Tower
    tower: Tower | None = None  # the model itself, where it can be run here
    stored: bool = False  # what it says is on disk already
    remote: bool = False  # it runs elsewhere and is asked for what it says
    of_student: bool = False  # it is made of the student, so it is no better at first and is not scored beside it
    view_of_sample: View | None = None  # what it sees of a sample; None for what the student sees

    @property
    @abstractmethod
    def gives(self) -> Gives:
        """What it can give."""

    @abstractmethod
    def prepare(self, sample: Sample, encoded: Encoded, *, student: Tower, alike: bool) -> Any:
        """What stands for a sample in `collate`.

        encoded: the sample as the student prepares it.  alike: whether the teacher's processor makes the same of it.
        Raises DataError, ImageError.
        """

    def ask(self, sample: Sample, encoded: Encoded, *, alike: bool) -> Encoded:
        """A sample's prompt as it reads it, to which `answered` puts an answer. encoded: as the student prepares it."""
        return encoded if alike else self.body.encode(self.view(sample), with_answer=False)

    def answered(self, sample: Sample, prompt: Encoded, ids: Sequence[int]) -> Encoded:
        """The sample with these tokens of this teacher as its answer. prompt: of `ask`."""
        return with_answer_ids(prompt, ids)

    def prepared(self, sample: Sample, own: Encoded) -> Any:
        """What stands for a sample in `collate`. own: the sample as this teacher's processor prepares it."""
        return own

    @abstractmethod
    def collate(self, prepared: Sequence[Any]) -> Any:
        """A batch of prepared samples, with `to` and `pin_memory`."""

    @abstractmethod
    def say(self, inputs: Any, host: Any, *, shared: Seen | None = None, differentiable: bool = False) -> TeacherSignals:
        """What it says of a collated batch.

        host: the same batch on the CPU.  shared: what the student's encoder saw, where it is the teacher's own.
        differentiable: whether gradients pass through its modules in this step (the visual switch).
        """

    def view(self, sample: Sample) -> Sample:
        """A sample as it is shown to it. Raises SampleError."""
        return sample if self.view_of_sample is None else self.view_of_sample(sample)

    def alike(self, student: Tower) -> bool:
        """Whether it reads every sample as the student does, so that it need be prepared only once."""
        return self.view_of_sample is None and same_processor(student, self.body)

    # ---- of one that is made of the student; others do nothing ----

    def meet(self, student: Tower) -> None:  # noqa: B027
        """The student is built, not yet trained."""

    def begin(self, student: Tower) -> None:  # noqa: B027
        """A stage begins with this student."""

    def after_step(self) -> None:  # noqa: B027
        """An optimiser step has been made."""

    def save_state(self, folder: Path) -> None:  # noqa: B027
        """Writes what it carries from step to step into a checkpoint."""

    def load_state(self, folder: Path) -> None:  # noqa: B027
        """Reads it again."""

    def check(self, samples: Sequence[Sample]) -> None:  # noqa: B027  most teachers can read any sample
        """Before step 1: raises DataError where it has nothing to say of some samples."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of weights and processor."""

    def shares_encoder(self, student: Tower, inputs: Any) -> bool:
        """Whether one pass of the vision encoder serves both on these inputs, which must be the same for both."""
        return False

    def answer_loss(self, inputs: Any) -> float | None:
        """Of a stored teacher: its mean cross-entropy on the answers of a batch; None where it keeps no answer rows."""
        return None

    def bytes_to_keep(self, prepared: Any) -> int | None:
        """Of a stored teacher: memory of what `prepare` gave, to keep it for the next epoch; None where it is read anew then."""
        return None

    def storage(self) -> str | None:
        """Of a stored teacher: how much is kept and where."""
        return None

    def reference_folder(self, default: Path) -> Path:
        """Where log-probabilities of preference pairs under this teacher are kept; `default`: beside the runs."""
        return default

    def running(self) -> Tower:
        """The model itself. Raises TowerError where it is not loaded."""
        if self.tower is None:
            raise TowerError(f"{self.name}: the model itself is needed here, but it is not loaded")
        return self.tower

    # ---- what is the same for all ----

    @property
    def tokenizer(self) -> Any:
        return self.body.tokenizer

    @property
    def vocabulary(self) -> int:
        return self.body.vocabulary

    @property
    def feature_width(self) -> int:
        return self.body.feature_width

    @property
    def logit_rule(self) -> tuple[float, float | None]:
        return self.body.logit_rule

    @property
    def head(self) -> Head:
        return head_of(self.body)


def head_of(tower: Tower) -> Head:
    """The tower's head as the row engine takes it, with what its family puts on the logits."""
    scale, softcap = tower.logit_rule
    return Head(weight=tower.head.weight, bias=tower.head_bias, scale=scale, softcap=softcap)


def read_by(tower: Tower, inputs: TowerInputs, seen: Seen) -> Tensor:
    """Hidden states over what was seen, by another tower's encoder perhaps. [B, L, D]"""
    return tower.read(inputs, seen.tokens if seen.output is None else seen)


def same_processor(student: Tower, teacher: Tower) -> bool:
    """Whether both towers prepare every sample alike, so that it need be done only once."""
    return student.processor_fingerprint() == teacher.processor_fingerprint()


def check_vocabularies(student: Tower, teacher: Tower) -> None:
    """Both tokenizers must give every token the same id, but for tokens added to one of them only and those that stand for
    pictures, which no answer holds.

    Padding rows of a head do not matter. Raises TowerError for unrelated tokenizers.
    """
    pictures = {t.tokenizer.convert_ids_to_tokens(t.image_token_id) for t in (student, teacher) if t.has_visual_tokens}
    differing = differing_tokens(student.tokenizer, teacher.tokenizer) - pictures
    if differing:
        raise TowerError(
            f"{len(differing):,} tokens of the student's {len(student.tokenizer):,} and the teacher's {len(teacher.tokenizer):,} "
            f"have another id or none in the other tokenizer (for example {sorted(differing)[:3]}), so their logits cannot be "
            "compared; build the student on a language model with the teacher's tokenizer, or compare spans of text "
            "(teacher.alignment=spans and the term spans)"
        )


def differing_tokens(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> set[str]:
    """Tokens with another id in the other tokenizer, or none; those that were added to one of them alone do not count."""
    ids, others = one.get_vocab(), other.get_vocab()
    added = {*one.get_added_vocab(), *other.get_added_vocab()}
    return {t for t in {*ids, *others} if ids.get(t) != others.get(t) and (t not in added or (t in ids and t in others))}
