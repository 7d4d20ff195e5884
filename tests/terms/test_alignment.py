"""Teacher and student with different tokenizers: spans of bytes, and a loss on them that teaches."""

import logging

import pytest
import torch
from tiny import make_term, tiny_samples, tiny_tokenizer, tiny_tower

from mmkd.errors import DataError, RecipeError, TowerError
from mmkd.recipes.reading import validate
from mmkd.recipes.recipe import Recipe
from mmkd.terms.alignment import END, Alignment, common_spans, token_bytes
from mmkd.terms.term import Schedule
from mmkd.towers.assemble import train_tokenizer
from mmkd.train.collate import Collator, PairDataset
from mmkd.train.distiller import Distiller

OTHER = ("green and blue", "round", "square", "left", "right", "of", "A B C", "what", "grün")


def other_tokenizer():
    return train_tokenizer(OTHER, 285)


def term(kind, weight=1.0, **options):
    return make_term(kind, kind, Schedule(weight, weight), options=tuple(options.items()))


def batch_of(student, teacher, samples, terms):
    dataset = PairDataset(samples, student, teacher, terms)
    return Collator(student, teacher)([dataset[i] for i in range(len(samples))])["batch"]


def loss_of(student, teacher, samples, terms, chunk_bytes=2**20):
    distiller = Distiller(student, teacher, terms, chunk_bytes=chunk_bytes)
    distiller.zero_grad()
    loss, log = distiller(batch_of(student, teacher, samples, terms))
    loss.backward()
    return loss, log


def unequal_towers():
    return tiny_tower(1, tokenizer=tiny_tokenizer()), tiny_tower(2, 32, tokenizer=other_tokenizer())


BROKEN = "\ufffd".encode()


@pytest.mark.parametrize(
    ("own", "other", "expected"),
    [
        ([b"ab", b"c"], [b"ab", b"c"], [(0, 1, 0, 1), (1, 2, 1, 2)]),
        ([b"abc"], [b"a", b"bc"], [(0, 1, 0, 2)]),
        ([b"ab", b"cd", b"e"], [b"a", b"bcd", b"e"], [(0, 2, 0, 2), (2, 3, 2, 3)]),
        ([b" red", END], [b"r", b"ed", END], [(0, 1, 0, 2), (1, 2, 2, 3)]),  # one template begins with a space
        ([b"red"], [b"red", b" and"], [(0, 1, 0, 1)]),  # the student's answer is cut off
        ([b"x", END, b"y", END], [b"x", END, b"y", END], [(0, 1, 0, 1), (1, 2, 1, 2), (2, 3, 2, 3), (3, 4, 3, 4)]),
        ([b"no"], [b"yes"], []),
        # One tokenizer composes accents, the other leaves them apart: "café" and "cafe" with an accent, "né" and the like.
        (["caf\u00e9".encode(), b" noir"], ["cafe\u0301".encode(), b" noir"], [(0, 1, 0, 1), (1, 2, 1, 2)]),
        ([b"caf", "\u00e9".encode(), b"!"], [b"cafe", "\u0301".encode(), b"!"], [(0, 2, 0, 2), (2, 3, 2, 3)]),
        ([b"caf", b"\xc3", b"\xa9", b"s"], [b"caf", "e\u0301".encode(), b"s"], [(0, 1, 0, 1), (1, 3, 1, 2), (3, 4, 2, 3)]),
        (["\ud55c".encode(), END], ["\u1112".encode(), "\u1161\u11ab".encode(), END], [(0, 1, 0, 2), (1, 2, 2, 3)]),
        ([b"fi", b"n", END], ["\ufb01".encode(), b"n", END], [(0, 1, 0, 1), (1, 2, 1, 2), (2, 3, 2, 3)]),  # a ligature
        (["x\u0308".encode(), b"y"], [b"x", "\u0308".encode(), b"y"], [(0, 1, 0, 2), (1, 2, 2, 3)]),  # composes to nothing
        # A model said bytes that are no text, and the other one was told the sign for them.
        ([b"a", b"\x93", b"b"], [b"a", BROKEN, b"b"], [(0, 1, 0, 1), (1, 2, 1, 2), (2, 3, 2, 3)]),
        ([b"\xe1", b"\xa8", b"3", END], [BROKEN, b"3", END], [(0, 2, 0, 1), (2, 3, 1, 2), (3, 4, 2, 3)]),  # one sign for both
        ([b"\xe7", b"\xd5", b"x"], [BROKEN[:1], BROKEN[1:], BROKEN + b"x"], [(0, 1, 0, 2), (1, 3, 2, 3)]),
        ([b"a", b"\xc3"], [b"a", b"\xc3", b"\xa9"], [(0, 1, 0, 1)]),  # cut within a character: that is no sign
        ([b"a", b"\xc3", b"\xa9"], [b"a", b"\xe2"], [(0, 1, 0, 1)]),
        # Special tokens within an answer have no bytes.
        ([b"", b"a", b"", b"b", END], [b"ab", END], [(0, 4, 0, 1), (4, 5, 1, 2)]),
        ([b"a", b"", b"b"], [b"a", b"b"], [(0, 1, 0, 1), (1, 3, 1, 2)]),
        ([b"a", b"", END], [b"a", END], [(0, 1, 0, 1), (1, 3, 1, 2)]),
        ([b"", END], [END], [(0, 2, 0, 1)]),
    ],
)
def test_spans_are_the_smallest_common_pieces(own, other, expected):
    assert common_spans(own, other) == expected


