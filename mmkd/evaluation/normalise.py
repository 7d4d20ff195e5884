"""How the official scorers of VQA v2 and of EvalAI (TextVQA, ST-VQA) put an answer into its plain form."""

from __future__ import annotations

import re
from functools import lru_cache

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
