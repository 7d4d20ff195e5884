"""Teachers of many families with students of many encoders: the loss falls, pictures matter, and missing ones are found."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from tiny import VISIONS, language_config, make_term, tiny_samples, tiny_tokenizer, tiny_tower

from mmkd.errors import GuardError
from mmkd.registry import registry
from mmkd.terms.term import Schedule
from mmkd.testing.tiny_families import TEMPLATE, TEXTS, VOCABULARY, tiny_family
from mmkd.towers.assemble import train_tokenizer
from mmkd.towers.tower import Seen
from mmkd.train.collate import Collator, PairDataset
from mmkd.train.distiller import Distiller
from mmkd.train.guards import run_guards

STEPS = 20
OPEN_CLIP = {"model_type": "mmkd_encoder", "source": "open_clip", "architecture": "tiny-pair"}
TIMM = {
    "model_type": "mmkd_encoder", "source": "timm", "architecture": "convnext_atto",
    "arguments": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]},
}  # fmt: skip
OWN = {"model_type": "mmkd_encoder", "source": "module", "architecture": "small_conv", "module": "my_encoders"}
# name -> (teacher's family, student's encoder, its picture size, what else is unlike)
PAIRS = {
    "qwen2.5-vl, padded vocabulary": ("qwen2_5_vl", "siglip", 16, "padded"),
    "qwen3-vl, clip": ("qwen3_vl", "clip", 16, ""),
    "internvl, open_clip": ("internvl", OPEN_CLIP, 32, ""),
    "gemma 3, timm convolutional": ("gemma3", TIMM, 64, ""),
    "llava-onevision, encoder of the guide": ("llava_onevision", OWN, 64, ""),
    "mistral 3, other tokenizer": ("mistral3", "dinov2", 16, "tokenizer"),
    "idefics 3, itself": ("idefics3", None, 0, ""),
}


@pytest.fixture(scope="module", autouse=True)
def encoders_of_others(tmp_path_factory):
    """A small open_clip model, and the encoder that docs/encoders.md tells to write."""
    import open_clip

    folder = tmp_path_factory.mktemp("encoders")
    vision = {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    (folder / "tiny-pair.json").write_text(json.dumps({"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}), encoding="utf-8")
    open_clip.add_model_config(folder)
    page = (Path(__file__).parents[2] / "docs" / "encoders.md").read_text(encoding="utf-8")
    lines = re.search(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)[1]
    assert len([line for line in lines.splitlines() if line.strip()]) <= 25
    (folder / "my_encoders.py").write_text(lines, encoding="utf-8")
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    yield
    sys.path.remove(str(folder))
    sys.modules.pop("my_encoders", None)
    registry("encoders").remove("small_conv")


def pair(name):
    family, vision, size, unlike = PAIRS[name]
    teacher = tiny_family(family, 1)
    if vision is None:
        return tiny_family(family, 2), teacher
    tokenizer = tiny_tokenizer() if unlike == "tokenizer" else train_tokenizer(TEXTS, VOCABULARY)
    language = language_config(vocab_size=len(tokenizer) + (21 if unlike == "padded" else 1))
    config = VISIONS[vision] if isinstance(vision, str) else vision
    template = TEMPLATE.replace("IMAGE", "<image>")
    student = tiny_tower(
        3, vision=config, image_size=(size, size), language=language, tokenizer=tokenizer, chat_template=template
    )
    return student, teacher


def terms_of(name):
    kind = "spans" if PAIRS[name][3] == "tokenizer" else "forward_kl"
    return [make_term("distil", kind, Schedule(1.0, 1.0)), make_term("sft", "cross_entropy", Schedule(0.2, 0.2))]


@pytest.mark.parametrize("name", PAIRS)
def test_the_loss_falls_and_pictures_matter(name, tmp_path, monkeypatch):
    student, teacher = pair(name)
    terms = terms_of(name)
    dataset = PairDataset(tiny_samples(tmp_path, 4), student, teacher, terms)
    distiller = Distiller(student, teacher, terms)
    facts = run_guards(distiller, dataset, 4, pixels_matter=True, teacher_is_better=False)
    for role in ("student", "teacher"):
        assert facts[f"{role}_loss"] != facts[f"{role}_loss_permuted"]

    batch = Collator(student, teacher)([dataset[i] for i in range(4)])["batch"]
    optimiser = torch.optim.AdamW(student.model.parameters(), lr=1e-2)
    values = []
    for _ in range(STEPS):
        loss, log = distiller(batch)
        values.append(float(log["distil"][0] / log["distil"][1]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert values[-1] < 0.9 * values[0], values

    for tower in (student, teacher):
        with monkeypatch.context() as patch:
            see = tower.see
            patch.setattr(tower, "see", lambda inputs, see=see: dropped(see(inputs)))
            with pytest.raises(GuardError, match="permuting the pictures changes nothing"):
                run_guards(distiller, dataset, 4, pixels_matter=True, teacher_is_better=False)


def dropped(seen: Seen) -> Seen:
    """The same grey for every picture."""
    return Seen(seen.features, [torch.zeros_like(token) for token in seen.tokens], None)
