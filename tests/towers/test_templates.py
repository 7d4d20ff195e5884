"""What is trained is what is met: published chat templates, seven kinds of sample."""

from __future__ import annotations

import pytest
import torch
from hub_templates import HUB, hub_tower
from PIL import Image

from mmkd.data.samples import ImageRef, Sample, Turn
from mmkd.errors import SampleError
from mmkd.towers.inputs import IGNORE


def user(text: str, images: int = 0, places: tuple[int, ...] = ()) -> Turn:
    return Turn("user", text, images, places)


def answer(text: str) -> Turn:
    return Turn("assistant", text)


@pytest.fixture(scope="module")
def refs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate([(64, 48), (48, 64)]):
        Image.effect_noise(size, 80).convert("RGB").save(folder / f"{number}.png")
    return tuple(ImageRef.inside(folder, f"{number}.png") for number in range(2))


KINDS = {
    "one turn": lambda p: (p[:1], (user("What colour is it?", 1), answer("red"))),
    "two turns": lambda p: (p[:1], (user("What colour?", 1), answer("red."), user("And how many?"), answer("seven of them"))),
    "a picture in turn 2": lambda p: (p, (user("What?", 1), answer("red"), user("And this?", 1), answer("green"))),
    "two pictures": lambda p: (p, (user("Do both show the same?", 2), answer("no"))),
    "text only": lambda p: ((), (user("What is two and two?"), answer("four"))),
    "a system turn": lambda p: (p[:1], (Turn("system", "Be brief."), user("What colour is it?", 1), answer("red"))),
    "thinking": lambda p: (p[:1], (user("What colour is it?", 1), answer("<think>It looks warm.</think>red"))),
}


def check(tower, sample: Sample, end: int) -> None:
    """The trained prefix of each answer is what is asked for it, and behind that stand the answer and the end."""
    encoded = tower.encode(sample)
    said = [turn.text for turn in sample.turns if turn.role == "assistant"]
    wanted = said[-1:] if sample.last_only else said
    rows = (encoded.targets != IGNORE).nonzero().flatten().tolist()
    ends = [row for row in rows if int(encoded.targets[row]) == end]
    assert len(ends) == len(wanted)
    start = 0
    for number, (text, row) in enumerate(zip(wanted, ends, strict=True)):
        own = [r for r in rows if start <= r <= row]
        start = row + 1
        assert own == list(range(own[0], row + 1))
        targets = encoded.targets[own[0] : row + 1]
        assert tower.tokenizer.decode(targets[:-1]).strip() == text
        assert torch.equal(encoded.input_ids[own[0] + 1 : row + 1], targets[:-1])
        asked = sample if sample.last_only else sample.up_to_answer(number)
        prompt = tower.encode(asked, with_answer=False)
        assert encoded.input_ids[: own[0] + 1].tolist() == prompt.input_ids.tolist()
    prompt = tower.encode(sample, with_answer=False)
    assert set(prompt.pixels) == set(encoded.pixels)
    assert all(torch.equal(prompt.pixels[name], value) for name, value in encoded.pixels.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", HUB)
def test_what_is_trained_is_what_is_met(name, kind, refs):
    hub, tower = HUB[name], hub_tower(name)
    pictures, turns = KINDS[kind](refs)
    sample = Sample(kind, tuple(pictures), turns)
    end = tower.tokenizer.convert_tokens_to_ids(hub.end)
    if kind == "a system turn" and not hub.system:
        with pytest.raises(SampleError, match="'a system turn': the chat template refuses these turns"):
            tower.encode(sample)
        return
    if kind == "thinking":
        return
    if sample.answers > 1:
        assert tower.preparer.answers_apart(sample) == (not hub.steady)
    samples = [sample] if hub.steady else [sample.up_to_answer(number) for number in range(sample.answers)]
    for one in samples:
        check(tower, one, end)
