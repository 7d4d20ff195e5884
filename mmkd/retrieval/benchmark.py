"""Retrieval benchmarks: a dual encoder ranks a test set's captions for each picture and its pictures for each caption."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field

from mmkd.base.cards import list_cards, load_card
from mmkd.base.schema import Strict
from mmkd.data.annotations import Row, load
from mmkd.data.samples import ImageRef
from mmkd.errors import DataError, ImageError
from mmkd.evaluation.answer import PREDICTIONS, RESULTS, library_versions, write_atomically, write_object
from mmkd.evaluation.benchmarks import RETRIEVAL, ReferenceScore

if TYPE_CHECKING:
    from torch import Tensor

    from mmkd.retrieval.dual_encoders import DualEncoder

CUTOFFS = (1, 5, 10)
WAYS = ("image_to_text", "text_to_image")
SHOWN = 3  # of what a query found, kept in its row
LIMIT_SEED = 0

log = logging.getLogger(__name__)


class RetrievalBenchmark(Strict):
    """A retrieval benchmark's card. Keys that are not listed here are refused."""

    model_config = ConfigDict(frozen=True)

    name: str
    title: str
    root: Path = Field(description="the data's folder, absolute or below the data root")
    split: str
    annotations: str = Field(description="Karpathy's JSON, below the root")
    images: str = Field(description="the pictures' folder, below the root")
    expected_pictures: int | None = Field(None, gt=0, description="pictures of the official split; a difference is reported")
    reference_scores: tuple[ReferenceScore, ...] = ()
    notes: str = ""

    def folder(self, data_root: Path | str | None = None) -> Path:
        """`data_root`/`root` if that is a folder, else `data_root` itself, else `root`. Raises DataError."""
        candidates = [Path(data_root) / self.root, Path(data_root)] if data_root else [self.root]
        for folder in candidates:
            if os.path.isdir(found := os.path.expanduser(folder)):
                return Path(found)
        raise DataError(f"benchmark {self.name!r}: there is no folder {candidates[-1]}; get the data. {self.notes.strip()}")

    def read(self, data_root: Path | str | None = None, limit: int | None = None) -> list[Captioned]:
        """The split's pictures in the file's order; `limit` keeps a random part, the same one every time. Raises DataError."""
        folder = self.folder(data_root)
        path = folder / self.annotations
        if not path.exists():
            raise DataError(f"benchmark {self.name!r}: there is no {path}; get it, or name it in a card of your own")
        entries = Row(load(path), str(path)).list_of("images", dict, "objects")
        rows = [Row(entry, f"{path} image {number}") for number, entry in enumerate(entries)]
        found = [_captioned(row, folder / self.images) for row in rows if row.text("split") == self.split]
        if not found:
            raise DataError(f"{path} has no picture in split {self.split!r}")
        repeated = [name for name, count in Counter(item.image.key for item in found).items() if count > 1]
        if repeated:
            raise DataError(f"{path} names {len(repeated)} pictures more than once (first: {repeated[0]})")
        if limit is None or limit >= len(found):
            return found
        kept = random.Random(LIMIT_SEED).sample(range(len(found)), limit)
        return [found[place] for place in sorted(kept)]


@dataclass(frozen=True)
class Captioned:
    """A picture with its captions."""

    image: ImageRef
    captions: tuple[str, ...]


def _captioned(row: Row, images: Path) -> Captioned:
    """One row of Karpathy's file: filename (in the folder filepath, where there is one) and sentences of {raw}."""
    name = "/".join(filter(None, [row.text("filepath", default=""), row.text("filename")]))
    sentences = row.list_of("sentences", dict, "objects")
    captions = tuple(Row(value, f"{row.where} sentence {n}").text("raw").strip() for n, value in enumerate(sentences))
    if not captions or not all(captions):
        raise DataError(f"{row.where}: a picture needs captions, none of them empty")
    return Captioned(ImageRef.inside(images, name), captions)


def retrieval_names() -> list[str]:
    """The names of the cards in `evaluation/retrieval`."""
    return [name.removeprefix(RETRIEVAL) for name in list_cards("evaluation") if name.startswith(RETRIEVAL)]


def is_retrieval(name: str) -> bool:
    """Whether a benchmark is one of retrieval; a card file is one where it lies in a folder of that name."""
    return name in retrieval_names() or Path(name).parent.name == RETRIEVAL.rstrip("/")


