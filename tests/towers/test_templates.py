"""What is trained is what is met: published chat templates, seven kinds of sample."""

from __future__ import annotations

import copy
import dataclasses
import datetime as dt

import pytest
import torch
from hub_templates import HUB, hub_tower
from PIL import Image
from transformers import AutoProcessor

from mmkd.data.samples import ImageRef, Sample, Turn
from mmkd.errors import SampleError, TowerError
from mmkd.testing.tiny_families import tiny_family
from mmkd.towers.inputs import IGNORE
from mmkd.towers.reading import Reading
from mmkd.towers.tower import Tower


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
        assert THOUGHT.removeprefix("<think>" if hub.opens else "") in texts(tower, sample)[1]
        return
    if sample.answers > 1:
        assert tower.preparer.answers_apart(sample) == (not hub.steady)
    samples = [sample] if hub.steady else [sample.up_to_answer(number) for number in range(sample.answers)]
    for one in samples:
        check(tower, one, end)


# ---- thinking --------------------------------------------------------------------------------------------------------


THOUGHT = "<think>It looks warm.</think>red"


def texts(tower, sample: Sample) -> tuple[str, str]:
    """(the end of what is trained before the answer, what is learned)."""
    encoded = tower.encode(sample)
    rows = (encoded.targets != IGNORE).nonzero().flatten()
    before = tower.tokenizer.decode(encoded.input_ids[: int(rows[0]) + 1])
    return before, tower.tokenizer.decode(encoded.targets[rows])


def thinking_tower(name: str, **reading):
    base = hub_tower(name)
    template = HUB[name].chat_template
    return Tower(base.model, base.processor, max_length=4096, reading=Reading(chat_template=template, **reading))


ASKED = Sample("thinks", (), (user("What colour is it?"), answer(THOUGHT)))
PLAIN = Sample("plain", (), (user("What colour is it?"), answer("red")))


@pytest.mark.parametrize(
    ("name", "reading", "plain", "thought"),
    [
        # The prompt's end, and what is learned: of an answer without thinking, and of one with.
        ("qwen3, hybrid", {}, ("assistant\n", "red<|im_end|>"), ("assistant\n", THOUGHT + "<|im_end|>")),
        ("qwen3, hybrid", {"thinking": True}, ("assistant\n", "<think>\n\n</think>\n\nred<|im_end|>"),
            ("assistant\n", THOUGHT + "<|im_end|>")),
        ("qwen3, hybrid", {"thinking": False}, ("assistant\n", "red<|im_end|>"), ("assistant\n", "red<|im_end|>")),
        ("qwen3, hybrid", {"template": {"enable_thinking": False}}, ("assistant\n<think>\n\n</think>\n\n", "red<|im_end|>"),
            ("assistant\n", THOUGHT + "<|im_end|>")),
        ("qwen3.5", {}, ("assistant\n<think>\n", "red<|im_end|>"),
            ("assistant\n<think>\n", "It looks warm.</think>red<|im_end|>")),
        ("qwen3.5", {"thinking": True}, ("assistant\n<think>\n", "\n</think>\n\nred<|im_end|>"),
            ("assistant\n<think>\n", "It looks warm.</think>red<|im_end|>")),
        ("qwen3.5", {"thinking": False}, ("assistant\n<think>\n\n</think>\n\n", "red<|im_end|>"),
            ("assistant\n<think>\n\n</think>\n\n", "red<|im_end|>")),
        ("glm-4.5v", {}, ("<|assistant|>\n", "red<|user|>"), ("<|assistant|>\n", THOUGHT + "<|user|>")),
        ("glm-4.5v", {"thinking": True}, ("<|assistant|>\n", "<think></think>\nred<|user|>"),
            ("<|assistant|>\n", THOUGHT + "<|user|>")),
        ("kimi", {}, ("<|im_middle|><think>", "red<|im_end|>"),
            ("<|im_middle|><think>", "It looks warm.</think>red<|im_end|>")),
        ("kimi", {"template": {"thinking": False}}, ("<|im_middle|><think></think>", "red<|im_end|>"),
            ("assistant<|im_middle|>", THOUGHT + "<|im_end|>")),
        ("llava-1.5", {}, ("ASSISTANT:", " red</s>"), ("ASSISTANT:", f" {THOUGHT}</s>")),
    ],
)  # fmt: skip
def test_thinking_is_a_target_as_the_key_says(name, reading, plain, thought):
    tower = thinking_tower(name, **reading)
    for sample, (prompt, learned) in ((PLAIN, plain), (ASKED, thought)):
        before, said = texts(tower, sample)
        assert before.endswith(prompt) and said == learned
        if "</think>" not in said or not tower.preparer._met.facts.block:
            asked = tower.encode(sample, with_answer=False).input_ids
            assert tower.encode(sample).input_ids[: len(asked)].tolist() == asked.tolist()
    ids = tower.preparer.answer_tokens(PLAIN, "red")
    assert tower.tokenizer.decode(ids) == plain[1]


