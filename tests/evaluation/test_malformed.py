"""Nearly six hundred damaged files: each gives a DataError of one line or a counted skip, and never another error."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from layouts import CARDS, Oracle

from mmkd.errors import DataError
from mmkd.evaluation.answer import evaluate
from mmkd.evaluation.benchmarks import load_benchmark
from mmkd.evaluation.report import build_report
from mmkd.evaluation.statistics import compare_runs
from mmkd.evaluation.store import PARTIAL, PREDICTIONS, RESULTS
from mmkd.retrieval.benchmark import load_retrieval

ANNOTATIONS, ANSWERS, CAPTIONS = 380, 120, 80
PICTURES = {".jpg", ".png"}
STRANGE = [
    None, True, -1, 0, 10**30, 1.5, 1e308, "", " ", "\x00", "../../etc/passwd", "/etc/passwd", "x" * 200_000, "\ud83d", "\u2028",
    "🐈" * 300, [], {}, [[]], [None], {"": None}, ["a", 1], "nan", "<image>", "NaN",
]  # fmt: skip


def leaves(value: object, path: tuple = ()) -> list[tuple]:
    """The places of a JSON value, the inner ones included."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in pairs for place in leaves(inner, (*path, key)))]


def replaced(value: object, path: tuple, new: object) -> object:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


def without(value: object, path: tuple) -> object:
    if len(path) > 1:
        return replaced(value, path[:1], without(value[path[0]], path[1:]))
    copy = dict(value) if isinstance(value, dict) else list(value)
    del copy[path[0]]
    return copy


def changed_json(content: bytes, draw: random.Random) -> bytes:
    """One value of a JSON text (or of one of its lines) of another type, missing, doubled or NaN."""
    lines = [content] if content.lstrip()[:1] == b"[" or content.count(b"\n") <= 1 else content.split(b"\n")
    number = draw.randrange(len(lines))
    try:
        value = json.loads(lines[number])
    except ValueError:
        return content + b"\x00"
    path = draw.choice(leaves(value))
    way = draw.choice(["strange", "strange", "missing", "twice", "constant"])
    if way == "missing" and path:
        value = without(value, path)
    elif way == "twice":
        value = value * 2 if isinstance(value, list) else {k: v * 2 if isinstance(v, list) else v for k, v in value.items()}
    elif way == "strange":
        value = replaced(value, path, draw.choice(STRANGE))
    text = json.dumps(value)
    if way == "constant":
        text = json.dumps(replaced(value, path, "@@")).replace('"@@"', draw.choice(["NaN", "-Infinity", "1e999", "01"]))
    lines[number] = text.encode("utf-8", "surrogatepass")
    return b"\n".join(lines)


def damaged(content: bytes, draw: random.Random) -> bytes:
    """The bytes of a file with one thing wrong with them."""
    place = draw.randrange(len(content))
    ways: list[Callable[[], bytes]] = [
        lambda: content[:place],
        lambda: b"",
        lambda: b"\xff\xfe" + content,
        lambda: content.decode("utf-8", "replace").encode("utf-16"),
        lambda: content[:place] + b"\x80" + content[place:],
        lambda: content[:place] + b'"' + content[place:],
        lambda: b"[" * 100_000,
        lambda: b'{"a":' * 100_000,
        lambda: b"1" * 6000,
        lambda: b"\xef\xbb\xbf" + content,  # harmless: a byte order mark
        lambda: bytes(draw.randrange(256) for _ in range(200)),
    ]
    return draw.choice(ways)() if draw.random() < 0.4 else changed_json(content, draw)


def outcome(action: Callable[[], dict]) -> str:
    """ "refused" with a message of one line, "skipped" with its count, or "read". Any other error goes through."""
    try:
        results = action()
    except DataError as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 2000, str(error)[:3000]
        return "refused"
    return "skipped" if results.get("n_skipped") else "read"


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmkd.base.jsonl.os.fsync", lambda descriptor: None)


