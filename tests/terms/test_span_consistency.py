"""Span consistency as a term: which tokens are of one word, the loss over cut batches and chunks."""

from dataclasses import replace

import objectives
import pytest
import torch
from objectives import (
    TOKENIZER,
    assert_equals,
    assert_micro_batches_add_up,
    assert_refused_by_top_k,
    assert_refused_options,
    term,
    towers,
)
from tiny import tiny_samples

from mmkd.data.samples import Turn
from mmkd.terms.rows import word_borders, word_numbers

ANSWERS = ("blueish redness", "7,301", "A", "rounded squares B")


@pytest.fixture(autouse=True)
def long_words(monkeypatch):
    """Answers of words of several tokens."""

    def samples(folder, n=3, **options):
        found = tiny_samples(folder, n, **options)
        return [replace(s, turns=(*s.turns[:-1], Turn("assistant", ANSWERS[i % 4]))) for i, s in enumerate(found)]

    monkeypatch.setattr(objectives, "tiny_samples", samples)


def pairs_by_text(targets, spans):
    """Neighbours of one word, by the text that is decoded token by token."""
    texts = [TOKENIZER.decode([i]) for i in targets.tolist()]
    ends = [text == "<|end|>" for text in texts]
    found = []
    for i in range(len(texts) - 1):
        one_word = not texts[i + 1].startswith(" ") or spans == "answer"
        if one_word and not ends[i] and not ends[i + 1] and (spans == "answer" or not texts[i].isspace()):
            found.append(i)
    return found


def reference(spans, form):
    def mean(zs, zt, targets):
        q, p = zs.softmax(-1), zt.softmax(-1)
        pairs = pairs_by_text(targets, spans)
        assert len(pairs) >= 8
        distances = torch.stack([(q[i] * q[i + 1] - p[i] * p[i + 1]).square().sum() for i in pairs])
        return (distances if form == "squared" else distances.sqrt()).sum() / len(targets)

    return mean


@pytest.mark.parametrize("chunk_bytes", [2**24, 1])
@pytest.mark.parametrize(("spans", "form"), [("words", "squared"), ("answer", "squared"), ("words", "norm")])
def test_it_equals_a_plain_computation(tmp_path, spans, form, chunk_bytes):
    """Also with two rows of logits at a time."""
    assert_equals(tmp_path, term("span_consistency", spans=spans, form=form), reference(spans, form), chunk_bytes=chunk_bytes)


def test_micro_batches_add_up(tmp_path):
    assert_micro_batches_add_up(tmp_path, term("span_consistency"))


@pytest.mark.parametrize(("words", "expected"), [(True, ["rounded", "squares,", "7,301", "A", "red"]), (False, None)])
def test_words_end_at_white_space_answers_and_samples(words, expected):
    """Two answers, and another sample whose first token does not begin with white space."""
    student, _ = towers(torch.float32)
    ids = [TOKENIZER(text, add_special_tokens=False).input_ids for text in ("rounded  squares,\n7,301<|end|>", "A<|end|>", "red")]
    samples = torch.tensor([0] * (len(ids[0]) + len(ids[1])) + [1] * len(ids[2]))
    flat = torch.tensor([index for answer in ids for index in answer])
    numbers = word_numbers(word_borders(student, words)[:, flat], samples)
    found = [TOKENIZER.decode(flat[numbers == n]).strip() for n in numbers.unique().tolist() if n >= 0]
    assert found == (expected or ["rounded  squares,\n7,301", "A", "red"])
    assert set(TOKENIZER.decode(flat[numbers == -1])) <= {*"<|end|> \n"}


def test_what_it_refuses():
    assert_refused_by_top_k(term("span_consistency"), "span_consistency needs all of the teacher's logits, the cache has top-8")
    assert_refused_options("span_consistency", "has spans in answers only; use positions: response", positions="prompt")
    assert_refused_options("span_consistency", "spans is 'lines'", spans="lines")
