"""A vision encoder that is drawn anew."""

import pytest
import torch
from tiny import tiny_tower

from mmkd.errors import RecipeError, TowerError
from mmkd.recipes.reading import validate
from mmkd.recipes.recipe import Recipe
from mmkd.runs.towers import build_student
from mmkd.towers.fresh import draw_vision_anew


@pytest.mark.parametrize("vision", ["vit", "siglip"])
def test_only_the_encoder_is_drawn_anew_and_by_the_seed(tmp_path, vision):
    tower = tiny_tower(1, vision=vision)
    tower.save(tmp_path / "student")

    def weights(**keys):
        stage = {"data": [{"card": "a"}], "steps": 1, "terms": {"cross_entropy": 1.0}}
        raw = {"title": "t", "output": "o", "student": {"model": str(tmp_path / "student"), **keys.pop("student", {})}}
        recipe = validate(raw | keys | {"stages": {"one": stage}}, "t", Recipe)
        return build_student(recipe, None, []).model.state_dict()

    saved, one, again, two = weights(), *(weights(student={"fresh": ["vision"]}, seed=seed) for seed in (7, 7, 8))
    assert all(torch.equal(one[name], again[name]) for name in one)
    inside = [name for name in saved if "vision" in name and saved[name].dim() > 1]
    assert inside and not any(torch.equal(saved[name], one[name]) or torch.equal(one[name], two[name]) for name in inside)
    outside = [name for name in saved if "vision" not in name]
    assert outside and all(torch.equal(saved[name], one[name]) for name in outside)


def test_what_cannot_be_drawn_anew_is_refused(monkeypatch):
    tower = tiny_tower()
    monkeypatch.setattr(type(tower), "vision", property(lambda self: torch.nn.Linear(2, 2)))
    with pytest.raises(TowerError, match="Linear is no model"):
        draw_vision_anew(tower, 0)
    stages = {"one": {"data": [{"card": "a"}], "steps": 1, "terms": {"cross_entropy": 1.0}}}
    student = {"assemble": {"vision": {"source": "a"}, "language": {"source": "b"}}, "fresh": ["vision"]}
    with pytest.raises(RecipeError, match="`fresh` is of a student from `model`"):
        validate({"title": "t", "output": "o", "student": student, "stages": stages}, "t", Recipe)
