"""Teachers whose pictures are no tokens of their text: rows of their answers, live and from a cache; what they cannot give."""

import json

import pytest
import torch
from tiny import VISIONS, language_config, make_term, tiny_samples, tiny_tower

from mmkd.errors import DataError, SampleError, TowerError
from mmkd.recipes.reading import validate
from mmkd.recipes.recipe import Recipe
from mmkd.runs.preflight import preflight
from mmkd.runs.stages import train
from mmkd.runs.towers import build_student, load_student, load_teachers
from mmkd.runs.write_cache import write_cache
from mmkd.teachers.live import LiveTeacher
from mmkd.terms.term import Schedule
from mmkd.testing import check_tower
from mmkd.testing.tiny_families import TEMPLATE, TEXTS, VOCABULARY, tiny_family
from mmkd.towers.assemble import train_tokenizer
from mmkd.towers.families import FAMILIES, REFUSED
from mmkd.towers.tokenless import for_decoder
from mmkd.towers.tower import Tower
from mmkd.train.collate import Collator, PairDataset
from mmkd.train.distiller import Distiller, term_errors

KINDS = ("forward_kl", "reverse_kl", "jsd", "dbild")
# Cross-attention with a mask along the text, an encoder-decoder, forbidden logits, pictures before the text.
FAMILY_NAMES = ("mllama", "florence2", "chameleon", "git")


def student_of():
    tokenizer = train_tokenizer(TEXTS, VOCABULARY)
    language = language_config(vocab_size=len(tokenizer))
    template = TEMPLATE.replace("IMAGE", "<image>")
    return tiny_tower(3, vision=VISIONS["clip"], image_size=(16, 16), language=language, tokenizer=tokenizer,
                      chat_template=template)  # fmt: skip


@pytest.fixture(scope="module")
def teachers():
    return {name: tiny_family(name, 1) for name in FAMILY_NAMES}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_losses_at_response_rows_fall(family, teachers, tmp_path):
    student, teacher = student_of(), teachers[family]
    terms = [make_term(kind, kind, Schedule(1.0, 1.0)) for kind in KINDS]
    dataset = PairDataset(tiny_samples(tmp_path, 4), student, teacher, terms)
    distiller = Distiller(student, teacher, terms)
    batch = Collator(student, teacher)([dataset[i] for i in range(4)])["batch"]
    optimiser = torch.optim.AdamW(student.model.parameters(), lr=1e-2)
    values = []
    for _ in range(12):
        loss, _ = distiller(batch)
        values.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert values[-1] < 0.9 * values[0]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_batch_of_unlike_samples_is_each_alone(family, teachers, tmp_path):
    tower = teachers[family]
    more = {"two_images": 1, "text_only": 1} if FAMILIES[family].pictures == "any" else {}
    samples = tiny_samples(tmp_path, 3, **more)
    together = tower.prepare(samples)
    with torch.no_grad():
        rows = tower.read(together, tower.see(together))
        for place, sample in enumerate(samples):
            alone = tower.prepare([sample])
            own = tower.read(alone, tower.see(alone))[alone.response]
            torch.testing.assert_close(rows[place][together.response[place]], own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("feature_match", {}, "needs features of the teacher"),
        ("relation", {}, "needs visual rows of the teacher"),
        ("forward_kl", {"path": "switch"}, "needs switch of the teacher"),
        ("forward_kl", {"positions": "visual"}, "needs visual rows of the teacher"),
        ("forward_kl", {"positions": "prompt"}, "needs prompt rows of the teacher"),
        ("jsd", {"positions": "all"}, "needs all rows of the teacher"),
    ],
)
def test_terms_that_need_visual_tokens_are_refused_by_name(kind, options, words, teachers):
    term = make_term("mine", kind, Schedule(1.0, 1.0), options.get("positions", "response"), options.get("path", "student"))
    (error,) = term_errors(student_of(), {"teacher": LiveTeacher(teachers["mllama"])}, [term])
    assert error.startswith("mine: ") and words in error
    assert "'mllama' has no visual tokens: its text attends" in error and "another teacher" in error


