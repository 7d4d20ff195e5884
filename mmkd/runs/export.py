"""Writes a student as vLLM or llama.cpp reads it, and asks the engine what transformers answers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import takewhile, zip_longest
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from mmkd.data.samples import ImageRef, Sample, Turn
from mmkd.errors import DataError
from mmkd.runs.engines import TOKENS, Engine, llama_cpp, vllm, vllm_command
from mmkd.towers.export import served_width, serving_options, serving_remarks, with_wider_heads
from mmkd.towers.gguf import PICTURES, TEXT, write_gguf
from mmkd.towers.quantise import BLOCK
from mmkd.towers.reading import AS_SAVED, Reading
from mmkd.towers.tower import Tower

QUESTIONS = 50
# Whether pictures are stretched to the model's size before they are sent: vLLM has transformers' processor, llama.cpp pads them.
FOR_VLLM = {"sent as they are": False}
FOR_LLAMA_CPP = {"stretched to the model's size before they are sent": True, "sent as they are": False}
LARGEST = 336  # of a size that a processor tells as "shortest_edge", which some mean as a number of pixels
SHAPES = ((1, 1), (2, 1), (1, 3), (5, 4))  # width to height of the pictures that are asked about
ASKED = ("What is in the picture?", "What colour is it?", "How many are there?", "Is there a sign?", "What does it say?")


def export(
    model: str | Path, output: Path, to: str, *, form: str = "f32", check: bool = False, reading: Reading = AS_SAVED
) -> Iterator[str]:
    """Lines that say what was written and what was found. to: "vllm" or "gguf".  form: of the matrices in gguf.

    Raises DataError where something is there already or a package is missing, TowerError for what an engine would run otherwise.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError(f"{output} holds something already; choose another folder, or empty it")
    needed = ["gguf", *(["xllamacpp"] if check else [])] if to == "gguf" else []
    if missing := [name for name in needed if find_spec(name) is None]:
        raise DataError(f"{' and '.join(missing)} must be installed for this; pip install {' '.join(missing)}")
    if to == "vllm" and check:
        vllm_command()
    tower = Tower.load(model, reading=reading).freeze()
    if to == "vllm":
        model = with_wider_heads(tower.model)
        if model is not tower.model:
            wide = served_width(tower.model)
            yield f"attention heads are written {wide} wide, filled up with zeros; vLLM does not take its own"
        Tower(model, tower.processor).save(output)
        options = serving_options(model)
        yield from (f"stands in the way: {remark}" for remark in serving_remarks(model))
        yield f"written: {output}; serve it with `{' '.join(['vllm serve', str(output), *options])}`"
        if check:
            with vllm(output, options) as engine:
                yield from compare(tower, engine, FOR_VLLM)
        return
    left = write_gguf(tower, output, form)
    if left:
        yield f"{len(left)} matrices stay in float32, since {BLOCK} does not divide their rows"
    yield f"written: {output / TEXT} and {output / PICTURES}; llama.cpp pads pictures to a square, transformers stretches them"
    if check:
        with llama_cpp(output) as engine:
            yield from compare(tower, engine, FOR_LLAMA_CPP)


def compare(tower: Tower, engine: Engine, ways: dict[str, bool]) -> Iterator[str]:
    """Greedy answers and the likeliest first tokens of an engine against transformers', on drawn pictures of several shapes.

    ways: whether pictures are stretched to the model's size before they are sent, by words for it; a line each.
    """
    size = tower.processor.image_processor.size
    shortest = min(size.get("shortest_edge") or LARGEST, LARGEST)
    square = (size.get("width") or shortest, size.get("height") or shortest)
    for name, stretched in ways.items():
        size = square if stretched else None
        found = [_compared(tower, engine, drawn(number, square), number, size) for number in range(QUESTIONS)]
        gaps = [gap for gap, _ in found if gap is not None]
        apart = f"; where they part, transformers prefers its token by at most {max(gaps):.1e}" if gaps else ""
        furthest = max(distance for _, distance in found)
        yield (
            f"pictures {name}: {QUESTIONS - len(gaps)} of {QUESTIONS} greedy answers equal, first log-probabilities within "
            f"{furthest:.1e}{apart}"
        )


def _compared(
    tower: Tower, engine: Engine, picture: Image.Image, number: int, size: tuple[int, int] | None
) -> tuple[float | None, float]:
    """(by how much transformers prefers its own token where the answers part, None where they do not; the largest difference of
    the first token's log-probabilities)"""
    sent = picture.resize(size, Image.Resampling.BICUBIC) if size else picture
    sample = _sample(ASKED[number % len(ASKED)])
    own, rows = _asked(tower, sent, sample)
    theirs, told = engine.ask(sample, tower.preparer.prompt_text(sample), sent)
    theirs = _before_end(tower, theirs)
    distance = max((abs(float(rows[0, token]) - value) for token, value in told.items()), default=0.0)
    parted = next((n for n, (a, b) in enumerate(zip_longest(own, theirs)) if a != b and n < len(rows)), None)
    if parted is None:
        return None, distance
    ends = sorted(tower.stop_ids)
    first, other = (ids[parted] if parted < len(ids) else ends[0] for ids in (own, theirs))
    return float(rows[parted, first] - rows[parted, other]), distance


def drawn(number: int, square: tuple[int, int]) -> Image.Image:
    """A picture of coloured shapes, one to four times the model's size."""
    rng = random.Random(number)
    wide, high = SHAPES[number % len(SHAPES)]
    scale = rng.choice((1, 2)) * min(square)
    picture = Image.new("RGB", (scale * wide // min(wide, high), scale * high // min(wide, high)), _colour(rng))
    pen = ImageDraw.Draw(picture)
    for _ in range(3):
        left, top = rng.randrange(picture.width // 2), rng.randrange(picture.height // 2)
        box = (left, top, left + picture.width // 3, top + picture.height // 3)
        rng.choice((pen.rectangle, pen.ellipse))(box, fill=_colour(rng))
    return picture


def _colour(rng: random.Random) -> tuple[int, int, int]:
    return (rng.randrange(256), rng.randrange(256), rng.randrange(256))


def _sample(question: str) -> Sample:
    """The question to one picture, which is given where it is read."""
    return Sample("asked", (ImageRef(Path(), "drawn"),), (Turn("user", question, 1),))


@torch.no_grad()
def _asked(tower: Tower, picture: Image.Image, sample: Sample) -> tuple[list[int], torch.Tensor]:
    """Greedy ids before the end, by transformers itself, and the log-probabilities of each step [steps, V]."""
    inputs = tower.collate([tower.encode(sample, with_answer=False, pictures=[picture])]).to(tower.device)
    found = tower.model.generate(
        input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, **inputs.pixels, do_sample=False, max_new_tokens=TOKENS,
        eos_token_id=sorted(tower.stop_ids), pad_token_id=tower.pad_id, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    ids = [int(token) for token in found.sequences[0, inputs.input_ids.shape[1] :]]
    rows = torch.log_softmax(torch.cat(found.logits).float(), -1)
    return _before_end(tower, ids), rows


def _before_end(tower: Tower, ids: Sequence[int]) -> list[int]:
    return [*takewhile(lambda token: token not in tower.stop_ids, ids)]
