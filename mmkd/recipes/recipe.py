"""The recipe: one YAML file that says everything about a distillation run.

The keys of a part are defined beside the code that reads them (`data/spec.py`, `towers/spec.py`, `teachers/spec.py`,
`terms/spec.py`, `train/spec.py`); here they are put together. `recipes/reading.py` reads a file.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_validator, model_validator

from mmkd.base.schema import Strict, is_default
from mmkd.errors import did_you_mean, shown
from mmkd.recipes.controls import DEFAULT, ControlSpec, changed, named
from mmkd.recipes.rounds import RoundsSpec, written_out
from mmkd.recipes.writes import split_stages, write_errors
from mmkd.teachers.spec import TeacherSpec
from mmkd.terms.term import Term, terms_of_teacher
from mmkd.towers.spec import StudentSpec
from mmkd.train.spec import ReportSpec, Seed, StageSpec, TrainSpec
from mmkd.writing.spec import WriteSpec

# Keys of which a run may go on with other values: they do not change what it has learnt so far. `max_length` changes which
# samples are left out or cut from here on; data go by content, wherever they lie.
CHANGEABLE = (
    "max_length", "guards", "guards.*", "evaluation", "evaluation.*", "workers", "data_root", "chunk_bytes", "report_to",
    "stages.*.save_every", "stages.*.log_every", "stages.*.gradient_checkpointing",
)  # fmt: skip


class ValidationSpec(Strict):
    """The part of the benchmarks' data on which anything is chosen; never that on which the student is scored."""

    split: str  # the benchmarks' split that is asked
    limit: int | None = Field(None, gt=0)  # a random part of so many questions of each


