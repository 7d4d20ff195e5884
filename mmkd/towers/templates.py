"""Chat templates that come with mmkd, and what a tower's keys make of a template: arguments, closed thinking, a fixed date."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from mmkd.errors import TowerError, did_you_mean

IMAGE = "<image>"

_CONTENT = (
    "{% macro content(m) %}{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<image>\n{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"
)
# Chat templates for language models, most of whose own templates know nothing of images.
CHAT_TEMPLATES = {
    # The space before an answer is the answer's: its first word is then the same token as within a sentence.
    "simple": _CONTENT
    + "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %} {{ content(m) }}<|end|>{% else %}{{ content(m) }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "chatml": _CONTENT + "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ content(m) }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama3": _CONTENT
    + "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ content(m) }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    "vicuna": _CONTENT
    + "{% for m in messages %}{% if m.role == 'system' %}{{ content(m) }} {% elif m.role == 'user' %}USER: {{ content(m) }} "
    "{% else %}ASSISTANT: {{ content(m) }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    # PaliGemma was taught without roles: pictures, then what is asked. Its processor writes the beginning and the newline.
    "paligemma": "{% for m in messages %}{% if m.content is not string %}{% for c in m.content if c.type == 'image' %}<image>"
    "{% endfor %}{% endif %}{% endfor %}{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %}{% endif %}{% if not loop.last %}{{ '\\n' }}{% endif %}"
    "{% endfor %}",
}

_DATE = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")


def template_of(processor: Any) -> str | None:
    """The chat template of a processor, or else of its tokenizer; of several named ones the default."""
    template = getattr(processor, "chat_template", None) or processor.tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default") or next(iter(template.values()), None)
    return template


def named_template(text: str) -> str:
    """A template by one of our names, a file, or as it is. Raises TowerError for what is none of these."""
    if text in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[text]
    if "{{" in text or "{%" in text:
        return text
    path = Path(text)
    if not path.is_file():
        raise TowerError(
            f"chat_template {text!r} is no file, no template (it has neither '{{{{' nor '{{%'), and no name of one; "
            f"{did_you_mean(text, CHAT_TEMPLATES)}"
        )
    return path.read_text(encoding="utf-8")


def with_arguments(template: str, arguments: Mapping[str, Any]) -> str:
    """The template with values for variables that it asks for. They are written into it, so that a saved model has them too.

    Raises TowerError for a variable that the template does not know.
    """
    values = {name: _literal(name, value) for name, value in arguments.items()}
    written = "".join(f"{{%+ set {name} = {value} +%}}" for name, value in values.items())
    if template.startswith(written):  # that of a model which was saved with them
        return template
    known = variables_of(template)
    for name in arguments:
        if name not in known:
            raise TowerError(f"the chat template has no variable {name!r}; {did_you_mean(name, known)}")
    return written + template


def _literal(name: str, value: Any) -> str:
    if value is None:
        return "none"
    if not isinstance(value, bool | int | float | str | list):
        raise TowerError(f"the template argument {name!r} is {value!r}; write a text, a number, true, false, null or a list")
    return json.dumps(value)


def variables_of(template: str) -> set[str]:
    """Variables that a template takes besides the messages. Raises TowerError for what is no template."""
    from jinja2 import TemplateSyntaxError, meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(_GENERATION.sub("", template))
    except TemplateSyntaxError as error:
        raise TowerError(f"the chat template does not parse: {error.message} (line {error.lineno})") from error
    own = {"messages", "add_generation_prompt", "raise_exception", "strftime_now", "namespace", "tools", "documents"}
    return set(meta.find_undeclared_variables(tree)) - own


def closing(template: str, text: str) -> str:
    """The template with `text` behind its generation prompt."""
    template = template.removesuffix("\n")  # as Jinja leaves it away at the end of a template
    return f"{template}{{%+ if add_generation_prompt +%}}{{{{ {json.dumps(text)} }}}}{{%+ endif +%}}"


def prints_date(template: str) -> bool:
    return "strftime_now" in template


def dated(template: str, day: date) -> str:
    """The template with `day` for what it asks of the clock."""
    return _DATE.sub(lambda found: json.dumps(day.strftime(found[2])), template)
