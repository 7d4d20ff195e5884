from __future__ import annotations

import os
from pathlib import Path

import pytest

from mmkd.base.cards import card_folders, find_card, list_cards, load_card
from mmkd.errors import DataError, did_you_mean
from mmkd.evaluation.benchmarks import Benchmark, load_benchmark
from mmkd.retrieval.benchmark import load_retrieval, retrieval_names
from mmkd.testing.benchmark_tables import readme

REPO = Path(__file__).parents[2]
CARD = "title: t\nformat: jsonl\nroot: .\nsplit: test\nprompt_style: plain\nmetric: exact_match\n"


def write_card(root: Path, name: str = "mine", text: str = CARD, kind: str = "evaluation") -> Path:
    path = root / kind / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def user_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMKD_CARDS", str(tmp_path))
    return tmp_path


def test_every_card_is_valid() -> None:
    files = sorted((REPO / "evaluation").glob("*.yaml"))
    cards = [load_benchmark(path) for path in files]
    assert len(cards) == 33
    for card in cards:
        assert card.notes and card.title
        assert all(reference.source for reference in card.reference_scores)
    assert [card.name for card in cards] == [path.stem for path in files]


def test_every_retrieval_card_is_valid() -> None:
    cards = [load_retrieval(name) for name in retrieval_names()]
    assert [(card.name, card.expected_pictures) for card in cards] == [("coco_5k", 5000), ("flickr30k", 1000)]
    assert all(card.notes and card.title and card.split == "test" for card in cards)


def test_the_readme_is_up_to_date() -> None:
    text = (REPO / "evaluation" / "README.md").read_text(encoding="utf-8")
    assert text == readme(), "run `python -m mmkd.testing.benchmark_tables`"
    assert "mmkd/evaluation" in text.splitlines()[0]


def test_the_card_folder_holds_no_code() -> None:
    assert {path.suffix for path in (REPO / "evaluation").rglob("*") if path.is_file()} == {".yaml", ".md"}


def test_unknown_benchmark_gets_a_suggestion() -> None:
    with pytest.raises(DataError, match="did you mean 'scienceqa'"):
        load_benchmark("sciencqa")
    assert did_you_mean("zzz", ["b", "a"]) == "known: a, b"


def test_user_cards_come_first_and_by_path(user_root: Path) -> None:
    write_card(user_root)
    path = write_card(user_root, "scienceqa", CARD)
    assert load_benchmark("mine").title == "t"
    assert load_benchmark("scienceqa").title == "t"
    assert find_card("evaluation", "scienceqa") == path
    assert load_benchmark(path) == load_benchmark("scienceqa")
    assert "textvqa" in list_cards("evaluation")


def test_several_user_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write_card(tmp_path / "one")
    write_card(tmp_path / "two", text=CARD.replace("title: t", "title: other"))
    write_card(tmp_path / "two", "second")
    monkeypatch.setenv("MMKD_CARDS", os.pathsep.join([str(tmp_path / "one"), str(tmp_path / "two")]))
    assert find_card("evaluation", "mine") == first
    assert load_benchmark("second").name == "second"


def test_subfolders_are_part_of_the_name_or_of_the_kind(user_root: Path) -> None:
    path = write_card(user_root, "vit_tiny_x", kind="models/encoders")
    assert list_cards("models/encoders")["vit_tiny_x"] == path
    assert list_cards("models")["encoders/vit_tiny_x"] == path
    assert find_card("models", "vit_tiny_x") == path
    assert card_folders("models/encoders")[0] == user_root / "models" / "encoders"


def test_an_ambiguous_name_is_refused(user_root: Path) -> None:
    write_card(user_root, "twin_x", kind="models/encoders")
    write_card(user_root, "twin_x", kind="models/towers")
    with pytest.raises(DataError, match="encoders/twin_x, towers/twin_x"):
        find_card("models", "twin_x")


@pytest.mark.parametrize("kind", ["model", "../data", "models/../.."])
def test_unknown_kinds(kind: str) -> None:
    with pytest.raises(DataError, match="no kind of card"):
        card_folders(kind)


def test_a_missing_user_root_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MMKD_CARDS", str(tmp_path / "gone"))
    with pytest.raises(DataError, match="gone"):
        list_cards("evaluation")


def test_all_mistakes_of_a_card_at_once(user_root: Path) -> None:
    path = write_card(
        user_root,
        text=CARD.replace("exact_match", "exact_mach") + "splitt: x\nmax_new_tokens: 0\nparser: sciencqa\n",
    )
    with pytest.raises(DataError) as caught:
        load_card("evaluation", "mine", Benchmark)
    message = str(caught.value)
    assert str(path) in message
    assert "splitt: is not a key of this card; did you mean 'split'?" in message
    assert "did you mean 'exact_match'?" in message and "did you mean 'scienceqa'?" in message
    assert "max_new_tokens" in message and "got 0" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: [", "no valid YAML"),
        ("- a\n", "holds list"),
        (CARD + "name: other\n", "'other'"),
        ("!!python/object/apply:os.getcwd []", "no valid YAML"),
    ],
)
def test_what_is_no_card(user_root: Path, text: str, message: str) -> None:
    write_card(user_root, text=text)
    with pytest.raises(DataError, match=message):
        load_benchmark("mine")


def test_data_folder(tmp_path: Path) -> None:
    card = load_benchmark("scienceqa")
    assert card.data_folder(tmp_path) == tmp_path
    (tmp_path / "scienceqa").mkdir()
    assert card.data_folder(tmp_path) == tmp_path / "scienceqa"
    with pytest.raises(DataError, match="--data-root"):
        card.data_folder(tmp_path / "nowhere")


def test_pope_files(tmp_path: Path) -> None:
    row = '{"question_id": 1, "image": "x.jpg", "text": "Is there a cat in the image?", "label": "%s"}\n'
    for sampling, label in (("random", "yes"), ("popular", "no"), ("adversarial", "no")):
        (tmp_path / f"coco_pope_{sampling}.json").write_text(row % label, encoding="utf-8")
    questions = load_benchmark("pope").read(tmp_path)
    assert [q.id for q in questions] == ["random-1", "popular-1", "adversarial-1"]
    assert questions[0].references == ("yes",) and questions[0].images[0].name == "x.jpg"
    (tmp_path / "coco_pope_popular.json").write_text(row % "perhaps", encoding="utf-8")
    with pytest.raises(DataError, match=r"coco_pope_popular\.json line 1: key 'label' is a string \('perhaps'\)"):
        load_benchmark("pope").read(tmp_path)
