"""Thinking: what is left of an answer without it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tiny import tiny_tower

from mmkd.towers.samples import Sample, Turn
from mmkd.towers.thinking import CLOSED, PAIRS, UNCLOSED, decode_answers, ends_within, without_thinking


@pytest.mark.parametrize(("opening", "closing"), PAIRS)
def test_a_block_of_every_kind(opening: str, closing: str) -> None:
    thought = f"{opening}\nFirst I took it for A.\nOr C?\n{closing}"
    assert without_thinking(f" {thought}\n\nB") == ("B", CLOSED)
    assert without_thinking(f"Is it A? No.{closing} B ") == ("B", CLOSED)  # the prompt had opened it
    assert without_thinking(f"{opening}First I took it for B") == (None, UNCLOSED)
    assert ends_within(f"<user>?<assistant>{opening}\n")
    assert not ends_within(f"<user>?<assistant>{opening}\n\n{closing}\n\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", ("B", None)),
        (" I think B. ", (" I think B. ", None)),  # as it came
        ("<THINK>a</Think>b", ("b", CLOSED)),
        ("<think></think>", ("", CLOSED)),
        ("<think>In <think> tags I say A</think>B", ("B", CLOSED)),
        ("<think>x <think>y</think> z</think>B", ("B", CLOSED)),
        ("<think>A</think>C<think>no, B</think>B", ("B", CLOSED)),
        ("B<think>since it is red</think>", ("B", CLOSED)),
        ("<think>A</think>C<think>or", (None, UNCLOSED)),
        ("[THINK]A[/THINK]B[THINK]", (None, UNCLOSED)),
        ("<think>A</think>\n<answer> B </answer>", ("B", CLOSED)),
        ("<think>A</think><|begin_of_box|>B<|end_of_box|>", ("B", CLOSED)),
        ("<REASONING>A or B?</REASONING>\n<CONCLUSION>B</CONCLUSION>", ("B", CLOSED)),
        ("<|channel>thought\n<channel|>B", ("B", CLOSED)),
        ("a < b and think > d", ("a < b and think > d", None)),
    ],
)
def test_what_is_left(text: str, expected: tuple[str | None, str | None]) -> None:
    assert without_thinking(text) == expected


def test_where_the_prompt_opened_it() -> None:
    assert without_thinking("Let me see whether it is B", opened=True) == (None, UNCLOSED)
    assert without_thinking("Hm.</think>B", opened=True) == ("B", CLOSED)


class Words:
    """A tokenizer whose tokens are words; some are special."""

    words = ("<s>", "[THINK]", "[/THINK]", "A", "B", "</s>")
    special = frozenset({0, 1, 2, 5})

    @property
    def added_tokens_decoder(self) -> dict:
        return {i: SimpleNamespace(content=self.words[i], special=True) for i in self.special}

    def decode(self, ids, skip_special_tokens: bool) -> str:
        return " ".join(self.words[i] for i in ids if i not in self.special)

    def batch_decode(self, rows, skip_special_tokens: bool) -> list[str]:
        return [self.decode(row, skip_special_tokens) for row in rows]


def test_marks_that_are_special_tokens_stay() -> None:
    assert decode_answers(Words(), [[0, 1, 3, 4, 2, 4, 5], [4, 5]]) == ["[THINK]A B[/THINK]B", "B"]
    plain = Words()
    plain.special = {0, 5}
    assert decode_answers(plain, [[0, 3, 5]]) == ["A"]


def test_a_tower_whose_template_opens_thinking() -> None:
    tower = tiny_tower()
    asked = Sample("1", (), (Turn("user", "Which?"),))
    assert not tower.opens_thinking(asked)
    template = tower.preparer.processor.chat_template
    for added, opens in (("<think>\\n", True), ("<think>\\n\\n</think>\\n\\n", False)):
        tower.preparer.processor.chat_template = template + "{% if add_generation_prompt %}" + added + "{% endif %}"
        assert tower.opens_thinking(asked) == opens
