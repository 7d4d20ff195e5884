"""Some samples of a recipe as its towers read them: pictures, text, what is learnt, lengths, what is left out.

Each sample is prepared as a run prepares it, by the student and by the teachers that its stage reads live.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image
from torch import Tensor

from mmkd.data.samples import Sample
from mmkd.errors import ImageError, printable, shown
from mmkd.recipes.recipe import Recipe
from mmkd.runs.answers_apart import with_answers_apart
from mmkd.runs.data import all_samples, is_unwritten, rows_left_out, stage_parts, texts_of
from mmkd.runs.plan import term_text
from mmkd.runs.preflight import preflight, terms_of
from mmkd.runs.run import check_benchmarks
from mmkd.runs.survey import Survey, of_role, readers, whole
from mmkd.runs.towers import build_student, load_teachers
from mmkd.teachers.teacher import Teacher
from mmkd.terms.term import Term, teacher_names
from mmkd.towers.inputs import IGNORE, Encoded
from mmkd.towers.tokenless import PROMPT
from mmkd.towers.tower import Tower
from mmkd.train.collate import PairDataset
from mmkd.train.preference import PreferenceDataset, PreferencePair
from mmkd.train.skips import Skip

TEMPLATE = "show.html.j2"
LARGEST, FRAMES = 448, 6  # pixels of a picture's longer side on the page, and how many of a sample a tower's view shows
LEFT, RIGHT = "⟦", "⟧"  # around what is learnt
BOLD, GREEN, DIM, RED, PLAIN = "\033[1m", "\033[1;32m", "\033[2m", "\033[31m", "\033[0m"
# Inputs that say how many patches a picture has, height and width last: their pixels are rows of patches.
PATCHES = ("image_grid_thw", "grid_thws", "spatial_shapes", "target_sizes", "image_grid_hws")


@dataclass(frozen=True)
class Piece:
    """Tokens that follow each other and are of one kind: "text", "visual", or "learnt" (targets of the answer)."""

    kind: str
    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class View:
    """A sample as one tower reads it. cut: tokens of the answer beyond max_length.  sizes: (width, height) of what it sees.

    same: the role whose view this is, too; it then has no pieces of its own.  frames: pictures as the tower gets them, where its
    pixels are pictures.
    """

    role: str
    max_length: int
    tokens: int = 0
    visual: int = 0
    cut: int = 0
    sizes: tuple[tuple[int, int], ...] = ()
    pieces: tuple[Piece, ...] = ()
    frames: tuple[Image.Image, ...] = field(default=(), repr=False)
    same: str = ""
    refused: bool = False  # it cannot prepare the sample

    @property
    def learnt(self) -> int:
        return sum(len(piece.ids) for piece in self.pieces if piece.kind == "learnt")

    @property
    def seen(self) -> str:
        """The sizes in words, equal ones once."""
        counts: dict[tuple[int, int], int] = {}
        for size in self.sizes:
            counts[size] = counts.get(size, 0) + 1
        return ", ".join(f"{count} × {w}x{h}" if count > 1 else f"{w}x{h}" for (w, h), count in counts.items())

    @property
    def facts(self) -> str:
        """Pictures, tokens and lengths in words."""
        if self.refused:
            return "cannot prepare it"
        if self.same:
            return f"reads the same as the {self.same}"
        visual = f" ({self.visual:,} visual)" if self.visual else ""
        over = f", {self.tokens - self.max_length:,} too many" if self.tokens > self.max_length else ""
        cut = f"; {self.cut:,} tokens of the answer are cut" if self.cut else ""
        sees = f"sees {self.seen} pixels; " if self.sizes else ""
        return f"{sees}{self.tokens:,} tokens{visual} of max_length {self.max_length:,}{over}; {self.learnt:,} learnt{cut}"


@dataclass(frozen=True)
class ShownSample:
    """left_out: why training leaves the sample out; "" where it does not.  pictures: (name, picture), None: cannot be read.

    place: in its entry, from 0.
    """

    id: str
    place: int
    views: list[View]
    left_out: str
    pictures: list[tuple[str, Image.Image | None]] = field(repr=False)


@dataclass(frozen=True)
class ShownEntry:
    name: str
    lines: list[str]  # what was found in the whole entry
    samples: list[ShownSample]


@dataclass(frozen=True)
class ShownStage:
    name: str
    lines: list[str]
    entries: list[ShownEntry]


@dataclass(frozen=True)
class Shown:
    title: str
    stages: list[ShownStage]


def show(recipe: Recipe, samples: int = 3) -> Shown:
    """So many samples of each data entry of each train stage, spread over it, the same each time. Writes nothing.

    Raises what the dry run raises: DataError, TowerError with all findings.
    """
    check_benchmarks(recipe)
    texts = texts_of(all_samples(recipe))
    teachers = load_teachers(recipe)
    student = build_student(recipe, teachers, texts)
    recipe = with_answers_apart(recipe, student, teachers)
    surveys = preflight(recipe, student, teachers, writes=False)
    dropped = rows_left_out(recipe)
    stages = [_stage(recipe, name, student, teachers, surveys[name], dropped.get(name, {}), samples) for name in recipe.stages]
    return Shown(recipe.title, stages)


def _stage(
    recipe: Recipe, name: str, student: Tower, teachers: Mapping[str, Teacher], surveys: Sequence[Survey],
    dropped: Mapping[str, int], count: int,
) -> ShownStage:  # fmt: skip
    spec = recipe.stages[name]
    terms, needed = terms_of(spec, teachers)
    lines = ["terms: " + ", ".join(map(term_text, terms))]
    if spec.generates:
        lines.append(f"answers: {shown(dict(spec.answers))}; those of the data are shown")
    lines += [f"{role}: its outputs are read from disk, so it reads no samples" for role, t in needed.items() if t.stored]
    lines += [f"left out when the data were read: {number:,} rows, {reason}" for reason, number in dropped.items()]
    entries = []
    for entry, samples, survey in zip(spec.data, stage_parts(recipe, spec), surveys, strict=True):
        found = [line.strip() for line in survey.lines()[1:]]
        if is_unwritten(entry):
            found.append("not written yet: a stand-in takes the place of each answer")
        own = spread(len(samples), count)
        own += [skip.index for skip in survey.skips[:count] if skip.index not in own]
        head = survey.lines()[0].strip().removeprefix("data ")
        chosen = [(place, samples[place]) for place in own]
        reading = _live(terms, needed) if is_unwritten(entry) else (terms, needed)  # no cache has what is not written yet
        entries.append(ShownEntry(head, found, _samples(chosen, student, *reading)))
    return ShownStage(name, lines, entries)


def _live(terms: Sequence[Term], teachers: Mapping[str, Teacher]) -> tuple[list[Term], dict[str, Teacher]]:
    """The teachers that are not stored, and the terms that need no other."""
    live = {role: teacher for role, teacher in teachers.items() if not teacher.stored}
    return [t for t in terms if not t.reads_teacher or live.keys() >= {*teacher_names(t, teachers)}], live


def spread(samples: int, count: int) -> list[int]:
    """Places of at most `count` samples, at equal distances."""
    count = min(samples, count)
    return [(2 * number + 1) * samples // (2 * count) for number in range(count)]


def _samples(
    chosen: Sequence[tuple[int, Sample]], student: Tower, terms: Sequence[Term], teachers: Mapping[str, Teacher]
) -> list[ShownSample]:
    kind = PreferenceDataset if any(t.needs_pairs for t in terms) else PairDataset
    dataset = kind([sample for _, sample in chosen], student, teachers, terms, memory=0)
    found = []
    for number, (place, sample) in enumerate(chosen):
        pair = dataset.look(number)
        views: list[View] = []
        for role, tower in readers(dataset).items():
            encoded = of_role(pair, role)
            if role != "student" and isinstance(pair, Skip):
                encoded = whole(tower, teachers[role].view(sample), None)
            elif isinstance(pair, Skip):
                encoded = whole(tower, sample, None)
            same = not isinstance(pair, Skip) and role != "student" and encoded is pair.student
            views.append(View(role, tower.max_length, same="student") if same else view_of(role, tower, encoded))
        if isinstance(pair, PreferencePair) and pair.rejected is not None:
            views.append(view_of("student, rejected answer", student, pair.rejected))
        why = pair.message if isinstance(pair, Skip) else ""
        found.append(ShownSample(sample.id, place, views, why, _pictures(sample)))
    return found


# ---- what a tower reads ------------------------------------------------------------------------------------------------


def view_of(role: str, tower: Tower, encoded: Encoded | None) -> View:
    """A prepared sample as its tower reads it; None: the tower cannot prepare it."""
    if encoded is None:
        return View(role, tower.max_length, refused=True)
    return View(
        role, tower.max_length, tokens=len(encoded.input_ids), visual=tower.visual_count(encoded), cut=encoded.truncated,
        sizes=tuple(sizes_of(tower, encoded)), pieces=tuple(pieces_of(tower, encoded)), frames=tuple(_frames_of(tower, encoded)),
    )  # fmt: skip


def pieces_of(tower: Tower, encoded: Encoded) -> list[Piece]:
    """The tokens of a sample, cut where visual tokens or targets begin and end.

    A target is the token that stands behind its row. Of an encoder-decoder model the encoder's prompt comes first.
    """
    ids, targets = encoded.input_ids.tolist(), encoded.targets.tolist()
    before = encoded.pixels.get(f"{PROMPT}input_ids")
    tokens = [(token, False) for token in (ids[:1] if before is None else before.flatten().tolist())]
    for row, target in enumerate(targets):
        if target != IGNORE:
            tokens.append((target, True))
        elif row + 1 < len(ids):
            tokens.append((ids[row + 1], False))
    groups: list[tuple[str, list[int]]] = []
    for token, is_target in tokens:
        kind = "learnt" if is_target else "visual" if token == tower.image_token_id else "text"
        if not groups or groups[-1][0] != kind:
            groups.append((kind, []))
        groups[-1][1].append(token)
    pieces, last = [], []
    for kind, own in groups:
        text = f"[{len(own):,} visual tokens]" if kind == "visual" else _decoded(tower, last, own)
        pieces.append(Piece(kind, tuple(own), text))
        last = own[-1:]
    return pieces


def _decoded(tower: Tower, before: list[int], ids: list[int]) -> str:
    """What tokens say behind another one: some tokenizers drop the space at the head of a text."""

    def decode(ids: list[int]) -> str:
        return tower.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    head, text = decode(before) if before else "", decode([*before, *ids])
    return text[len(head) :] if text.startswith(head) else decode(ids)


def sizes_of(tower: Tower, encoded: Encoded) -> list[tuple[int, int]]:
    """(width, height) in pixels of each picture, or each crop of one, that a tower gets; [] where its inputs do not tell."""
    grid = next((encoded.pixels[name] for name in PATCHES if name in encoded.pixels), None)
    if grid is None:
        return [(frame.shape[-1], frame.shape[-2]) for frame in _planes(encoded)]
    patch = getattr(tower.processor.image_processor, "patch_size", None)
    side = patch if isinstance(patch, int) else getattr(patch, "height", None)
    return [(int(row[-1]) * side, int(row[-2]) * side) for row in grid.reshape(-1, grid.shape[-1])] if side else []


def _planes(encoded: Encoded) -> list[Tensor]:
    """The pictures among a sample's inputs, each [3, H, W]."""
    if any(name in encoded.pixels for name in PATCHES):
        return []
    found = [t for t in encoded.pixels.values() if t.is_floating_point() and t.dim() >= 4 and t.shape[-3] == 3]
    return [plane for tensor in found for plane in tensor.flatten(0, -4)]


