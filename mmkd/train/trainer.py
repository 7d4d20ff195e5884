"""The training loop: transformers' Trainer with the little that distillation changes.

What is ours: global counts per kind of position (so that micro-batches and ranks add up exactly), the log of each term,
checkpoints that hold the student and the terms' own parameters but never the teacher, and a mark on complete ones.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import seed_worker

from mmkd.answers import AnswerSource
from mmkd.answers.data import DataAnswers
from mmkd.base import stopping
from mmkd.base.distributed import host_group
from mmkd.base.files import write_whole
from mmkd.base.jsonl import log_rows
from mmkd.data.samplers.mixture import MovingMixture
from mmkd.engine.positions import COUNTS
from mmkd.teachers.ahead import Ahead
from mmkd.teachers.teacher import Teacher
from mmkd.towers.finite import check_trained
from mmkd.towers.loading import half_of
from mmkd.towers.modes import evaluating, varies_in_training
from mmkd.train.batch import Batch, naming_samples
from mmkd.train.checkpoints import writing_checkpoint
from mmkd.train.collate import PairDataset
from mmkd.train.distiller import Distiller, Log
from mmkd.train.experts import LOGGED, ExpertUse
from mmkd.train.finite import FiniteWatch, Where
from mmkd.train.measured import MemorySteps, MixtureSteps
from mmkd.train.optimisers import build_optimiser
from mmkd.train.sharded import keep_sums_precise, shard_on_cpu
from mmkd.train.spec import OptimiserSpec, StageSpec
from mmkd.train.stop_at_step import StopWhenAsked
from mmkd.train.token_batches import apart

logger = logging.getLogger(__name__)

WEIGHTS = "distiller.safetensors"


class DistillTrainer(Trainer):
    """Trains a `Distiller`."""

    def __init__(
        self,
        distiller: Distiller,
        dataset: PairDataset,
        stage: StageSpec,
        arguments: TrainingArguments,
        log: Path,
        collator: Any = None,
        ahead: bool = False,
        sizes: Sequence[int] = (),
        answers: AnswerSource | None = None,
        where: Where | None = None,
    ):
        """ahead: whether the teacher's pass over the next micro-batch begins before the student works on this one.
        sizes: samples of each data entry.  answers: where a step's answers come from; None for the data.
        where: of which run and role, for what is kept of a step that is not finite.
        """
        self.stage, self.sizes = stage, sizes
        self.answers = answers or DataAnswers()
        self._peeked: tuple[Any, list] = (None, [])  # of which iterator, the batch that was taken from it too early
        self._following: dict[int, Batch] = {}  # by the id of the batch before it
        self._sums: dict[str, Tensor] = {}
        self.mixture: MovingMixture | None = None
        self._resumed_from: Path | None = None
        self._stateful = {t.followed: t for t in distiller.terms if t.has_state}
        self._asks_step = any(t.has_step_sums for t in distiller.terms)
        self._step: dict[str, Tensor] = {}  # of the step that is under way, of terms with a state
        self._experts = ExpertUse()
        where = where or Where(Path(arguments.output_dir), "student", arguments.run_name)
        self.finite, self.stop = FiniteWatch(where, self._whole), StopWhenAsked()
        self.term_log = TermLog(log, arguments.run_name)
        super().__init__(
            model=distiller,
            args=arguments,
            train_dataset=dataset,
            data_collator=collator or dataset.collator,
            callbacks=[self.term_log, TermStates(self), MixtureSteps(self), MemorySteps(self), self.stop],
        )
        self.remove_callback(PrinterCallback)
        self.loss_is_scaled_for_ga = True  # our counts already span the accumulation window
        distiller.lockstep = self._lockstep = self.is_fsdp_enabled or self.is_deepspeed_enabled
        self._by_tokens = stage.optimiser.micro_batch_tokens is not None
        if self._by_tokens:
            self.training_step = self._step_of_several
        half = half_of(stage.precision)
        self._ahead = Ahead(distiller.prefetch, arguments.device, half) if ahead else None
        if distiller.lockstep and half is not None:  # as accelerate does for DDP; the engines' own casts leave the teacher out
            distiller.forward = torch.autocast(arguments.device.type, half)(distiller.forward)

    def create_accelerator_and_postprocess(self) -> None:
        shard_on_cpu()
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            keep_sums_precise(self.accelerator.state.fsdp_plugin)

    # ---- batches ----

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Tensor]:
        """The micro-batches of a step and their counts; with a teacher ahead the next step's first is fetched, too."""
        if self._ahead is None:
            step = self.state.global_step
            self.answers.begin(step, progress_at(step, self.state.max_steps))
            samples = self._micro_batches(self.answers.take(epoch_iterator, num_batches))
            for name, seen in self.answers.observed().items():
                self._add(name, torch.tensor(seen, device=device))
            self._count_skipped(samples)
            counts = self._get_num_items_in_batch(samples, device)
            self._sum_over_step(samples)
            return self._as_the_loop_counts(samples), counts
        peeked = self._peeked[1] if self._peeked[0] is epoch_iterator else []
        coming = itertools.chain(peeked, epoch_iterator)
        samples = self._micro_batches(list(itertools.islice(coming, num_batches)))
        self._count_skipped(samples)
        last = self.state.global_step + 1 >= self.state.max_steps
        self._peeked = (epoch_iterator, [] if last else list(itertools.islice(coming, 1)))
        queue = [inputs["batch"] for inputs in (*samples, *apart(self._peeked[1]))]
        self._following = {id(batch): following for batch, following in itertools.pairwise(queue)}
        self._sum_over_step(samples)
        return self._as_the_loop_counts(samples), self._get_num_items_in_batch(samples, device)

    def _micro_batches(self, collated: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those of a step, of what the loader gave.

        Where they follow from tokens, processes in lockstep must take as many all the same: who has fewer goes through its last
        one again, which is "idle" then and counts nothing.
        """
        samples = apart(collated)
        if self._by_tokens and self._lockstep and self.args.world_size > 1 and samples:
            most = torch.tensor(len(samples))
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group=host_group())
            samples += [{**samples[-1], "idle": True}] * (int(most) - len(samples))
        return samples

    def _as_the_loop_counts(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A step's micro-batches for transformers' loop, which counts them: where they follow from tokens, all of them as one."""
        return [{"micro_batches": samples}] if self._by_tokens and samples else samples

    def _count_skipped(self, samples: Sequence[dict[str, Batch]]) -> None:
        """Counts what was left out of a step's micro-batches; workers that made them could not. Raises DataError."""
        skips = self.train_dataset.skips
        for batch in (inputs["batch"] for inputs in samples if "idle" not in inputs):
            skips.seen += len(batch.student.ids) + len(batch.skipped)
            for skip in batch.skipped:
                skips.add(skip)

    # ---- loss ----

    def _step_of_several(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """`training_step` where tokens tell: only the last micro-batch's gradients are sent to other processes."""
        *first, last = inputs["micro_batches"]
        total: Any = 0.0
        for part in first:
            with self.accelerator.no_sync(model):
                total = total + super().training_step(model, part, num_items_in_batch)
        return total + super().training_step(model, last, num_items_in_batch)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Counts of one optimiser step over its micro-batches and all ranks. [len(COUNTS)], on the CPU"""
        if not batch_samples:
            return torch.zeros(len(COUNTS))
        counts = torch.stack([inputs["batch"].counts for inputs in batch_samples if "idle" not in inputs]).sum(0)
        if self.args.world_size > 1:
            told = torch.cat([counts, torch.tensor([float(stopping.asked())])])  # a process that is asked to end tells all
            torch.distributed.all_reduce(told, group=host_group())
            counts, self.stop.agreed = told[:-1], bool(told[-1])
        return counts.long()  # wrappers round floating-point arguments to the precision of training

    @cached_property
    def _varies(self) -> bool:
        return varies_in_training(self.accelerator.unwrap_model(self.model_wrapped).tower.model)

    @torch.no_grad()
    def _sum_over_step(self, batch_samples: list) -> None:
        """What terms must know of the whole step (`Term.step_sums`): a pass in evaluation mode, without gradient, finds it first,
        so that neither the split into micro-batches and processes nor dropout changes it. It is left out where the step is one
        batch and the model does the same in training, since the batch's own pass tells it then."""
        model = self.model_wrapped
        alone = len(batch_samples) == 1 and self.args.world_size == 1
        if not self._asks_step or (alone and not self._varies):
            return
        totals: dict[str, Tensor] = {}
        with evaluating(model):
            for inputs in batch_samples:
                with self.compute_loss_context_manager():
                    batch = inputs["batch"].to(self.args.device, non_blocking=True)  # a pass ahead is for the step itself
                    for name, sums in model(batch, step_sums=True).items():
                        sums = torch.zeros_like(sums) if "idle" in inputs else sums
                        totals[name] = totals[name] + sums if name in totals else sums
        if self.args.world_size > 1:
            totals = {name: self.accelerator.reduce(sums, reduction="sum") for name, sums in totals.items()}
        for inputs in batch_samples:
            inputs["batch"].on_host.step_sums = {name: sums.cpu() for name, sums in totals.items()}

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        batch = inputs["batch"]
        if self._ahead is not None:
            return {**inputs, "batch": self._ahead.take(batch, self._following.get(id(batch)))}
        return {**inputs, "batch": batch.to(self.args.device, non_blocking=True)}

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Batch], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        progress = progress_at(self.state.global_step, self.state.max_steps)
        with naming_samples(inputs["batch"]):
            loss, terms = model(inputs["batch"], num_items_in_batch, progress)
        if "idle" in inputs:
            return loss * 0.0
        self._note(inputs["batch"].on_host, loss, terms, num_items_in_batch, progress)
        self._count_experts(model, inputs["batch"])
        for name, (total, count) in terms.items():
            seen = torch.stack([total.detach().float(), count.to(total.device)])  # [2]
            self._add(name, seen)
            if name in self._stateful:
                self._step[name] = self._step[name] + seen if name in self._step else seen
        loss = loss * self.args.world_size  # data-parallel wrappers average gradients; our counts are global already
        return (loss, terms) if return_outputs else loss

    @property
    def teachers(self) -> Iterable[Teacher]:
        return self.accelerator.unwrap_model(self.model_wrapped).teachers.values()

    def _add(self, name: str, seen: Tensor) -> None:
        """To what goes into the log. seen: [2] sum and count."""
        self._sums[name] = self._sums[name] + seen if name in self._sums else seen

    def _note(self, batch: Batch, loss: Tensor, terms: Log, counts: Tensor | None, progress: float) -> None:
        """For the case that one of these values is not finite."""
        sums = {name: total for name, (total, _) in terms.items()}
        counts = counts.tolist() if counts is not None else None
        self.finite.losses(
            self.state.global_step + 1, batch, batch.student.ids, loss, sums, counts=counts, progress=float(progress)
        )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        # Under float16 an infinite gradient is how the loss scale finds its size; such a step is left out.
        self.finite.gradient(None if self.args.fp16 else norm)
        return norm

    def _whole(self) -> nn.Module | None:
        """Student and terms; None where each process holds a part of them."""
        return None if self.is_fsdp_enabled or self.is_deepspeed_enabled else self.accelerator.unwrap_model(self.model)

    def _count_experts(self, model: nn.Module, batch: Batch) -> None:
        self._experts.add(self.accelerator.unwrap_model(model).routed, batch.tokens)

    def update_terms(self) -> None:
        """Tells each term with a state its mean over the optimiser step that has just ended, the same on all ranks."""
        extras = self.accelerator.unwrap_model(self.model_wrapped).extras
        for followed, term in self._stateful.items():
            if followed in self._step:
                total, count = self.accelerator.reduce(self._step[followed], reduction="sum").tolist()
                if count:
                    term.update(extras[term.name], total / count, self.state.global_step / max(1, self.state.max_steps))
        self._step.clear()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.finite.look()
        if self._sums and "loss" in logs:
            for name in sorted(self._sums):
                total, count = self.accelerator.reduce(self._sums[name], reduction="sum").tolist()
                logs[name] = total / max(1.0, count)
            self._sums.clear()
            if (use := self._experts.take(lambda tensor: self.accelerator.reduce(tensor, reduction="sum"))) is not None:
                self.term_log.beside[LOGGED] = use
        super().log(logs, start_time)

    def tell(self, scores: dict[str, float]) -> None:
        """Shows scores of the model that is being trained on the dashboards. The process that scored calls it.

        Not by the handler, which would take this for the row of the log that is due at the end of the step.
        """
        for callback in self.callback_handler.callbacks:
            callback.on_log(self.args, self.state, self.control, model=self.model, logs=dict(scores))

    # ---- order ----

    def get_train_dataloader(self) -> DataLoader:
        """As the trainer's own, which would import `datasets` and pandas only to see that the data is none of theirs."""
        given, order = self.args, {}
        if not isinstance(self.train_dataset, IterableDataset):
            order = {"sampler": self._get_train_sampler(), "drop_last": given.dataloader_drop_last}
        loader = DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=given.dataloader_num_workers,
            pin_memory=given.dataloader_pin_memory,
            persistent_workers=given.dataloader_persistent_workers,
            worker_init_fn=partial(seed_worker, num_workers=given.dataloader_num_workers, rank=given.process_index),
            **order,
        )
        return self.accelerator.prepare(loader)

    def _get_train_sampler(self, train_dataset: PairDataset | None = None) -> Sampler | None:
        dataset, stage = self.train_dataset, self.stage
        order = stage.order.build(dataset.samples, self.sizes or [len(dataset)], stage.optimiser.batch_size, self.args.seed)
        if isinstance(order, MovingMixture):
            self.mixture = order
            if self._resumed_from is not None:
                order.load(self._resumed_from)
        return super()._get_train_sampler(train_dataset) if order is None else order

    # ---- optimiser ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            spec = self.stage.optimiser
            self.optimizer = optimiser_of(self.model, spec)
        return self.optimizer

    # ---- checkpoints ----

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return  # they write checkpoints of their own, a part from each process
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.accelerator.unwrap_model(self.model), str(folder / WEIGHTS))
        for teacher in self.teachers:
            teacher.save_state(folder)
        if self.mixture is not None:
            self.mixture.save(folder)
        self.answers.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._resumed_from = Path(resume_from_checkpoint)
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        load_model(self.accelerator.unwrap_model(self.model), str(Path(resume_from_checkpoint) / WEIGHTS))
        for teacher in self.teachers:
            teacher.load_state(Path(resume_from_checkpoint))
        self.answers.load(Path(resume_from_checkpoint))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.finite.look()
        if (whole := self._whole()) is not None:
            check_trained(whole.state_dict().items(), f"step {self.state.global_step}")
        with writing_checkpoint(Path(self.args.output_dir), self.state.global_step, self.args.should_save, self._needed(whole)):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # each process has written its part

    def _needed(self, whole: nn.Module | None) -> int | None:
        """Bytes of a checkpoint, about: the weights, and AdamW's two averages of those that are trained."""
        if whole is None:
            return None
        return sum((1 + 2 * p.requires_grad) * p.numel() * p.element_size() for p in whole.parameters())


