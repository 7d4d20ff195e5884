"""Seeded damage: to bytes, to texts, to values of YAML and JSON, to folders."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.0, -1.0, 1e-300, 1e300, float("nan"), float("inf"), -float("inf"), "",
    " ", "x", "x" * 5000, "../outside", "../../../../etc/passwd", "/dev/zero",
    "/proc/self/mem", "a\0b", "ä\u202e字", "\ud800", "${NOT_SET}",
    "{{ 7 * 7 }}", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "<script>alert(1)</script>",
    [], [[]], [1, 2, 3], ["a", None], {}, {"x": {"y": {}}}, {"kind": "nothing"}, [None] * 1000,
)  # fmt: skip
ODD_TEXT = (
    b"\0", b"\xff\xfe", b"!!int abc", b"2001-99-99", b"&a [*a]", b"*nowhere", b"<<: *a", b"!!python/object/apply:os.getcwd []",
    b"9" * 5000, b"[" * 500, b"{" * 500, b"\t", b"\n", b": ", b"- ", b"\"", b"'", b"\\u0000", b"NaN", b"-Infinity", b"1e999",
    b"\r",
)  # fmt: skip


def bytes_of(draw: random.Random, content: bytes) -> bytes:
    """The content with one kind of damage."""
    if not content:
        return draw.choice(ODD_TEXT)
    place, other = draw.randrange(len(content)), draw.randrange(len(content))
    low, high = sorted((place, other))
    kinds: tuple[Callable[[], bytes], ...] = (
        lambda: content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :],
        lambda: content[:place],
        lambda: content[:low] + content[high:],
        lambda: content[:place] + draw.choice(ODD_TEXT) + content[place:],
        lambda: content[:low] + bytes(high - low) + content[high:],
        lambda: content[:high] + content[low:high] + content[high:],
        lambda: content[high:] + content[:high],
        lambda: content[:place] + draw.randbytes(draw.randrange(1, 40)) + content[place:],
        lambda: b"",
        lambda: draw.randbytes(draw.randrange(1, 400)),
    )
    return draw.choice(kinds)()


def value_of(draw: random.Random, value: Any, depth: int = 0) -> Any:
    """A nested value with one part replaced, taken away, renamed or doubled."""
    if isinstance(value, dict) and value and (depth == 0 or draw.random() < 0.75):
        key = draw.choice(list(value))
        kind = draw.random()
        if kind < 0.12:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.2:
            return {(f"{k}_" if k == key else k): v for k, v in value.items()}
        if kind < 0.25:
            return {**value, draw.choice(["", "x" * 300, "on", "1", "__class__"]): draw.choice(ODD_VALUES)}
        return {**value, key: value_of(draw, value[key], depth + 1)}
    if isinstance(value, list) and value and draw.random() < 0.75:
        place = draw.randrange(len(value))
        if draw.random() < 0.2:
            return value[:place] + value[place + 1 :]
        return [value_of(draw, part, depth + 1) if number == place else part for number, part in enumerate(value)]
    return draw.choice(ODD_VALUES)


def json_of(draw: random.Random, content: bytes) -> bytes:
    """A JSON or JSON lines file with one value changed; bytes where it is none."""
    try:
        lines = content.decode().splitlines() if content.count(b"\n") > 1 and content.lstrip()[:1] != b"[" else [content.decode()]
        try:
            whole = json.loads(content)
            lines = [json.dumps(value_of(draw, whole))]
        except ValueError:
            place = draw.randrange(len(lines))
            lines[place] = json.dumps(value_of(draw, json.loads(lines[place])))
        return "\n".join(lines).encode("utf-8", "surrogatepass")
    except (ValueError, IndexError):
        return bytes_of(draw, content)


def file(draw: random.Random, path: Path) -> str:
    """Damages a file in place; says how."""
    content = path.read_bytes()
    structured = path.suffix in (".json", ".jsonl") and draw.random() < 0.6
    path.write_bytes((json_of if structured else bytes_of)(draw, content))
    return f"{'value' if structured else 'bytes'} of {path.name}"


def folder(draw: random.Random, path: Path, keep: tuple[str, ...] = ()) -> str:
    """Damages, removes, replaces or exchanges a file below a folder; says which."""
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name not in keep)
    chosen = draw.choice(files)
    name, kind = chosen.relative_to(path).as_posix(), draw.random()
    if kind < 0.7:
        return file(draw, chosen)
    chosen.unlink()
    if kind < 0.8:
        return f"removed {name}"
    if kind < 0.85:
        chosen.mkdir()
        return f"{name} is a folder"
    if kind < 0.9:
        chosen.symlink_to("/etc/passwd")
        return f"{name} links outside"
    shutil.copy(draw.choice([p for p in files if p != chosen] or [Path(__file__)]), chosen)
    return f"{name} is another file"
