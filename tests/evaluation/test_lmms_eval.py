"""The tasks for lmms-eval: what it would read and call gives mmkd's prompts and scores; its own run is in docs/evaluation.md."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import yaml

from mmkd.evaluation.answer import evaluate
from mmkd.evaluation.results import read_predictions

FOLDER = Path(__file__).parents[2] / "scripts" / "lmms_eval"
CARD = "title: tiny\nformat: jsonl\nroot: tiny\nsplit: test\nprompt_style: short\nmetric: exact_match\nmax_new_tokens: 7\n"


def script(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=100)


def functions_in(path: Path):
    spec = importlib.util.spec_from_file_location("task_functions", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_task_asks_and_scores_as_the_card_does(data: Path, tmp_path: Path, benchmark_of, fake_tower) -> None:
    (tmp_path / "tiny.yaml").write_text(CARD, encoding="utf-8")
    out = tmp_path / "tasks"
    done = script(str(FOLDER / "export.py"), str(tmp_path / "tiny.yaml"), "--data-root", str(data), "--output", str(out))
    assert done.returncode == 0, done.stderr
    task = yaml.safe_load(Path(done.stdout.strip()).read_text(encoding="utf-8").replace("!function ", ""))
    assert task["generation_kwargs"] == {"max_new_tokens": 7, "temperature": 0, "do_sample": False}
    rows = [json.loads(line) for line in Path(task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()]
    functions = functions_in(out / task["doc_to_text"].replace(".doc_to_text", ".py"))

    benchmark = benchmark_of(prompt_style="short", max_new_tokens=7)
    answers = {"red-1": " wrong ", "blue-2": " 2 "}
    evaluate(fake_tower(answers), benchmark, tmp_path / "mmkd", data_root=data, progress=False)
    ours = read_predictions(tmp_path / "mmkd" / "predictions.jsonl")
    assert [row["id"] for row in rows] == list(ours)
    for row in rows:
        expected = ours[row["id"]]
        assert functions.doc_to_text(row) == expected["prompt"]
        assert [picture.size for picture in functions.doc_to_visual(row)] == [(8, 8)] * len(expected["images"])
        said = answers.get(row["id"], expected["references"][0])
        assert functions.process_results(row, [said]) == {"mmkd_score": expected["score"]}

    samples = [
        {"doc_id": n, "filtered_resps": ours[row["id"]]["prediction"], "mmkd_score": ours[row["id"]]["score"]}
        for n, row in enumerate(rows)
    ]
    compared = [str(FOLDER / "agree.py"), str(tmp_path / "mmkd" / "predictions.jsonl"), str(out / "mmkd_tiny.jsonl")]
    path = tmp_path / "samples.jsonl"
    for changed, code in ((False, 0), (True, 1)):
        samples[3]["mmkd_score"] = 1.0 if changed else samples[3]["mmkd_score"]
        path.write_text("".join(json.dumps(row) + "\n" for row in samples), encoding="utf-8")
        done = script(*compared, str(path))
        assert done.returncode == code, done.stderr
        assert json.loads(done.stdout)["scores_differ"] == code


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    done = script(str(FOLDER / "export.py"), "pop", "--output", str(tmp_path))
    assert done.returncode == 1 and "did you mean 'pope'" in done.stderr and done.stderr.count("\n") == 1
