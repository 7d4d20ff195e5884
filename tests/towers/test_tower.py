"""The four verbs, answering, saving: on a LLaVA of ours and on families of transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import (
    FAMILIES,
    language_config,
    tiny_family,
    tiny_picture,
    tiny_samples,
    tiny_tokenizer,
    tiny_tower,
)
from tokenizers import processors

from mmkd.data.samples import Sample, Turn
from mmkd.errors import DataError, ImageError, TowerError
from mmkd.testing import check_tower
from mmkd.towers.tower import IGNORE, Tower
from mmkd.train.spec import LoraSpec
from mmkd.train.trainable import add_lora


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> list[Sample]:
    return tiny_samples(tmp_path_factory.mktemp("pictures"), 3, two_images=1, text_only=1)


def with_bos(*tokens: str):
    """A tokenizer that puts <s> before every text, as Llama's does."""
    tokenizer = tiny_tokenizer(400)
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["<image>", *tokens]})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def with_tokens(*tokens: str):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", *tokens]})
    return tokenizer


def without_pad():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    return tokenizer


# ---- the contract ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_transformers_keep_the_contract(name, samples):
    facts = check_tower(tiny_family(name), samples)
    assert facts["largest difference from transformers' logits"] == 0
    assert facts["visual switch"] == "yes"


