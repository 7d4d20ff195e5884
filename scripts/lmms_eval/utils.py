"""What lmms-eval calls for a task that export.py wrote: one row's pictures, prompt, and score by mmkd's scorers."""

import json

from PIL import Image

from mmkd.data.samples import Question
from mmkd.evaluation.metric import metric_of, parser_of
from mmkd.towers.thinking import without_thinking


def doc_to_visual(doc):
    return [Image.open(path).convert("RGB") for path in doc["images"]]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["prompt"]


def doc_to_target(doc):
    return doc["references"][0] if doc["references"] else ""


def process_results(doc, results):
    # mmkd takes white space from the ends of an answer: templates may leave a space before it
    answer, _ = without_thinking(results[0].strip())
    parsed = None if answer is None else parser_of(doc["parser"]).parse(answer, doc["choices"])
    answers = {"references": tuple(doc["references"]), "choices": tuple(doc["choices"])}
    question = Question(doc["id"], doc["prompt"], **answers, categories=json.loads(doc["categories"]))
    return {"mmkd_score": 0.0 if parsed is None else metric_of(doc["metric"]).score(parsed, question)}
