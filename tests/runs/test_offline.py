"""The papers' recipes: their numbers against a table, and the plan without weights and data."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image
from tiny import tiny_picture

from mmkd.base.cards import list_cards, load_card
from mmkd.cli import main
from mmkd.data.samples import Sample, Turn
from mmkd.errors import DataError
from mmkd.recipes.reading import load_recipe
from mmkd.registry import registry
from mmkd.retrieval.recipe import load_ranking_recipe
from mmkd.runs.offline import FOLDER, Configuration, configuration, model_of, need_of, shape_of, student_of, upcycled_shape
from mmkd.terms.spec import TermSpec
from mmkd.testing.model_cards import ModelCard
from mmkd.towers.tower import Tower

WRITE = Path(__file__).resolve().parents[2] / "scripts" / "recipes" / "write"
METHODS = Path(__file__).resolve().parents[2] / "scripts" / "recipes" / "methods"

# By recipe and stage: trained parts, terms with their weights, rate, batch, epochs. From the papers and the released code.
LLAVA_KD = {"cross_entropy": 1.0, "forward_kl response": 1.0, "forward_kl visual": 1.0, "relation": 0.5}
SWITCH = {"cross_entropy": 1.0, "dbild response": 1.0, "dbild response switch": 1.0}
PAPERS = {
    "llava_kd": {
        "dpt": (["projector"], LLAVA_KD, 1e-3, 256, 1),
        "sft": (["projector", "language"], {"cross_entropy": 1.0}, 2e-5, 128, 1),
        "dft": (["projector", "language"], LLAVA_KD, 2e-5, 128, 1),
    },
    "switch_kd": {
        "pretrain": (["vision", "projector"], SWITCH, 1e-3, 256, 1),
        "finetune": (["vision", "projector", "language"], SWITCH, 2e-5, 128, 1),
    },
    "llava_mod": {
        "init": (["projector"], {"cross_entropy": 1.0}, 1e-3, 512, 1),
        "d2d": (["projector", "language"], {"forward_kl response": 1.0}, 2e-5, 256, 1),
        "d2s": (["projector", "mlp"], {"forward_kl response": 1.0, "cross_entropy": 1.0, "load_balance": 0.01}, 2e-5, 256, 1),
        "prefer": (["projector", "mlp"], {"kto_pair": 1.0, "load_balance": 0.01}, 2e-6, 256, 1),
    },
}
MODELS = {  # teacher's language model, student's language model, vision encoder; parameters of the language models in millions
    "llava_kd": (3086, 494, "siglip-so400m-384", 729),
    "switch_kd": (3086, 494, "siglip-so400m-384", 729),
    "llava_mod": (7616, 1544, "clip-vit-l-336", 576),
}


def terms_of(stage) -> dict[str, float]:
    found = {}
    for spec in stage.terms.values():
        where = f" {spec.positions}" if spec.kind in ("forward_kl", "dbild") else ""
        found[spec.kind + where + (" switch" if spec.path == "switch" else "")] = spec.weight
    return found


@pytest.mark.parametrize("name", PAPERS)
def test_the_numbers_are_the_papers(name):
    recipe = load_recipe(METHODS / f"{name}.yaml")
    found = {
        stage: (spec.train, terms_of(spec), spec.optimiser.learning_rate, spec.optimiser.batch_size, spec.epochs)
        for stage, spec in recipe.stages.items()
    }
    assert found == PAPERS[name]
    for stage in recipe.stages.values():
        optimiser = stage.optimiser
        assert (optimiser.kind, optimiser.weight_decay, optimiser.schedule, optimiser.warmup) == ("adamw", 0.0, "cosine", 0.03)
        assert stage.precision == "bfloat16"
    assert recipe.max_length == 2048 and recipe.student.assemble.vision.feature_layer == -2
    if name == "llava_mod":
        assert recipe.stages["d2s"].upcycle.model_dump() == {"experts": 4, "top_k": 2, "layers": "every-other"}
        assert {stage.optimiser.betas for stage in recipe.stages.values()} == {(0.9, 0.98)}
        assert recipe.stages["prefer"].terms["kto_pair"].model_extra == {"beta": 0.1}
    if name == "switch_kd":
        options = {"temperature": 3.0, "window": 64, "min_k": 4}
        kinds = [t for s in recipe.stages.values() for t in s.terms.values() if t.kind == "dbild"]
        assert all(t.model_extra == options for t in kinds)
        assert {s.optimiser.learning_rates["vision"] for s in recipe.stages.values()} == {2e-6}


def test_cprds_numbers():
    recipe = load_ranking_recipe(METHODS / "cprd.yaml")
    assert (recipe.ranking.candidates, recipe.ranking.threshold, recipe.ranking.weight) == (16, 0.1, 1.0)
    optimiser = recipe.training.optimiser
    assert (recipe.training.epochs, optimiser.batch_size, optimiser.learning_rate, optimiser.weight_decay) == (5, 256, 1e-5, 0.02)
    assert recipe.student.assemble.embedding == 256 and recipe.student.assemble.vision.image_size == 384


@pytest.mark.parametrize("name", MODELS)
def test_sizes_are_the_models_own(name):
    recipe = load_recipe(METHODS / f"{name}.yaml")
    teacher, student, vision, tokens = MODELS[name]
    shape = shape_of(model_of(recipe.teacher.model))
    assert round(shape.parts["language"] / 1e6) == pytest.approx(teacher, abs=1)
    assert round(shape_of(student_of(recipe.student)).parts["language"] / 1e6) == pytest.approx(student, abs=1)
    assert configuration(recipe.student.assemble.vision.source).name == vision and shape.patches == tokens


def test_all_pass_the_offline_dry_run(capsys):
    paths = sorted(METHODS.glob("*.yaml"))
    assert [path.stem for path in paths] == [
        "adpa", "cprd", "dckd", "distillm", "distillm2", "gkd", "kepo", "llava_kd", "llava_mod", "mend", "mgsr", "minillm",
        "monotakd", "mst_distill", "opsd", "ovsgtr", "switch_kd", "tgeo_kd",
    ]  # fmt: skip
    for path in paths:
        command = "rank" if path.stem == "cprd" else "distill"
        assert main([command, str(path), "--dry-run", "--offline"]) == 0
        shown = capsys.readouterr().out
        assert "1 x 80 GB" in shown and "8 x 80 GB" in shown and "parameters" in shown
        assert f"mmkd {command} scripts/recipes/methods/{path.name} --dry-run --offline" in path.read_text()


def test_whole_models_have_the_parameters_of_their_cards():
    """Which count the published files."""
    found = {}
    for name in list_cards("models/towers"):
        card = load_card("models/towers", name, ModelCard)
        with suppress(DataError):
            found[name] = (shape_of(model_of(card.source)).total / 1e6, card.parameters)
    assert len(found) >= 11
    assert {name for name, (counted, told) in found.items() if abs(counted / told - 1) > 0.002} == set()
    assert shape_of(model_of("OpenGVLab/InternVL3-1B-hf")).patches == 4 * 256
    by_area = shape_of(model_of("Qwen/Qwen2.5-VL-3B-Instruct"))
    assert by_area.patches is None and by_area.merged == 4
    assert by_area.parts["projector"] == 1280 + 4 * 1280 * (4 * 1280 + 1) + (4 * 1280 + 1) * 2048  # its merger


@pytest.mark.parametrize("path", sorted(WRITE.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_that_write_pass_the_offline_dry_run(path, capsys):
    assert main(["distill", str(path), "--dry-run", "--offline"]) == 0
    assert "student: " in capsys.readouterr().out


def test_each_pair_passes_the_offline_dry_run(tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text('{"image": "a.png", "question": "what", "answer": "red"}\n' * 3)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name in list_cards("models/pairs"):
        assert main(["distill", f"pair:{name}", f"data={tmp_path}", "--dry-run", "--offline"]) == 0, name
        shown = capsys.readouterr().out
        assert "teacher: " in shown and "student: " in shown


def test_the_numbers_of_on_policy_recipes():
    """What the papers and their code tell; the rest is said to be our choice in each."""
    found = {name: load_recipe(METHODS / f"{name}.yaml").stages[stage] for name, stage in
             (("minillm", "minillm"), ("mgsr", "mgsr"), ("mend", "mend"), ("ovsgtr", "sft"), ("kepo", "kepo"))}  # fmt: skip
    weights = {name: [spec.weight for spec in stage.terms.values()] for name, stage in found.items()}
    assert weights == {"minillm": [1, 1], "mgsr": [1, 1], "mend": [1, 1], "ovsgtr": [1, 0.1], "kepo": [1, 0.5]}
    assert found["minillm"].terms["long"].model_extra == {"gamma": 1.0}
    assert found["mgsr"].answers["mended"]["corrections"] == 1
    assert (found["mend"].steps, found["mend"].optimiser.learning_rate) == (30000, 1e-5)
    assert found["ovsgtr"].terms["retention"].positions == "prompt"


def test_the_numbers_of_recipes_with_several_teachers():
    found = {name: load_recipe(METHODS / f"{name}.yaml") for name in ("adpa", "monotakd", "mst_distill", "tgeo_kd")}
    adpa, mono = found["adpa"].stages["adpa"], found["monotakd"].stages["distil"]
    assert adpa.terms["advantage"].teacher == "aligned" and adpa.terms["advantage"].model_extra == {"reference": "before"}
    assert adpa.answers["student"]["beside"] and adpa.build_terms()[0].positions == "given"  # likelihood of the chosen answers
    assert mono.terms["branches"].model_extra == {"assistant": "small", "residual": 0.2, "threshold": 0.6}
    gate = found["mst_distill"].stages["distil"]
    assert gate.optimiser.learning_rate == 1e-4 and {spec.weight for spec in gate.terms.values()} == {1}
    assert [spec.kind for spec in found["tgeo_kd"].stages["distil"].terms.values()] == ["tgeo_kd"]


def test_the_weights_of_all_teachers_are_reckoned():
    both = load_recipe(METHODS / "mst_distill.yaml")
    alone = both.model_copy(update={"teachers": {"large": both.teachers["large"]}})
    shape, other = (shape_of(model_of(both.teachers[name].model)) for name in ("large", "other"))
    given = (both.stages["distil"], shape_of(student_of(both.student)), shape, 4)
    assert need_of(both, *given).teacher - need_of(alone, *given).teacher == 2 * other.total


@pytest.mark.parametrize("name", ["adpa", "mst_distill", "tgeo_kd", "monotakd", "monotakd_assistant"])
def test_small_runs_have_a_plan_from_their_folders_alone(name, capsys, tmp_path, monkeypatch):
    """The sample's models have an encoder that halves its grid: 16 x 16 patches become 4 x 4 tokens, as the model makes them."""
    path = METHODS.parent / f"{name}.yaml"
    monkeypatch.setenv("ASSISTANT", str(METHODS.parents[2] / "models" / "sample-teacher"))  # where its own run has not been
    assert main(["distill", str(path), "--dry-run", "--offline"]) == 0
    spec = next(iter(load_recipe(path).teacher_specs.values()))
    tower = Tower.load(spec.model, max_length=64)
    shown = capsys.readouterr().out
    assert f"{tower.parameter_count()['total']:,} parameters" in shown
    picture = tiny_picture(tmp_path, "a.png", 0, (64, 64))
    encoded = tower.encode(Sample("a", (picture,), (Turn("user", "what?", 1),)), with_answer=False)
    assert f"visual tokens: {tower.visual_count(encoded)} a picture" in shown


