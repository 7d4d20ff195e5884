"""Runs the stages of a recipe on one student: build the towers, read the data, train stage by stage, resume anywhere.

The SFT control is the same student put through the same stages, data, order, steps and seed, without the teacher.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

import mmkd
from mmkd.data.preference import rejected_of
from mmkd.errors import DataError
from mmkd.data.samples import Sample
from mmkd.data.entries import read_samples
from mmkd.data.fingerprint import fingerprint, samples_fingerprint
from mmkd.teachers.stored import CachedTower, open_teacher
from mmkd.train.collate import PairDataset
from mmkd.train.distiller import Distiller
from mmkd.train.guards import freeze_unreached, run_guards
from mmkd.train.preference import PreferenceDataset, PreferenceDistiller, PreferenceTrainer
from mmkd.train.reference import fill_reference
from mmkd.train.sharded import make_whole, spreads_weights
from mmkd.train.experts import summarise_experts, upcycled, write_receipt
from mmkd.train.streaming import StreamDataset, stage_stream
from mmkd.terms.term import KINDS, Schedule, Term
from mmkd.train.trainer import DistillTrainer, last_checkpoint, split_evenly, training_arguments
from mmkd.runs.watch import Watch
from mmkd.base.files import copy_whole, save_whole
from mmkd.base.distributed import alone_in, is_main_process, wait_for_all, world_size
from mmkd.recipes.recipe import AssembleSpec, DataSpec, LoraSpec, Recipe, StageSpec, TermSpec, WeightSpec
from mmkd.towers.assemble import LanguageSpec, VisionSpec, assemble, load_tokenizer, train_tokenizer
from mmkd.towers.loading import device_of_process, dtype_of, to_device
from mmkd.towers.recompute import recompute_layers
from mmkd.errors import TowerError
from mmkd.towers.tower import Tower

logger = logging.getLogger(__name__)

CONTROL_TERMS = {"cross_entropy": TermSpec(kind="cross_entropy")}


# ---- towers ----------------------------------------------------------------------------------------------------------


def load_teacher(recipe: Recipe) -> Tower | None:
    if recipe.teacher is None:
        return None
    if recipe.teacher.cache is None:
        return _live_teacher(recipe)
    terms = {name: terms_of(stage.terms) for name, stage in recipe.stages.items()}
    return open_teacher(recipe, terms, partial(_live_teacher, recipe)).to(device_of_process()).freeze()


def _live_teacher(recipe: Recipe) -> Tower:
    spec = recipe.teacher
    tower = Tower.load(
        spec.model, dtype=dtype_of(spec.dtype), quantise=spec.quantise, trust_remote_code=spec.trust_remote_code,
        max_length=recipe.max_length,
    )
    if spec.gradient_checkpointing:
        recompute_layers(tower)
    return to_device(tower, spec.quantise).freeze()


def build_student(recipe: Recipe, teacher: Tower | None, texts: list[str]) -> Tower:
    """The student before its first stage. `texts` train its tokenizer where the recipe asks for one."""
    spec = recipe.student
    if spec.model is not None:
        tower = Tower.load(
            spec.model, dtype=dtype_of(spec.dtype), trust_remote_code=spec.trust_remote_code, max_length=recipe.max_length
        )
        return to_device(tower)
    parts = spec.assemble
    if parts.import_module:
        _import(parts.import_module)
    size = parts.vision.image_size
    vision = {k: v for k, v in parts.vision.model_dump(exclude={"image_size"}).items() if v is not None}
    tower = assemble(
        VisionSpec(**vision, image_size=(size, size) if isinstance(size, int) else size),
        LanguageSpec(**parts.language.model_dump()),
        projector=parts.projector,
        projector_options=parts.projector_options,
        tokenizer=_tokenizer(parts, teacher, texts),
        max_length=recipe.max_length,
        seed=recipe.seed,
        dtype=torch.float32 if spec.dtype == "auto" else dtype_of(spec.dtype),
    )
    return to_device(tower)


def _import(module: str) -> None:
    try:
        import_module(module)
    except ImportError as error:
        raise TowerError(
            f"student.assemble.import_module {module!r} cannot be imported: {error}; install it or put its folder on PYTHONPATH"
        ) from error


def _tokenizer(parts: AssembleSpec, teacher: Tower | None, texts: list[str]) -> Any:
    spec = parts.tokenizer
    if spec is None:
        return None
    if spec.vocab_size is not None:
        return train_tokenizer(texts, spec.vocab_size)
    return teacher.tokenizer if spec.source == "teacher" else load_tokenizer(spec.source)


# ---- data and terms --------------------------------------------------------------------------------------------------


def stage_samples(recipe: Recipe, stage: StageSpec) -> list[Sample]:
    """All training samples of a stage, in the order of its data entries."""
    entries = tuple(spec.model_dump_json() for spec in stage.data)
    state = json.dumps([fingerprint(spec, recipe.data_root) for spec in stage.data])
    samples = list(_read_once(entries, recipe.seed, recipe.data_root, state))
    if not samples:
        raise DataError("a stage has no samples")
    if any(KINDS[term.kind].preference for term in stage.terms.values()):
        for sample in samples:
            rejected_of(sample)
    return samples


@lru_cache(maxsize=1)  # the control, the student and a check before them read the same data one after another
def _read_once(entries: tuple[str, ...], seed: int, data_root: str | None, state: str) -> tuple[Sample, ...]:
    specs = [DataSpec.model_validate_json(entry) for entry in entries]
    return tuple(sample for spec in specs for sample in read_samples(spec, seed, data_root))


def terms_of(specs: dict[str, TermSpec]) -> list[Term]:
    terms = []
    for name, spec in specs.items():
        weight = spec.weight
        schedule = Schedule(weight.start, weight.end, weight.over) if isinstance(weight, WeightSpec) else Schedule(weight, weight)
        options = tuple(sorted((spec.model_extra or {}).items()))
        terms.append(Term(name, spec.kind, schedule, spec.positions, spec.path, spec.bridge, options, spec.reduction))
    return terms


def control_recipe(recipe: Recipe) -> Recipe:
    """The recipe of the SFT control: everything the same without the teacher.

    Its terms are the stage's `control_terms`, else those of the student that need no teacher, with cross-entropy in
    place of the others.
    """
    stages = {
        name: stage.model_copy(update={"terms": stage.control_terms or _without_teacher(stage), "control_terms": None})
        for name, stage in recipe.stages.items()
    }
    return recipe.model_copy(update={"stages": stages, "teacher": None})


def _without_teacher(stage: StageSpec) -> dict[str, TermSpec]:
    kept = {name: spec for name, spec in stage.terms.items() if not KINDS[spec.kind].teacher}
    learns = len(kept) == len(stage.terms) or any(spec.kind == "cross_entropy" for spec in kept.values())
    return kept if learns else kept | CONTROL_TERMS


# ---- training --------------------------------------------------------------------------------------------------------


def train(recipe: Recipe, role: str, student: Tower, teacher: Tower | None, run: Path) -> Tower:
    """Puts the student through all stages; what is done already is loaded. Returns the trained tower.

    Every stage ends on disk and the next starts from there, so that a resumed run and an undisturbed one are the same.
    """
    final = run / role
    if (final / "config.json").exists():
        return to_device(Tower.load(final, dtype=dtype_of(recipe.student.dtype), max_length=recipe.max_length))
    for number, (name, stage) in enumerate(recipe.stages.items()):
        folder = run / "stages" / role / f"{number}_{name}"
        if not (folder / "model").exists():
            _train_stage(recipe, role, name, stage, student, teacher, run, folder)
        student = to_device(Tower.load(folder / "model", dtype=dtype_of(recipe.student.dtype), max_length=recipe.max_length))
    if is_main_process():
        copy_whole(folder / "model", final)
    wait_for_all()
    return student


def _train_stage(
    recipe: Recipe, role: str, name: str, stage: StageSpec, student: Tower, teacher: Tower | None, run: Path, folder: Path
) -> None:
    set_seed(recipe.seed)
    samples = stage_samples(recipe, stage)
    terms = terms_of(stage.terms)
    needed = teacher if any(t.needs_teacher and not t.is_preference for t in terms) else None
    student, receipt = upcycled(stage, student, recipe.seed)
    if receipt is not None and is_main_process():
        write_receipt(receipt, folder)
    if stage.lora is not None:
        add_lora(student, stage.lora)
    set_trainable(student, stage)
    of_pairs = any(t.is_preference for t in terms)
    dataset = (PreferenceDataset if of_pairs else PairDataset)(
        samples, student, needed, terms, max_skipped=int(recipe.guards.max_skipped_images * len(samples)), workers=recipe.workers
    )
    distiller = (PreferenceDistiller if of_pairs else Distiller)(
        student, needed, terms, chunk_bytes=recipe.chunk_bytes, compiled=recipe.compile
    )
    processes = world_size()
    wrong = split_evenly(stage.optimiser, processes)
    if wrong:
        raise DataError(f"stage {name}: {'; '.join(wrong)}")
    stream = stage_stream(recipe, stage)
    if stream is None and len(samples) < stage.optimiser.batch_size:
        raise DataError(f"stage {name} has {len(samples)} samples, fewer than its batch_size {stage.optimiser.batch_size}")
    arguments = training_arguments(stage, name, folder, recipe.seed, processes, recipe.workers)
    if of_pairs:
        fill_reference(
            dataset, teacher, references_of(teacher, run), batch_size=arguments.per_device_train_batch_size,
            chunk_bytes=recipe.chunk_bytes, pixels_matter=recipe.guards.pixels_matter,
        )
    freeze_unreached(distiller, dataset)
    resume = last_checkpoint(folder)
    if resume is None:
        logger.info("%s, stage %s: %d samples, terms %s", role, name, len(samples), ", ".join(t.name for t in terms))
        first = number_of(recipe, name) == 0
        guards = recipe.guards
        run_guards(distiller, dataset, guards.samples, guards.pixels_matter, guards.teacher_is_better and first)
    set_seed(recipe.seed)
    loop = PreferenceTrainer if of_pairs else DistillTrainer
    if stream is not None:
        done = 0 if resume is None else int(resume.rpartition("-")[2]) * stage.optimiser.batch_size
        dataset = StreamDataset(dataset, stream, arguments.per_device_train_batch_size * processes, done)
        arguments.ignore_data_skip = True
        arguments.accelerator_config.dispatch_batches = False  # every process reads, and keeps its own
    ahead = needed is not None and recipe.teacher.ahead and not of_pairs
    trainer = loop(distiller, dataset, stage, arguments, run / "log" / f"{role}.jsonl", ahead=ahead)
    if recipe.evaluation.every is not None:
        if spreads_weights(trainer):
            raise DataError("evaluation.every: no process has the whole student of FSDP or ZeRO-3 while it trains; leave it out")
        trainer.add_callback(Watch(recipe, role, name, student, run))
    trainer.train(resume_from_checkpoint=resume)
    if stream is None and dataset.skipped_count:
        logger.warning("stage %s skipped %d samples with unreadable images", name, dataset.skipped_count)
    if stream is None and dataset.truncated:
        logger.warning("stage %s cut the ends of %d answers at max_length %d", name, len(dataset.truncated), student.max_length)
    make_whole(trainer)
    if is_main_process():
        summarise_experts(run)
        save_whole(folder / "model", student.save)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    wait_for_all()


def references_of(teacher: Tower, run: Path) -> Path:
    """Where log-probabilities of preference pairs are kept: beside the runs, or in the cache that stands for the teacher."""
    return teacher.cache.folder / "references" if isinstance(teacher, CachedTower) else run.parent / "references"


def number_of(recipe: Recipe, stage: str) -> int:
    return list(recipe.stages).index(stage)


_MLP = ".mlp."  # in the parameter names of a language model's feed-forward layers, experts and routers


def set_trainable(student: Tower, stage: StageSpec) -> None:
    """Only the parts that the stage names are trained; with LoRA, of the language model only the adapters."""
    for part, parameters in student.part_parameters().items():
        for name, parameter in parameters:
            adapter = "lora_" in name
            wanted = part in stage.train and (adapter or part != "language" or stage.lora is None)
            wanted = wanted or ("mlp" in stage.train and part == "language" and _MLP in name)
            parameter.requires_grad_(wanted and parameter.is_floating_point())
    if "mlp" in stage.train and not any(_MLP in name for name, _ in student.part_parameters()["language"]):
        raise TowerError(f"train: [mlp], but {type(student.language).__name__} has no parameters below `mlp`; train language")
    if not any(p.requires_grad for p in student.model.parameters()):
        raise TowerError(f"nothing is trained: the student has no parameters in {', '.join(stage.train)}")
    if stage.gradient_checkpointing:
        student.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if not any(p.requires_grad for p in student.language.parameters()):
            recompute_layers(student)  # frozen, it stays in evaluation mode, where transformers checkpoints nothing


def add_lora(student: Tower, spec: LoraSpec) -> None:
    """LoRA (or DoRA) adapters on the language model, in place; they are merged when the stage is saved."""
    from peft import LoraConfig, inject_adapter_in_model

    targets = spec.targets if isinstance(spec.targets, list) else sorted(
        {n.rpartition(".")[2] for n, m in student.language.named_modules() if isinstance(m, torch.nn.Linear)}
    )
    config = LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha, lora_dropout=spec.dropout, target_modules=targets, use_dora=spec.dora
    )
    inject_adapter_in_model(config, student.language)


# ---- control ---------------------------------------------------------------------------------------------------------


def control_key(recipe: Recipe, student: Tower) -> str:
    """What defines a control: its untrained weights and processor, its stages with their data, seed and this version."""
    control = control_recipe(recipe)
    stages = control.model_dump(mode="json", include={"stages", "seed", "max_length"})
    data = [_data_state(recipe, stage) for stage in control.stages.values()]
    facts = json.dumps([mmkd.__version__, student.fingerprint(), stages, data], sort_keys=True)
    return hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()


def _data_state(recipe: Recipe, stage: StageSpec) -> list:
    """A stage's data by content: data that were changed make a new control, whatever lies beside them does not."""
    files = [fingerprint(spec, recipe.data_root) for spec in stage.data]
    return [*files, samples_fingerprint(stage_samples(recipe, stage))]


def train_control(recipe: Recipe, student: Tower, run: Path) -> Tower:
    """The SFT control, trained once for all runs beside this one that would train the very same."""
    shared = run.parent / "controls" / control_key(recipe, student)
    with alone_in(shared, "the SFT control of this one, too,", wait=True):
        control = train(control_recipe(recipe), "control", student, None, shared)
    if is_main_process():
        if not (run / "control").exists():
            copy_whole(shared / "control", run / "control")
        (run / "log").mkdir(parents=True, exist_ok=True)
        shutil.copy(shared / "log" / "control.jsonl", run / "log" / "control.jsonl")
        summarise_experts(run)
    wait_for_all()
    return control
