"""The benchmarks' own scores, as pure functions: (prediction, references) -> 0.0 to 1.0.

Where an official scorer has a quirk it is kept, and named in the docstring: a published number contains it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from mmkd.data.prompts import letter_of
from mmkd.data.samples import Question
from mmkd.errors import DataError
from mmkd.evaluation.chair import chair, unhallucinated
from mmkd.evaluation.mathematics import math_equal
from mmkd.evaluation.parsers import mme_parse, pope_parse, scienceqa_index, scienceqa_parse

__all__ = [
    "METRICS", "anls", "aokvqa_accuracy", "chair", "exact_match", "mme", "mme_parse", "mmmu_open", "normalise_evalai",
    "normalise_vqav2", "pope", "pope_parse", "references_of", "relaxed_accuracy", "scienceqa", "scienceqa_index",
    "scienceqa_parse", "stvqa_accuracy", "textvqa_accuracy", "vqa_accuracy",
]  # fmt: skip

# ---- answer normalisation of VQA v2 and of EvalAI (TextVQA, ST-VQA)
# --------------------------------------------

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
# The official pattern also carries a "not after a digit" condition, misspelt so that it always holds.
_PERIOD = re.compile(r"\.(?!\d)")
# Both official scorers pass re.UNICODE (32) where `sub` takes a count: only the first 32 periods go.
_PERIOD_COUNT = 32
_NUMBERS = {
    word: str(value)
    for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})

# Forms with one apostrophe, looked up without it.
_SINGLE = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll
    how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't
    should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll
    that's there'd there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'll who's who've why'll why're why's
    won't would've wouldn't y'all you'd you'll you're you've
""".split()
# Forms with two, looked up with either one missing.
_DOUBLE = """
    couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
    something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
""".split()
# Forms with three: any one missing.
_TRIPLE = ["'ow's'at", "y'all'd've"]


def _contractions() -> dict[str, str]:
    """Words without an apostrophe -> with it, as both official scorers list them (lower case by then)."""
    table = {form.replace("'", ""): form for form in _SINGLE}
    for form in _DOUBLE + _TRIPLE:
        marks = [i for i, character in enumerate(form) if character == "'"]
        table |= {form[:i] + form[i + 1 :]: form for i in marks}
    table["somebody'd"] = "somebodyd"  # the wrong way round in both sources
    return table


_CONTRACTIONS = _contractions()


def _process_punctuation(text: str) -> str:
    """Punctuation goes or becomes a space; which of the two is decided on the text as it came in."""
    result = text
    comma_in_number = _DIGIT_COMMA.search(text) is not None
    for mark in _PUNCTUATION:
        beside_space = mark + " " in text or " " + mark in text
        result = result.replace(mark, "" if beside_space or comma_in_number else " ")
    return _PERIOD.sub("", result, count=_PERIOD_COUNT)


