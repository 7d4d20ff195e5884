"""A processor as a `Reading` wants it: options, chat template and its arguments, closed thinking."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

from mmkd.errors import TowerError, did_you_mean
from mmkd.towers.chat import Chat, closing_of
from mmkd.towers.families import family_of
from mmkd.towers.reading import AS_SAVED, Reading
from mmkd.towers.templates import closing, named_template, template_of, with_arguments


def configured(processor: Any, kind: str, reading: Reading) -> Any:
    """The processor of a model of type `kind` as it is to be read with; the one given stays as it is. Raises TowerError."""
    family_template = family_of(kind).chat_template if template_of(processor) is None else None
    if reading == AS_SAVED and family_template is None:
        return processor
    processor = _with_options(copy.copy(processor), reading.processor)
    given = reading.chat_template or family_template
    template = named_template(given) if given else template_of(processor)
    if template is None:
        return processor  # which is refused when it is to prepare samples
    if reading.template:
        template = with_arguments(template, reading.template)
    if reading.thinking is False:
        facts = Chat(processor, template, thinking=None).facts
        if facts.opens:
            template = closing(template, closing_of(facts.generation))
    if template != template_of(processor):
        processor.chat_template = template
    return processor


def _with_options(processor: Any, options: Mapping[str, Any]) -> Any:
    """A copy of a processor with changed options, each its own or its image processor's."""
    images = getattr(processor, "image_processor", None)
    parts = {"tokenizer", "chat_template", "self", "args", "kwargs", *processor.get_attributes()}
    own = {name for name in inspect.signature(type(processor).__init__).parameters if hasattr(processor, name)} - parts
    of_images = _options_of(images)
    for name in options:
        if name not in own | of_images:
            raise TowerError(
                f"neither {type(processor).__name__} nor {type(images).__name__} has an option {name!r}; "
                f"{did_you_mean(name, own | of_images)}"
            )
    for name in own & options.keys():
        setattr(processor, name, options[name])
    changed = {name: value for name, value in options.items() if name in of_images}
    if changed:
        try:
            processor.image_processor = type(images).from_dict(images.to_dict(), **changed)
        except (ValueError, TypeError, KeyError) as error:
            raise TowerError(f"{type(images).__name__} does not take {changed}: {error}") from error
    every_call = getattr(processor, "images_kwargs", None) or {}  # what a class such as InternVL's says over its image processor
    if every_call.keys() & changed.keys():
        processor.images_kwargs = {name: changed.get(name, value) for name, value in every_call.items()}
    return processor


def tell_model(config: Any, reading: Reading) -> None:
    """Sets what a model's configuration says of its pictures as the processor's options do, where both have it: LLaVA-NeXT and
    OneVision cut by the processor's `image_grid_pinpoints` and count the pieces by the model's."""
    for name, value in reading.processor.items():
        if name in config.to_dict():
            setattr(config, name, copy.deepcopy(value))


def not_saved(processor: Any) -> list[str]:
    """The options of `_with_options` that stand in no file of a saved processor, since its class has them for every call."""
    own, of_class = vars(processor).get("images_kwargs", {}), getattr(type(processor), "images_kwargs", {})
    return [name for name, value in own.items() if value != of_class.get(name)]


def _options_of(images: Any) -> set[str]:
    if images is None:
        return set()
    valid = getattr(getattr(images, "valid_kwargs", None), "__annotations__", {})
    return {*valid, *images.to_dict()} - {"image_processor_type", "processor_class", "device", "return_tensors"}