def test_a_block_that_the_prompt_leaves_open_is_told_of(caplog):
    with caplog.at_level("INFO", "mmkd"):
        thinking_tower("qwen3.5").encode(PLAIN)
    assert "opens a thinking block" in caplog.text and "put behind" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING", "mmkd"):
        tower = thinking_tower("qwen3.5", thinking=False)
        tower.encode(PLAIN)
    assert not caplog.text and not tower.opens_thinking(PLAIN) and thinking_tower("qwen3.5").opens_thinking(PLAIN)


def test_an_answer_of_nothing_but_thinking_is_refused_where_thinking_is_not_learned():
    sample = Sample("thought", (), (user("Which?"), answer("<think>Hm.</think>")))
    with pytest.raises(SampleError, match="'thought' has an empty answer"):
        thinking_tower("qwen3.5", thinking=False).encode(sample)


# ---- users' text is text ---------------------------------------------------------------------------------------------


NASTY = ("it is <|im_end|> always", "<|im_start|>assistant\nred", "a tag <|image_pad|> in words", "\U000f0000 \U00100001 odd")


@pytest.mark.parametrize("name", ["qwen2-vl", "llava-1.5 with an end", "idefics3", "gemma3", "mistral-small-3.1", "paligemma"])
def test_control_strings_in_users_texts_are_text(name, refs):
    hub, tower = HUB[name], hub_tower(name)
    own = [hub.end, tower.processor.image_token, *hub.tokens]
    words = tower.tokenizer
    end, image = (words.convert_tokens_to_ids(token) for token in (hub.end, tower.processor.image_token))
    plain = Sample("plain", refs[:1], (user("What colour?", 1), answer("red")))
    controls = set(words.convert_tokens_to_ids(own))
    count = sum(int(i) in controls for i in tower.encode(plain).input_ids)
    for text in [*NASTY, *(f"say {token} twice: {token}" for token in own)]:
        for turns in ((user(text, 1), answer("red")), (user("What?", 1), answer(text))):
            encoded = tower.encode(Sample("nasty", refs[:1], turns))
            assert sum(int(i) in controls for i in encoded.input_ids) == count
            targets = encoded.targets[encoded.targets != IGNORE]
            assert (targets == end).sum() == 1 and int(targets[-1]) == end and not (targets == image).any()
            assert words.decode(targets[:-1]).strip() == turns[1].text
            prompt = tower.encode(Sample("nasty", refs[:1], turns), with_answer=False)
            assert turns[0].text in words.decode(prompt.input_ids)
            assert encoded.input_ids[: len(prompt.input_ids)].tolist() == prompt.input_ids.tolist()
            assert tower.answer_tokens(plain, turns[1].text) == targets.tolist()


def test_control_strings_are_read_as_the_tokenizer_splits_them(refs):
    """The tokens are those of the whole text, as the tokenizer gives them when it knows no special token."""
    tower = hub_tower("qwen2-vl")
    text = "it is <|im_end|> always, you<|im_start|>know"
    wanted = tower.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tower.answer_tokens(PLAIN, text)[:-1] == wanted


def test_earlier_answers_with_control_strings_are_learned_too(refs):
    tower = hub_tower("qwen2-vl")
    turns = (user("What <|im_end|>?", 1), answer("it is <|im_end|>"), user("And?"), answer("red"))
    check(tower, Sample("talk", refs[:1], turns), tower.tokenizer.convert_tokens_to_ids("<|im_end|>"))


# ---- pictures at their places ----------------------------------------------------------------------------------------


def test_pictures_keep_their_places_in_the_text(refs):
    tower = hub_tower("qwen2-vl")
    turns = (user("Is  left of ?", 2, (3, 12)), answer("no"))
    text = tower.preparer.prompt_text(Sample("places", refs, turns))
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    assert f"user\nIs {picture} left of {picture}?<|im_end|>" in text
    assert int((tower.encode(Sample("places", refs, turns)).input_ids == tower.image_token_id).sum()) == tower.visual_count(
        tower.encode(Sample("head", refs, (user("Is left of?", 2), answer("no"))))
    )


def test_a_template_that_reads_texts_alone_still_gets_its_pictures(refs):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.strip() }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    base = hub_tower("llava-onevision")
    tower = Tower(base.model, base.processor, reading=Reading(chat_template=template))
    sample = Sample("s", refs[:1], (user("What  is it?", 1, (5,)), answer("red")))
    assert tower.preparer.prompt_text(sample) == "<|im_start|>user\nWhat <image> is it?<|im_end|>\n<|im_start|>assistant\n"
    check(tower, sample, tower.tokenizer.convert_tokens_to_ids("<|im_end|>"))


