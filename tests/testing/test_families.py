"""Families of transformers: some keep the contract here and now, all appear in the results with a reason."""

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_samples

from mmkd.cli import main
from mmkd.errors import TowerError
from mmkd.testing import check_rows, check_tower
from mmkd.testing.family_check import check_families, families_table, markdown_table
from mmkd.testing.model_cards import KINDS, families, model_cards, readme
from mmkd.testing.tiny_data import TINY, Tiny
from mmkd.testing.tiny_families import image_text_families, shrunken, tiny_config, tiny_family, why_no_tower, with_ids
from mmkd.towers.families import FAMILIES, REFUSED
from mmkd.train.guards import answer_loss, answer_rows

ROOT = Path(__file__).resolve().parents[2]
# One of each kind: grids and deepstack, pictures in crops, packed patches, token types, several modules as projector.
QUICK = ("qwen3_vl", "llava_onevision", "mistral3", "ernie4_5_vl_moe", "muse_glimmer")


# A projector within the forward pass; of teachers of rows: a Q-Former, latent queries, an encoder-decoder.
MORE_TOWERS = ("llama4", "smolvlm")
ROWS_ONLY = ("instructblip", "kosmos-2", "t5gemma2")


@pytest.mark.parametrize("family", MORE_TOWERS)
def test_more_families_keep_the_contract(family):
    assert check_tower(tiny_family(family))["visual switch"] == "yes"


@pytest.mark.parametrize("family", (*ROWS_ONLY, QUICK[0]))
def test_teachers_of_rows_keep_theirs(family):
    facts = check_rows(tiny_family(family))
    assert facts["loss"] != facts["loss with permuted pictures"]
    assert facts["largest difference from the model's logits"] < 1e-4


@pytest.mark.parametrize("family", QUICK)
def test_quick_families_keep_the_contract(family):
    facts = check_tower(tiny_family(family))
    assert facts["largest difference of injected tokens"] == 0
    assert facts["loss"] != facts["loss with permuted pictures"]


def test_tiny_families_are_tiny_and_reproducible():
    first, again, other = (tiny_family("llava", seed).model.state_dict() for seed in (0, 0, 1))
    assert sum(t.numel() for t in first.values()) < 100_000
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_shrinking_follows_the_names_of_keys():
    config = {"hidden_size": 4096, "layer_types": ["full"] * 32, "vision_config": {"hidden_size": 1152}, "image_token_id": 9}
    small = shrunken(config, text=True)
    assert small["hidden_size"] > small["vision_config"]["hidden_size"] and "layer_types" not in small
    assert with_ids(small, {"image_token": 3}, 300)["image_token_id"] == 3


def test_every_family_is_in_the_results_with_a_reason():
    results = families()
    assert sorted(results) == image_text_families()
    assert all(result["reason"] for result in results.values() if not result["ok"])
    assert sum(result["ok"] for result in results.values()) >= 71
    assert sum(result["rows"] for result in results.values()) >= 85
    assert all(result["rows"] for result in results.values() if result["ok"])
    assert {name for name, result in results.items() if not result["rows"]} == set(REFUSED)
    for family, result in results.items():
        reason = why_no_tower(family)
        assert reason is None or (not result["ok"] and result["reason"] == reason), family


def test_the_data_speak_of_families_that_exist():
    known = set(image_text_families())
    assert set(TINY) | set(REFUSED) | set(FAMILIES) <= known
    assert not (set(TINY) | set(FAMILIES)) & set(REFUSED)
    assert {name for name, family in FAMILIES.items() if family.tokenless} == {
        name for name, result in families().items() if result["rows"] and not result["ok"]
    }
    passing = {family for family, result in families().items() if result["ok"]}
    with_projector = {name for name, family in FAMILIES.items() if family.projector}
    assert passing <= with_projector, "a family that passes says where its projector is"


