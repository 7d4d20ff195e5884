"""Sparse students in a run: the balance term against a plain float64 computation, the use of experts, whole runs."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import language_config, make_term, tiny_samples, tiny_tokenizer, tiny_tower
from torch.nn import functional as F

from mmkd.engine.positions import COUNTS
from mmkd.errors import RecipeError, TowerError
from mmkd.recipes.reading import load_recipe
from mmkd.recipes.recipe import Recipe
from mmkd.runs.plan import plan
from mmkd.runs.preflight import fit_errors
from mmkd.runs.run import distill, table
from mmkd.sample.sample_set import write_sample_set
from mmkd.terms.term import Schedule
from mmkd.towers.tower import Tower
from mmkd.towers.upcycle import upcycle
from mmkd.train.collate import Collator, PairDataset
from mmkd.train.distiller import Distiller
from mmkd.train.experts import ExpertUse, experts_table
from mmkd.train.spec import StageSpec
from mmkd.train.trainable import set_trainable
from mmkd.train.trainer import DistillTrainer

TOKENIZER = tiny_tokenizer()
EXPERTS, TOP_K = 4, 2


def dense_tower(kind="qwen3"):
    return tiny_tower(1, language=language_config(kind, layers=3), tokenizer=TOKENIZER)


@pytest.fixture
def student():
    return upcycle(dense_tower(), experts=EXPERTS, top_k=TOP_K, seed=2)[0]


def term(kind, weight=1.0):
    return make_term(kind, kind, Schedule(weight, weight))


def batch_of(student, samples, terms):
    dataset = PairDataset(samples, student, None, terms)
    return Collator(student, None)([dataset[i] for i in range(len(samples))])["batch"]


def loss_of(student, batch, *terms, counts=None):
    distiller = Distiller(student, None, terms)
    loss, log = distiller(batch, counts)
    return loss, log, distiller


def router_logits(student, inputs):
    """What transformers itself records when the language model alone is asked, in float64. One [B, L, E] a sparse layer"""
    words = student.model.get_input_embeddings()(inputs.input_ids)  # [B, L, D]
    words = words.masked_scatter(inputs.visual[..., None], torch.cat(student.see(inputs).tokens))
    output = student.language(inputs_embeds=words, attention_mask=inputs.attention_mask, output_router_logits=True)
    return [logits.double().view(*inputs.input_ids.shape, -1) for logits in output.router_logits]


def plain_balance(layers, mask):
    """Sum over layers of E * sum of (mean gate * share of first choices), one token after the other."""
    total = torch.zeros((), dtype=torch.float64)
    for logits in layers:
        gates = [row.softmax(-1) for row, real in zip(logits.flatten(0, 1), mask.flatten(), strict=True) if real]
        mean = sum(gates) / len(gates)
        share = sum(F.one_hot(g.argmax(), len(g)).double() for g in gates) / len(gates)
        total = total + len(mean) * (mean * share).sum()
    return total


# ---- the term --------------------------------------------------------------------------------------------------------


def test_balance_equals_a_plain_computation(student, tmp_path):
    batch = batch_of(student, tiny_samples(tmp_path, 4, two_images=1), [term("load_balance")])
    assert not batch.student.attention_mask.all(), "some sample is padded"
    expected = plain_balance(router_logits(student, batch.student), batch.student.attention_mask.bool())
    parameters = [p for name, p in student.model.named_parameters() if "mlp.gate.weight" in name]
    wanted = torch.autograd.grad(expected, parameters)
    loss, log, _ = loss_of(student, batch, term("load_balance"))
    assert len(parameters) == 2 and float(loss.detach()) == pytest.approx(float(expected.detach()), rel=2e-6)
    total, count = log["load_balance"]
    assert float(total / count) == pytest.approx(float(expected.detach()), rel=2e-6)
    for own, other in zip(torch.autograd.grad(loss, parameters), wanted, strict=True):
        assert other.norm() > 0
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-7)


def test_padding_changes_nothing(student, tmp_path):
    batch = batch_of(student, tiny_samples(tmp_path, 3), [term("load_balance")])
    fills = {"input_ids": student.pad_id, "attention_mask": 0, "targets": -100, "visual": False}
    longer = {name: F.pad(getattr(batch.student, name), (0, 9), value=fill) for name, fill in fills.items()}
    padded = replace(batch, student=replace(batch.student, **longer))
    one, _, first = loss_of(student, batch, term("load_balance"))
    two, _, second = loss_of(student, padded, term("load_balance"))
    assert float(one) == pytest.approx(float(two), rel=2e-6)
    assert all(torch.equal(first.routed[layer], second.routed[layer]) for layer in first.routed)
    everything = plain_balance(router_logits(student, padded.student), torch.ones_like(padded.student.attention_mask))
    assert float(everything) != pytest.approx(float(one), rel=1e-3), "counting padding gives another value"


def test_balance_is_counted_once(student, tmp_path):
    """Not a second time by transformers, which adds a balance loss of its own where a configuration asks for it."""
    batch = batch_of(student, tiny_samples(tmp_path, 3), [])
    balance, _, _ = loss_of(student, batch, term("load_balance"))
    spoken, _, _ = loss_of(student, batch, term("cross_entropy"))
    student.model.config.text_config.output_router_logits = True
    both, _, _ = loss_of(student, batch, term("cross_entropy"), term("load_balance", 0.01))
    assert float(both) == pytest.approx(float(spoken + 0.01 * balance), rel=1e-6)
    assert float(both) != pytest.approx(float(spoken + 0.02 * balance), rel=1e-6)


def test_micro_batches_are_weighted_by_their_tokens(student, tmp_path):
    samples = tiny_samples(tmp_path, 5)
    parts = [batch_of(student, chosen, []) for chosen in (samples[:2], samples[2:])]
    counts = parts[0].counts + parts[1].counts
    split = sum(float(loss_of(student, part, term("load_balance"), counts=counts)[0]) for part in parts)
    tokens = [float(part.counts[COUNTS.index("token")]) for part in parts]
    alone = [float(loss_of(student, part, term("load_balance"))[0]) for part in parts]
    assert tokens == [float(part.student.attention_mask.sum()) for part in parts]
    assert split == pytest.approx(sum(n * value for n, value in zip(tokens, alone, strict=True)) / sum(tokens), rel=1e-6)


def test_gradient_checkpointing_changes_nothing(student, tmp_path):
    batch = batch_of(student, tiny_samples(tmp_path, 3), [])
    parameters = [p for name, p in student.model.named_parameters() if ".layers.0." in name and "language_model" in name]

    def gradients():
        loss, _, distiller = loss_of(student, batch, term("cross_entropy"), term("load_balance", 0.5))
        distiller.train()
        student.model.zero_grad()
        distiller(batch)[0].backward()
        return float(loss), [p.grad.clone() for p in parameters]

    plain = gradients()
    student.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed = gradients()
    assert checkpointed[0] == pytest.approx(plain[0], rel=1e-6)
    for own, other in zip(checkpointed[1], plain[1], strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-7)


def test_a_dense_student_has_nothing_to_balance():
    with pytest.raises(TowerError, match="load_balance: balances experts, but the student has none"):
        Distiller(dense_tower(), None, [term("load_balance")])


# ---- use of experts --------------------------------------------------------------------------------------------------


def test_places_are_the_top_experts_of_the_tokens_without_padding(student, tmp_path):
    batch = batch_of(student, tiny_samples(tmp_path, 4), [])
    _, _, distiller = loss_of(student, batch, term("cross_entropy"))
    mask = batch.student.attention_mask.bool()
    assert list(distiller.routed) == [0, 2]
    for logits, places in zip(router_logits(student, batch.student), distiller.routed.values(), strict=True):
        chosen = logits[mask].topk(TOP_K).indices.flatten()
        assert places.tolist() == [int((chosen == expert).sum()) for expert in range(EXPERTS)]
        assert int(places.sum()) == TOP_K * int(mask.sum())


def test_a_dense_student_routes_nothing(tmp_path):
    student = dense_tower()
    _, _, distiller = loss_of(student, batch_of(student, tiny_samples(tmp_path, 2), []), term("cross_entropy"))
    assert distiller.routed == {}


def test_use_adds_up_and_begins_anew():
    use = ExpertUse()
    assert use.take(lambda tensor: tensor) is None
    use.add({0: torch.tensor([1, 3]), 2: torch.tensor([4, 0])}, 2)
    use.add({0: torch.tensor([2, 2]), 2: torch.tensor([4, 0])}, 2)
    assert use.take(lambda tensor: 2 * tensor) == {"tokens": 8, "layers": {"0": [0.375, 0.625], "2": [1.0, 0.0]}}
    assert use.take(lambda tensor: tensor) is None


# ---- recipes ---------------------------------------------------------------------------------------------------------

STAGE = {"data": [{"card": "sample_textvqa"}], "steps": 1, "terms": {"cross_entropy": 1}}


def recipe_of(**stages_of):
    return Recipe.model_validate({"title": "t", "output": "o", "student": {"model": "m"}, "stages": stages_of})


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"upcycle": {"experts": 2, "top_k": 3}}, "top_k is 3, but there are only 2 experts"),
        ({"upcycle": {"layers": "odd"}}, "every-other"),
        ({"upcycle": {}, "lora": {}}, "LoRA's adapters do not reach experts"),
        ({"train": ["mlp"], "lora": {}}, "LoRA's adapters do not reach experts"),
        ({"terms": {"load_balance": {"weight": 0.01, "mask": 1}}}, "has no option 'mask'"),
    ],
)
def test_wrong_stages_are_refused(stage, message):
    with pytest.raises(ValueError, match=message):
        StageSpec.model_validate(STAGE | stage)


def test_what_cannot_be_upcycled_is_refused_before_the_first_stage():
    balanced = {"terms": {"cross_entropy": 1, "load_balance": 0.01}}
    late = recipe_of(dense=STAGE, sparse=STAGE | {"upcycle": {}} | balanced)
    assert fit_errors(late, dense_tower(), {}) == []
    (error,) = fit_errors(late, dense_tower("llama"), {})
    assert re.match(r"stages\.sparse\.upcycle: mixtral, .* set layers to all", error)
    (error,) = fit_errors(recipe_of(dense=STAGE | balanced, sparse=STAGE | {"upcycle": {}}), dense_tower(), {})
    assert error.startswith("stages.dense.terms.load_balance: balances experts")
    (error,) = fit_errors(recipe_of(once=STAGE | {"upcycle": {}}, twice=STAGE | {"upcycle": {}}), dense_tower(), {})
    assert error.startswith("stages.twice.upcycle: the student has experts already")


def test_mlp_trains_feed_forward_layers_experts_and_routers_alone(student):
    set_trainable(student, StageSpec.model_validate(STAGE | {"train": ["projector", "mlp"]}))
    trained = {name for name, p in student.model.named_parameters() if p.requires_grad}
    names = {name for name, _ in student.model.named_parameters()}
    assert trained == {n for n in names if "multi_modal_projector" in n or ("language_model" in n and ".mlp." in n)}
    assert any("mlp.gate.weight" in n for n in trained) and any("layers.1.mlp.up_proj" in n for n in trained)


# ---- whole runs ------------------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VISION = {"model_type": "vit", **SIZES, "image_size": 64, "patch_size": 16}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Dense, then sparse, with a random teacher on a few scenes of the embedded sample."""
    folder = tmp_path_factory.mktemp("sparse")
    write_sample_set(folder / "sample", sizes={"train": 12, "test": 4})
    tiny_tower(5, 32, vision=VISION, image_size=(64, 64)).save(folder / "teacher")
    student = {
        "vision": {"config": VISION, "feature_layer": -1},
        "language": {"config": {"model_type": "llama", **SIZES, "num_key_value_heads": 2}},
        "tokenizer": {"source": "teacher"},
    }
    common = {"data": [{"card": "sample_textvqa"}], "steps": 4, "save_every": 2, "log_every": 2, "optimiser": {"batch_size": 4}}
    kd = {"kd": {"kind": "forward_kl"}}
    sparse = {"upcycle": {"experts": 3, "layers": "all"}, "train": ["projector", "mlp"]}
    terms = {"cross_entropy": 1, "balance": {"kind": "load_balance", "weight": 0.01}}
    return Recipe.model_validate({
        "title": "test", "output": str(folder / "runs" / "out"), "data_root": str(folder / "sample"), "max_length": 512,
        "teacher": {"model": str(folder / "teacher")}, "student": {"assemble": student},
        "stages": {"d2d": common | {"terms": kd}, "d2s": common | sparse | {"terms": kd | terms}},
        "guards": {"teacher_is_better": False}, "evaluation": {"benchmarks": ["sample_textvqa"], "limit": 4},
        "controls": ["equal_steps"],
    })