def load_retrieval(name: str) -> RetrievalBenchmark:
    """A retrieval benchmark by the name of its card or by the path of a YAML file. Raises DataError."""
    return load_card(f"evaluation/{RETRIEVAL.rstrip('/')}", name, RetrievalBenchmark)


def evaluate_retrieval(
    model: DualEncoder,
    benchmark: RetrievalBenchmark,
    out: Path | str,
    *,
    data_root: Path | str | None = None,
    batch_size: int = 64,
    limit: int | None = None,
    model_name: str = "",
) -> dict[str, Any]:
    """Ranks both ways and writes `predictions.jsonl` (a row a query) and `results.json` to the folder `out`.

    A picture that cannot be read is left out with its captions and counted in `n_skipped`. The headline is recall@1 over all
    queries; `retrieval` has recall at 1, 5 and 10 and the median rank both ways, and `rsum`, the sum of the six in percent.
    Intervals are over pictures with all queries that belong to them. A tie counts against the model.
    Returns the content of results.json. Raises DataError.
    """
    import torch

    from mmkd.retrieval.measures import compare_retrieval, retrieval_ranks

    start = time.perf_counter()
    items = benchmark.read(data_root, limit)
    seen = _see(model, items, batch_size)
    captions = [caption for item in seen.items for caption in item.captions]
    owners = [number for number, item in enumerate(seen.items) for _ in item.captions]
    similarities = (seen.features @ _embed(model, captions, batch_size).T).cpu()  # [pictures, captions]
    relevant = torch.tensor(owners)[None, :] == torch.arange(len(seen.items))[:, None]  # [pictures, captions]
    ranks = retrieval_ranks(similarities, similarities.T, relevant)
    compared = compare_retrieval({"model": ranks}, relevant)
    rows = [*_picture_rows(seen, captions, similarities, ranks), *_caption_rows(seen, captions, owners, similarities, ranks)]
    results = {
        "benchmark": benchmark.name,
        "title": benchmark.title,
        **_scores(compared),
        "n_skipped": len(items) - len(seen.items),
        "skipped": seen.skipped,
        "rows": len(rows),
        "pictures": len(items),
        "captions": len(captions),
        "expected_pictures": benchmark.expected_pictures,
        "rows_difference": _difference(benchmark, len(items), limit),
        "split": benchmark.split,
        "limit": limit,
        "reference_scores": [score.model_dump() for score in benchmark.reference_scores],
        "model": model_name,
        "model_fingerprint": model.fingerprint(),
        "data_fingerprint": _fingerprint(seen),
        "parameters": model.parameter_count(),
        "batch_size": batch_size,
        "seconds": round(time.perf_counter() - start, 6),
        "versions": library_versions(),
    }
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / PREDICTIONS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_object(out / RESULTS, results)
    return results


# ---- embedding -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """The readable pictures with their unit vectors [pictures, D], digests, and how many were left out for which reason."""

    items: list[Captioned]
    features: Tensor
    digests: list[str]
    skipped: dict[str, int]


def _see(model: DualEncoder, items: Sequence[Captioned], batch_size: int) -> _Seen:
    import torch

    readable, features, digests, reasons = [], [], [], Counter()
    for start in range(0, len(items), batch_size):
        pictures = []
        for item in items[start : start + batch_size]:
            try:
                pictures.append(item.image.load())
            except ImageError as error:
                reasons[str(error).replace(f" {item.image.key}", "").partition(":")[0]] += 1
                continue
            readable.append(item)
            digests.append(hashlib.sha256(item.image.read_bytes()).hexdigest()[:16])
        if pictures:
            features.append(_vectors(model, model.embed_images, model.prepare_images(pictures)))
    if not readable:
        raise DataError(f"none of {len(items)} pictures can be read: {dict(reasons)}")
    if reasons:
        log.warning("%d pictures skipped: %s", sum(reasons.values()), dict(reasons))
    return _Seen(readable, torch.cat(features), digests, dict(reasons))


def _embed(model: DualEncoder, texts: Sequence[str], batch_size: int) -> Tensor:
    """Unit vectors of texts. [texts, D]"""
    import torch

    parts = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    return torch.cat([_vectors(model, model.embed_texts, model.prepare_texts(part)) for part in parts])