def progress_at(step: int, steps: int) -> float:
    """0..1 of a stage at its `step`, counted from 0: the first is 0, the last is 1, and so is a stage's only one."""
    return step / (steps - 1) if steps > 1 else 1.0


def parameter_groups(distiller: Distiller, spec: OptimiserSpec) -> list[dict[str, Any]]:
    """Trainable parameters by part, each with its learning rate; no weight decay on norms, biases and other vectors."""
    parts = {part: [p for _, p in found] for part, found in distiller.tower.part_parameters().items()}
    parts["extras"] = list(distiller.extras.parameters())
    groups = []
    for part, parameters in parts.items():
        rate = spec.learning_rates.get(part, spec.learning_rate)  # type: ignore[call-overload]
        trainable = [p for p in parameters if p.requires_grad]
        for decay, chosen in ((spec.weight_decay, True), (0.0, False)):
            members = [p for p in trainable if (p.dim() > 1) == chosen]
            if members:
                groups.append({"params": members, "lr": rate, "weight_decay": decay})
    return groups


def optimiser_of(distiller: Distiller, spec: OptimiserSpec) -> torch.optim.Optimizer:
    """A stage's optimiser over what the distiller trains."""
    given = {"learning_rate": spec.learning_rate, "betas": spec.betas, "momentum": spec.momentum}
    return build_optimiser(spec.kind, parameter_groups(distiller, spec), **given)


