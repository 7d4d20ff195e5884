"""ST-VQA (Biten et al. 2019), its third task."""

from __future__ import annotations

from mmkd.data.formats.docvqa import DocVQA
from mmkd.registry import register


@register("formats", "stvqa")
class STVQA(DocVQA):
    """ST-VQA: {split}_task_3.json with {"data": [...]}, pictures by paths below the root."""

    files = {"annotations": "{split}_task_3.json"}
    keys = ("question_id", "file_path", "")