class EvaluationSpec(Strict):
    benchmarks: list[str] = Field([])  # names of `mmkd list evaluation`, or files of cards
    limit: int | None = Field(None, gt=0)  # a random part of so many questions of each, the same every time
    batch_size: int = Field(64, gt=0, le=2**16)  # questions that are asked at once
    blind: bool = False  # also score the student without its pictures
    every: int | None = Field(None, gt=0)  # also score the student in training, every so many steps
    # A split of the benchmarks that `every`, `until: plateau` and the control `tuned` ask, in place of that of the final scores.
    validation: ValidationSpec | None = Field(None, exclude_if=is_default(None))

    @field_validator("validation", mode="before")
    @classmethod
    def by_split(cls, given: Any) -> Any:
        """`validation: val` means {split: val}."""
        return {"split": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def something_to_ask(self) -> EvaluationSpec:
        if self.every and not self.benchmarks:
            raise ValueError(f"every is {self.every}, but there are no benchmarks to ask; name some in `benchmarks`")
        return self


class RunSpec(ReportSpec):
    """What every recipe says of its run."""

    title: str  # one line for logs and reports
    imports: list[str] = Field([], exclude_if=is_default([]))  # modules of your own that register terms, formats, metrics, ...
    output: str  # the run's folder; the same recipe goes on with what is there
    data_root: str | None = None  # folder that holds the data sets of cards, for training and for benchmarks
    seed: Seed = 0  # moves everything that is drawn: batches, fresh weights, dropout, subsets of the data


class Recipe(RunSpec, TrainSpec):
    # Draws questions (`limit`, `image_limit`, fractions of `weight`) and sampled labels; default: the seed. With it given,
    # several seeds train on the same questions and labels.
    data_seed: Seed | None = Field(None, exclude_if=is_default(None))
    teacher: TeacherSpec | None = None  # the model that is learnt from
    teachers: dict[str, TeacherSpec] = Field({}, exclude_if=is_default({}))  # several by name; a term says `teacher: NAME`
    student: StudentSpec  # the model that learns
    stages: dict[str, StageSpec] = Field(min_length=1)  # what is trained, one stage after the other, by names of your own
    # Those of `stages` that write data (`kind: write`), each with the train stage that it stands before.
    writes: dict[str, WriteSpec] = Field({}, exclude_if=is_default({}))
    # stages that run several times in a row
    rounds: RoundsSpec | None = Field(None, exclude_if=is_default(None))
    written: dict[str, str] = Field({}, exclude=True)  # while a run goes on: by write stage the folder of its rows
    # what the student is held against; `control: false`: nothing
    controls: dict[str, ControlSpec] = {name: ControlSpec(kind=name) for name in DEFAULT}  # noqa: RUF012
    evaluation: EvaluationSpec = EvaluationSpec()  # what all models are asked at the end

    @model_validator(mode="before")
    @classmethod
    def writes_apart(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("written"):
            raise ValueError("written: unknown key; a run finds out by itself where rows are")
        return split_stages(written_out(given)) if isinstance(given, dict) else given

    @field_validator("stages", "controls", "writes")
    @classmethod
    def names_are_folders(cls, given: dict[str, Any]) -> dict[str, Any]:
        for name in given:
            if not re.fullmatch(r"[\w.-]{1,100}", name) or set(name) == {"."}:
                raise ValueError(f"{shown(name)} names a folder: use letters, digits, _, - and ., at most 100")
        return given

    @model_validator(mode="before")
    @classmethod
    def one_control_key(cls, given: Any) -> Any:
        """`control: true` and `control: false` are short for the default controls and for none."""
        if not isinstance(given, dict) or "control" not in given:
            return given
        if "controls" in given:
            raise ValueError("give either `control` (true or false) or `controls`")
        if not isinstance(given["control"], bool):
            raise ValueError(f"control is {given['control']!r}; write true or false, or say which in `controls`")
        return {("controls" if key == "control" else key): value for key, value in given.items()}

    @field_validator("controls", mode="before")
    @classmethod
    def by_name(cls, given: Any) -> Any:
        return named(given)

    @model_validator(mode="after")
    def controls_fit(self) -> Recipe:
        for name, control in self.controls.items():
            for stage, keys in control.stages.items():
                if stage not in self.stages:
                    raise ValueError(f"controls.{name}.stages: there is no stage {stage!r}; {did_you_mean(stage, self.stages)}")
                found = changed(self.stages[stage], keys)
                if "monitor" in keys or ("until" in keys and found.until is not None and found.until.kind == "golden"):
                    raise ValueError(
                        f"controls.{name}.stages.{stage}: `monitor` and `until: golden` compare with a teacher, and a control "
                        "has none; `until: plateau` ends it at its best point"
                    )
        return self

    @model_validator(mode="after")
    def choices_are_made_on_validation(self) -> Recipe:
        """Whoever chooses needs a validation split, and benchmarks that are asked there."""
        stages = {f"stages.{name}.until": stage.until for name, stage in self.stages.items()}
        for name, control in self.controls.items():
            stages |= {
                f"controls.{name}.stages.{stage}.until": changed(self.stages[stage], keys).until
                for stage, keys in control.stages.items() if "until" in keys
            }  # fmt: skip
        stages = {key: until for key, until in stages.items() if until is not None and until.kind == "plateau"}
        needy, often = [*stages], [key for key, until in stages.items() if until.every is None]
        needy += [f"controls.{name} (tuned)" for name, control in self.controls.items() if control.kind == "tuned"]
        spec = self.evaluation
        if needy and (spec.validation is None or not spec.benchmarks):
            raise ValueError(
                f"{', '.join(needy)}: what is chosen is chosen on a validation split; give evaluation.benchmarks and "
                "evaluation.validation, such as `validation: val`"
            )
        if often and spec.every is None:
            raise ValueError(f"{often[0]}: how often is it scored? Give `every` there, or evaluation.every")
        return self

    @property
    def teacher_specs(self) -> dict[str, TeacherSpec]:
        """All teachers by name; a single one is called "teacher"."""
        return {"teacher": self.teacher} if self.teacher is not None else self.teachers

    def all_terms(self) -> dict[str, Term]:
        """The terms of all stages by their keys, "stages.sft.terms.kl"."""
        return {
            f"stages.{stage}.terms.{name}": spec.build(name)
            for stage, its in self.stages.items() for name, spec in its.terms.items()
        }  # fmt: skip

    @model_validator(mode="after")
    def teacher_is_there(self) -> Recipe:
        if self.teacher is not None and self.teachers:
            raise ValueError("give either `teacher` (one) or `teachers` (several by name)")
        terms = self.all_terms()
        if not self.teacher_specs:
            users = [key for key, term in terms.items() if term.needs_teacher]
            if users:
                raise ValueError(f"no teacher is given, but {', '.join(users)} compare with one; add `teacher: {{model: ...}}`")
            tokenizer = self.student.assemble.tokenizer if self.student.assemble else None
            if tokenizer is not None and tokenizer.source == "teacher":
                raise ValueError("the student's tokenizer is the teacher's, but no teacher is given")
        self._made_of_student()
        self._teachers_are_named({key: term for key, term in terms.items() if term.needs_teacher})
        return self

    def _made_of_student(self) -> None:
        """Raises ValueError for what a teacher that is the student itself, or on a server, cannot do."""
        own = [name for name, spec in self.teacher_specs.items() if spec.self]
        if not own and not any(spec.served for spec in self.teacher_specs.values()):
            return
        tokenizer = self.student.assemble.tokenizer if self.student.assemble else None
        if tokenizer is not None and tokenizer.source == "teacher" and next(iter(self.teacher_specs)) in own:
            raise ValueError("the student's tokenizer is the teacher's, which is the student itself; name another source")
        asked = [f"stages.{name}" for name, s in self.stages.items() if any(d.target == "teacher" for d in s.data)]
        asked += [f"controls.{name}" for name, control in self.controls.items() if control.kind == "hard_answers"]
        if asked:
            raise ValueError(
                f"{', '.join(asked)}: the teacher's answers (`target: teacher`, hard_answers) come from a model in this process, "
                "and the teacher is the student itself or on a server; give answers from a file (`answers: FILE`) or take it out"
            )

    def _teachers_are_named(self, terms: dict[str, Term]) -> None:
        known = self.teacher_specs
        wrong = [
            f"{key}.teacher is {name!r}; {did_you_mean(name, known)}"
            for key, term in terms.items() for name in (term.several or (term.place.teacher,))
            if name is not None and name not in known
        ]  # fmt: skip
        if len(known) > 1:
            unnamed = [key for key, term in terms.items() if term.place.teacher is None and not term.several]
            wrong += [f"{key} compares with a teacher; say which of {', '.join(known)}: `teacher: NAME`" for key in unnamed]
            pairs = [key for key, term in terms.items() if term.needs_pairs]
            wrong += [f"{key}: preference terms have one teacher as their reference, not several" for key in pairs]
        if wrong:
            raise ValueError("; and ".join(wrong))

    @model_validator(mode="after")
    def writes_fit(self) -> Recipe:
        wrong = write_errors(self)
        if self.rounds is not None and not any(name in self.stages for name in self.rounds.stages):
            wrong.append("rounds.stages: none of them trains, so all rounds would be the same; add the stage that learns")
        chosen_on = self.evaluation.validation is not None and bool(self.evaluation.benchmarks)
        if self.rounds is not None and self.rounds.until and not chosen_on:
            wrong.append("rounds.until: give evaluation.benchmarks and evaluation.validation, on which a round is scored")
        if wrong:
            raise ValueError("; and ".join(wrong))
        return self

    @model_validator(mode="after")
    def keeping_is_possible(self) -> Recipe:
        if any(spec.keep for spec in self.teachers.values()):
            raise ValueError("keep: goes with `teacher`, not with `teachers`; write a cache of each by `mmkd cache`")
        return self

    @model_validator(mode="after")
    def ahead_is_possible(self) -> Recipe:
        ahead = [spec for spec in self.teacher_specs.values() if spec.ahead]
        if any(spec.cache is not None for spec in ahead):
            raise ValueError("teacher.ahead: a cached teacher made its passes already; take teacher.ahead or teacher.cache out")
        generating = [name for name, stage in self.stages.items() if stage.generates]
        if ahead and generating:
            raise ValueError(
                f"teacher.ahead: the answers of stage {generating[0]} are generated within the step, so none can be read before; "
                "take teacher.ahead out"
            )
        switched = [key for key, term in self.all_terms().items() if term.switched]
        if ahead and switched:
            raise ValueError(
                f"teacher.ahead: {', '.join(switched)} put the student's features through the teacher within the step, where its "
                "next pass would be under way; take teacher.ahead out"
            )
        if ahead and len(ahead) < len(self.teacher_specs):
            raise ValueError("ahead: with several teachers, all of them or none; set it for each")
        return self

    @model_validator(mode="after")
    def monitors_are_possible(self) -> Recipe:
        known = self.teacher_specs
        for name, stage in self.stages.items():
            if stage.monitor is None:
                continue
            key, oracle, terms = f"stages.{name}.monitor", stage.monitor.oracle, stage.build_terms()
            kept = [n for n, spec in known.items() if (spec.cache is not None or spec.keep) and terms_of_teacher(terms, n, known)]
            if kept:
                raise ValueError(f"{key}: {kept[0]} is a cache, which has not seen what is held out; take `cache` and `keep` out")
            if oracle is not None and oracle not in known:
                raise ValueError(f"{key}.oracle is {oracle!r}; {did_you_mean(oracle, known)}")
            if oracle is not None and (known[oracle].self or known[oracle].cache or terms_of_teacher(terms, oracle, known)):
                raise ValueError(f"{key}.oracle: {oracle} must be a model, and none that a term of the stage reads")
        return self

    @model_validator(mode="after")
    def alignment_is_meant(self) -> Recipe:
        users = [key for key, term in self.all_terms().items() if not term.same_tokens]
        aligned = any(spec.alignment == "spans" for spec in self.teacher_specs.values())
        if users and not aligned:
            raise ValueError(
                f"{', '.join(users)} compare pieces of text, since tokens of different tokenizers do not correspond; say that "
                "this is meant: teacher.alignment=spans"
            )
        if aligned and not users:
            raise ValueError("teacher.alignment is spans, but no term is of kind `spans`; add one, or take it out")
        return self