TOWERS = {
    "bos": lambda: tiny_tower(tokenizer=with_bos()),
    "bos in the template": lambda: tiny_tower(
        tokenizer=with_bos("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), chat_template="llama3"
    ),
    "vicuna": lambda: tiny_tower(tokenizer=with_bos(), chat_template="vicuna"),
    "chatml": lambda: tiny_tower(tokenizer=with_tokens("<|im_start|>", "<|im_end|>")),
    "no pad token": lambda: tiny_tower(tokenizer=without_pad()),
    "untied head": lambda: tiny_tower(language=language_config(tie_word_embeddings=False)),
    "bfloat16": lambda: tiny_tower(dtype=torch.bfloat16),
}


@pytest.mark.parametrize("name", TOWERS)
def test_tokenizers_templates_and_dtypes_keep_the_contract(name, samples):
    facts = check_tower(TOWERS[name](), samples)
    assert facts["largest difference from transformers' logits"] == 0
    assert facts["largest difference after loading"] == 0
    assert facts["samples with several pictures"] == facts["samples without a picture"] == 1


def test_window_attention_reorders_features_which_the_contract_tells(tmp_path):
    """Qwen2.5-VL's projector reads patches by attention window: exact for everything but the visual switch."""
    pictures = tiny_samples(tmp_path, 2, sizes=((32, 32), (48, 16)))
    facts = check_tower(tiny_family("qwen2_5_vl"), pictures)
    assert facts["visual switch"].startswith("not with this family")
    assert facts["largest difference from transformers' logits"] == 0


def test_the_contract_holds_on_its_own_samples_and_leaves_the_model_as_it_was():
    tower = tiny_tower()
    tower.vision.requires_grad_(False)
    tower.model.train()
    before = tower.fingerprint()
    assert check_tower(tower)["samples"] == 5
    assert tower.fingerprint() == before and tower.model.training
    assert all(not p.requires_grad and p.grad is None for p in tower.vision.parameters())


class Blind(torch.nn.Module):
    """An encoder that never looks."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.config = encoder, encoder.config

    def forward(self, pixels, **options):
        return self.encoder(torch.zeros_like(pixels), **options)


def test_the_contract_finds_a_tower_that_never_looks(samples):
    tower = tiny_tower()
    tower.base.vision_tower = Blind(tower.base.vision_tower)
    with pytest.raises(TowerError, match="pixels do not reach the language model"):
        check_tower(tower, samples)


def test_the_contract_finds_too_many_placeholders(samples):
    tower = tiny_tower()
    tower.processor.num_additional_image_tokens += 1
    with pytest.raises(TowerError, match="20 visual tokens, the processor wrote 25"):
        check_tower(tower, samples)


def test_the_contract_finds_a_template_without_roles_end(samples):
    tower = tiny_tower()
    tower.processor.chat_template = tower.processor.chat_template.replace("<|end|>", "[end]")
    with pytest.raises(TowerError, match=r"ends an answer with '\[end\]', which is no end token"):
        check_tower(tower, samples)


# ---- prepare ---------------------------------------------------------------------------------------------------------


def test_several_turns_are_all_targets(tmp_path):
    first, second = tiny_picture(tmp_path, "a.png", 1), tiny_picture(tmp_path, "b.png", 2, (33, 17))
    turns = (
        Turn("system", "Be brief."), Turn("user", "what", 1), Turn("assistant", "red"),
        Turn("user", "and", 1), Turn("assistant", "round"),
    )  # fmt: skip
    tower = tiny_tower()
    inputs = tower.prepare([Sample("talk", (first, second), turns)])
    targets = inputs.targets[0]
    assert tower.tokenizer.decode(targets[targets != IGNORE]) == " red<|end|> round<|end|>"
    assert torch.equal(inputs.input_ids[0, 1:][targets[:-1] != IGNORE], targets[targets != IGNORE])
    assert inputs.images == [2] and int(inputs.visual.sum()) == 8


def test_two_pictures_in_one_turn_keep_their_order(tmp_path):
    refs = tuple(tiny_picture(tmp_path, f"{i}.png", i, size) for i, size in enumerate([(20, 16), (40, 9)]))
    tower = tiny_tower()
    tower.model.eval()

    def tokens(order: tuple) -> list:
        sample = Sample("two", order, (Turn("user", "compare", len(order)), Turn("assistant", "A")))
        return tower.see(tower.prepare([sample])).tokens

    together, apart = tokens(refs), [tokens(refs[:1])[0], tokens(refs[1:])[0]]
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.allclose(apart[0], apart[1])


def test_an_empty_answer_is_refused(tmp_path):
    with pytest.raises(DataError, match="'empty' has an empty answer"):
        tiny_tower().prepare([Sample("empty", (), (Turn("user", "what"), Turn("assistant", "  ")))])


def test_a_long_answer_is_cut_and_a_long_prompt_refused(tmp_path):
    tower = tiny_tower(max_length=16)
    short = tower.encode(Sample("cut", (), (Turn("user", "A"), Turn("assistant", "xyz" * 10))))
    assert len(short.input_ids) == 16 and short.truncated > 0
    with pytest.raises(DataError, match="more than max_length 16"):
        tower.encode(Sample("long", (), (Turn("user", "xyz" * 20), Turn("assistant", "A"))))


def test_a_picture_that_does_not_decode_is_named(tmp_path):
    ref = tiny_picture(tmp_path, "broken.png", 0)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"broken\.png does not decode"):
        tiny_tower().prepare([Sample("s", (ref,), (Turn("user", "what", 1), Turn("assistant", "A")))])


def test_a_template_that_rewrites_earlier_turns_is_trained_as_it_is_met():
    template = (
        "{{ messages | length }}{% for m in messages %}<|{{ m.role }}|>{% for c in m.content %}{{ c.text }}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tower = tiny_tower(chat_template=template)
    turns = (Turn("user", "A"), Turn("assistant", "B"), Turn("user", "C"), Turn("assistant", "red"))
    whole = Sample("s", (), turns)
    assert tower.preparer.answers_apart(whole)
    for number, answer in enumerate(("B", "red")):
        sample = whole.up_to_answer(number)
        encoded, asked = tower.encode(sample), tower.encode(sample, with_answer=False).input_ids
        assert encoded.input_ids[: len(asked)].tolist() == asked.tolist()
        assert tower.tokenizer.decode(encoded.targets[encoded.targets != IGNORE]) == f"{answer}<|end|>"
        assert (encoded.targets[: len(asked) - 1] == IGNORE).all()


def test_a_processor_without_a_template_is_refused():
    tower = tiny_tower()
    tower.processor.chat_template = None
    with pytest.raises(TowerError, match="has no chat template"):
        Tower(tower.model, tower.processor)


# ---- see, project, read ----------------------------------------------------------------------------------------------


def test_features_of_another_width_are_refused():
    with pytest.raises(TowerError, match="width 24 do not fit the projector of this tower, which reads 16"):
        tiny_tower().project([torch.zeros(4, 24)])


def test_features_of_unequal_count_are_projected_one_by_one():
    tower = tiny_tower()
    features = [torch.randn(n, 16) for n in (4, 6)]
    for one, other in zip(tower.project(features), features, strict=True):
        torch.testing.assert_close(one, tower.projector(other[None])[0])


def test_reading_with_another_number_of_visual_tokens(samples):
    """The visual switch: four positions become nine, targets stay with their tokens."""
    tower = tiny_tower()
    encoded = tower.encode(samples[0])
    more = tower.with_visual_count(encoded, 9)
    assert tower.visual_count(more) == 9
    assert more.targets[more.targets != IGNORE].tolist() == encoded.targets[encoded.targets != IGNORE].tolist()
    inputs = tower.collate([more])
    assert tower.read(inputs, [torch.randn(9, 16)]).shape == (1, len(more.input_ids), 16)
    two = tower.encode(next(s for s in samples if len(s.images) == 2))
    with pytest.raises(TowerError, match="9 visual tokens cannot be spread evenly over 2 images"):
        tower.with_visual_count(two, 9)


def test_a_family_with_grids_does_not_take_another_count(samples):
    tower = tiny_family("qwen2_5_vl")
    with pytest.raises(TowerError, match="by the grid of its own patches"):
        tower.with_visual_count(tower.encode(samples[0]), 9)


def test_micro_batches_see_the_same(samples):
    tower = tiny_tower()
    tower.model.eval()
    whole = tower.prepare(samples)
    rows = tower.read(whole, tower.see(whole))[whole.response]
    parts = [tower.prepare([s]) for s in samples]
    alone = torch.cat([tower.read(p, tower.see(p))[p.response] for p in parts])
    torch.testing.assert_close(rows, alone, rtol=1e-4, atol=1e-4)


# ---- answering -------------------------------------------------------------------------------------------------------


def test_the_vision_cache_saves_the_encoder_and_changes_no_answer(samples):
    tower, cache = tiny_tower(), {}
    plain = tower.answer(samples, max_new_tokens=6)
    assert tower.answer(samples, max_new_tokens=6, vision_cache=cache) == plain
    assert len(cache) == len({tuple(r.key for r in s.images) for s in samples if s.images})
    tower.see = None  # a second look would fail
    assert tower.answer(samples, max_new_tokens=6, vision_cache=cache) == plain


def test_answering_needs_no_answer_and_keeps_the_mode(samples):
    tower = tiny_tower()
    tower.model.train()
    asked = [replace(s, turns=s.prompt_turns) for s in samples]
    assert tower.answer(asked, max_new_tokens=4) == tower.answer(samples, max_new_tokens=4)
    assert tower.model.training


# ---- saving ----------------------------------------------------------------------------------------------------------

PLAIN = """
import json, sys
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

torch.set_num_threads(1)
out = {}
for folder, questions in json.load(open(sys.argv[1], encoding="utf-8")).items():
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    out[folder] = []
    for messages in questions:
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
        out[folder].append(processor.decode(ids, skip_special_tokens=True).strip())
if any(name.split(".")[0] in ("mmkd", "peft") for name in sys.modules):
    sys.exit("mmkd was imported")
print(json.dumps(out))
"""


def _messages(sample: Sample) -> list[dict]:
    images = iter(sample.images)
    pictures = {t: [{"type": "image", "path": next(images).key} for _ in range(t.images)] for t in sample.prompt_turns}
    return [{"role": t.role, "content": [*pictures[t], {"type": "text", "text": t.text}]} for t in sample.prompt_turns]


def test_students_answer_the_same_in_plain_transformers(tmp_path, samples):
    """Saved, loaded by a process that never imports mmkd, asked by its own chat template: the same words."""
    lora = tiny_tower(seed=3)
    add_lora(lora, LoraSpec(rank=2, targets="all-linear"))
    for name, parameter in lora.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    towers = {
        "llava": tiny_tower(seed=1),
        "bos": tiny_tower(seed=2, vision="siglip", language="qwen2", tokenizer=with_bos()),
        "lora": lora,
    }
    asked, wanted = {}, {}
    for name, tower in towers.items():
        folder = str(tmp_path / name)
        wanted[folder] = tower.answer(samples, max_new_tokens=8)
        tower.save(folder)
        asked[folder] = [_messages(s) for s in samples]
    assert towers["lora"].answer(samples, max_new_tokens=8) == wanted[str(tmp_path / "lora")]  # saving merged a copy
    (tmp_path / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-c", PLAIN, str(tmp_path / "asked.json")],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.strip().splitlines()[-1]) == wanted


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_quantised_teacher_keeps_encoder_and_head_and_nearly_its_logits(samples, bits):
    """The sample's teacher: its answers survive, its language model is packed, the rest is untouched."""
    folder = Path(__file__).parents[2] / "models" / "sample-teacher"
    whole, packed = (Tower.load(folder, dtype=torch.float32, quantise=q) for q in (None, bits))
    assert packed.parameter_count() == whole.parameter_count()
    assert all(p.dtype in (torch.int8, torch.uint8) for n, p in packed.language.named_parameters() if "proj" in n)
    for part in ("vision", "projector"):
        for own, other in zip(getattr(packed, part).parameters(), getattr(whole, part).parameters(), strict=True):
            assert torch.equal(own, other)
    assert torch.equal(packed.head.weight, whole.head.weight)
    inputs = whole.prepare([s for s in samples if len(s.images) == 1])
    with torch.no_grad():
        own, other = (t.head(t.read(inputs, t.see(inputs))[inputs.response]).float() for t in (packed, whole))
    error = (own - other).norm() / other.norm()
    assert 0 < error < (0.05 if bits == "8bit" else 0.3)


def test_lora_is_merged_into_what_is_saved(tmp_path, samples):
    tower = tiny_tower()
    plain = tower.answer(samples, max_new_tokens=8)
    add_lora(tower, LoraSpec(rank=2, dora=True))
    for name, parameter in tower.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    tuned = tower.answer(samples, max_new_tokens=8)
    assert tuned != plain
    tower.save(tmp_path)
    loaded = Tower.load(tmp_path)
    assert not any("lora" in name for name in loaded.model.state_dict())
    assert loaded.answer(samples, max_new_tokens=8) == tuned


def test_rotary_frequencies_are_not_rounded():
    """A bfloat16 student places its tokens as the one that is loaded from its file does."""
    model = tiny_tower(dtype=torch.bfloat16).model
    assert {b.dtype for name, b in model.named_buffers() if "inv_freq" in name} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(TowerError, match=r"no image-text model can be loaded from .*nothing"):
        Tower.load(tmp_path / "nothing")