def test_it_is_no_student_and_no_tower_to_take_apart(teachers, tmp_path):
    tower = teachers["mllama"]
    tower.save(tmp_path)
    raw = {
        "title": "t", "output": "o", "student": {"model": str(tmp_path)},
        "stages": {"a": {"data": [{"card": "a"}], "steps": 1, "terms": {"cross_entropy": 1}}},
    }  # fmt: skip
    with pytest.raises(TowerError, match="the student 'mllama' has no visual tokens"):
        load_student(validate(raw, "t", Recipe), tmp_path)
    with pytest.raises(TowerError, match="it can only be a teacher of rows"):
        check_tower(tower)
    with pytest.raises(TowerError, match="it can only be a teacher of rows"):
        _ = tower.projector
    assert {part: len(found) > 0 for part, found in tower.part_parameters().items()} == {
        "vision": False, "projector": False, "language": True,
    }  # fmt: skip


def test_families_that_can_be_no_tower_say_why():
    for family in ("mistral4", "pi0"):
        with pytest.raises(TowerError, match=REFUSED[family].split(";")[0]):
            tiny_family(family)
    tower = tiny_family("llava")
    tower.model.config.model_type = "pix2struct"
    with pytest.raises(TowerError, match="'pix2struct' can be no tower: its question is drawn into the picture"):
        Tower(tower.model, tower.processor)


@pytest.mark.parametrize(("pictures", "family"), [(2, "git"), (0, "florence2")])
def test_samples_that_a_family_does_not_read_are_named(pictures, family, teachers, tmp_path):
    (sample,) = tiny_samples(tmp_path, 0, two_images=int(pictures == 2), text_only=int(pictures == 0))
    with pytest.raises(SampleError, match=f"{sample.id!r} has {pictures} pictures, and {family!r} reads exactly one"):
        teachers[family].encode(sample)


def test_an_encoder_decoder_reads_the_prompt_and_writes_the_answer(teachers, tmp_path):
    tower = teachers["florence2"]
    (sample,) = tiny_samples(tmp_path, 1)
    encoded = tower.encode(sample)
    answer = encoded.targets[encoded.targets >= 0].tolist()
    assert answer[-1] in tower.stop_ids and encoded.input_ids.tolist()[1:] == answer[:-1]
    asked = tower.encode(sample, with_answer=False)
    assert torch.equal(asked.pixels["prompt_input_ids"], encoded.pixels["prompt_input_ids"])
    assert len(asked.input_ids) == 1 and not (asked.targets >= 0).any()
    assert torch.equal(for_decoder(asked, 7).input_ids, torch.tensor([7]))


def test_live_and_cached_teachers_train_the_same_student(tmp_path):
    """Through a folder on disk, as a recipe has it; the preflight and an answer of the teacher beside it."""
    teacher = tiny_family("mllama", 1)
    teacher.save(tmp_path / "teacher")
    student_of().save(tmp_path / "student")
    samples = tiny_samples(tmp_path, 4, text_only=1)
    rows = [
        {"question": s.turns[0].text, "answer": s.answer, **({"image": s.images[0].name} if s.images else {})} for s in samples
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage = {
        "data": [{"format": "jsonl", "root": str(tmp_path), "prompt": "plain"}], "terms": {"forward_kl": 1.0, "jsd": 0.5},
        "steps": 3, "log_every": 1, "optimiser": {"batch_size": 5},
    }  # fmt: skip
    weights = {}
    for name, cache in (("live", None), ("cached", str(tmp_path / "cache"))):
        raw = {
            "title": "t", "output": str(tmp_path / name), "teacher": {"model": str(tmp_path / "teacher"), "cache": cache},
            "student": {"model": str(tmp_path / "student")}, "stages": {"only": stage}, "guards": {"teacher_is_better": False},
        }  # fmt: skip
        recipe = validate(raw, "t", Recipe)
        if cache is not None:
            write_cache(recipe, tmp_path / "cache")
        loaded = load_teachers(recipe)
        student = build_student(recipe, loaded, [])
        preflight(recipe, student, loaded)
        weights[name] = train(recipe, "student", student, loaded, tmp_path / name).model.state_dict()
        if cache is None:
            answers = loaded["teacher"].running().answer(samples, max_new_tokens=4)
            assert answers == teacher.answer(samples, max_new_tokens=4)
            choices = [["red", "green"]] * len(samples)
            assert set(loaded["teacher"].running().choose(samples, choices)) <= {0, 1}
    for name, tensor in weights["live"].items():
        torch.testing.assert_close(weights["cached"][name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    wrong = {**stage, "terms": {"relation": 1.0}}
    recipe = validate({**raw, "teacher": {"model": str(tmp_path / "teacher")}, "stages": {"only": wrong}}, "t", Recipe)
    with pytest.raises(DataError, match="needs visual rows of the teacher, but 'mllama' has no visual tokens"):
        preflight(recipe, student, load_teachers(recipe))
