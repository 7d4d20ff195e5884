"""Data cards and what a recipe's data entry becomes."""

from pathlib import Path

import pytest
from layouts import CARDS

from mmkd.base.cards import list_cards, load_card
from mmkd.data.entries import DataCard, read_samples, readme
from mmkd.data.formats import read_questions
from mmkd.data.selection import TARGETS
from mmkd.data.spec import DataSpec
from mmkd.errors import DataError
from mmkd.evaluation.benchmarks import load_benchmark
from mmkd.sample.sample_set import write_sample_set

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources") / "sample"
    write_sample_set(root, sizes={"train": 6, "test": 2})
    return root


def test_every_card_loads_and_the_readme_is_theirs():
    names = list(list_cards("data"))
    assert len(names) >= 10
    assert {load_card("data", name, DataCard).name for name in names} == set(names)
    assert (ROOT / "data" / "README.md").read_text(encoding="utf-8") == readme()


def test_an_entry_reads_its_card_below_the_data_root(sample):
    samples = read_samples(DataSpec(card="sample_textvqa"), seed=0, data_root=str(sample))
    assert len(samples) > 6
    assert all(s.turns[0].text.endswith("?") and s.answer for s in samples)


def test_fields_of_the_entry_win_over_the_card(sample):
    samples = read_samples(DataSpec(card="sample_textvqa", prompt="short", limit=3), seed=0, data_root=str(sample))
    assert len(samples) == 3 and all(s.turns[0].text.endswith("single word or phrase.") for s in samples)


def test_samples_have_the_tag_of_their_entry_or_the_name_of_its_card(sample):
    named = read_samples(DataSpec(card="sample_scienceqa", tag="mine", limit=4), 0, str(sample))
    plain = read_samples(DataSpec(card="sample_scienceqa", limit=4), 0, str(sample))
    assert {s.meta["tag"] for s in named} == {"mine"} and {s.meta["tag"] for s in plain} == {"sample_scienceqa"}


def test_weight_repeats_a_set(sample):
    one = read_samples(DataSpec(card="sample_captions"), 0, str(sample))
    more = read_samples(DataSpec(card="sample_captions", weight=2.5), 0, str(sample))
    assert len(more) == 2 * len(one) + round(0.5 * len(one))


UNANSWERED = ("vqav2", "vizwiz", "docvqa_test", "stvqa_test")  # test splits


@pytest.mark.parametrize("card", [card for card in CARDS if card not in UNANSWERED])
def test_the_layout_of_every_benchmark_can_be_trained_on(tmp_path, card):
    CARDS[card][0](tmp_path)
    asked = load_benchmark(card)
    spec = DataSpec(
        format=asked.format, root=str(tmp_path), split=asked.split, files=asked.files, prompt=asked.prompt_style
    )
    samples = read_samples(spec, seed=0)
    questions = read_questions(asked.format, tmp_path, asked.split, files=asked.files)
    assert [s.id for s in samples] == [q.id for q in questions] and len(samples) == CARDS[card][1]
    assert [s.answer for s in samples] == [asked.references(q)[0] for q in questions]


def test_targets_go_for_all_formats(tmp_path):
    CARDS["docvqa"][0](tmp_path)
    entry = {"format": "docvqa", "root": str(tmp_path), "split": "val", "prompt": "plain"}
    answers = {t: {s.answer for seed in range(9) for s in read_samples(DataSpec(**entry, target=t), seed)} for t in TARGETS}
    assert answers == {"first": {"A. Smith"}, "majority": {"A. Smith"}, "sampled": {"A. Smith", "Smith"}}


def test_a_missing_folder_and_a_missing_field_say_what_to_do(tmp_path):
    with pytest.raises(DataError, match="there is no data folder .*scienceqa.* set data_root"):
        read_samples(DataSpec(card="scienceqa"), 0, str(tmp_path))
    with pytest.raises(DataError, match="lacks format and root"):
        read_samples(DataSpec(), 0)