def test_processes_give_what_they_found_and_are_ended_in_time(tmp_path, capsys):
    target = tmp_path / "families.json"
    assert main(["check", "--families", "llava", "git", "pi0", "--json", str(target), "--workers", "1"]) == 0
    results = json.loads(target.read_text())
    assert results["llava"] == {"ok": True, "rows": True, "reason": "", "project": True}
    assert results["git"] == {"ok": False, "rows": True, "reason": FAMILIES["git"].tokenless, "project": False}
    assert results["pi0"]["reason"] == why_no_tower("pi0") and not results["pi0"]["rows"]
    assert "1 of 3 families pass as towers, 2 as teachers of rows" in capsys.readouterr().out
    late = check_families(["llava"], seconds=0.01, progress=False)
    assert late["llava"]["reason"] == "not done within 0 s"


def test_a_family_that_does_not_exist_is_refused_with_a_suggestion(capsys):
    with pytest.raises(TowerError, match="did you mean 'llava_next'"):
        check_families(["llava_nxt"])
    assert main(["check"]) == 2 and "--families" in capsys.readouterr().err


def test_the_tables_tell_all():
    results = {
        "a": {"ok": True, "rows": True, "reason": "x|y", "project": False},
        "b": {"ok": False, "rows": True, "reason": "why", "project": False},
    }
    assert markdown_table(results).splitlines()[2:] == ["| `a` | passes | passes | no: x\\|y |", "| `b` | no: why | passes |  |"]
    assert "b  teacher of rows: why" in families_table(results)
    assert families_table(results).endswith("1 of 2 families pass as towers, 2 as teachers of rows")


def test_the_readme_of_models_is_current():
    assert (ROOT / "models" / "README.md").read_text(encoding="utf-8") == readme(), "run `python -m mmkd.testing.model_cards`"


def test_cards_of_models_load_and_are_found():
    cards = {kind: model_cards(kind) for kind in KINDS}
    assert sum(map(len, cards.values())) >= 45
    assert set(model_cards("towers", "LLAVA")) >= {"llava-1.5-7b", "llava-onevision-7b"}
    towers = {card.family for card in cards["towers"].values()}
    assert {"llava", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3", "paligemma", "smolvlm"} <= towers
    for pair in cards["pairs"].values():
        assert pair.source in cards["towers"] and pair.student, pair.name


def test_deepstack_features_travel_with_the_visual_tokens(tmp_path):
    tower = tiny_family("qwen3_vl")
    inputs = tower.prepare(tiny_samples(tmp_path, 2))
    seen = tower.see(inputs)
    width = tower.model.get_input_embeddings().weight.shape[1]
    assert {token.shape[1] for token in seen.tokens} == {3 * width}
    with torch.no_grad():
        whole = tower.read(inputs, list(seen.tokens))
        without = tower.read(inputs, [token[:, :width] for token in seen.tokens])
    assert not torch.allclose(whole, without)


def test_a_soft_cap_is_found_where_logits_are_small():
    tower = tiny_family("inkling2")
    assert tower.logit_rule == (1.0, 30.0)
    assert tiny_config("llava", Tiny(), tower.tokenizer).text_config.vocab_size == len(tower.tokenizer)


# Cohere 2 Vision names a scale in its configuration that its class does not apply; Inkling divides before its head.
RULES = [
    ("inkling_mm_model", True, False), ("muse_glimmer", True, True), ("cohere2_vision", False, False), ("llava", False, False),
]  # fmt: skip


@pytest.mark.parametrize(("family", "scaled", "capped"), RULES)
def test_the_row_engine_has_the_logits_of_the_model(family, scaled, capped, tmp_path):
    tower = tiny_family(family)
    if family == "llava":  # no family has a bias of its own; the engine takes one all the same
        tower.model.lm_head.bias = torch.nn.Parameter(torch.randn(tower.head.weight.shape[0]))
    inputs = tower.prepare(tiny_samples(tmp_path, 3))
    scale, cap = tower.logit_rule
    assert (scale != 1.0, cap is not None) == (scaled, capped)
    with torch.no_grad():
        own = tower.model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, **inputs.pixels).logits
    expected = torch.nn.functional.cross_entropy(own[inputs.response].double(), inputs.targets[inputs.response])
    assert answer_loss(tower, inputs, answer_rows(tower, inputs)) == pytest.approx(float(expected), rel=1e-4)