def test_little_that_is_aligned_is_a_warning(caplog, tmp_path):
    towers = unequal_towers()
    alignment = Alignment(*towers)
    rows = [[tower.answer_tokens(tiny_samples(tmp_path, 1)[0], text) for text in ("red", "blue")] for tower in towers]
    own, other = (torch.tensor([row[0]]) for row in rows)
    alignment.of(own, other)
    assert "stand beside only" not in caplog.text
    Alignment(*towers).of(own, torch.tensor([rows[1][1]]))
    assert "stand beside only 33.3 %" in caplog.text  # the space before the word


def test_spans_hold_the_same_bytes(tmp_path):
    student, teacher = unequal_towers()
    tables = token_bytes(student), token_bytes(teacher)
    text = "left of a grün square, 3 m² of it"
    ids = [tower.tokenizer(text)["input_ids"] for tower in (student, teacher)]
    pieces = [[table[i] for i in row] for table, row in zip(tables, ids, strict=True)]
    assert b"".join(pieces[0]) == b"".join(pieces[1]) == text.encode()
    found = common_spans(*pieces)
    assert found[-1][1] == len(pieces[0]) and found[-1][3] == len(pieces[1])
    for a, b, c, d in found:
        assert b"".join(pieces[0][a:b]) == b"".join(pieces[1][c:d])


def test_one_tokenizer_gives_the_jsd_of_tokens(tmp_path):
    shared = tiny_tokenizer()
    student, teacher = tiny_tower(1, tokenizer=shared), tiny_tower(2, 32, tokenizer=shared)
    samples = tiny_samples(tmp_path, 3, text_only=1)
    _, log = loss_of(student, teacher, samples, [term("spans", beta=0.3), term("jsd", beta=0.3)])
    values = {name: float(total / count) for name, (total, count) in log.items()}
    assert values["spans"] == pytest.approx(values["jsd"], rel=1e-4)
    assert values["aligned"] == 1.0


def test_chunks_do_not_change_value_or_gradient(tmp_path):
    student, teacher = unequal_towers()
    for tower in (student, teacher):
        tower.model.double()  # rounding apart
    samples = tiny_samples(tmp_path, 3)
    results = []
    for chunk_bytes in (1, 2**30):
        loss, _ = loss_of(student, teacher, samples, [term("spans")], chunk_bytes=chunk_bytes)
        results.append((loss.item(), student.head.weight.grad.clone()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-8)


def test_it_teaches_and_tells_what_is_covered(tmp_path, caplog):
    student, teacher = unequal_towers()
    samples = tiny_samples(tmp_path, 4)
    terms = [term("spans"), term("cross_entropy", weight=0.1)]
    distiller = Distiller(student, teacher, terms)
    batch = batch_of(student, teacher, samples, terms)
    optimiser = torch.optim.AdamW(student.model.parameters(), lr=2e-2)
    values = []
    with caplog.at_level(logging.INFO, logger="mmkd"):
        for _ in range(20):
            loss, log = distiller(batch)
            values.append(float(log["spans"][0]))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    assert values[-1] < 0.8 * values[0], values
    covered, tokens = log["aligned"]
    assert covered == tokens > 0
    told = [record.getMessage() for record in caplog.records]
    assert sum("100.0 % of the student's" in line for line in told) == 1
    assert sum("strings are in both vocabularies" in line for line in told) == 1


def test_without_it_other_tokenizers_are_refused(tmp_path):
    student, teacher = unequal_towers()
    with pytest.raises(TowerError, match="have another id or none"):
        Distiller(student, teacher, [term("forward_kl")])
    with pytest.raises(DataError, match="both need the same tokenizer"):
        batch_of(student, teacher, tiny_samples(tmp_path, 2), [term("cross_entropy")])


def test_word_pieces_keep_no_bytes():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordPiece({"[UNK]": 0, "red": 1}, unk_token="[UNK]"))
    raw.decoder = decoders.WordPiece()
    tower = tiny_tower()
    tower.tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    with pytest.raises(TowerError, match="does not keep the bytes"):
        token_bytes(tower)


def recipe(**changes):
    raw = {
        "title": "t",
        "output": "runs/t",
        "teacher": {"model": "teacher"},
        "student": {"model": "student"},
        "stages": {"one": {"data": [{"card": "sample_textvqa"}], "steps": 1, "terms": {"spans": {"kind": "spans"}}}},
    }
    return raw | changes


def test_a_recipe_must_ask_for_it():
    with pytest.raises(RecipeError, match="teacher.alignment=spans"):
        validate(recipe(), "r.yaml", Recipe)
    asked = recipe(teacher={"model": "teacher", "alignment": "spans"})
    assert validate(asked, "r.yaml", Recipe).teacher.alignment == "spans"
    asked["stages"]["one"]["terms"] = {"ce": {"kind": "cross_entropy"}}
    with pytest.raises(RecipeError, match="no term is of kind"):
        validate(asked, "r.yaml", Recipe)


def test_an_answer_that_is_no_text_or_has_special_tokens_is_aligned_with_what_the_teacher_was_told(tmp_path):
    """Half a character and a token of the template within what the student says: all of it stands beside the teacher's words."""
    student, teacher = unequal_towers()
    alignment, table = Alignment(student, teacher), token_bytes(student)
    special = next(i for i in student.tokenizer.all_special_ids if i not in student.stop_ids)
    ids = [table.index(b"r"), special, table.index(b"\x93"), table.index(b"e"), min(student.stop_ids)]
    dataset = PairDataset(tiny_samples(tmp_path, 1), student, teacher, [make_term("s", "spans", Schedule(1, 1))], generates=True)
    pair = dataset.answered(dataset[0], ids)
    inputs = dataset.collator([pair])["batch"]
    (name,) = inputs.teachers
    aligned = alignment.of(inputs.student.targets, inputs.teachers[name].inputs.targets)
    assert int(aligned.tokens.sum()) == len(ids)
