"""What this machine can do of what a recipe asks, said before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

import torch
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

from mmkd.errors import DataError
from mmkd.recipes.recipe import Recipe
from mmkd.towers.loading import device_of_process
from mmkd.train.optimisers import why_not
from mmkd.train.spec import tracker_errors

# Attention that is a package of its own -> (whether it is installed, its name). transformers also takes kernels from the hub.
FLASH = {
    "flash_attention_2": (is_flash_attn_2_available, "flash-attn"),
    "flash_attention_3": (is_flash_attn_3_available, "flash-attn-3"),
    "flash_attention_4": (is_flash_attn_4_available, "flash-attn-4"),
}
TF32_CAPABILITY = (8, 0)  # Ampere


def use_machine(recipe: Recipe) -> None:
    """Refuses what this machine cannot do, makes this process's GPU its current one, and sets the precision of float32 products.

    Raises DataError with all reasons, TowerError where there are fewer GPUs than processes.
    """
    wrong = list(machine_errors(recipe))
    if wrong:
        raise DataError("this machine cannot run the recipe: " + "; ".join(wrong))
    device_of_process()
    torch.set_float32_matmul_precision("high" if recipe.tf32 else "highest")


def machine_errors(recipe: Recipe) -> Iterator[str]:
    """What a recipe asks that this machine cannot do, each with the key, the reason and the way out."""
    cuda = torch.cuda.is_available()
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    many = len(recipe.teacher_specs) > 1
    for name, spec in recipe.teacher_specs.items():
        key = f"teachers.{name}" if many else "teacher"
        attention = spec.attn_implementation if spec.cache is None else None
        yield from loading_errors(f"{key}.", attention, spec.dtype, spec.quantise)
    yield from loading_errors("student.", recipe.student.attn_implementation, recipe.student.dtype, None, trained=True)
    for name, stage in recipe.stages.items():
        if stage.precision == "float16" and not cuda:
            yield f"stages.{name}.precision: float16 needs a GPU, and there is none here; take bfloat16 or float32"
        if stage.quantise is not None and stage.quantise.format == "nf4" and find_spec("bitsandbytes") is None:
            yield f"stages.{name}.quantise: nf4 needs bitsandbytes, which is not installed; install it, or take q4_0"
        if (why := why_not(stage.optimiser.kind, cuda=cuda, sharded=sharded)) is not None:
            yield f"stages.{name}.optimiser.kind: {why}"
    yield from tracker_errors(recipe.report_to)
    if recipe.tf32 and not cuda:
        yield "tf32: needs an NVIDIA GPU, and there is none here; take it out"
    elif recipe.tf32 and torch.cuda.get_device_capability() < TF32_CAPABILITY:
        yield f"tf32: {torch.cuda.get_device_name()} has none; it needs an NVIDIA GPU from Ampere on (A100, RTX 30); take it out"


def loading_errors(
    key: str, chosen: str | None, dtype: str, quantise: str | None, *, trained: bool = False
) -> Iterator[str]:  # fmt: skip
    """What of a model's attention and quantisation this machine cannot do. key: what stands before the names of the options."""
    cuda = torch.cuda.is_available()
    if quantise is not None and find_spec("bitsandbytes") is None:
        yield f"{key}quantise: needs bitsandbytes, which is not installed; pip install bitsandbytes"
    if chosen in FLASH:
        installed, package = FLASH[chosen]
        if not cuda:
            yield f"{key}attn_implementation: {chosen} needs a GPU, and there is none here; take sdpa"
        elif not installed() and find_spec("kernels") is None:
            yield f"{key}attn_implementation: {chosen} needs {package}, which is not installed; install it or take sdpa"
        if dtype == "float32":
            yield f"{key}attn_implementation: {chosen} computes in half precision, {key}dtype is float32; take bfloat16 or sdpa"
    if chosen == "flex_attention" and trained and not cuda:
        yield f"{key}attn_implementation: flex_attention has no backward pass without a GPU; take sdpa"
