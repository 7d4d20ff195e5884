#!/usr/bin/env python3
"""Compare mmkd's answers with lmms-eval's, question by question.

    python scripts/lmms_eval/agree.py predictions.jsonl mmkd_NAME.jsonl SAMPLES.jsonl

mmkd_NAME.jsonl are the rows that export.py wrote, SAMPLES what lmms-eval wrote with --log_samples. Prints how many questions
have another answer or another score, and which; exit code 1 where a score differs.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
SHOWN = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("predictions", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("samples", type=Path)
    options = parser.parse_args()
    result = compare(options.predictions, options.rows, options.samples)
    print(json.dumps(result, indent=1, ensure_ascii=False))
    sys.exit(result["scores_differ"] > 0)


def compare(predictions: Path, rows: Path, samples: Path) -> dict:
    """{"questions", "answers_differ", "scores_differ", "mmkd", "lmms_eval", "first"}, the means over the same questions."""
    from mmkd.evaluation.results import read_predictions

    ours = read_predictions(predictions)
    names = [row["id"] for row in json_lines(rows)]
    theirs = {names[row["doc_id"]]: row for row in json_lines(samples)}
    pairs = [(ours[name], theirs[name]) for name in theirs if name in ours and not ours[name]["skipped"]]
    if not pairs:
        sys.exit(f"{predictions} and {samples} have no question in common")
    answers = [pair for pair in pairs if pair[0]["prediction"] != text_of(pair[1]).strip()]
    scores = [pair for pair in pairs if pair[0]["score"] != pair[1]["mmkd_score"]]
    return {
        "questions": len(pairs),
        "answers_differ": len(answers),
        "scores_differ": len(scores),
        "mmkd": sum(row["score"] for row, _ in pairs) / len(pairs),
        "lmms_eval": sum(row["mmkd_score"] for _, row in pairs) / len(pairs),
        "first": [[row["id"], row["prediction"], text_of(other)] for row, other in answers[:SHOWN]],
    }


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def text_of(row: dict) -> str:
    """The answer in a row of lmms-eval's samples, which nests it differently from version to version."""
    value = row["filtered_resps"]
    while isinstance(value, list):
        value = value[0]
    return value


if __name__ == "__main__":
    main()
