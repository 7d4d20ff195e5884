"""Overlap with benchmarks: every planted question and picture is found, and others are left alone."""

import io
import random

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mmkd.data.samples import ImageRef, Question
from mmkd.data.scenes import SHAPES
from mmkd.errors import DataError
from mmkd.writing.checks import Candidate, CheckSpec, Surroundings
from mmkd.writing.checks.overlap import Index
from mmkd.writing.words import folded

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "white")


def scene(seed, size=64):
    """Shapes on a grid, and a sign with a few letters: drawn as the sample draws."""
    rng = random.Random(seed)
    picture = Image.new("RGB", (size, size), (238, 238, 234))
    pen, cell = ImageDraw.Draw(picture), size // 4
    for place in rng.sample(range(16), 4):
        x, y = place % 4 * cell, place // 4 * cell
        box = [x + 2, y + 2, x + cell - 3, y + cell - 3]
        (pen.ellipse if rng.random() < 0.5 else pen.rectangle)(box, fill=rng.choice(COLOURS))
    return picture


def photograph(seed, size=(120, 90)):
    """Smooth noise: no edge in it is sharp, and none of it is flat."""
    noise = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def saved(picture, folder, name, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    (folder / name).write_bytes(buffer.getvalue())
    return ImageRef(folder, name)


AGAIN = [
    *[("JPEG", {"quality": quality}, 1.0) for quality in (95, 75, 50, 30, 20)],
    ("JPEG", {"quality": 75, "progressive": True}, 1.0), ("PNG", {"compress_level": 9}, 1.0), ("WEBP", {"quality": 60}, 1.0),
    ("BMP", {}, 1.0), *[("WEBP", {"quality": quality}, 1.0) for quality in (95, 80, 40)],
    ("WEBP", {"lossless": True}, 1.0), *[(kind, {}, by) for kind in ("PNG", "JPEG") for by in (0.9, 0.95, 1.1, 1.5)],
]  # fmt: skip


@pytest.fixture(scope="module")
def tested(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    pictures = [scene(n) for n in range(20)] + [photograph(n) for n in range(10)]
    refs = [saved(picture, folder, f"{n}.png") for n, picture in enumerate(pictures)]
    index = Index()
    index.add(Question(str(n), f"What stands at place {n}?", images=(ref,)) for n, ref in enumerate(refs))
    return pictures, index


@pytest.mark.parametrize(("kind", "options", "by"), AGAIN)
def test_a_picture_is_found_however_it_is_encoded(tested, tmp_path, kind, options, by):
    pictures, index = tested
    for number, picture in enumerate(pictures):
        other = picture.resize([round(side * by) for side in picture.size], Image.Resampling.BICUBIC) if by != 1 else picture
        assert index.has_picture(saved(other, tmp_path, f"{number}-{by}.{kind.lower()}", kind, **options)), number


def test_other_pictures_are_left_alone(tested, tmp_path):
    _, index = tested
    others = [scene(n) for n in range(1000, 1100)] + [photograph(n) for n in range(1000, 1030)]
    assert not [n for n, picture in enumerate(others) if index.has_picture(saved(picture, tmp_path, f"{n}.png"))]


def test_a_shape_of_another_colour_is_another_picture(tested, tmp_path):
    pictures, index = tested
    changed = 0
    for number, picture in enumerate(pictures[:20]):
        pixels = np.array(picture)
        colours, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
        shape = colours[np.argsort(counts)[-2]]
        pixels[(pixels == shape).all(-1)] = 255 - shape if abs(int(shape.sum()) - 382) > 60 else (255, 0, 0)
        changed += not index.has_picture(saved(Image.fromarray(pixels), tmp_path, f"{number}.png"))
    assert changed == 20


def test_a_picture_that_cannot_be_read_is_no_overlap(tested, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert not tested[1].has_picture(ImageRef(tmp_path, "broken.png"))


def reworded(text, rng):
    """Another case, other punctuation and white space, another form of the same characters."""
    words = text.rstrip("?").split()
    words = [rng.choice((str.upper, str.title, str.lower, str.swapcase))(word) for word in words]
    joined = "".join(word + rng.choice((" ", "  ", "\t", "\n", " - ", ", ", "... ", "\u00a0")) for word in words)
    return (
        rng.choice(("", " ", "\u201c", "(", "* "))
        + joined.strip()
        + rng.choice(("", "?", " ?", "??", "!", ".", "\u201d", " \uff1f"))
    )


def test_every_planted_question_is_found():
    rng = random.Random(17)
    subjects = (
        "the sign",
        "the left tower",
        "Zoë's café",
        "the 3rd train",
        "a naïve reader",
        "the Straße",
        "bottle no. 7",
        "ﬁeld 9",
    )
    texts = [f"Which {shape} is nearest to {subject} in row {n}?" for n in range(16) for shape in SHAPES for subject in subjects]
    index = Index()
    index.add(Question(str(n), text) for n, text in enumerate(texts))
    assert all(index.asked(reworded(text, rng)) == 1 for text in texts)
    assert not any(index.asked(reworded(text.replace("row", "column"), rng)) for text in texts)


def test_choices_belong_to_a_question():
    index = Index()
    index.add([Question("1", "Which is largest?", choices=("cat", "Horse"))])
    assert index.asked("which is LARGEST", ["horse.", "cat"]) == 1
    assert index.asked("Which is largest?", ["cat", "mouse"]) == 0 and index.asked("Which is largest?") == 0


def test_folding_keeps_what_is_no_case_punctuation_or_space():
    assert folded("What's  THE\tcolour?") == folded("whats the colour") == "whatsthecolour"
    assert folded("a1") != folded("a 2") and folded("é") != folded("e") and folded("e\u0301") == folded("é")
    assert folded("->") == "->" != folded("<-")
    assert folded("कि") != folded("का")


# ---- the check ------------------------------------------------------------------------------------------------------------


class Nowhere:
    key = "nowhere"

    def load(self):
        return Image.new("RGB", (20, 20), "pink")


def row(question, picture=None, choices=None):
    made = {"question": question, "answer": "red", "choices": choices}
    return Candidate("x", Question("x", question), "t", 0, "red", "red", made, (picture or Nowhere(),))


def check_of(questions, **options):
    check = CheckSpec(kind="overlap", **options).made()
    check.prepare(Surroundings({"bench": lambda: questions}, lambda name: [Question("o", f"asked by {name}?")]))
    check.start()
    return check


def test_rows_of_a_benchmark_are_dropped_by_default(tmp_path):
    first, second = (saved(scene(n), tmp_path, f"{n}.png") for n in (1, 2))
    asked = [
        Question("1", "How many?", images=(first,)),
        Question("2", "How many?", images=(second,)),
        Question("3", "Who won in 1912?"),
    ]
    check = check_of(asked)
    again = saved(scene(1), tmp_path, "again.jpg", "JPEG", quality=60)
    assert check.refuse(row("Something else?", again)) == "a benchmark's picture"
    assert check.refuse(row("who won, in 1912")) == "a benchmark's question"
    assert check.refuse(row("how many")) is None  # asked of several pictures: the words alone say nothing
    assert check_of(asked, text="any").refuse(row("how many")) == "a benchmark's question"
    assert check_of(asked, text="never").refuse(row("who won, in 1912")) is None
    assert check_of(asked, text="never").refuse(row("x", again)) == "a benchmark's picture"
    assert check_of(asked, off=True).refuse(row("who won, in 1912", again)) is None


def test_every_planted_row_is_dropped_and_no_other(tmp_path):
    """200 rows: every second one a benchmark's picture, encoded again, or its question, in other words."""
    rng = random.Random(4)
    pictures = [scene(n) if n % 2 else photograph(n) for n in range(50)]
    refs = [saved(picture, tmp_path, f"{n}.png") for n, picture in enumerate(pictures)]
    asked = [Question(str(n), f"What colour has {rng.choice(SHAPES)} number {n}?", images=(ref,)) for n, ref in enumerate(refs)]
    check, others, found = check_of(asked), [scene(n) for n in range(2000, 2050)], []
    for n, picture in enumerate(pictures):
        kind, options, _ = AGAIN[n % 9]
        again = saved(picture, tmp_path, f"again-{n}.{kind.lower()}", kind, **options)
        fresh = saved(others[n], tmp_path, f"other-{n}.{kind.lower()}", kind, **options)
        rows = [row(f"Which is it, {n}?", again), row(f"Which is it, {n}?", fresh)]
        rows += [row(reworded(asked[n].question, rng)), row(reworded(asked[n].question, rng).replace(str(n), str(n + 1000)))]
        found += [check.refuse(one) for one in rows]
    assert found == ["a benchmark's picture", None, "a benchmark's question", None] * 50


def test_other_benchmarks_can_be_named():
    check = check_of([Question("1", "of the recipe?")], benchmarks=["other"])
    assert check.refuse(row("asked by other")) == "a benchmark's question" and check.refuse(row("of the recipe")) is None
    both = check_of([Question("1", "of the recipe?")], benchmarks=["recipe", "other"])
    assert both.refuse(row("asked by other")) and both.refuse(row("of the recipe"))
    with pytest.raises(DataError, match="cannot be read here"):
        CheckSpec(kind="overlap", benchmarks=["other"]).made().prepare(Surroundings())
