"""Students whose weights are spread over processes (FSDP2, DeepSpeed ZeRO-3): what they need that whole ones do not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import DistributedType, PartialState
from accelerate.utils import parse_flag_from_env
from PIL import Image
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmkd.data.samples import ImageRef, Sample, Turn
from mmkd.towers.tower import Tower, TowerInputs

if TYPE_CHECKING:
    from mmkd.distill.trainer import DistillTrainer

BLANK = 64  # pixels a side of the picture that nobody looks at


def is_sharded(model: nn.Module) -> bool:
    """Whether a process holds only its part of some weights. (Outside a pass, ZeRO-3 leaves empty tensors.)"""
    return any(isinstance(p, DTensor) or p.numel() == 0 for p in model.parameters())


def blank_look(tower: Tower) -> Tensor:
    """0, attached to the encoder and the projector by a pass over a black picture.

    A micro-batch without pictures runs through it where weights are sharded: the other processes gather the encoder's
    weights, and would wait for this one.
    """
    picture = Image.new("RGB", (BLANK, BLANK))
    sample = Sample("blank", (ImageRef(Path(), "blank"),), (Turn("user", "", 1),))
    encoded = tower.encode(sample, with_answer=False, pictures=[picture])
    inputs: TowerInputs = tower.collate([encoded]).to(tower.device)
    return sum(tokens.sum() for tokens in tower.see(inputs).tokens) * 0.0


def shard_on_cpu() -> None:
    """Lets accelerate shard over processes without accelerators, where it was launched for FSDP.

    It knows FSDP for kinds of accelerators only, and would train processes on CPUs data-parallel without a word.
    """
    state = PartialState()
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU  # of its parts only `state.device` says where tensors are


def make_whole(trainer: DistillTrainer) -> None:
    """Ends a sharded training: puts whole weights in the place of the main process' shards, so that it can save the student.

    Every process calls it. Nothing happens where weights are whole already.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if trainer.args.process_index == 0:
            replace_weights(trainer.accelerator.unwrap_model(trainer.model_wrapped), state)


def replace_weights(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Sets a model's parameters to the whole tensors of `state`; those that are one (tied) stay one."""
    whole: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in whole:
                tensor = state[f"{path}.{name}" if path else name].to(parameter.dtype)
                whole[id(parameter)] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
            module._parameters[name] = whole[id(parameter)]
