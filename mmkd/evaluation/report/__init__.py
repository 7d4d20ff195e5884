"""The report of a run or of several models: one HTML page that needs nothing else, made from files of evaluations alone."""

from mmkd.evaluation.report.files import ModelFiles, roles_of
from mmkd.evaluation.report.page import build_comparison, build_report

__all__ = ["ModelFiles", "build_comparison", "build_report", "roles_of"]
