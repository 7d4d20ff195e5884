"""Evaluation: benchmarks, answers, scores, comparison of models and the report of a run."""