def _process_digit_article(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


@lru_cache(maxsize=65_536)
def normalise_vqav2(text: str) -> str:
    """VQA v2's processPunctuation then processDigitArticle (GT-Vision-Lab/VQA, `vqaEval.py`).

    Quirks kept: a comma between two digits anywhere in the text removes *all* punctuation marks instead of
    turning them into spaces; periods stay before a digit; beyond the 32nd they stay everywhere.
    """
    return _process_digit_article(_process_punctuation(text))


@lru_cache(maxsize=65_536)
def normalise_evalai(text: str) -> str:
    """The answer processor of EvalAI, used for TextVQA and ST-VQA (mmf and LLaVA, `m4c_evaluator.py`).

    Differs from `normalise_vqav2` in what comes first: lower case, commas and question marks gone, and a
    space put before every "'s" ("man's" -> "man 's").
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return _process_digit_article(_process_punctuation(text))


# ---- one prediction against its references
# ---------------------------------------------------------------------


def _leave_one_out(matches: int, count: int) -> float:
    """The mean over every reference left out of min(1, matches among the others / 3)."""
    if matches == 0:
        return 0.0
    left_in = min(1.0, (matches - 1) / 3)
    left_out = min(1.0, matches / 3)
    return (matches * left_in + (count - matches) * left_out) / count


def _plain_spaces(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=16_384)
def _vqa_references(references: tuple[str, ...]) -> tuple[bool, tuple[str, ...]]:
    plain = tuple(_plain_spaces(reference) for reference in references)
    differ = len(set(plain)) > 1
    return differ, tuple(map(normalise_vqav2, plain)) if differ else plain


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """VQA v2's soft accuracy (GT-Vision-Lab/VQA, `vqaEval.py`): the mean over the references left out in
    turn.

    Quirk kept: when all references are the same string nothing is normalised, so "Yes" is wrong where ten
    people said "yes".  Raises DataError for fewer than four references, with which full marks cannot be had.
    """
    if len(references) < 4:
        raise DataError(
            f"vqa_accuracy needs 4 references or more (VQA v2 has 10), got {len(references)}; "
            "use stvqa_accuracy or exact_match for data with few references"
        )
    differ, normalised = _vqa_references(tuple(references))
    prediction = _plain_spaces(prediction)
    answer = normalise_vqav2(prediction) if differ else prediction
    return _leave_one_out(normalised.count(answer), len(normalised))


@lru_cache(maxsize=16_384)
def _evalai_references(references: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(normalise_evalai, references))


def textvqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """TextVQA's soft accuracy (EvalAI; mmf and LLaVA, `m4c_evaluator.py`). Always normalises, unlike VQA v2.

    Raises DataError when there are not exactly ten references, as the official scorer does.
    """
    if len(references) != 10:
        raise DataError(
            f"textvqa_accuracy needs exactly 10 references, got {len(references)}; "
            "use stvqa_accuracy or exact_match for data with few references"
        )
    return _leave_one_out(_evalai_references(tuple(references)).count(normalise_evalai(prediction)), 10)


def stvqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """1.0 when the prediction equals any reference after `normalise_evalai` (LLaVA, `m4c_evaluator.py`)."""
    return float(normalise_evalai(prediction) in _evalai_references(tuple(references)))


def _to_number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _relaxed_match(prediction: str, target: str, tolerance: float) -> bool:
    predicted, wanted = _to_number(prediction), _to_number(target)
    if predicted is None or not wanted:
        return prediction.lower() == target.lower()
    return abs(predicted - wanted) / abs(wanted) <= tolerance


def relaxed_accuracy(prediction: str, references: Sequence[str], tolerance: float = 0.05) -> float:
    """ChartQA's relaxed accuracy (pix2struct, `metrics.py`): numbers within 5 % of any reference, words
    equal.

    Quirks kept: "5%" is 0.05; "1,000" is no number; a target of 0 needs the same string; case does not
    matter.
    """
    return float(any(_relaxed_match(prediction, target, tolerance) for target in references))


def _edit_distance(a: str, b: str) -> int:
    """Levenshtein distance, one row at a time."""
    if len(a) < len(b):
        a, b = b, a
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            cost = min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
            diagonal, row[j] = row[j], cost
    return row[-1]


@lru_cache(maxsize=65_536)
def _similarity(a: str, b: str) -> float:
    return 1 - _edit_distance(a, b) / max(len(a), len(b))


def anls(prediction: str, references: Sequence[str], threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity of one answer, as the DocVQA / MP-DocVQA evaluator computes
    it.

    Lower case and stripped, inner spaces as they are; the best similarity over the references, 0 below
    `threshold` (exactly 0.5 counts); an empty prediction scores 0, even against an empty reference.
    Raises DataError when there is no reference.
    """
    if not references:
        raise DataError("anls needs at least one reference, got none; give the question an answer")
    answer = prediction.lower().strip()
    if not answer:
        return 0.0
    wanted = [reference.lower().strip() for reference in references]
    if answer in wanted:
        return 1.0
    # The similarity is at most shorter / longer: what cannot reach the threshold by its length is not compared.
    near = [text for text in wanted if min(len(text), len(answer)) >= threshold * max(len(text), len(answer))]
    best = max((_similarity(answer, text) for text in near), default=0.0)
    return best if best >= threshold else 0.0


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 when the prediction equals a reference but for case and white space (runs count as one space)."""
    answer = " ".join(prediction.split()).casefold()
    return float(any(answer == " ".join(reference.split()).casefold() for reference in references))


def aokvqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """A-OKVQA's direct answers: min(1, equal references / 3), strings compared as they are."""
    return min(1.0, list(references).count(prediction) / 3)


_MMMU_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_MMMU_TRIVIAL = frozenset(":,.!?;'")
_MMMU_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # with commas
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def _mmmu_normalise(text: str) -> list[str | float]:
    """A number rounded to two places, or the lower-case text; of one character with a space on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _mmmu_candidates(response: str) -> list[str | float]:
    """The parts of a response that may be its answer, and the numbers in them."""
    response = response.strip().strip(".").lower()
    # The official pattern also splits before capitals, of which there are none left.
    parts = response.split("\n")
    keys = []
    for number, part in enumerate(parts):
        marks = _MMMU_KEYS + (("=",) if number == len(parts) - 1 else ())
        tails = [part.split(mark)[-1].strip() for mark in marks if mark in part]
        shortest = _first_shortest(tails)
        if shortest and shortest not in _MMMU_TRIVIAL:
            keys.append(shortest)
    keys = keys or [response]
    numbers = [found for key in keys for pattern in _MMMU_NUMBERS for found in pattern.findall(key)]
    return [value for text in keys + numbers for value in _mmmu_normalise(text)]


def _first_shortest(tails: Sequence[str]) -> str:
    """As the official loop takes it: an empty tail is replaced by the next one, however long."""
    best = ""
    for tail in tails:
        best = tail if not best or len(tail) < len(best) else best
    return best


def mmmu_open(prediction: str, references: Sequence[str]) -> float:
    """MMMU's open questions (`eval_utils.py`): 1.0 when a reference stands in a part that may be the answer, or equals
    a number in it."""
    wanted = [value for reference in references for value in _mmmu_normalise(reference)]
    texts = [value for value in wanted if isinstance(value, str)]
    for found in _mmmu_candidates(prediction):
        if found in wanted if isinstance(found, float) else any(text in found for text in texts):
            return 1.0
    return 0.0


# ---- a whole benchmark
# -----------------------------------------------------------------------------------------


def _same_length(first: Sequence, second: Sequence, what: str) -> None:
    if len(first) != len(second):
        raise DataError(
            f"{what}: {len(first)} predictions for {len(second)} labels; give one label a prediction"
        )
    if not first:
        raise DataError(f"{what}: there is nothing to score; give at least one prediction")


def pope(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """POPE's numbers (`llava/eval/eval_pope.py`) with "yes" as the positive class.

    `predictions` are raw texts, parsed here by `pope_parse` ("yes" and "no" stay what they are); `labels`
    are "yes" or "no".  Precision, recall and f1 are 0.0 where their denominator is 0 (the official script
    divides by zero). Raises DataError on lengths that differ, on nothing to score, on an unknown label.
    """
    _same_length(predictions, labels, "pope")
    unknown = sorted(set(labels) - {"yes", "no"})
    if unknown:
        raise DataError(f"pope: labels are 'yes' or 'no', got {unknown[:3]}; check the annotation file")
    pairs = [(pope_parse(prediction), label) for prediction, label in zip(predictions, labels, strict=True)]
    true_yes = pairs.count(("yes", "yes"))
    said_yes = sum(said == "yes" for said, _ in pairs)
    is_yes = sum(label == "yes" for _, label in pairs)
    precision = true_yes / said_yes if said_yes else 0.0
    recall = true_yes / is_yes if is_yes else 0.0
    return {
        "accuracy": sum(said == label for said, label in pairs) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if true_yes else 0.0,
        "yes_ratio": said_yes / len(pairs),
    }


def mme(tasks: Mapping[str, Sequence[tuple[str, str, str]]]) -> dict[str, dict[str, float]]:
    """MME's numbers by task, and their sum under "total".

    `tasks` is {task: [(image key, prediction, label), ...]}: two questions an image, the predictions raw
    (parsed here by `mme_parse`), the labels "yes" or "no".  `acc` is the share of questions, `acc_plus` the
    share of images with both right, `score` = 100 (acc + acc_plus), at most 200 a task; "other" is wrong.
    Raises DataError when an image does not have exactly two questions.
    """
    result = {task: _mme_task(task, rows) for task, rows in tasks.items()}
    return result | {"total": {"score": math.fsum(values["score"] for values in result.values())}}


def _mme_task(task: str, rows: Sequence[tuple[str, str, str]]) -> dict[str, float]:
    by_image: dict[str, list[bool]] = {}
    for image, prediction, label in rows:
        by_image.setdefault(image, []).append(mme_parse(prediction) == label.strip().lower())
    odd = [image for image, right in by_image.items() if len(right) != 2]
    if odd or not rows:
        raise DataError(
            f"mme task {task!r}: needs two questions an image; {len(odd)} images differ, first {odd[:3]}"
        )
    acc = sum(map(sum, by_image.values())) / len(rows)
    acc_plus = sum(map(all, by_image.values())) / len(by_image)
    return {"acc": acc, "acc_plus": acc_plus, "score": 100 * (acc + acc_plus)}


def scienceqa(rows: Sequence[Mapping]) -> dict[str, dict[str, float]]:
    """ScienceQA's usual break-down of rows with "score", "parsed" and "categories" (modality, subject,
    grades).

    Returns {"all" | "image" | "text" | "<subject>" | "grades 1-6" | "grades 7-12": {"n", "score",
    "unparsed_share"}}. "image" is what others call ScienceQA-IMG.
    """
    groups: dict[str, list[Mapping]] = {"all": list(rows)}
    for row in rows:
        labels = dict(row["categories"])
        names = [labels.get("modality"), labels.get("subject")]
        names += [f"grades {labels['grades']}"] if "grades" in labels else []
        for name in filter(None, names):
            groups.setdefault(name, []).append(row)
    return {name: _group_score(members) for name, members in groups.items() if members}


def _group_score(rows: Sequence[Mapping]) -> dict[str, float]:
    return {
        "n": len(rows),
        "score": math.fsum(row["score"] for row in rows) / len(rows),
        "unparsed_share": sum(row["parsed"] is None for row in rows) / len(rows),
    }


# ---- one question by the metric that a card names
# --------------------------------------------------------------


def references_of(question: Question, by_letter: bool) -> tuple[str, ...]:
    """What a prediction is compared with: the right choice's letter, or the references (else the one answer).

    () for a question without an answer, as in splits that a test server scores.
    """
    if by_letter:
        return () if question.answer_index is None else (letter_of(question.answer_index),)
    return question.references or tuple(filter(None, [question.answer]))


def _choice_accuracy(parsed: str, references: Sequence[str]) -> float:
    return float(parsed in references)


# metric(parsed, references) -> 0.0 to 1.0; the names are the values of `metric` in a benchmark's card.
METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "accuracy": _choice_accuracy,
    "exact_match": exact_match,
    "vqa_accuracy": vqa_accuracy,
    "textvqa_accuracy": textvqa_accuracy,
    "stvqa_accuracy": stvqa_accuracy,
    "relaxed_accuracy": relaxed_accuracy,
    "anls": anls,
    "aokvqa_accuracy": aokvqa_accuracy,
    "mmmu_open": mmmu_open,
    "pope": exact_match,
    "mme": exact_match,
    "chair": unhallucinated,
    "math": math_equal,
}