def training_arguments(
    stage: StageSpec, name: str, folder: Path, seed: int, world_size: int, workers: int = 0, report_to: Sequence[str] = ()
) -> TrainingArguments:
    """A stage in transformers' terms."""
    spec = stage.optimiser
    per_process = max(1, spec.batch_size // world_size)
    micro = min(spec.micro_batch_size or per_process, per_process)  # by tokens: what is split further
    return TrainingArguments(
        output_dir=str(folder),
        run_name=name,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=per_process // micro,
        num_train_epochs=stage.epochs or 1.0,
        max_steps=stage.steps or -1,
        learning_rate=spec.learning_rate,
        lr_scheduler_type=spec.schedule,
        warmup_steps=spec.warmup,
        max_grad_norm=spec.max_grad_norm,
        bf16=stage.precision == "bfloat16",
        fp16=stage.precision == "float16",
        logging_steps=stage.log_every,
        save_steps=stage.save_every,
        seed=seed,
        data_seed=seed,
        dataloader_drop_last=True,
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        remove_unused_columns=False,
        report_to=list(report_to),
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        disable_tqdm=True,  # `TrainingLines` and its bar
        logging_nan_inf_filter=False,  # it would wait for every step's loss
    )


class TermStates(TrainerCallback):
    """Lets terms and teachers that carry something from step to step see each optimiser step."""

    def __init__(self, trainer: DistillTrainer):
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.update_terms()
        for teacher in self.trainer.teachers:
            teacher.after_step()


class TermLog(TrainerCallback):
    """Appends one JSON line a log event: stage, step, loss, every term. A resumed stage drops what it will do again."""

    def __init__(self, path: Path, stage: str):
        self.path, self.stage = path, stage
        self.beside: dict[str, Any] = {}  # what the next row has beside numbers; dashboards do not take it

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [r for r in log_rows(self.path) if not (r["stage"] == self.stage and r["step"] > state.global_step)]
        write_whole(self.path, "".join(json.dumps(r) + "\n" for r in kept))

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            row = {"stage": self.stage, "step": state.global_step, **{k: float(v) for k, v in logs.items()}, **self.beside}
            self.beside.clear()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def split_evenly(spec: OptimiserSpec, world_size: int) -> Sequence[str]:
    """Errors of a batch size that does not divide over processes and micro-batches."""
    errors = []
    if spec.batch_size % world_size:
        errors.append(f"batch_size {spec.batch_size} does not divide over {world_size} processes")
    elif spec.micro_batch_size and (spec.batch_size // world_size) % spec.micro_batch_size:
        errors.append(
            f"batch_size {spec.batch_size} over {world_size} processes is {spec.batch_size // world_size} samples a process, "
            f"which micro_batch_size {spec.micro_batch_size} does not divide"
        )
    return errors