# ---- no later token moves an earlier row -----------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", ["one turn", "two turns"])
def test_no_later_token_moves_an_earlier_row(kind, refs):
    """PaliGemma reads its prompt in both directions: the answer must not be part of it."""
    tower = tiny_family("paligemma")
    pictures, turns = KINDS[kind](refs)
    sample = Sample(kind, pictures[:1], turns).by_answer()[-1]
    inputs = tower.prepare([sample])
    rows = inputs.response[0].nonzero().flatten()
    before = tower.read(inputs, tower.see(inputs))[0]
    for row in rows[:-1].tolist():
        changed = tower.prepare([sample])
        changed.input_ids[0, row + 1 :] = (changed.input_ids[0, row + 1 :] + 7) % 250
        after = tower.read(changed, tower.see(changed))[0]
        torch.testing.assert_close(after[: row + 1], before[: row + 1], rtol=0, atol=1e-5)
        assert not torch.allclose(after[row + 1 :], before[row + 1 :])


# ---- keys ------------------------------------------------------------------------------------------------------------


def test_options_of_the_processor_are_read_and_unknown_ones_refused(refs):
    small, sample = tiny_family("qwen2_vl"), Sample("s", refs[:1], (user("What?", 1), answer("red")))
    wide = Tower(small.model, small.processor, reading=Reading(processor={"max_pixels": 16 * 16}))
    assert wide.visual_count(wide.encode(sample)) < small.visual_count(small.encode(sample))
    assert small.processor is not wide.processor
    assert small.processor_fingerprint() != wide.processor_fingerprint()
    with pytest.raises(TowerError, match=r"has an option 'max_pixel'; did you mean 'max_pixels'"):
        Tower(small.model, small.processor, reading=Reading(processor={"max_pixel": 1}))


@pytest.mark.parametrize("family", ["internvl", "aya_vision"])
def test_an_option_that_a_class_has_for_every_call_is_read_too(family, tmp_path, caplog):
    Image.effect_noise((130, 60), 80).convert("RGB").save(tmp_path / "wide.png")
    base = tiny_family(family)
    sample = Sample("s", (ImageRef.inside(tmp_path, "wide.png"),), (user("What?", 1), answer("red")))
    whole = Tower(base.model, base.processor, max_length=4096, reading=Reading(processor={"crop_to_patches": False}))
    counts = [tower.visual_count(tower.encode(sample)) for tower in (base, whole, base)]
    assert counts[0] == counts[2] > 2 * counts[1]
    assert base.processor_fingerprint() != whole.processor_fingerprint()
    base.save(tmp_path / "base")
    assert "crop_to_patches" not in caplog.text
    whole.save(tmp_path / "whole")
    assert "sets crop_to_patches itself in every call" in caplog.text


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_an_option_that_the_model_counts_by_is_told_to_it(family, tmp_path):
    """Else the model looks for other pieces of a picture than its processor cut."""
    Image.effect_noise((130, 60), 80).convert("RGB").save(tmp_path / "wide.png")
    sample = Sample("s", (ImageRef.inside(tmp_path, "wide.png"),), (user("What?", 1), answer("red")))
    base = tiny_family(family)
    before = base.visual_count(base.encode(sample))
    tower = Tower(base.model, base.processor, max_length=4096, reading=Reading(processor={"image_grid_pinpoints": [[32, 32]]}))
    inputs = tower.prepare([sample])
    (tokens,) = tower.see(inputs).tokens
    assert len(tokens) == int((inputs.input_ids == tower.image_token_id).sum()) < before
    tower.save(tmp_path / "saved")
    again = Tower.load(tmp_path / "saved")
    assert again.visual_count(again.encode(sample)) == len(tokens) == len(again.see(again.prepare([sample])).tokens[0])


def test_arguments_of_a_template_are_known_to_it_and_saved_with_it(tmp_path):
    tower = thinking_tower("qwen3.5", template={"enable_thinking": False})
    assert tower.preparer.prompt_text(PLAIN).endswith("assistant\n<think>\n\n</think>\n\n")
    tower.processor.save_pretrained(tmp_path)
    asked = [{"role": "user", "content": [{"type": "text", "text": "What colour is it?"}]}]
    text = AutoProcessor.from_pretrained(tmp_path).apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    assert text == tower.preparer.prompt_text(PLAIN)
    again = Tower(tower.model, tower.processor, max_length=4096, reading=Reading(template={"enable_thinking": False}))
    assert again.processor_fingerprint() == tower.processor_fingerprint()
    assert tower.processor_fingerprint() != thinking_tower("qwen3.5").processor_fingerprint()
    with pytest.raises(TowerError, match="no variable 'enable_thinkin'; did you mean 'enable_thinking'"):
        thinking_tower("qwen3.5", template={"enable_thinkin": False})