@pytest.fixture(scope="module")
def undisturbed(recipe):
    return distill(recipe)


def folder_of(recipe):
    return Path(recipe.output)


def test_a_run_makes_student_and_control_sparse(recipe, undisturbed):
    run = folder_of(recipe)
    for role in ("student", "control"):
        assert json.loads((run / role / "config.json").read_text())["text_config"]["model_type"] == "mixtral"
    dense = json.loads((run / "stages" / "student" / "0_d2d" / "model" / "config.json").read_text())
    assert dense["text_config"]["model_type"] == "llama"
    parameters = undisturbed["benchmarks"]["sample_textvqa"]
    assert parameters["parameters_active"]["student"] < parameters["parameters"]["student"]
    assert parameters["parameters_active"]["teacher"] == parameters["parameters"]["teacher"]


def test_a_run_reports_the_use_of_experts(recipe, undisturbed):
    run = folder_of(recipe)
    rows = [json.loads(line) for line in (run / "log" / "student.jsonl").read_text().splitlines()]
    sparse = [row for row in rows if row["stage"] == "d2s"]
    assert [("experts" in row, "balance" in row) for row in rows] == [(False, False)] * 2 + [(True, True)] * 2
    found = json.loads((run / "experts.json").read_text())
    assert found.keys() == {"student", "control"} and found["student"].keys() == found["control"].keys() == {"d2s"}
    entry = found["student"]["d2s"]
    assert entry["last"] == sparse[-1]["experts"]["layers"] and entry["last"].keys() == {"0", "1"}
    assert entry["tokens"] == sum(row["experts"]["tokens"] for row in sparse)
    for layer, shares in entry["mean"].items():
        assert len(shares) == 3 and sum(shares) == pytest.approx(1, abs=1e-3)
        weights = [row["experts"]["tokens"] for row in sparse]
        first = [row["experts"]["layers"][layer][0] for row in sparse]
        assert shares[0] == pytest.approx(sum(w * s for w, s in zip(weights, first, strict=True)) / sum(weights), abs=1e-3)
    assert entry["receipt"]["relative_difference"] <= 1e-5 and entry["receipt"]["target"] == "mixtral"
    printed = table(undisturbed)
    assert experts_table(found) in printed and "experts at the end of stage d2s" in printed and " active" in printed


