"""Evaluation mode ends with every module's own mode, also where parts of a model in training are not."""

from __future__ import annotations

import pytest
import torch
from tiny import language_config, tiny_tower
from torch import nn

from mmkd.testing import check_encoder
from mmkd.towers.modes import evaluating, varies_in_training


def test_every_module_gets_its_own_mode_back():
    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(1)))
    model.train()
    model[1][1].eval()  # frozen statistics in a model that trains
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == before


def test_measuring_a_rule_of_logits_leaves_modes_alone():
    tower = tiny_tower()
    tower.model.config.get_text_config().final_logit_softcapping = 30.0  # which the class around it does not apply
    tower.model.train()
    tower.vision.eval()
    before = {name: module.training for name, module in tower.model.named_modules()}
    assert tower.logit_rule == (1.0, None)
    assert {name: module.training for name, module in tower.model.named_modules()} == before


def test_checking_an_encoder_leaves_its_modes_and_gradients_alone():
    encoder = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Dropout())
    encoder[1].eval()
    encoder[0].weight.grad = torch.ones_like(encoder[0].weight)
    check_encoder(encoder, 8)
    assert [module.training for module in encoder.modules()] == [True, True, False]
    assert bool((encoder[0].weight.grad == 1).all())


def test_what_varies_in_training_is_known():
    assert not varies_in_training(tiny_tower(1).model)
    for varied in (nn.Dropout(0.1), nn.BatchNorm2d(2), nn.Sequential(nn.Linear(1, 1), nn.Dropout2d(0.5))):
        assert varies_in_training(varied)
    assert not varies_in_training(nn.Sequential(nn.Dropout(0.0), nn.LayerNorm(2)))
    dropping = tiny_tower(1, language=language_config(attention_dropout=0.2))
    assert varies_in_training(dropping.model)
    swin = {"model_type": "swin", "image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2],
            "window_size": 4, "drop_path_rate": 0.5}  # fmt: skip
    assert varies_in_training(tiny_tower(1, vision=swin, image_size=(32, 32)).model)