def test_damaged_annotations_and_pictures(tmp_path: Path, fake_tower) -> None:
    draw, seen = random.Random(7), {"refused": 0, "skipped": 0, "read": 0}
    benchmarks = {card: load_benchmark(card) for card in CARDS}
    for card in CARDS:
        (tmp_path / card).mkdir()
        CARDS[card][0](tmp_path / card)
    for _ in range(ANNOTATIONS):
        card = draw.choice(list(CARDS))
        benchmark, root = benchmarks[card], tmp_path / card
        files = sorted(path for path in root.rglob("*") if path.is_file())
        words = [path for path in files if path.suffix not in PICTURES]
        victim = draw.choice(files if draw.random() < 0.35 else words)
        content = victim.read_bytes()
        victim.unlink()
        if draw.random() < 0.9:
            victim.write_bytes(damaged(content, draw))
        options = {"data_root": root, "progress": False, "resume": False, "submission": benchmark.submission is not None}
        seen[outcome(lambda b=benchmark, k=options: evaluate(Oracle(fake_tower), b, tmp_path / "out", **k))] += 1
        victim.write_bytes(content)
    assert seen["refused"] > 200 and seen["skipped"] > 3 and seen["read"] > 5, seen


def test_damaged_captions(tmp_path: Path) -> None:
    rows = [{"filename": f"{n}.jpg", "split": "test", "sentences": [{"raw": f"a {n}"}] * 2} for n in range(3)]
    content = json.dumps({"images": rows, "dataset": "x"}).encode()
    draw, seen = random.Random(3), {"refused": 0, "read": 0}
    for _ in range(CAPTIONS):
        (tmp_path / "dataset_flickr30k.json").write_bytes(damaged(content, draw))
        seen[outcome(lambda: {"pictures": load_retrieval("flickr30k").read(tmp_path)})] += 1
    assert seen["refused"] > 30 and seen["read"] > 5, seen


@pytest.fixture
def run(tmp_path: Path, data: Path, benchmark_of, fake_tower) -> Path:
    """A finished run of two models, and an evaluation that was stopped."""
    for role in ("student", "teacher"):
        out = tmp_path / "run" / "evaluation" / role / "tiny"
        evaluate(fake_tower({"red-1": "no"} if role == "student" else {}), benchmark_of(), out, data_root=data, progress=False)
    with pytest.raises(KeyboardInterrupt):
        out = tmp_path / "run" / "stopped"
        evaluate(fake_tower(fail_at=3), benchmark_of(), out, data_root=data, batch_size=4, progress=False)
    return tmp_path / "run"


def test_damaged_answers(run: Path, data: Path, benchmark_of, fake_tower) -> None:
    draw, seen = random.Random(11), {"refused": 0, "skipped": 0, "read": 0}
    student = run / "evaluation" / "student" / "tiny"
    victims = [run / "stopped" / PARTIAL, student / PREDICTIONS, student / RESULTS]
    paths = {role: run / "evaluation" / role / "tiny" / PREDICTIONS for role in ("student", "teacher")}

    def again(folder: Path) -> dict:
        return evaluate(fake_tower(), benchmark_of(categories=[]), folder, data_root=data, batch_size=4, progress=False)

    def report() -> dict:
        return {"path": build_report(run)}

    for _ in range(ANSWERS):
        victim = draw.choice(victims)
        kept = {path: path.read_bytes() for path in victims}
        victim.write_bytes(damaged(kept[victim], draw))
        if victim.name == PARTIAL:
            seen[outcome(lambda: again(run / "stopped"))] += 1
        elif draw.random() < 0.5:
            seen[outcome(lambda: compare_runs(paths))] += 1
        else:
            seen[outcome(report)] += 1
        # A finished evaluation that is not whole any more is simply done again.
        assert again(student)["n"] == 32
        for path, content in kept.items():
            path.write_bytes(content)
    assert seen["refused"] > 50 and seen["read"] > 10, seen
