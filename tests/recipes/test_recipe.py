"""Reading recipes: overrides, `extends`, environment variables, and errors that all come at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmkd.errors import RecipeError
from mmkd.recipes.reading import load_recipe, read_raw
from mmkd.retrieval.recipe import load_ranking_recipe
from mmkd.runs.ablation import load_grid

BASE = """
title: t
output: runs/x
teacher: {model: teacher}
student: {model: student}
stages:
  sft:
    data: [{card: a}, {card: b}]
    epochs: 1
    terms:
      ce: {kind: cross_entropy}
      kl: {kind: forward_kl, temperature: 2}
      jsd: 0.5
"""
RECIPES = Path(__file__).parents[2] / "scripts" / "recipes"


@pytest.fixture
def load(tmp_path):
    def load(text: str = BASE, *overrides: str, name: str = "recipe.yaml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return load_recipe(tmp_path / name, list(overrides))

    return load


# ---- overrides -------------------------------------------------------------------------------------------------------


def test_dotted_keys_and_list_indices(load):
    recipe = load(BASE, "seed=3", "stages.sft.data.1.limit=5", "stages.sft.optimiser.learning_rate=1e-4")
    assert recipe.seed == 3
    assert [d.limit for d in recipe.stages["sft"].data] == [None, 5]
    assert recipe.stages["sft"].optimiser.learning_rate == 1e-4


def test_a_number_is_a_terms_weight(load):
    terms = load(BASE, "stages.sft.terms.kl=3", "stages.sft.terms.jsd=0.1", "stages.sft.terms.reverse_kl=2").stages["sft"].terms
    assert terms["kl"].weight == 3 and terms["kl"].kind == "forward_kl"
    assert terms["kl"].model_extra == {"temperature": 2}  # what the file says besides stays
    assert terms["jsd"].weight == 0.1
    assert terms["reverse_kl"].weight == 2 and terms["reverse_kl"].kind == "reverse_kl"


@pytest.mark.parametrize("override", ["stages.sft.terms.kl=0", "stages.sft.terms.kl.weight=0"])
def test_weight_0_takes_a_term_out(load, override):
    assert list(load(BASE, override).stages["sft"].terms) == ["ce", "jsd"]


def test_a_short_term_grows_by_override(load):
    term = load(BASE, "stages.sft.terms.jsd.beta=0.3").stages["sft"].terms["jsd"]
    assert term.weight == 0.5 and term.model_extra == {"beta": 0.3}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "is not key=value"),
        ("seed=[1", "is not YAML"),
        ("stages.sft.data.2.limit=1", "'2' is no index of a list of 2"),
        ("stages.sft.data.last.limit=1", "'last' is no index"),
        ("title.short=1", "title: Input should be a valid string"),
        ("sed=1", "sed: unknown key; did you mean 'seed'?"),
        ("stages.sft.terms.kl.temprature=1", "no option 'temprature'; did you mean 'temperature'?"),
    ],
)
def test_wrong_overrides(load, override, message):
    with pytest.raises(RecipeError) as error:
        load(BASE, override)
    assert message in str(error.value)


def test_an_override_into_plain_text(load):
    with pytest.raises(RecipeError, match="goes into 'vision', which holds no keys"):
        load(BASE, "stages.sft.train=[vision]", "stages.sft.train.0.x=1")


# ---- extends ---------------------------------------------------------------------------------------------------------


def test_extends_changes_what_it_names(load):
    load(BASE, name="base.yaml")
    recipe = load("extends: base.yaml\ntitle: other\nstages: {sft: {terms: {kl: 4, jsd: 0}}}")
    assert recipe.title == "other" and recipe.output == "runs/x"
    terms = recipe.stages["sft"].terms
    assert list(terms) == ["ce", "kl"] and terms["kl"].weight == 4 and terms["kl"].kind == "forward_kl"


def test_extends_goes_one_level_deep(load):
    load(BASE, name="base.yaml")
    load("extends: base.yaml", name="middle.yaml")
    with pytest.raises(RecipeError, match="one level deep"):
        load("extends: middle.yaml")
    with pytest.raises(RecipeError, match=r"there is no recipe .*missing\.yaml"):
        load("extends: missing.yaml")


# ---- environment variables -------------------------------------------------------------------------------------------


def test_environment_variables(load, monkeypatch):
    monkeypatch.setenv("MMKD_TEST_ROOT", "/data/${HOME}")
    text = BASE.replace("runs/x", "${MMKD_TEST_ROOT}/${MMKD_TEST_NAME:-run}${MMKD_TEST_EMPTY:-}")
    assert load(text).output == "/data/${HOME}/run"  # values are taken as they are


def test_variables_that_are_not_set_are_all_named(load):
    text = BASE.replace("runs/x", "${MMKD_TEST_A}").replace("card: b", "card: '${MMKD_TEST_B}'")
    with pytest.raises(RecipeError) as error:
        load(text)
    assert "has 2 errors" in str(error.value)
    assert "output: the environment variable MMKD_TEST_A is not set" in str(error.value)
    assert "stages.sft.data.1.card: the environment variable MMKD_TEST_B" in str(error.value)


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_all_errors_come_at_once_with_path_and_suggestion(load):
    text = BASE.replace("title", "titel").replace("epochs: 1", "epoch: 1\n    optimiser: {learning_rat: 1}")
    text = text.replace("{card: a}", "{cards: a, limit: 0}").replace("jsd: 0.5", "jsdd: 0.5")
    with pytest.raises(RecipeError) as error:
        load(text)
    lines = str(error.value).splitlines()
    assert lines[0].endswith("recipe.yaml has 7 errors:")
    for line in (
        "  title: missing",
        "  titel: unknown key; did you mean 'title'?",
        "  stages.sft.epoch: unknown key; did you mean 'epochs'?",
        "  stages.sft.optimiser.learning_rat: unknown key; did you mean 'learning_rate' or 'learning_rates'?",
        "  stages.sft.data.0.cards: unknown key; did you mean 'card'?",
        "  stages.sft.data.0.limit: Input should be greater than 0 (given: 0)",
        "  stages.sft.terms.jsdd: unknown kind 'jsdd'; did you mean 'jsd'?",
    ):
        assert line in lines


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("temperature: 2", "temperature: hot", "stages.sft.terms.kl: temperature is 'hot', not a number"),
        ("temperature: 2", "temperture: 1, weight: -1", "did you mean 'temperature'?; and weight is -1"),
        ("kind: forward_kl", "kindd: forward_kl", "no option 'kindd'; did you mean 'kind'?"),
        ("jsd: 0.5", "dbild: {path: switch}\n    train: [projector]", "add `vision` to `train`"),
        ("jsd: 0.5", "relation: {path: switch}", "relation cannot run on the visual switch"),
        ("jsd: 0.5", "jsd: true", "stages.sft.terms.jsd: Input should be a valid dictionary"),
        ("epochs: 1", "epochs: 1\n    steps: 1", "stages.sft: give either `epochs` or `steps`"),
        ("teacher: {model: teacher}\n", "", "stages.sft.terms.kl, stages.sft.terms.jsd compare with one; add `teacher:"),
        ("{model: student}", "{assemble: {vision: {sorce: x}, language: {source: y}}}", "did you mean 'source'?"),
        ("{model: student}", "{assemble: {vision: {source: x}, language: {config: {}}}}", "needs `tokenizer:`"),
    ],
)
def test_each_mistake_has_its_answer(load, old, new, message):
    with pytest.raises(RecipeError) as error:
        load(BASE.replace(old, new))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.sft.lr=1", "stages.sft.lr: unknown key; here it is `optimiser.learning_rate`"),
        ("stages.sft.learning_rate=1", "belongs one place lower: `optimiser.learning_rate`"),
        ("stages.sft.optimizer=adamw", "here it is `optimiser`"),
        ("stages.sft.optimiser.lr=1", "here it is `learning_rate`"),
        ("lr=1", "here it is `stages.NAME.optimiser.learning_rate`"),
        ("stages.sft.seed=1", "a key of the recipe itself: `seed`"),
        ("batch_size=8", "lower: `evaluation.batch_size`"),
        ("stages.sft.batch_size=8", "lower: `optimiser.batch_size`"),
        ("output_dir=x", "here it is `output`"),
        ("teacher.quantize=8bit", "quantise"),
        ("stages.sfft.steps=3", "stages.sfft.data: missing; if no new stage is meant, did you mean 'sft'?"),
    ],
)
def test_a_key_of_another_place_or_trainer_is_told_its_own(load, override, message):
    with pytest.raises(RecipeError) as error:
        load(BASE, override)
    assert message in str(error.value)


def test_what_is_no_recipe(load, tmp_path):
    with pytest.raises(RecipeError, match="holds list; a recipe is a mapping of keys to values"):
        load("- a\n- b")
    with pytest.raises(RecipeError, match="is no valid YAML"):
        load("a: [1")
    with pytest.raises(RecipeError, match=r"there is no recipe .*nowhere\.yaml"):
        load_recipe(tmp_path / "nowhere.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(RecipeError, match="is no valid YAML"):
        load_recipe(tmp_path / "binary.yaml")
    with pytest.raises(RecipeError, match="is no valid YAML"):
        load_recipe(tmp_path)


# ---- YAML's traps ----------------------------------------------------------------------------------------------------


def test_on_is_a_boolean_in_yaml_so_the_field_is_called_positions(load):
    assert load(BASE.replace("temperature: 2", "positions: visual")).stages["sft"].terms["kl"].positions == "visual"
    with pytest.raises(RecipeError, match="the key True is not text; YAML reads on, off, yes and no as true and false"):
        load(BASE.replace("temperature: 2", "on: visual"))


def test_numbers_with_an_exponent_and_no_point_are_numbers(load):
    terms = load(BASE.replace("temperature: 2", "temperature: 2e0").replace("jsd: 0.5", "jsd: 5e-1")).stages["sft"].terms
    assert terms["kl"].model_extra == {"temperature": 2.0} and terms["jsd"].weight == 0.5


def test_a_key_that_is_given_twice_is_refused(load):
    with pytest.raises(RecipeError, match="given twice: title"):
        load(BASE + "title: again\n")


# ---- the project's own recipes ---------------------------------------------------------------------------------------


def test_every_recipe_of_the_project_loads():
    paths = sorted(RECIPES.rglob("*.yaml"))
    kinds = [read_raw(path).get("kind", "distillation") for path in paths]
    assert len(paths) >= 19 and {*kinds} == {"distillation", "ablation", "ranking", "matching"}
    loaders = {"distillation": load_recipe, "ablation": lambda path: load_grid(path, [])[0]}
    for path, kind in zip(paths, kinds, strict=True):
        assert loaders.get(kind, load_ranking_recipe)(path).title


# ---- options of terms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("kl.temperature=0", "temperature is 0; it must be above 0"),
        ("jsd.beta=1.5", "beta is 1.5; it must lie in [0, 1]"),
        ("x={kind: dbild, direction: up}", "direction is 'up'; it must be one of reverse, forward"),
        ("x={kind: dbild, window: 0}", "window is 0; it must be at least 1"),
        ("x={kind: relation, source: hiden}", "source is 'hiden'; did you mean 'hidden'?"),
        ("x={kind: feature_match, distance: l3}", "distance is 'l3'; known: cosine, mse, smooth_l1"),
        ("x={kind: dpo, form: square}", "form is 'square'; known: hinge, ipo, sigmoid"),
        ("ce.positions=visual", "cross_entropy has no target at positions: visual; choose response, prompt or text"),
        ("x={kind: relation, reduction: sum}", "relation is no loss of rows and has no `reduction`"),
    ],
)
def test_wrong_options_are_found_before_anything_is_loaded(load, override, message):
    with pytest.raises(RecipeError) as error:
        load(BASE, f"stages.sft.terms.{override}")
    assert message in str(error.value)


def test_options_of_the_specifications(load):
    dbild = "window: 64, min_k: 4, max_k: 32, direction: forward, tau_squared: true, fixed_k: 8, inclusive: false"
    overrides = {
        "a": "{kind: dbild, temperature: 3, %s}" % dbild,  # noqa: UP031
        "b": "{kind: relation, source: hidden, weight: 0.5}",
        "c": "{kind: dbild, positions: all}",
        "d": "{kind: dpo, form: ipo}",
        "e": "{kind: feature_match, distance: mse}",
        "kl.positions": "answer",
        "kl.reduction": "sum",
    }
    terms = load(BASE, *(f"stages.sft.terms.{key}={value}" for key, value in overrides.items())).stages["sft"].terms
    assert terms["a"].model_extra["inclusive"] is False and terms["kl"].reduction == "sum"


def test_relative_paths_are_looked_for_beside_the_recipe_and_up_to_its_project(tmp_path, monkeypatch, caplog):
    project = tmp_path / "project"
    for folder in (".git", "runs/teacher", "recipes/my_data", "here"):
        (project / folder).mkdir(parents=True)
    (tmp_path / "runs" / "teacher").mkdir(parents=True)  # above the project: not its own
    path = project / "recipes" / "recipe.yaml"
    path.write_text(BASE + "data_root: my_data\n")
    monkeypatch.chdir(project / "here")
    with caplog.at_level("INFO"):
        recipe = load_recipe(path, ["teacher.model=runs/teacher", "student.model=some-lab/some-vlm"])
    assert recipe.teacher.model == str(project / "runs" / "teacher") and recipe.data_root == str(project / "recipes" / "my_data")
    assert recipe.student.model == "some-lab/some-vlm"
    assert f"teacher.model: there is no runs/teacher here, so {project / 'runs' / 'teacher'} is taken" in caplog.text
    monkeypatch.chdir(project)
    assert load_recipe(path, ["teacher.model=runs/teacher"]).teacher.model == "runs/teacher"


@pytest.mark.parametrize("name", ["x" * 5000, "a/" * 3000 + "b", "~nobody_of_that_name/teacher"])
def test_a_name_that_no_file_can_have_is_one_that_is_not_there(tmp_path, name):
    path = tmp_path / "recipe.yaml"
    path.write_text(BASE)
    assert load_recipe(path, [f"teacher.model={name}", f"data_root={name}"]).teacher.model == name
