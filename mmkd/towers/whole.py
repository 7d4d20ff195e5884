"""Pretrained weights, whole or refused: every tensor of the model is in the folder, in its shape, and is finite."""

from __future__ import annotations

import json
import logging
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

from torch import nn
from transformers.utils import logging as transformers_logging

from mmkd.errors import MmkdError, TowerError, one_line
from mmkd.towers.finite import check_weights, named

logger = logging.getLogger(__name__)

POOLER = "pooler."  # of encoders; models with another head were saved without it


def load_whole(
    auto: Any, source: str | Path, what: str, *, part: bool = False, pooled: bool = False, shown: str = "", **options: Any
) -> nn.Module:
    """The model that `auto.from_pretrained` makes of a folder or hub id, from safetensors alone.

    what: the model's name in messages, "vision encoder".  part: whether the folder may hold more than this model, such as another
    head or the text half of a CLIP.  pooled: whether a part's pooled output is used; where it is not, a missing pooler is none.
    shown: the source as the recipe has it.
    Tied weights and those that the model's class leaves out by itself count as there. Raises TowerError with the tensors' names.
    """
    shown = repr(shown or str(source))
    check_source(source, what, shown)
    try:
        check_index(source)
        with _quiet():
            model, report = auto.from_pretrained(
                source, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except MmkdError:
        raise
    except Exception as error:  # each model, configuration and file format fails in its own way
        raise TowerError(f"no {what} can be loaded from {shown}: {_reason(error)}") from error
    if wrong := _incomplete(model, report, part, pooled):
        raise TowerError(f"{shown} is not the whole of a {what} ({type(model).__name__}): {'; '.join(wrong)}")
    check_weights(model, f"the {what} {shown}")
    return model


def check_source(source: str | Path, what: str, shown: str) -> None:
    """Raises TowerError, at once, for a folder that is not there and a hub id that the hub does not give.

    transformers takes either for a hub id, and asks the hub for each file again and again.
    """
    name = str(source)
    if Path(name).is_dir():
        return
    if Path(name).is_file():
        reason: str | None = "it is a file; a folder is expected, or a hub id"
    elif _looks_like_path(name):
        reason = f"there is no folder {name} here (in {Path.cwd()}); give one, or a hub id (ORGANISATION/NAME)"
    else:
        reason = _hub_refusal(name)
    if reason is not None:
        raise TowerError(f"no {what} can be loaded from {shown}: {reason}")


def _looks_like_path(name: str) -> bool:
    """Whether a name means a folder: no hub id has its form, or it begins with a folder that is here."""
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name) is not None
    return not is_id or ("/" in name and Path(name).parts[0] != name and Path(Path(name).parts[0]).is_dir())


@lru_cache(maxsize=64)
def _hub_refusal(name: str) -> str | None:
    """Why there is no such model on the hub; None where there is one, or a copy of it here."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return None
    here = f"there is no folder {name} here (in {Path.cwd()})"
    if HF_HUB_OFFLINE:
        return f"{here} and no copy of such a model of the hub, which is not asked (HF_HUB_OFFLINE)"
    try:
        HfApi().model_info(name, timeout=10)
    except Exception as error:  # no such name, no access, no network: each has its own
        return f"{here}, and the hub gives no model of this name: {one_line(error, 200)}"
    return None


def load_beside(auto: Any, source: str | Path, what: str, **options: Any) -> Any:
    """A processor, tokenizer or configuration of a folder or hub id. Raises TowerError."""
    check_source(source, what, repr(str(source)))
    try:
        return auto.from_pretrained(source, **options)
    except Exception as error:  # as above
        raise TowerError(f"no {what} can be loaded from {str(source)!r}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    told = one_line(error, 400)
    return told if isinstance(error, OSError | ValueError) and told else f"{type(error).__name__}: {told}"


def _incomplete(model: nn.Module, report: dict[str, Any], part: bool, pooled: bool) -> list[str]:
    missing = sorted(report["missing_keys"])
    surplus = sorted(report["unexpected_keys"])
    if part:
        own = {name for name, _ in model.named_children()}
        surplus = [name for name in surplus if name.split(".")[0] in own]
        poolers = [] if pooled else [name for name in missing if name.startswith(POOLER)]
        if poolers:
            logger.info("not in the folder, starts from random weights: %s", named(poolers))
        missing = [name for name in missing if name not in poolers]
    misshapen = [f"{name} {list(there)} instead of {list(wanted)}" for name, there, wanted in sorted(report["mismatched_keys"])]
    found = [f"{len(missing)} tensors are missing: {named(missing)}"] if missing else []
    found += [f"{len(misshapen)} have other shapes: {named(misshapen)}"] if misshapen else []
    found += [f"{len(surplus)} have no place in the model: {named(surplus)}"] if surplus else []
    return found + [one_line(message) for message in report.get("error_msgs") or ()][:2]


def check_index(source: str | Path) -> None:
    """Raises TowerError for an index of weights that names files outside its folder, or files that are not there."""
    folder = Path(source)
    for path in sorted(folder.glob("*.index.json")) if folder.is_dir() else ():
        try:
            files = {str(name) for name in json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
            raise TowerError(f"{path} is no index of weights: {one_line(error)}") from error
        outside = sorted(name for name in files if PurePath(name).name != name or name == "..")
        if outside:
            raise TowerError(f"{path} names files outside its folder: {named(outside)}; weights are only read from {folder}")
        missing = sorted(name for name in files if not (folder / name).is_file())
        if missing:
            raise TowerError(f"{path} names files that are not there: {named(missing)}")


@contextmanager
def blamed(what: str) -> Iterator[None]:
    """While a model's own code runs: whatever it raises becomes a TowerError with kind and place of the failure."""
    try:
        yield
    except MmkdError:
        raise
    except Exception as error:  # parts of a folder that do not fit together fail anywhere
        places = traceback.extract_tb(error.__traceback__)
        place = f" ({PurePath(places[-1].filename).name}, line {places[-1].lineno})" if places else ""
        raise TowerError(
            f"{what} fails: {type(error).__name__}: {one_line(error)}{place}. Check that its configuration, tokenizer and "
            "weights belong together: mmkd check FOLDER"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own table of what is missing: it is refused here, in one line."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
