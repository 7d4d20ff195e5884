"""Ten annotators who answer each question, independently of each other, and their mistakes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from mmkd.data.scenes import NUMBERS, WORDS

ANNOTATORS = 10
SIMILAR_COLORS = {
    "red": ("orange", "pink"),
    "orange": ("red", "yellow"),
    "yellow": ("orange", "white"),
    "green": ("blue",),
    "blue": ("purple", "green", "black"),
    "purple": ("blue", "black"),
    "black": ("blue", "purple"),
    "white": ("yellow", "pink"),
    "pink": ("red", "white"),
}
SIMILAR_SHAPES = {
    "circle": ("square",),
    "square": ("circle",),
    "triangle": ("cross",),
    "cross": ("triangle",),
}


def _similar(answer: str) -> tuple[str, ...]:
    """Answers that people mistake for this one: colours, shapes, numbers, words, or "colour shape"."""
    if answer.isdigit():
        number = int(answer)
        return tuple(str(n) for n in (number - 1, number + 1) if n >= 0)
    if " " in answer:
        color, shape = answer.split(" ", 1)
        return tuple(f"{c} {shape}" for c in SIMILAR_COLORS.get(color, ())) + tuple(
            f"{color} {s}" for s in SIMILAR_SHAPES.get(shape, ())
        )
    if answer in SIMILAR_COLORS:
        return SIMILAR_COLORS[answer]
    if answer in SIMILAR_SHAPES:
        return SIMILAR_SHAPES[answer]
    return tuple(
        w for w in WORDS if len(w) == len(answer) and sum(a != b for a, b in zip(w, answer, strict=True)) == 1
    )


_MISREAD = dict(zip("abcdefghiklmnoprstuxz", "odobctcnlxinmcrpzfoks", strict=True))


def misread(rng: random.Random, answer: str) -> str:
    """A word with one letter, or a number with one digit, taken for another."""
    place = rng.randrange(len(answer))
    letter = answer[place]
    other = rng.choice([d for d in "0123456789" if d != letter]) if letter.isdigit() else _MISREAD[letter]
    text = answer[:place] + other + answer[place + 1 :]
    return str(int(text)) if text.isdigit() else text


def opinion(rng: random.Random, truth: str, pool: Sequence[str], accuracy: float) -> str:
    """One annotator's answer out of `pool` (which holds the truth)."""
    if rng.random() < accuracy:
        return truth
    likely = [a for a in _similar(truth) if a in pool]
    if likely and rng.random() < 0.8:
        return rng.choice(likely)
    return rng.choice([a for a in pool if a != truth])


def choice_opinions(rng: random.Random, truth: int, choices: Sequence[str], accuracy: float) -> list[int]:
    """Ten answers to a multiple-choice question, as indices of the choices."""
    return [choices.index(opinion(rng, choices[truth], choices, accuracy)) for _ in range(ANNOTATORS)]


def _format_harmlessly(rng: random.Random, answer: str) -> str:
    if rng.random() >= 0.1:
        return answer
    return rng.choice((f"the {answer}", f"a {answer}", answer.upper(), answer.capitalize(), f"{answer}."))


def open_opinions(rng: random.Random, truth: str, pool: Sequence[str], accuracy: float) -> list[str]:
    """Ten free-form answers. Half of the mistakes about a sign's text are one letter or digit misread."""
    answers = []
    for _ in range(ANNOTATORS):
        answer = opinion(rng, truth, pool, accuracy)
        if answer != truth and pool in (WORDS, NUMBERS) and rng.random() < 0.5:
            answer = misread(rng, truth)
        answers.append(_format_harmlessly(rng, answer))
    return answers


def majority(answers: Sequence[int], truth: int) -> int:
    """The commonest answer; a tie that the truth is part of goes to the truth."""
    counts = Counter(answers)
    most = max(counts.values())
    return truth if counts[truth] == most else min(a for a in counts if counts[a] == most)
