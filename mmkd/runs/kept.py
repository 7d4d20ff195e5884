"""A teacher that reads each sample once in a run (`teacher.keep: true`): its cache is written before training."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path

from mmkd.base.distributed import alone_in, world_size
from mmkd.recipes.recipe import Recipe
from mmkd.runs.write_cache import about_of, plan_of, write_cache
from mmkd.teachers.teacher import Teacher

logger = logging.getLogger(__name__)

FOLDER = "kept"  # beside the runs, shared by all whose terms compare with the same rows of the same teacher
BATCH = 64


def keeps(recipe: Recipe) -> bool:
    """Whether the run writes its teacher's cache itself. Several processes do not: their teacher reads each batch."""
    asked = recipe.teacher is not None and recipe.teacher.keep and recipe.teacher.cache is None
    asked = asked and any(term.needs_teacher for term in recipe.all_terms().values())  # answers alone are kept as answers
    if asked and world_size() > 1:
        logger.warning(
            "teacher.keep: several processes keep nothing, the teacher reads each batch; to have it read each sample once, run "
            "`mmkd cache RECIPE teacher.cache=FOLDER` first, and train with teacher.cache=FOLDER"
        )
    return asked and world_size() == 1


def with_kept_teacher(recipe: Recipe, teachers: Mapping[str, Teacher]) -> Recipe:
    """The recipe with the cache of its teacher, which is written here where something is missing.

    teachers: the same, loaded. Raises what `write_cache` raises.
    """
    (teacher,) = teachers.values()
    facts = json.dumps([teacher.fingerprint(), about_of(recipe, plan_of(recipe, None))], sort_keys=True, default=str)
    folder = Path(recipe.output).parent / FOLDER / hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()
    kept = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"cache": str(folder)})})
    with alone_in(folder, "the same signals of the teacher", wait=True):
        logger.info("the teacher reads each sample once; what it says is kept in %s", folder)
        write_cache(kept, folder, batch_size=BATCH)
    return kept