def _vectors(model: DualEncoder, embed: Callable[[dict], Tensor], inputs: dict[str, Tensor]) -> Tensor:
    import torch

    model.eval()
    with torch.no_grad():
        return embed({name: value.to(model.device) for name, value in inputs.items()}).float()


# ---- results -------------------------------------------------------------------------------------------------------------


def _picture_rows(seen: _Seen, captions: Sequence[str], similarities: Tensor, ranks: Mapping) -> Iterator[dict[str, Any]]:
    best = similarities.topk(min(SHOWN, len(captions)), dim=1).indices.tolist()
    for number, item in enumerate(seen.items):
        found = [captions[place] for place in best[number]]
        row = _query(f"picture {item.image.name}", "image_to_text", ranks["image_to_text"][number], seen.digests[number])
        yield row | {
            "question": "Which captions belong to this picture?",
            "prediction": " | ".join(found),
            "references": list(item.captions),
            "images": [item.image.key],
        }


def _caption_rows(
    seen: _Seen, captions: Sequence[str], owners: Sequence[int], similarities: Tensor, ranks: Mapping
) -> Iterator[dict[str, Any]]:
    best = similarities.topk(min(SHOWN, len(seen.items)), dim=0).indices.T.tolist()
    for number, (caption, owner) in enumerate(zip(captions, owners, strict=True)):
        found = [seen.items[place].image.name for place in best[number]]
        row = _query(f"caption {number}", "text_to_image", ranks["text_to_image"][number], seen.digests[owner])
        yield row | {
            "question": f"Which picture belongs to: {caption}",
            "prediction": " | ".join(found),
            "references": [seen.items[owner].image.name],
            "images": [seen.items[owner].image.key],
        }


def _query(name: str, direction: str, rank: int, group: str) -> dict[str, Any]:
    """What every row of predictions.jsonl has; the score is recall@1."""
    common = {"id": name, "prompt": "", "parsed": None, "score": float(rank <= 1), "rank": rank, "group": group, "skipped": None}
    return common | {"categories": {"direction": direction}}


def _scores(compared: Mapping[str, Any]) -> dict[str, Any]:
    """The headline, recall@1 over all queries, and every other number. `compared`: what `compare_retrieval` gives."""
    found = compared["recall"].items()
    recalls = {name: {"n": entry["n"], "score": entry["model"], "ci95": entry["model_ci95"]} for name, entry in found}
    return {
        "metric": "recall@1",
        **recalls["recall@1_both"],
        "by": {"direction": {way: recalls[f"recall@1_{way}"] for way in WAYS}},
        "retrieval": recalls | {"median_rank": {way: rank["model"] for way, rank in compared["median_rank"].items()}},
        "rsum": 100 * math.fsum(recalls[f"recall@{k}_{way}"]["score"] for k in CUTOFFS for way in WAYS),
    }


def _difference(benchmark: RetrievalBenchmark, pictures: int, limit: int | None) -> str | None:
    if benchmark.expected_pictures in (None, pictures):
        return None
    cause = f"limit={limit}" if limit is not None else "another release or a part of the data"
    return f"{pictures} pictures, the card expects {benchmark.expected_pictures} ({cause}): not comparable with published numbers"


def _fingerprint(seen: _Seen) -> str:
    digest = hashlib.sha256()
    for item, picture in zip(seen.items, seen.digests, strict=True):
        digest.update(json.dumps([picture, item.captions]).encode())
    return digest.hexdigest()[:16]


def retrieval_line(results: Mapping[str, Any]) -> str:
    """The numbers for the terminal."""
    lines = [f"{results['benchmark']}: {results['pictures'] - results['n_skipped']} pictures, {results['captions']} captions"]
    for way in WAYS:
        cells = [results["retrieval"][f"recall@{k}_{way}"] for k in CUTOFFS]
        shown = "  ".join(
            f"R@{k} {100 * cell['score']:.2f} [{100 * cell['ci95'][0]:.2f}, {100 * cell['ci95'][1]:.2f}]"
            for k, cell in zip(CUTOFFS, cells, strict=True)
        )
        lines.append(f"  {way.replace('_', ' ')}: {shown}  median rank {results['retrieval']['median_rank'][way]:g}")
    return "\n".join([*lines, f"  sum of recalls: {results['rsum']:.1f}"])
