"""Students whose weights are spread over processes (FSDP2, DeepSpeed ZeRO-3): what they need that whole ones do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from PIL import Image
from torch import Tensor, nn
from transformers import Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from mmkd.data.samples import ImageRef, Sample, Turn
from mmkd.towers.tower import Seen, Tower, TowerInputs

ZERO_OF_WEIGHTS = 3  # the stage of DeepSpeed's ZeRO that spreads weights, not only gradients and optimiser
BLANK = 64  # pixels a side of the picture that nobody looks at


def zero_of_parameters(model: nn.Module) -> Tensor:
    """0, attached to every trained parameter."""
    return sum((p.flatten()[:1].sum() * 0.0 for p in model.parameters() if p.requires_grad), torch.zeros(()))


def dummy_forward(tower: Tower) -> Seen:
    """The encoder's and the projector's pass over a black picture.

    A micro-batch without pictures begins with it where processes keep step: the others gather the encoder's weights and
    would wait for this one (FSDP, ZeRO-3), or take whichever gradients come first for the same ones (ZeRO-2).
    """
    picture = Image.new("RGB", (BLANK, BLANK))
    sample = Sample("blank", (ImageRef(Path(), "blank"),), (Turn("user", "", 1),))
    encoded = tower.encode(sample, with_answer=False, pictures=[picture])
    inputs: TowerInputs = tower.collate([encoded]).to(tower.device)
    return tower.see(inputs)


def shard_on_cpu() -> None:
    """Lets accelerate shard over processes without accelerators, where it was launched for FSDP.

    It knows FSDP for kinds of accelerators only, and would train processes on CPUs data-parallel without a word.
    """
    state = PartialState()
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU  # of its parts only `state.device` says where tensors are


def keep_sums_precise(plugin: FullyShardedDataParallelPlugin) -> None:
    """In a lower precision, gradients are still summed in float32 as by DDP, and losses and what is logged not rounded."""
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None)


def spreads_weights(trainer: Trainer) -> bool:
    """Whether no process has the whole student while it trains."""
    if trainer.is_deepspeed_enabled:
        return trainer.accelerator.state.deepspeed_plugin.zero_stage == ZERO_OF_WEIGHTS
    return trainer.is_fsdp_enabled


def make_whole(trainer: Trainer) -> None:
    """Ends a sharded training: puts whole weights in the place of the main process' shards, so that it can save the student.

    Every process calls it. Nothing happens where weights are whole already.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if trainer.args.process_index == 0:
            replace_weights(trainer.accelerator.unwrap_model(trainer.model_wrapped), state)
    if trainer.is_deepspeed_enabled:
        unset_hf_deepspeed_config()  # else transformers would load the next stage's student in parts


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