def _frames_of(tower: Tower, encoded: Encoded) -> list[Image.Image]:
    """Pictures as the tower gets them, without what its processor does to the colours' scale."""
    processor = tower.processor.image_processor
    mean, std = (getattr(processor, name, None) for name in ("image_mean", "image_std"))
    normalised = getattr(processor, "do_normalize", False) and mean is not None and std is not None
    frames = []
    for plane in _planes(encoded)[:FRAMES]:
        plane = plane.detach().float().cpu()
        if normalised:
            plane = plane * torch.tensor(std).reshape(-1, 1, 1) + torch.tensor(mean).reshape(-1, 1, 1)
        values = (plane.clamp(0, 1) * 255).round().to(torch.uint8)  # [3, H, W]
        frames.append(Image.fromarray(values.permute(1, 2, 0).contiguous().numpy()))
    return frames


def _pictures(sample: Sample) -> list[tuple[str, Image.Image | None]]:
    found: list[tuple[str, Image.Image | None]] = []
    for ref in sample.images[:FRAMES]:
        try:
            found.append((ref.key, ref.load()))
        except ImageError:
            found.append((ref.key, None))
    return found


# ---- as text and as a page ---------------------------------------------------------------------------------------------


def as_text(shown: Shown, colour: bool = False) -> str:
    """For a terminal. What is learnt stands between marks, in green where there is `colour`."""

    def ink(code: str, text: str) -> str:
        return f"{code}{printable(text)}{PLAIN}" if colour else printable(text)

    lines = [ink(BOLD, shown.title), f"{LEFT}learnt{RIGHT}: tokens of answers, which are targets"]
    for stage in shown.stages:
        lines += ["", ink(BOLD, f"stage {stage.name}"), *(f"  {printable(line)}" for line in stage.lines)]
        for entry in stage.entries:
            lines += ["", ink(BOLD, f"  data {entry.name}"), *(f"    {printable(line)}" for line in entry.lines)]
            for sample in entry.samples:
                lines += ["", ink(BOLD, f"    sample {sample.id} (number {sample.place + 1:,} of the entry)")]
                lines += [ink(RED, f"      left out: {sample.left_out}")] if sample.left_out else []
                lines += [f"      picture {printable(name)} {_size(picture)}" for name, picture in sample.pictures]
                for view in sample.views:
                    lines.append(f"      {printable(view.role)}: {view.facts}")
                    text = "".join(_marked(piece, ink) for piece in view.pieces)
                    lines += [f"      | {line}" for line in text.split("\n")] if text else []
    return "\n".join(lines)


def _size(picture: Image.Image | None) -> str:
    return "cannot be read" if picture is None else f"{picture.width}x{picture.height}"


def _marked(piece: Piece, ink: Callable[[str, str], str]) -> str:
    if piece.kind == "learnt":
        return "\n".join(ink(GREEN, line) for line in f"{LEFT}{piece.text}{RIGHT}".split("\n"))
    return ink(DIM, piece.text) if piece.kind == "visual" else printable(piece.text)


def as_page(shown: Shown) -> str:
    """One HTML page that needs nothing else, without scripts."""
    environment = Environment(
        loader=PackageLoader("mmkd.runs", "."), autoescape=True,  # questions and names are untrusted text
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"url": _url, "size": _size, "printable": printable}
    return environment.get_template(TEMPLATE).render(shown=shown)


def _url(picture: Image.Image) -> str:
    """A small JPEG as a data URL."""
    small = picture.convert("RGB")
    small.thumbnail((LARGEST, LARGEST))
    stream = io.BytesIO()
    small.save(stream, format="jpeg", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
