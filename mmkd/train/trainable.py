"""What of a student a stage trains: parts, adapters, feed-forward layers."""

from __future__ import annotations

import torch

from mmkd.errors import TowerError, one_line, shown
from mmkd.towers.tower import Tower
from mmkd.train.checkpointing import checkpoint_layers
from mmkd.train.spec import LoraSpec, StageSpec

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
        checkpoint_layers(student)


def add_lora(student: Tower, spec: LoraSpec) -> None:
    """LoRA (or DoRA) adapters on the language model, in place; they are merged when the stage is saved.

    Raises TowerError for targets that no layer matches.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if wrong := lora_errors(student, spec):
        raise TowerError(f"lora.{wrong[0]}")
    linear = sorted({path.rpartition(".")[2] for path in _linear(student)})
    targets = spec.targets if isinstance(spec.targets, list) else linear
    config = LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha, lora_dropout=spec.dropout, target_modules=targets, use_dora=spec.dora
    )
    try:
        inject_adapter_in_model(config, student.language)
    except ValueError as error:
        told = f"{one_line(error)}; the language model has {', '.join(linear)}"
        raise TowerError(f"lora.targets {shown(targets)}: {told}") from error


def _linear(student: Tower) -> list[str]:
    """Paths of the language model's matrices."""
    return [name for name, module in student.language.named_modules() if isinstance(module, torch.nn.Linear)]


def lora_errors(student: Tower, spec: LoraSpec) -> list[str]:
    """What makes these adapters impossible on a student: targets that no layer matches."""
    linear = _linear(student)
    targets = spec.targets if isinstance(spec.targets, list) else linear
    # As peft matches them: a layer's whole path, or its end.
    unmatched = [t for t in targets if not any(path == t or path.endswith(f".{t}") for path in linear)]
    if targets and len(unmatched) < len(targets):
        return []
    names = ", ".join(sorted({path.rpartition(".")[2] for path in linear}))
    return [f"targets {shown(spec.targets)} match no layer of the language model; it has {names}"]


def remove_lora(student: Tower) -> None:
    """Takes adapters away without merging them; the layers below stay as they are."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in [(n, m) for n, m in student.model.named_modules() if isinstance(m, BaseTunerLayer)]:
        parent, _, own = name.rpartition(".")
        setattr(student.model.get_submodule(parent), own, layer.get_base_layer())