def test_attention_embeddings_and_head_stay_as_they_were(recipe, undisturbed):
    run = folder_of(recipe)
    before = Tower.load(run / "stages" / "student" / "0_d2d" / "model").model.state_dict()
    after = Tower.load(run / "student").model.state_dict()
    shared = before.keys() & after.keys()
    changed = {name for name in shared if not torch.equal(before[name], after[name])}
    assert changed and all("multi_modal_projector" in name for name in changed)
    experts = after["model.language_model.layers.0.mlp.experts.down_proj"]
    assert not torch.equal(experts[0], experts[1]), "the experts have parted"


def test_interrupted_while_sparse_it_ends_with_the_same_weights(recipe, undisturbed, tmp_path, monkeypatch):
    class Interrupted(Exception):
        pass

    save = DistillTrainer._save_checkpoint

    def interrupt(trainer, *arguments):
        save(trainer, *arguments)
        if trainer.args.run_name == "d2s":
            raise Interrupted

    again = recipe.model_copy(update={"output": str(tmp_path / "out"), "controls": {}})
    monkeypatch.setattr(DistillTrainer, "_save_checkpoint", interrupt)
    with pytest.raises(Interrupted):
        distill(again)
    monkeypatch.undo()
    assert (tmp_path / "out" / "stages" / "student" / "1_d2s" / "checkpoint-2").exists()
    assert not (tmp_path / "out" / "student").exists()
    summary = distill(again)
    assert summary["experts"]["student"] == undisturbed["experts"]["student"]
    one, two = (Tower.load(Path(output) / "student") for output in (recipe.output, again.output))
    assert one.fingerprint() == two.fingerprint()


def test_the_plan_shows_the_receipt(recipe):
    text = plan(recipe)
    assert "upcycled llama to mixtral: 3 experts, 2 a token, in layers 0, 1" in text
    assert text.index("stage d2d") < text.index("upcycled") < text.index("stage d2s")


def test_the_recipe_of_the_project(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    recipe = load_recipe("scripts/recipes/llava_mod.yaml")
    assert list(recipe.stages) == ["init", "d2d", "d2s"]
    assert fit_errors(recipe, Tower.load(recipe.student.model), {}) == []
    with pytest.raises(RecipeError, match="top_k is 9"):
        load_recipe("scripts/recipes/llava_mod.yaml", ["stages.d2s.upcycle.top_k=9"])
