"""Every benchmark's card reads a small set in the layout of its authors; the test writes it, from their descriptions."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from layouts import CARDS, TEN, Oracle, dump, picture, write_seed_image

from mmkd.data.formats import format_of, read_questions
from mmkd.errors import DataError
from mmkd.evaluation.answer import evaluate
from mmkd.evaluation.benchmarks import load_benchmark
from mmkd.evaluation.results import read_predictions
from mmkd.registry import registry


@pytest.fixture
def ask(tmp_path: Path, fake_tower) -> Callable[..., dict]:
    def run(card: str, wrong: tuple[str, ...] = (), **options) -> dict:
        benchmark = load_benchmark(card)
        root = tmp_path / benchmark.root
        root.mkdir(exist_ok=True)
        CARDS[card][0](root)
        options = {"data_root": tmp_path, "progress": False, "submission": benchmark.submission is not None} | options
        return evaluate(Oracle(fake_tower, wrong), benchmark, tmp_path / "out", **options)

    return run


OF_ONES_OWN = {"scienceqa", "textvqa", "easy_vqa", "jsonl"}  # their layouts are written in tests/data/test_formats.py


def test_no_format_is_without_a_layout() -> None:
    asked = {name for name in registry("formats") if format_of(name).gives == "questions"}
    assert {load_benchmark(card).format for card in CARDS} == asked - OF_ONES_OWN and len(asked) == 21


@pytest.mark.parametrize("card", CARDS)
def test_official_layout(card: str, ask, tmp_path: Path) -> None:
    result = ask(card)
    _, count, prompt = CARDS[card]
    assert (result["n"], result["n_skipped"], result["rows"]) == (count, 0, count)
    rows = list(read_predictions(tmp_path / "out" / "predictions.jsonl").values())
    assert rows[0]["prompt"] == prompt
    unscored = card in UNSCORED
    assert result["score"] == (None if unscored else 1.0)
    for category in load_benchmark(card).categories if not unscored else ():
        assert "(none)" not in result["by"][category] or card in ("vqav2_val", "okvqa")


OTHERS = {
    "textvqa": lambda root: _textvqa(root, "TextVQA_0.5.1_val.json"),
    "textvqa_ocr": lambda root: _textvqa(root, "TextVQA_0.5.1_val.json", "TextVQA_Rosetta_OCR_v0.2_val.json"),
    "sroie_pages": lambda root: _textvqa(root, "SROIE_TextVQA_format_test.json", images="images/test"),
    "sroie_lines": lambda root: _jsonl(root),
    "jsonl": lambda root: _jsonl(root),
}


def _textvqa(root: Path, name: str, ocr: str = "", images: str = "train_images") -> None:
    row = {"question": "What?", "image_id": "a", "answers": ["Acme Ltd"] * 10, "question_id": 1}
    dump(root / name, {"data": [row, row | {"question_id": 2, "answers": ["12.50"] * 10}]})
    if ocr:
        dump(root / ocr, {"data": [{"image_id": "a", "ocr_tokens": ["12.50"]}]})
    picture(root / images / "a.jpg")


def _jsonl(root: Path) -> None:
    rows = [{"id": str(n), "image": "a.png", "question": "What?", "answer": answer} for n, answer in enumerate(("ACME", "2 %"))]
    root.mkdir(parents=True, exist_ok=True)
    (root / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    picture(root / "images" / "a.png")
    picture(root / "test_images" / "a.png")


UNSCORED = ("vqav2", "vizwiz", "docvqa_test", "stvqa_test")  # test servers keep the answers


@pytest.mark.parametrize("card", [card for card in (*CARDS, *OTHERS) if card not in UNSCORED])
def test_a_right_answer_behind_thinking_is_right_on_every_benchmark(card: str, tmp_path: Path, fake_tower) -> None:
    benchmark = load_benchmark(card)
    root = tmp_path / benchmark.root
    root.mkdir(exist_ok=True, parents=True)
    (OTHERS[card] if card in OTHERS else CARDS[card][0])(root)
    for form in ("{}", "<think>No: yes, B, 7. 答案是A。</think>\n\n{}", "It is A or 3, no.</think>{}", "[THINK]zzz[/THINK] {}"):
        found = evaluate(
            Oracle(fake_tower, form=form), benchmark, tmp_path / "out", data_root=tmp_path, progress=False, resume=False
        )
        assert found["score"] == 1.0, form
        assert found["thinking_share"] == (form != "{}") and found["unparsed_share"] == 0


def test_the_numbers_that_papers_print(ask) -> None:
    assert ask("mme")["mme"]["perception"]["score"] == 2000 and ask("mme")["mme"]["cognition"]["score"] == 800
    assert ask("pope")["pope"]["f1_mean"] == 1.0


def test_mme_leaves_out_pictures_whose_other_question_is_gone(ask) -> None:
    result = ask("mme", limit=9)
    assert result["n"] == 9 and result["mme"]["unpaired"] % 2 == 1


def test_mmbench_counts_circles_and_sees_a_picture_once(ask, tmp_path: Path) -> None:
    result = ask("mmbench_en", wrong=("1000241",))
    assert result["score"] == pytest.approx(2 / 3)
    assert result["mmbench"] == {"circular": 0.5, "questions": 2, "rows": 3}
    rows = read_predictions(tmp_path / "out" / "predictions.jsonl")
    assert rows["241"]["images"] == rows["1000241"]["images"] != rows["252"]["images"]


def test_mmmu_says_what_guessing_would_give(ask) -> None:
    result = ask("mmmu", wrong=("validation_Art_1",))
    assert result["score"] == 0.5 and result["unparsed_share"] == 0.5
    assert result["mmmu"]["expected_with_guessing"] == pytest.approx((1 + 1 / 3) / 2)


def test_seed_needs_the_bare_letter(ask, tmp_path: Path, fake_tower) -> None:
    write_seed_image(tmp_path)
    benchmark = load_benchmark("seed_image")
    result = evaluate(fake_tower({"101": "C. thing c"}), benchmark, tmp_path / "out", data_root=tmp_path, progress=False)
    assert (result["score"], result["score_lenient"]) == (0.0, 1.0)


def test_likelihood_answers_letters_and_nothing_else(ask, tmp_path: Path) -> None:
    result = ask("mmmu", choices="likelihood")
    rows = read_predictions(tmp_path / "out" / "predictions.jsonl")
    assert result["choices_by"] == "likelihood" and rows["validation_Art_1"]["prediction"] in "ABC"
    assert rows["validation_Art_2"]["prediction"] == "12"


# ---- submissions ---------------------------------------------------------------------------------------------------------


def test_servers_files(ask, tmp_path: Path) -> None:
    def content(card: str) -> list:
        assert ask(card, wrong=("420", "7"))["submission"] == "submission.json"
        return json.loads((tmp_path / "out" / "submission.json").read_text(encoding="utf-8"))

    assert content("vqav2") == [{"question_id": 420, "answer": "zzz"}, {"question_id": 421, "answer": ""}]
    assert content("vizwiz")[0] == {"image": "VizWiz_test_00000000.jpg", "answer": ""}
    assert content("docvqa_test")[0] == {"questionId": 7, "answer": "zzz"}
    assert content("stvqa_test")[1] == {"question_id": 8, "answer": ""}


def test_mmbench_table_for_the_server(ask, tmp_path: Path) -> None:
    ask("mmbench_en", wrong=("252",))
    with zipfile.ZipFile(tmp_path / "out" / "submission.xlsx") as archive:
        assert archive.testzip() is None
        trees = {name: ElementTree.fromstring(archive.read(name)) for name in archive.namelist()}
    sheet = trees["xl/worksheets/sheet1.xml"]
    rows = [["".join(cell.itertext()) for cell in row] for row in sheet.iter() if row.tag.endswith("}row")]
    assert rows[0] == ["index", "question", "A", "B", "C", "D", "answer", "prediction"]
    assert rows[3] == ["252", "And here?", "1", "2", "3", "4", "D", "zzz"]
    assert rows[1][1] == 'Look\tleft\nWhich "one"\nis it?'


def test_a_split_without_answers_is_not_scored_in_silence(ask) -> None:
    with pytest.raises(DataError, match=r"2 of 2 questions have no answer.*--submission"):
        ask("vqav2", submission=False)
    with pytest.raises(DataError, match="no test server"):
        ask("gqa", submission=True)


# ---- mistakes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "name", "change", "message"),
    [
        ("gqa", "testdev_balanced_questions.json", {"1": {"question": 3}}, "'imageId'|'question'|'answer'"),
        ("okvqa", "mscoco_val2014_annotations.json", {"annotations": []}, "no answer to score"),
        ("okvqa", "mscoco_val2014_annotations.json", {"annotations": [{"question_id": 1, "answers": TEN}]}, "question 420"),
        ("docvqa", "val_v1.0_withQT.json", {"data": {}}, "a list is expected"),
        ("ocrvqa", "dataset.json", {"1": {"split": 2}}, "holds no questions"),
        ("vizwiz_val", "val.json", [{"image": "../x.jpg", "question": "?"}], "leaves its root"),
    ],
)
def test_mistakes_are_named(ask, tmp_path: Path, monkeypatch, card, name, change, message) -> None:
    root = tmp_path / load_benchmark(card).root
    writer, count, prompt = CARDS[card]
    monkeypatch.setitem(CARDS, card, (lambda root: (writer(root), dump(root / name, change)), count, prompt))
    with pytest.raises(DataError, match=message) as caught:
        ask(card)
    assert "\n" not in str(caught.value) and (root / name).exists()


def test_unknown_files_and_formats(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no format 'gqq'"):
        read_questions("gqq", tmp_path, "x")
    with pytest.raises(DataError, match="unknown key 'imagess'"):
        read_questions("gqa", tmp_path, "x", files={"imagess": "y"})
    with pytest.raises(DataError, match=r"testdev_questions\.json"):
        read_questions("gqa", tmp_path, "testdev")