def test_more_samples_and_fewer_processes_need_more_memory():
    recipe = load_recipe(METHODS / "llava_mod.yaml")
    teacher = shape_of(model_of(recipe.teacher.model))
    student = shape_of(model_of("teachers/tinyllava-qwen2.5-3b"))
    stage = recipe.stages["d2d"]
    one, two = (need_of(recipe, stage, student, teacher, samples) for samples in (1, 2))
    assert two.samples > one.samples and two.training == one.training
    assert need_of(recipe, stage, student, teacher, 1, shards=8).training == pytest.approx(one.training / 8)
    assert one.teacher == 2 * teacher.total  # bfloat16
    answers, pairs = (need_of(recipe, recipe.stages[name], student, teacher, 1).samples for name in ("d2s", "prefer"))
    assert pairs > 1.5 * answers
    sparse = upcycled_shape(student, recipe.stages["d2s"])
    assert sparse.parts["mlp"] == pytest.approx(student.parts["mlp"] * (1 + 3 * 18 / 36), rel=1e-3)


def test_configurations_that_are_not_known_are_told(capsys):
    path = METHODS / "llava_kd.yaml"
    assert main(["distill", str(path), "student.assemble.language.source=Qwen/Qwen2.5-0.6B", "--dry-run", "--offline"]) == 2
    assert "no configuration of 'Qwen/Qwen2.5-0.6B' is known" in capsys.readouterr().err
    assert main(["distill", str(path), "--offline"]) == 2
    assert "--offline is a kind of --dry-run" in capsys.readouterr().err
    with pytest.raises(DataError, match="not a whole image-text model"):
        model_of("Qwen/Qwen2-7B")


def test_every_configuration_is_whole():
    cards = {name: load_card(FOLDER, name, Configuration) for name in list_cards(FOLDER)}
    assert len(cards) >= 14
    for card in cards.values():
        assert all(configuration(source) == card for source in card.sources)


def test_terms_without_a_weight_have_their_papers():
    found = {kind: registry("terms").get(kind).default_weight for kind in registry("terms")}
    assert TermSpec(kind="relation").weight == 0.5 and TermSpec(kind="load_balance").weight == 0.01
    assert {weight for kind, weight in found.items() if kind not in ("relation", "load_balance")} == {1.0}
    assert TermSpec(kind="relation", weight=2.0).weight == 2.0
