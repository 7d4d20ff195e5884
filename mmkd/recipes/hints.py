"""What is said of a key that a recipe does not have: where it belongs, or what it is called here."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from mmkd.errors import did_you_mean

# What other trainers call it -> its place here, below the place where somebody is likely to write it.
ELSEWHERE = {
    "lr": "optimiser.learning_rate",
    "optimizer": "optimiser",
    "optim": "optimiser.kind",
    "lr_scheduler": "optimiser.schedule",
    "lr_scheduler_type": "optimiser.schedule",
    "scheduler": "optimiser.schedule",
    "warmup_ratio": "optimiser.warmup",
    "warmup_steps": "optimiser.warmup",
    "gradient_clipping": "optimiser.max_grad_norm",
    "per_device_train_batch_size": "optimiser.micro_batch_size",
    "gradient_accumulation_steps": "optimiser.micro_batch_size",
    "batch_tokens": "optimiser.micro_batch_tokens",
    "max_tokens": "optimiser.micro_batch_tokens",
    "max_token_len_per_gpu": "optimiser.micro_batch_tokens",
    "ppo_max_token_len_per_gpu": "optimiser.micro_batch_tokens",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "max_steps": "steps",
    "save_steps": "save_every",
    "logging_steps": "log_every",
    "eval_steps": "evaluation.every",
    "bf16": "precision",
    "fp16": "precision",
    "loss": "terms",
    "losses": "terms",
    "dataset": "data",
    "datasets": "data",
    "freeze": "train",
    "unfreeze": "train",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "output_dir": "output",
    "teacher_model": "teacher.model",
    "student_model": "student.model",
    "max_seq_length": "max_length",
    "model_max_length": "max_length",
    "load_in_8bit": "quantise",
    "load_in_4bit": "quantise",
    "quantize": "quantise",
    "torch_dtype": "dtype",
    "num_workers": "workers",
}
DEPTH = 3  # how far below a place a key is looked for


def key_hint(name: str, here: Any, root: Any) -> str:
    """Where an unknown key belongs, in words. here: the model whose keys stand at its place.  root: that of the whole recipe."""
    own = {field.alias or name for name, field in here.model_fields.items()}
    meant = ELSEWHERE.get(name.lower())
    below = {path.rpartition(".")[2]: path for path in reversed([*_paths(here)])}
    if meant is not None and (place := _place(meant, here, root, own)):
        return place
    if name in below:
        return f"it belongs one place lower: `{below[name]}`"
    if here is not root and name in root.model_fields:
        return f"it is a key of the recipe itself: `{name}`"
    if not difflib.get_close_matches(name, own, cutoff=0.6):
        if close := difflib.get_close_matches(name, below, n=1, cutoff=0.75):
            return f"did you mean `{below[close[0]]}`?"
        paths = {path.rpartition(".")[2]: path for path in reversed([*_paths(root)])}
        if close := difflib.get_close_matches(name, paths, n=1, cutoff=0.8):
            return f"did you mean `{paths[close[0]]}` of the recipe?"
    return did_you_mean(name, own)


def _place(meant: str, here: Any, root: Any, own: set[str]) -> str | None:
    first, _, rest = meant.partition(".")
    if first in own:
        return f"here it is `{meant}`"
    if rest in own:  # the place is inside of what the name begins with
        return f"here it is `{rest}`"
    if here is not root and first in root.model_fields:
        return f"here it is `{meant}` of the recipe itself"
    if here is root:
        found = next((path for path in _paths(root) if path.endswith(f".{meant}")), None)
        return f"here it is `{found}`" if found else None
    return None


def _paths(model: Any, depth: int = DEPTH) -> Iterator[str]:
    """The dotted names of all keys below a model; names of a user's own are written in capitals. Shallow ones come first."""
    level = [("", model)]
    for _ in range(depth):
        following = []
        for prefix, one in level:
            for name, field in one.model_fields.items():
                if name == "writes" or field.exclude:  # not written in a recipe under this name
                    continue
                yield f"{prefix}{name}"
                inner = inner_model(field.annotation)
                if inner is not None:
                    user = "NAME." if "dict[" in str(field.annotation) else "0." if "list[" in str(field.annotation) else ""
                    following.append((f"{prefix}{name}.{user}", inner))
        level = following


def inner_model(annotation: Any) -> Any:
    """The model that an annotation holds, None where it holds none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = inner_model(argument)
        if found is not None:
            return found
    return None
