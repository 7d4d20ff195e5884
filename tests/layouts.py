"""Small sets in the layouts of the benchmarks' authors, written from their descriptions, and a model that knows the answers."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from string import ascii_uppercase

from PIL import Image

from mmkd.data.formats.mme import TASKS as MME_TASKS

TEN = [{"answer": "red", "answer_id": n, "answer_confidence": "yes"} for n in range(1, 11)]


def picture(path: Path, shade: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade % 256, 0, 0)).save(path)
    return path


def encoded(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((16, 16), 40 + shade).convert("RGB").save(stream, format="PNG")
    return stream.getvalue()


def dump(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def vqa(root: Path, questions: str, annotations: str, folder: str) -> None:
    rows = [{"image_id": 42, "question": f"Which color {n}?", "question_id": 420 + n} for n in range(2)]
    answers = [{"question_id": row["question_id"], "image_id": 42, "answers": TEN, "answer_type": "other"} for row in rows]
    dump(root / questions, {"info": {}, "questions": rows})
    if annotations:
        dump(root / annotations, {"annotations": answers[::-1]})  # the order is not the questions'
    picture(root / folder / f"COCO_{folder}_000000000042.jpg")


def write_vqav2(root: Path) -> None:
    vqa(root, "v2_OpenEnded_mscoco_test-dev2015_questions.json", "", "test2015")


def write_vqav2_val(root: Path) -> None:
    vqa(root, "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json", "val2014")


def write_okvqa(root: Path) -> None:
    vqa(root, "OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json", "val2014")


def write_gqa(root: Path) -> None:
    row = {"question": "Is it red?", "answer": "yes", "imageId": "n7", "types": {"structural": "verify", "semantic": "attr"}}
    dump(root / "testdev_balanced_questions.json", {"201": row, "202": row | {"answer": "no"}})
    picture(root / "images" / "n7.jpg")


def write_vizwiz(root: Path, split: str = "test") -> None:
    rows = [{"image": f"VizWiz_{split}_0000000{n}.jpg", "question": "What is this?"} for n in range(2)]
    if split == "val":
        rows = [row | {"answers": TEN, "answer_type": "other", "answerable": 1} for row in rows]
    dump(root / f"{split}.json", rows)
    for number, row in enumerate(rows):
        picture(root / split / row["image"], number)


def write_vizwiz_val(root: Path) -> None:
    write_vizwiz(root, "val")


def write_aokvqa(root: Path) -> None:
    row = {
        "split": "val", "image_id": 42, "question": "What is it?", "choices": ["cat", "dog", "cow", "bird"],
        "correct_choice_idx": 1, "direct_answers": ["dog"] * 9 + ["puppy"], "difficult_direct_answer": False,
    }  # fmt: skip
    dump(root / "aokvqa_v1p0_val.json", [row | {"question_id": "a1"}, row | {"question_id": "a2"}])
    picture(root / "val2017" / "000000000042.jpg")


def document(root: Path, name: str, keys: tuple[str, str], answers: bool) -> None:
    row = {keys[1]: "documents/p1.png", "question": "Who signed?", "question_types": ["handwritten"]}
    row |= {"answers": ["A. Smith", "Smith"]} if answers else {}
    dump(root / name, {"dataset_name": "x", "data": [row | {keys[0]: n} for n in (7, 8)]})
    picture(root / "documents" / "p1.png")


def write_docvqa(root: Path) -> None:
    document(root, "val_v1.0_withQT.json", ("questionId", "image"), True)


def write_docvqa_test(root: Path) -> None:
    document(root, "test_v1.0.json", ("questionId", "image"), False)


def write_stvqa(root: Path) -> None:
    document(root, "train_task_3.json", ("question_id", "file_path"), True)


def write_stvqa_test(root: Path) -> None:
    document(root, "test_task_3.json", ("question_id", "file_path"), False)


def write_chartqa(root: Path) -> None:
    for part, label in (("human", "0.57"), ("augmented", "Inspired")):
        dump(root / "test" / f"test_{part}.json", [{"imgname": "41.png", "query": "How many?", "label": label}])
    picture(root / "test" / "png" / "41.png")


def write_ocrvqa(root: Path) -> None:
    book = {"questions": ["Who wrote this?", "What is the title?"], "answers": ["Ann", "Fog"], "genre": "Art", "title": "Fog"}
    book["imageURL"] = "http://books/41x.jpg"
    dump(root / "dataset.json", {"0761": book | {"split": 3}, "0762": book | {"split": 1}})
    picture(root / "images" / "0761.jpg")


def write_ai2d(root: Path) -> None:
    asked = {"abcLabel": False, "answerTexts": ["root", "leaf"], "correctAnswer": 1}
    questions = {"Which is green?": asked | {"questionId": "3.png-0"}}
    questions["Which is A?"] = asked | {"abcLabel": True, "questionId": "3.png-1", "correctAnswer": 0}
    dump(root / "ai2d" / "questions" / "3.png.json", {"imageName": "3.png", "questions": questions})
    (root / "ai2d_test_ids.csv").write_text("3\n8\n", encoding="utf-8")
    picture(root / "ai2d" / "images" / "3.png")
    picture(root / "ai2d" / "abcImages" / "3.png", 9)


def write_seed_image(root: Path) -> None:
    row = {f"choice_{c}": f"thing {c}" for c in "abcd"} | {"answer": "C", "question": "What is it?", "segment": [0, 1]}
    row |= {"data_id": "454.jpg", "question_type_id": 2}
    rows = [row | {"question_id": "101", "data_type": "image"}, row | {"question_id": "102", "data_type": "video"}]
    dump(root / "SEED-Bench.json", {"questions": rows, "question_type": {"Scene": 1, "Instance": 2}})
    picture(root / "SEED-Bench-image" / "454.jpg")


def mmbench(root: Path, split: str) -> None:
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "l2-category", "split"]
    image = base64.b64encode(encoded(1)).decode()
    other = base64.b64encode(encoded(2)).decode()
    rows = [
        ["241", 'Which "one"\nis it?', "Look\tleft", "cat", "dog", "", "", "A", "id", image, "coarse", "dev"],
        ["1000241", 'Which "one"\nis it?', "Look\tleft", "dog", "cat", "", "", "B", "id", "241", "coarse", "dev"],
        ["252", "And here?", "", "1", "2", "3", "4", "D", "count", other, "fine", "dev"],
    ]
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"mmbench_{split}.tsv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, delimiter="\t").writerows([columns, *rows])


def write_mmbench_en(root: Path) -> None:
    mmbench(root, "dev_20230712")


def write_mmbench_cn(root: Path) -> None:
    mmbench(root, "dev_cn_20231003")


def write_mmmu(root: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    base = {f"image_{n}": None for n in range(3, 8)}
    first = {"bytes": encoded(1), "path": "a.png"}
    rows = [
        base | {"id": "validation_Art_1", "question": "Which is <image 1>?", "options": "['<image 2>', 'b', 'c']",
                "answer": "B", "question_type": "multiple-choice", "image_1": first, "image_2": first},
        base | {"id": "validation_Art_2", "question": "How many in <image 1>?", "options": "[]", "answer": "['12', 'twelve']",
                "question_type": "open", "image_1": first, "image_2": None},
    ]  # fmt: skip
    path = root / "Art" / "validation-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_mme(root: Path) -> None:
    for number, task in enumerate(task for tasks in MME_TASKS.values() for task in tasks):
        apart = task in ("posters", "celebrity", "scene", "landmark", "artwork")
        folder = root / task
        picture(folder / ("images" if apart else ".") / "0001.jpg", number)
        text = "Is it a cat? Please answer yes or no.\tYes\nIs it a dog? Please answer yes or no.\tNo\n"
        path = folder / ("questions_answers_YN" if apart else ".") / "0001.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


def write_pope(root: Path) -> None:
    row = {"image": "COCO_val2014_000000000042.jpg", "text": "Is there a dog in the image?"}
    for sampling in ("random", "popular", "adversarial"):
        rows = [row | {"question_id": n, "label": label} for n, label in ((1, "yes"), (2, "no"))]
        (root / f"coco_pope_{sampling}.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    picture(root / "val2014" / row["image"])


def write_chair_coco(root: Path) -> None:
    instances = {
        "categories": [{"id": 18, "name": "dog"}, {"id": 44, "name": "bottle"}],
        "images": [{"id": 42}, {"id": 7}],
        "annotations": [{"id": 1, "image_id": 42, "category_id": 18}, {"id": 2, "image_id": 42, "category_id": 18}],
    }
    captions = [{"id": 1, "image_id": 42, "caption": "A puppy beside two women."}, {"id": 2, "image_id": 7, "caption": "Sky."}]
    dump(root / "annotations" / "instances_val2014.json", instances)
    dump(root / "annotations" / "captions_val2014.json", {"annotations": captions})
    for number in (7, 42):
        picture(root / "val2014" / f"COCO_val2014_{number:012d}.jpg", number)


def write_object_halbench(root: Path) -> None:
    write_chair_coco(root)
    row = {"org_idx": 0, "image_id": 42, "question": "Tell me all that you see.", "image": "aGk="}
    (root / "obj_halbench_300_with_image.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")


def write_math_vision(root: Path) -> None:
    row = {"question": "How many?\n<image1>", "image": "images/6.jpg", "solution": None, "level": 3, "subject": "logic"}
    rows = [row | {"id": "6", "options": ["a cat", "$2$"], "answer": "B"}, row | {"id": "8", "options": [], "answer": "4.8"}]
    (root / "testmini.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    picture(root / "images" / "6.jpg")


BOXED = (
    'Please solve the problem and put your answer in one "\\boxed{}". '
    'If it is a multiple choice question, only one letter is allowed in the "\\boxed{}".'
)

# card -> (writer, questions, one prompt in full)
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
CARDS: dict[str, tuple[Callable[[Path], None], int, str]] = {
    "vqav2": (write_vqav2, 2, f"Which color 0?\n{SHORT}"),
    "vqav2_val": (write_vqav2_val, 2, f"Which color 0?\n{SHORT}"),
    "okvqa": (write_okvqa, 2, f"Which color 0?\n{SHORT}"),
    "gqa": (write_gqa, 2, f"Is it red?\n{SHORT}"),
    "vizwiz": (write_vizwiz, 2, f"What is this?\n{UNANSWERABLE}\n{SHORT}"),
    "vizwiz_val": (write_vizwiz_val, 2, f"What is this?\n{UNANSWERABLE}\n{SHORT}"),
    "aokvqa": (write_aokvqa, 2, f"What is it?\nA. cat\nB. dog\nC. cow\nD. bird\n{LETTER}"),
    "aokvqa_direct": (write_aokvqa, 2, f"What is it?\n{SHORT}"),
    "stvqa": (write_stvqa, 2, f"Who signed?\n{SHORT}"),
    "stvqa_test": (write_stvqa_test, 2, f"Who signed?\n{SHORT}"),
    "docvqa": (write_docvqa, 2, f"Who signed?\n{SHORT}"),
    "docvqa_test": (write_docvqa_test, 2, f"Who signed?\n{SHORT}"),
    "chartqa": (write_chartqa, 2, f"How many?\n{SHORT}"),
    "ocrvqa": (write_ocrvqa, 2, f"Who wrote this?\n{SHORT}"),
    "ai2d": (write_ai2d, 2, f"Which is green?\nA. root\nB. leaf\n{LETTER}"),
    "seed_image": (write_seed_image, 1, f"What is it?\nA. thing a\nB. thing b\nC. thing c\nD. thing d\n{LETTER}"),
    "mmbench_en": (write_mmbench_en, 3, f'Look\tleft\nWhich "one"\nis it?\nA. cat\nB. dog\n{LETTER}'),
    "mmbench_cn": (write_mmbench_cn, 3, 'Look\tleft\nWhich "one"\nis it?\nA. cat\nB. dog\n请直接回答选项字母。'),
    "mmmu": (write_mmmu, 2, f"Which is <image 1>?\n\n(A) <image 2>\n(B) b\n(C) c\n\n\n{LETTER}"),
    "mme": (write_mme, 28, f"Is it a cat?\n{SHORT}"),
    "pope": (write_pope, 6, f"Is there a dog in the image?\n{SHORT}"),
    "math_vision": (write_math_vision, 2, f"{BOXED}\nHow many?\n(A) a cat\n(B) $2$"),
    "chair_coco": (write_chair_coco, 2, "Please describe this image in detail."),
    "object_halbench": (write_object_halbench, 1, "Tell me all that you see."),
}


class Oracle:
    """Answers every question rightly, from its own fields; with "wrong" the questions of those ids get "zzz".

    form: what it writes around its answer.
    """

    def __init__(self, fake_tower, wrong: tuple[str, ...] = (), form: str = "{}") -> None:
        self.tower, self.wrong, self.form = fake_tower(), wrong, form

    def __getattr__(self, name: str):
        return getattr(self.tower, name)

    def answer(self, samples, *, max_new_tokens, vision_cache):
        self.tower.answer(samples, max_new_tokens=max_new_tokens, vision_cache=vision_cache)
        return ["zzz" if sample.id in self.wrong else self.form.format(self.right(sample)) for sample in samples]

    def right(self, sample) -> str:
        question = sample.meta["question"]
        by_letter = question.answer_index is not None
        return ascii_uppercase[question.answer_index] if by_letter else question.answer
