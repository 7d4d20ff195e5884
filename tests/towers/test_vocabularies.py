"""What is trained is what is met, with real vocabularies: borders, spaces, words of control."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_templates import TEMPLATES
from PIL import Image
from vocabularies import vocabulary

from mmkd.data.samples import ImageRef, Sample, Turn
from mmkd.testing.tiny_families import tiny_family
from mmkd.towers.inputs import IGNORE
from mmkd.towers.reading import Reading
from mmkd.towers.tower import Tower

TEKKEN = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST]{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}"
    "{{ c.text }}{% endif %}{% endfor %}[/INST]{% else %}{{ m.content[0].text }}</s>{% endif %}{% endfor %}"
)
# name -> vocabulary, options of it, template, further special tokens, the end
MODELS = {
    "qwen": ("qwen", {}, "minicpm_v", ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "qwen, spaces": ("qwen", {}, "llava_onevision", ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "qwen, no end": ("qwen", {}, "llava", (), "</s>"),
    "llama 3": ("llama 3", {}, "mllama", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
    "tekken": ("tekken", {}, TEKKEN, ("[INST]", "[/INST]"), "</s>"),
    "llava-1.5": ("sentencepiece", {}, "llava", (), "</s>"),
    "llava-1.5, later": ("sentencepiece", {"legacy": False}, "llava", (), "</s>"),
    "llava-1.5 with an end": ("sentencepiece", {}, "llava_with_end", (), "</s>"),
    "llava-next mistral": ("sentencepiece", {}, "llava_next_mistral", (), "</s>"),
    "idefics": ("sentencepiece", {}, "idefics", ("<end_of_utterance>",), "<end_of_utterance>"),
}


def tower_of(name: str) -> tuple[Tower, int]:
    vocabulary_name, options, template, tokens, end = MODELS[name]
    tokenizer = vocabulary(vocabulary_name, **options)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", *tokens]})
    tower = tiny_family("llava")
    tower.processor.tokenizer = tokenizer
    tower.processor.image_token_id = tower.model.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    number = tower.model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(end)
    file = TEMPLATES / f"{template}.jinja"
    reading = Reading(chat_template=str(file) if file.is_file() else template)
    return Tower(tower.model, tower.processor, reading=reading), number


@pytest.fixture(scope="module")
def refs(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("pictures")
    for number in range(2):
        Image.effect_noise((40, 40), 60 + number).convert("RGB").save(folder / f"{number}.png")
    return tuple(ImageRef.inside(folder, f"{number}.png") for number in range(2))


ANSWERS = (
    "left", "It is red.", "3.14 metres (about)", "two\nlines:\n\n- one", "é 漢字", "I'm </s> not <image> done [INST]", "“so”",
)  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_learned_as_they_are_met(name, refs):
    tower, end = tower_of(name)
    for number, text in enumerate(ANSWERS):
        other = ANSWERS[number - 1]
        turns = (Turn("user", "What is it?", 1), Turn("assistant", other), Turn("user", "Sure?"), Turn("assistant", text))
        talk = Sample("talk", refs[:1], turns)
        for sample in [talk.up_to_answer(0), talk.up_to_answer(1), *([] if tower.preparer.answers_apart(talk) else [talk])]:
            encoded = tower.encode(sample)
            learned = [turn.text for turn in sample.turns if turn.role == "assistant"][-1 if sample.last_only else 0 :]
            rows = (encoded.targets != IGNORE).nonzero().flatten().tolist()
            ends = [row for row in rows if int(encoded.targets[row]) == end]
            assert len(ends) == len(learned)
            for place, (answer, row) in enumerate(zip(learned, ends, strict=True)):
                first = next(r for r in rows if r > (ends[place - 1] if place else -1))
                targets = encoded.targets[first:row]
                assert tower.tokenizer.decode(targets).strip() == answer
                assert encoded.input_ids[first + 1 : row + 1].tolist() == targets.tolist()
                asked = sample if sample.last_only else talk.up_to_answer(place)
                assert encoded.input_ids[: first + 1].tolist() == tower.encode(asked, with_answer=False).input_ids.tolist()


def test_no_white_space_stands_between_an_answer_and_its_end():
    tower, _ = tower_of("llava-1.5")
    sample = Sample("s", (), (Turn("user", "Where?"), Turn("assistant", "left")))
    for text in ("left", " left", "left \n"):
        assert tower.tokenizer.convert_ids_to_tokens(tower.preparer.answer_tokens(sample, text)) == ["▁left", "</s>"]
    targets = tower.encode(sample).targets
    assert tower.tokenizer.convert_ids_to_tokens(targets[targets != IGNORE].tolist()) == ["▁left", "</s>"]
