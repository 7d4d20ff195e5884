"""A recipe to begin with: from a teacher, a student, data and a method, or from a pair of `models/pairs`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mmkd.base.cards import find_card, list_cards, read_yaml
from mmkd.errors import DataError, RecipeError, did_you_mean

PAIR = "pair:"  # begins the name of a pair where a recipe is expected

# Of each method what it is and its terms; with a share of the student's own answers where it has them.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "kl": ("answers, and the teacher's distribution over each of their tokens",
           {"cross_entropy": 1.0, "kl": {"kind": "forward_kl"}}),
    "reverse_kl": ("the same with the reverse KL, which avoids what the teacher finds unlikely",
                   {"cross_entropy": 1.0, "kl": {"kind": "reverse_kl"}}),
    "jsd": ("the same with the JSD, between both", {"cross_entropy": 1.0, "jsd": {"kind": "jsd", "beta": 0.5}}),
    "topk": ("the same over the teacher's likeliest tokens", {"cross_entropy": 1.0, "topkld": {"kind": "topkld"}}),
    "on_policy": ("half of the answers are the student's own (GKD)", {"jsd": {"kind": "jsd", "beta": 0.5}}),
    "spans": ("pieces of text, for a teacher with another tokenizer", {"cross_entropy": 0.3, "spans": {"kind": "spans"}}),
    "dpo": ("preferred against other answers, the teacher as reference", {"dpo": {"kind": "dpo"}}),
    "sft": ("answers alone, without a teacher", {"cross_entropy": 1.0}),
}  # fmt: skip
ON_POLICY = {"student": {"share": 0.5, "temperature": 0.9, "max_new_tokens": 64}, "data": 0.5}


@dataclass
class Starter:
    """What a recipe begins with. data: data entries.  samples: how many they have, 0 where that is not known.
    benchmarks: that are asked at the end.  gpus: that train together, 0 for a CPU.
    """

    teacher: str | None
    student: str
    data: list[dict[str, Any]]
    method: str = "kl"
    output: str = "runs/mine"
    gpus: int = 0
    samples: int = 0
    benchmarks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise RecipeError(f"there is no method {self.method!r}; {did_you_mean(self.method, METHODS)}")
        if self.teacher is None and self.method != "sft":
            raise RecipeError(f"the method {self.method!r} compares with a teacher; give --teacher, or --method sft")

    def content(self) -> dict[str, Any]:
        """The recipe as its keys and values."""
        assembled = "+" in self.student
        rates = {"learning_rate": 2.0e-5, "learning_rates": {"projector": 1.0e-3}} if assembled else {"learning_rate": 1.0e-5}
        stage: dict[str, Any] = {"data": self.data, "train": ["projector", "language"]}
        stage |= {"answers": ON_POLICY} if self.method == "on_policy" else {}
        stage |= {"terms": METHODS[self.method][1], **self._length()}
        half = {"precision": "bfloat16", "gradient_checkpointing": True} if self.gpus else {}
        stage |= (
            {"group_by_length": True} if not any(entry.get("format") in ("datasets", "shards") for entry in self.data) else {}
        )
        stage |= half | {"optimiser": {"batch_size": self._batch(), "micro_batch_size": 4 if self.gpus else 2, **rates}}
        teacher = (
            {"model": _source(self.teacher, "towers"), "dtype": "bfloat16" if self.gpus else "auto"} if self.teacher else None
        )
        teacher = teacher | {"alignment": "spans"} if teacher and self.method == "spans" else teacher
        return {
            "title": f"{_short(self.teacher) + ' into ' if self.teacher else ''}{_short(self.student)}",
            "output": self.output, "max_length": 2048,
            **({"teacher": teacher} if teacher else {}),
            "student": _student(self.student), "stages": {"distil": stage},
            "evaluation": {"benchmarks": self.benchmarks},
        }  # fmt: skip

    def text(self, path: str) -> str:
        """The recipe as a file at `path`, with a comment on each part."""
        launch = "mmkd" if self.gpus < 2 else f"torchrun --nproc-per-node {self.gpus} -m mmkd.cli"
        head = ["A recipe to begin with; every key stands in docs/keys.md.", "", f"  mmkd show {path}",
                f"  mmkd distill {path} --dry-run", f"  {launch} distill {path}",
                f"  mmkd ask {self.output} PICTURE QUESTION"]  # fmt: skip
        lines = [f"# {line}".rstrip() for line in head]
        for line in yaml.safe_dump(self.content(), sort_keys=False, width=120).splitlines():
            key = line.split(":")[0].rstrip()
            indent = line[: len(line) - len(line.lstrip())]
            lines += [f"{indent}# {word}" for word in self._comments().get(key, ())] + [line]
        return "\n".join(lines) + "\n"

    def _comments(self) -> dict[str, list[str]]:
        """What is said above a line, by its key with its indentation."""
        seen = f"{self.samples:,} samples were found." if self.samples else "How many there are is not known."
        return {
            "output": ["models, logs and the report go here; the same command goes on with it"],
            "teacher": ["does it not fit on the GPU? `quantise: 8bit`, or `mmkd cache` once and `cache: FOLDER` (docs/cache.md)"],
            "    data": [seen],
            "    train": ["also `vision`, where pictures are of another kind than those that the encoder knows"],
            "    terms": [f"{self.method}: {METHODS[self.method][0]}; `mmkd list terms` has all"],
            "    optimiser": ["batch_size: of a step, over all GPUs; micro_batch_size: what one holds at once"],
            "evaluation": ["names of `mmkd list evaluation`, or files of cards of your own (docs/evaluation.md)"],
        }

    def _batch(self) -> int:
        """Samples a step: 32, or less where there are few, and a multiple of what the processes hold."""
        least = max(1, self.gpus) * (4 if self.gpus else 2)
        most = 32 if not self.samples else max(least, min(32, self.samples // 4))
        return max(least, most // least * least)

    def _length(self) -> dict[str, Any]:
        if any(entry.get("format") in ("datasets", "shards") for entry in self.data):  # a stream has no epochs
            return {"steps": 1000}
        return {"epochs": 3 if self.samples and self.samples < 5000 else 1}


def pair_names() -> list[str]:
    """The pairs of `models/pairs`."""
    return list(list_cards("models/pairs"))


def starter_of_pair(name: str, data: list[dict[str, Any]], **more: Any) -> Starter:
    """A pair's recipe. Raises DataError, with a suggestion, for a name that is none."""
    card = read_yaml(find_card("models/pairs", name))
    method = more.pop("method", None) or ("spans" if card.get("alignment") == "spans" else "kl")
    return Starter(card["source"], card["student"], data, method, more.pop("output", f"runs/{name}"), **more)