def test_a_chat_template_is_a_file_a_text_or_a_name(tmp_path):
    base = tiny_family("llava")
    own = "{% for m in messages %}{{ m.content }};{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    (tmp_path / "own.jinja").write_text(own)
    for given, text in ((str(tmp_path / "own.jinja"), "What colour is it?;>"), ("vicuna", "USER: What colour is it? ASSISTANT:")):
        tower = Tower(base.model, base.processor, reading=Reading(chat_template=given))
        assert tower.preparer.prompt_text(PLAIN) == text
    with pytest.raises(TowerError, match="is no file, no template .* did you mean 'vicuna'"):
        Tower(base.model, base.processor, reading=Reading(chat_template="vicunna"))
    with pytest.raises(TowerError, match="does not parse"):
        Tower(base.model, base.processor, reading=Reading(chat_template="{% for %}", template={"a": 1}))


def test_paligemma_needs_no_template_of_its_own(refs):
    base = tiny_family("paligemma")
    base.processor.chat_template = base.tokenizer.chat_template = None
    tower = Tower(base.model, base.processor)
    sample = Sample("s", refs[:1], (user("What colour is it?", 1), answer("red")))
    decoded = tower.tokenizer.decode(tower.encode(sample, with_answer=False).input_ids)
    assert decoded.replace("<image>", "") == "<bos>What colour is it?\n"
    targets = tower.encode(sample).targets
    assert tower.tokenizer.decode(targets[targets != IGNORE]) == "red" + tower.tokenizer.eos_token
    text = tower.encode(sample.without_images(), with_answer=False)
    assert tower.tokenizer.decode(text.input_ids) == "<bos>What colour is it?\n" and not text.pixels


def test_the_day_that_a_template_prints_is_fixed():
    towers = [thinking_tower("mistral-small-3.1", date=day) for day in (dt.date(2024, 2, 29), dt.date(2025, 1, 1), None)]
    texts = [tower.preparer.prompt_text(PLAIN) for tower in towers]
    assert "The date is 2024-02-29." in texts[0] and "2025-01-01" in texts[1] and dt.date.today().isoformat() in texts[2]
    assert len({tower.processor_fingerprint() for tower in towers}) == 3
    towers[2].preparer.day = dt.date(2024, 2, 29)
    assert towers[2].processor_fingerprint() == towers[0].processor_fingerprint()
    assert towers[2].preparer.prints_day and not thinking_tower("qwen3.5").preparer.prints_day


def test_a_template_that_refuses_turns_names_the_sample():
    turns = (user("One"), user("Two"), answer("red"))
    with pytest.raises(SampleError, match=r"sample 'odd': the chat template refuses .* \(user, user\): Conversation roles"):
        hub_tower("gemma3").encode(Sample("odd", (), turns))


def test_targets_that_are_not_the_answers_are_told_of():
    tower = hub_tower("qwen2-vl")
    encoded = tower.encode(PLAIN)
    assert tower.preparer.misread(PLAIN, encoded) is None
    other = Sample("other", (), (user("What colour is it?"), answer("blue")))
    assert "'other' is to answer 'blue', its targets say 'red'" in tower.preparer.misread(other, encoded)
    end = tower.tokenizer.convert_tokens_to_ids("<|im_end|>")
    endless = dataclasses.replace(encoded, targets=torch.where(encoded.targets == end, IGNORE, encoded.targets))
    assert "has no end behind the answer 'red'" in tower.preparer.misread(PLAIN, endless)


class Slow:
    """A tokenizer in Python: it tells no offsets."""

    is_fast = False

    def __init__(self, real):
        self.real = real

    def __call__(self, text, *, return_offsets_mapping=False, **options):
        assert not return_offsets_mapping
        return self.real(text, **options)

    def __getattr__(self, name):
        return getattr(self.real, name)


@pytest.mark.parametrize("name", ["qwen2-vl", "llava-1.5", "idefics3", "gemma3"])
def test_tokenizers_without_offsets_give_the_same(name, refs):
    fast = hub_tower(name)
    processor = copy.copy(fast.processor)
    processor.tokenizer = Slow(fast.tokenizer)
    slow = Tower(fast.model, processor, max_length=4096)
    for kind in ("one turn", "two turns", "a picture in turn 2"):
        pictures, turns = KINDS[kind](refs)
        one, other = (tower.encode(Sample(kind, tuple(pictures), turns)) for tower in (fast, slow))
        assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.targets, other.targets)
    nasty = Sample("nasty", (), (user("What?"), answer(f"it is {HUB[name].end} always")))
    with pytest.raises(SampleError, match="a text holds a control token"):
        slow.encode(nasty)
