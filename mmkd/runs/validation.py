"""The split of the benchmarks on which a run chooses, never that on which its student is scored."""

from __future__ import annotations

from pathlib import Path

from mmkd.errors import DataError
from mmkd.evaluation.answer import evaluate
from mmkd.evaluation.benchmarks import Benchmark, load_benchmark
from mmkd.recipes.recipe import Recipe
from mmkd.towers.tower import Tower


def validation_benchmarks(recipe: Recipe) -> list[Benchmark]:
    """The recipe's benchmarks on their validation split. Raises DataError where that is the split on which they are scored."""
    spec, found = recipe.evaluation, []
    for name in spec.benchmarks if spec.validation is not None else ():
        benchmark = load_benchmark(name)
        if benchmark.split == spec.validation.split:
            raise DataError(f"evaluation.validation: {name} is scored on its split {benchmark.split!r}; choose on another one")
        found.append(benchmark.on_split(spec.validation.split))
    return found


def validation_scores(recipe: Recipe, tower: Tower, folder: Path, name: str, *, resume: bool = False) -> dict[str, float]:
    """{benchmark: score} of a model on the validation split; the answers are written below `folder`."""
    spec = recipe.evaluation
    return {
        benchmark.name: evaluate(
            tower, benchmark, folder / benchmark.name, data_root=recipe.data_root, batch_size=spec.batch_size,
            limit=spec.validation.limit, resume=resume, progress=False, model_name=name,
        )["score"]
        for benchmark in validation_benchmarks(recipe)
    }  # fmt: skip