def shipped(name: str) -> Path | None:
    """The file of a recipe that mmkd brings, by its name: of `scripts/recipes` in a checkout, else of the installed package."""
    package = Path(__file__).resolve().parents[1]
    folders = (package.parent / "scripts" / "recipes", package / "_cards" / "recipes")
    if not re.fullmatch(r"[\w-]+(/[\w-]+)?", name):
        return None
    return next((path for folder in folders if (path := folder / f"{name}.yaml").is_file()), None)


def is_pair(path: str | Path) -> bool:
    """Whether the name of a recipe is that of a pair."""
    return str(path).startswith(PAIR)


def pair_recipe(path: str | Path, overrides: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The content of `pair:NAME` with `data=FOLDER`, and the overrides that are left. Raises DataError."""
    from mmkd.data.detect import detect

    given = [text.removeprefix("data=") for text in overrides if text.startswith("data=")]
    if not given:
        raise DataError(f"{path} says what is distilled, not on what: give data=FOLDER (or a data card's name)")
    entries = [detect(name.strip()) for text in given for name in text.split(",")]
    content = starter_of_pair(str(path).removeprefix(PAIR), entries, gpus=_gpus()).content()
    return content, [text for text in overrides if not text.startswith("data=")]


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _short(name: str | None) -> str:
    return str(name).rstrip("/").rpartition("/")[2] if name else ""


def _source(name: str, kind: str) -> str:
    """What a recipe names: the source of a card of this name, else the name itself."""
    cards = list_cards(f"models/{kind}")
    return str(read_yaml(cards[name])["source"]) if name in cards else name


def _student(name: str) -> dict[str, Any]:
    """A tower by card, folder or hub id; ENCODER + LANGUAGE MODEL is put together."""
    if "+" not in name:
        return {"model": _source(name, "towers")}
    vision, language = (part.strip() for part in name.split("+", 1))
    source = _source(vision, "encoders")
    if ":" not in source:
        source = ("local-dir:" if Path(source).is_dir() else "hf-hub:") + source
    layer = -2 if re.search(r"clip-vit", source) else -1
    parts = {"vision": {"source": source, "feature_layer": layer}, "projector": "mlp"}
    return {"assemble": parts | {"language": {"source": _source(language, "languages")}}}
