"""The training loop of ranking and of matching: transformers' Trainer with a log of each term and marked checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from transformers import PrinterCallback, Trainer, TrainingArguments

from mmkd.base import stopping
from mmkd.base.distributed import host_group, wait_for_all
from mmkd.retrieval.batches import PairBatch, PairDataset
from mmkd.retrieval.recipe import StepSpec
from mmkd.towers.finite import check_trained
from mmkd.train.checkpoints import writing_checkpoint
from mmkd.train.finite import FiniteWatch, Where
from mmkd.train.guards import freeze_unreached_by
from mmkd.train.stop_at_step import StopWhenAsked
from mmkd.train.trainer import TermLog

WEIGHTS = "model.safetensors"  # the name under which the Trainer looks for them


class PairTrainer(Trainer):
    """Trains a module that takes a `PairBatch` and gives its loss and {term: (sum, count)}.

    A contrastive pool is the batch, so a batch is never cut into micro-batches. Each process gives the loss of its own queries,
    divided by the number of all.
    """

    def __init__(self, model: nn.Module, dataset: PairDataset, optimiser: StepSpec, arguments: TrainingArguments, log: Path):
        self.optimiser, self.table = optimiser, getattr(model, "table", None)
        self._sums: dict[str, Tensor] = {}
        where = Where(log.parent.parent, arguments.run_name, "train")
        self.finite = FiniteWatch(where, lambda: self.accelerator.unwrap_model(self.model))
        self.stop = StopWhenAsked()
        callbacks = [TermLog(log, arguments.run_name), self.stop]
        super().__init__(model, arguments, data_collator=dataset.collate, train_dataset=dataset, callbacks=callbacks)
        self.remove_callback(PrinterCallback)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, PairBatch], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch = inputs["batch"]
        if self.args.world_size > 1:  # a process that is asked to end tells all
            told = torch.tensor(float(stopping.asked()))
            torch.distributed.all_reduce(told, group=host_group())
            self.stop.agreed = bool(told)
        loss, terms = model(batch.to(self.args.device, non_blocking=True))
        sums = {name: total for name, (total, _) in terms.items()}
        self.finite.losses(self.state.global_step + 1, batch, batch.ids, loss, sums)
        for name, (total, count) in terms.items():
            seen = torch.stack([total.detach().float(), count.to(total.device)])  # [2]
            self._sums[name] = self._sums[name] + seen if name in self._sums else seen
        loss = loss * self.args.world_size  # data-parallel wrappers average gradients, which are to be summed
        return (loss, terms) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self.finite.gradient(norm)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.finite.look()
        if "loss" in logs:
            for name in sorted(self._sums):
                total, count = self.accelerator.reduce(self._sums[name], reduction="sum").tolist()
                logs[name] = total / max(1.0, count)
            self._sums.clear()
        super().log(logs, start_time)

    def get_train_dataloader(self) -> DataLoader:
        """As the Trainer's own, which would import `datasets` and pandas only to see that the data is none of theirs."""
        loader = DataLoader(
            self.train_dataset,
            batch_size=self.args.train_batch_size,
            sampler=RandomSampler(self.train_dataset),
            collate_fn=self.data_collator,
            drop_last=self.args.dataloader_drop_last,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = adamw(self.model, self.optimiser)
        return self.optimizer

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder, step = Path(self.args.output_dir), self.state.global_step
        with writing_checkpoint(folder, step, self.args.should_save):
            super()._save_checkpoint(model, trial)
            if self.table is not None:
                self.table.write(self._table_file(folder / f"checkpoint-{step}"))
            wait_for_all()  # each process has written its part

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """With the teacher's scores that were known then: which are computed beside one another may change their last bits."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.table is not None:
            self.table.read(self._table_file(Path(resume_from_checkpoint)))

    def _table_file(self, checkpoint: Path) -> Path:
        return checkpoint / f"scores_{self.args.process_index}.safetensors"

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the weights, those that several names share once. Raises NotFiniteError for weights that are not finite."""
        self.finite.look()
        check_trained(self.accelerator.unwrap_model(self.model).state_dict().items(), f"step {self.state.global_step}")
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_model(self.accelerator.unwrap_model(self.model), str(folder / WEIGHTS))


def adamw(model: nn.Module, spec: StepSpec) -> torch.optim.Optimizer:
    """AdamW without weight decay on norms, biases, the temperature and other vectors."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": spec.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=spec.learning_rate, betas=spec.betas)


def freeze_unreached(model: nn.Module, batch: PairBatch) -> list[str]:
    """Takes parameters that the loss does not reach out of training, since data-parallel training would wait for their
    gradients; returns their names."""
    model.train()
    loss, _ = model(batch)
    return freeze_unreached_by(model, loss)
