"""A preparer with another image processor, and what a tower reads that has not looked at anything."""

from __future__ import annotations

import torch
from tiny import tiny_samples, tiny_tower

from mmkd.testing.tiny_families import tiny_family


def test_another_image_processor_leaves_the_tower_as_it_is(tmp_path):
    (sample,) = tiny_samples(tmp_path, 1)
    tower = tiny_tower()
    real, asked = tower.processor.image_processor, []

    class Counting:
        def __call__(self, *arguments, **options):
            asked.append(tower.processor.image_processor is real)
            return real(*arguments, **options)

        def __getattr__(self, name):
            return getattr(real, name)

    other = tower.preparer.with_image_processor(Counting())
    own = tower.encode(sample)
    assert asked == []
    encoded = other.encode(sample)
    assert asked == [True] and tower.preparer.processor is tower.processor
    assert torch.equal(encoded.input_ids, own.input_ids)
    assert torch.equal(encoded.pixels["pixel_values"], own.pixels["pixel_values"])


def test_answering_never_changes_the_processor(tmp_path, monkeypatch):
    """Two questions on one picture: the second gets the record of the first."""
    samples = tiny_samples(tmp_path, 2)
    tower = tiny_tower()
    real, render, kept = tower.processor.image_processor, type(tower.processor).apply_chat_template, []

    def watched(processor, *arguments, **options):
        kept.append(tower.processor.image_processor is real)
        return render(processor, *arguments, **options)

    monkeypatch.setattr(type(tower.processor), "apply_chat_template", watched)
    cache: dict = {}
    for _ in range(2):
        tower.answer(samples, max_new_tokens=2, vision_cache=cache)
    assert len(kept) >= 2 * len(samples) and all(kept)


def test_tokens_between_pictures_need_no_earlier_look(tmp_path):
    """Ovis2: visual tokens of another tower are read by one that has seen nothing."""
    samples = tiny_samples(tmp_path, 1, two_images=1)
    looked, fresh = (tiny_family("ovis2") for _ in range(2))
    marks = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    for tower in (looked, fresh):  # the tiny configuration has the ids of the large one
        tower.base.visual_indicator_token_ids = tower.tokenizer.convert_tokens_to_ids(marks)
    inputs = looked.prepare(samples)
    with torch.no_grad():
        seen = looked.see(inputs)
        own = looked.read(inputs, seen)
        assert torch.equal(fresh.read(inputs, list(seen.tokens)), own)
        fresh.projector.weight.mul_(2)  # they are computed, not remembered
        assert not torch.equal(fresh.read(inputs, list(seen.tokens)), own)
