"""The official scorers' own answers, where they are at hand."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mmkd.evaluation.normalise import normalise_evalai, normalise_vqav2
from mmkd.evaluation.tasks.chartqa import relaxed_accuracy
from mmkd.evaluation.tasks.docvqa import anls
from mmkd.evaluation.tasks.letters import scienceqa_index, scienceqa_parse
from mmkd.evaluation.tasks.mme import mme_parse
from mmkd.evaluation.tasks.pope import pope_parse
from mmkd.evaluation.tasks.vqa import stvqa_accuracy, textvqa_accuracy, vqa_accuracy

CASES = Path(os.environ.get("MMKD_SCORER_CASES", Path(__file__).parents[4] / "shared" / "data" / "scorers"))


def _check(name: str, case: dict) -> tuple[object, object]:
    """(what we say, what the official scorer says) of one case."""
    if name == "scienceqa_llava":
        letter = scienceqa_parse(case["prediction"], case["num_choices"])
        index = scienceqa_index(letter, case["num_choices"])
        ours = {"parsed": letter or "FAILED", "index": index, "correct": index == case["label"]}
        return ours, case["expected"]
    if name.endswith("_normalise"):
        return {"textvqa_evalai_normalise": normalise_evalai, "vqav2_normalise": normalise_vqav2}[name](
            case["text"]
        ), case["expected"]
    if name.endswith("_parse"):
        return {"pope_parse": pope_parse, "mme_parse": mme_parse}[name](case["prediction"]), case["expected"]
    metrics = {
        "vqav2_soft_accuracy": vqa_accuracy,
        "textvqa_evalai_accuracy": textvqa_accuracy,
        "stvqa_accuracy": stvqa_accuracy,
        "chartqa_relaxed": relaxed_accuracy,
        "anls": anls,
    }
    expected = case["expected"]["docvqa_mp_docvqa_evaluator"] if name == "anls" else float(case["expected"])
    return metrics[name](case["prediction"], case["references"]), pytest.approx(expected, abs=1e-9)


@pytest.mark.skipif(not CASES.is_dir(), reason=f"no official cases in {CASES} (set MMKD_SCORER_CASES)")
def test_official_cases() -> None:
    files = sorted(CASES.glob("*.jsonl"))
    wrong, count = [], 0
    for path in files:
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line.strip():
                case = json.loads(line)
                ours, official = _check(path.stem, case)
                count += 1
                wrong += [] if ours == official else [(case, ours)]
    assert not wrong
    assert len(files) == 10 and count >= 500
