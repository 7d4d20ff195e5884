#!/usr/bin/env python3
"""Write a benchmark of mmkd as a task of lmms-eval: the same questions, pictures, prompts and scorer.

    python scripts/lmms_eval/export.py sample_textvqa --data-root runs/sample --output runs/lmms_eval --limit 200
    python -m lmms_eval --model llava_hf --model_args pretrained=STUDENT,device=cpu,device_map=cpu --batch_size 1 \\
        --include_path runs/lmms_eval --tasks mmkd_sample_textvqa --log_samples --output_path runs/lmms_eval/out
    python scripts/lmms_eval/agree.py runs/evaluation/STUDENT/sample_textvqa/predictions.jsonl \\
        runs/lmms_eval/mmkd_sample_textvqa.jsonl runs/lmms_eval/out/STUDENT/*_samples_mmkd_sample_textvqa.jsonl

lmms-eval asks and generates; answers are scored by mmkd's scorers, so mmkd must be importable where it runs (PYTHONPATH).
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

TASK = """\
# Written by scripts/lmms_eval/export.py from the card {name}.
task: mmkd_{name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: !function utils.doc_to_target
process_results: !function utils.process_results
generation_kwargs:
  max_new_tokens: {max_new_tokens}
  temperature: 0
  do_sample: false
metric_list:
  - metric: mmkd_score
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 0.0
"""


def main() -> None:
    from mmkd.errors import DataError

    options = parse()
    try:
        print(export(options.benchmark, Path(options.output), options.data_root, options.limit, options.only_images))
    except DataError as error:
        sys.exit(f"export: {error}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", help="a card's name or path")
    parser.add_argument("--data-root", default=None)
    parser.add_argument("--output", required=True, help="the folder for --include_path")
    parser.add_argument("--limit", type=int, default=None, help="the same random part that `mmkd evaluate --limit` asks")
    parser.add_argument("--only-images", action="store_true", help="leave out questions without a picture")
    return parser.parse_args()


def export(name: str, output: Path, data_root: str | None, limit: int | None, only_images: bool) -> Path:
    """Writes OUTPUT/mmkd_NAME.yaml, its rows, utils.py, and pictures that lie in archives; returns the task file."""
    from mmkd.evaluation.benchmarks import load_benchmark

    card = load_benchmark(name)
    questions = card.read(data_root, limit)
    output.mkdir(parents=True, exist_ok=True)
    rows = [row_of(card, question, output / "images") for question in questions if question.images or not only_images]
    path = output.resolve() / f"mmkd_{card.name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shutil.copy(HERE / "utils.py", output)
    task = output / f"mmkd_{card.name}.yaml"
    task.write_text(TASK.format(name=card.name, rows=path, max_new_tokens=card.max_new_tokens), encoding="utf-8")
    return task


def row_of(card, question, folder: Path) -> dict:
    turn = card.render(question).turns[-1]
    return {
        "id": question.id,
        "prompt": turn.text,
        "images": [picture_file(ref, folder) for ref in question.images],
        "choices": list(question.choices),
        "categories": json.dumps(question.categories),
        "references": list(card.references(question)),
        "parser": card.parser,
        "metric": card.metric,
    }


def picture_file(ref, folder: Path) -> str:
    """The picture's path; one in an archive or a table is written to `folder`."""
    path = ref.root / ref.name
    if path.is_file():
        return str(path.resolve())
    target = folder / ref.name.replace("/", "_")
    folder.mkdir(parents=True, exist_ok=True)
    target.write_bytes(ref.read_bytes())
    return str(target.resolve())


if __name__ == "__main__":
    main()
