"""The tables of `docs/methods/README.md` (from the registered terms) and `writing.md`: `python -m mmkd.testing.method_tables`."""

from __future__ import annotations

from pathlib import Path

from mmkd.base.yaml_files import read_mapping
from mmkd.registry import registry
from mmkd.teachers.teacher import Gives
from mmkd.terms.spec import TermSpec
from mmkd.terms.term import Term

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "methods"
MEASURED = FOLDER / "measured.yaml"  # name of a term -> what was measured, with the command that made it
NOT_YET = "not measured yet"
WRITING = FOLDER / "writing.yaml"

HEAD = """\
# Methods

Whole methods have pages of their own: [CPRD](cprd.md), [LLaVA-KD](llava_kd.md), [LLaVA-MoD](llava_mod.md),
[preference distillation](preference.md), [Switch-KD](switch_kd.md). What they are made of, and what else can be trained on, is
a *term*: one entry of `terms:` in a recipe's stage. `mmkd list terms` prints the options of each.

**Status** says what the source confirms and what is our choice. **Cache** says from which teacher cache (`docs/cache.md`) the
term can be trained: "exact" keeps hidden rows, "top-k" the likeliest tokens; "kept reference" means that log-probabilities of
whole answers are computed once. **Measured** is the accuracy on easy-VQA: 1,000 pictures with clean one-word labels, 300 steps
of 32 from a cached teacher of 90.8 %, weight 1, three seeds (`scripts/recipes/ablation_objectives.yaml`; intervals of Student's t
over seeds), against SFT of as many steps (67.7 %) and of equal compute (1,260 steps, 67.4 %). No objective is better or worse
than SFT there: with clean labels of one word, soft targets have little to add, and what limits the student is its number of
pictures. Where they do add something is in [the sample's results](../results/sample.md).

| term | what | source | status | cache | measured |
|---|---|---|---|---|---|
"""
FOOT = "\nThis table is written by `python -m mmkd.testing.method_tables`; edit the terms, not the table.\n"

_SIGNALS = frozenset({"rows", "features"})
EXACT = Gives("the exact cache", _SIGNALS | {"visual_rows", "gram"})
TOP_K = Gives("the top-k cache", _SIGNALS, top_k=64, mode="top-64")


def own_terms() -> dict[str, type[Term]]:
    """The terms of this project by name; those that other modules registered are left out."""
    found = {name: registry("terms").get(name) for name in registry("terms").names()}
    return {name: term for name, term in found.items() if term.__module__.startswith("mmkd.")}


def described(name: str) -> Term:
    """A term of this kind with no options but those that it cannot do without."""
    return TermSpec(kind=name, **registry("terms").get(name).example).build(name)


def served_by(term: Term) -> str:
    """Which teacher caches can serve a term."""
    if term.needs_pairs:
        return "kept reference"
    if not term.reads_teacher:
        return "needs no teacher"
    if term.positions == "generated":  # no cache has seen what the student will say
        return "no"
    served = [word for word, gives in (("exact", EXACT), ("top-k", TOP_K)) if term.refusal(gives) is None]
    return ", ".join(served) or "no"


def methods_table(measured: dict[str, str]) -> str:
    """One row a term. measured: what was measured, by name."""
    lines = []
    for name, term in own_terms().items():
        about, cache = registry("terms").about(name), served_by(described(name))
        cells = (f"`{name}`", about.summary, term.origin, term.status, cache, measured.get(name, NOT_YET))
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n")
    return "".join(lines)


def readme() -> str:
    """The whole of `docs/methods/README.md`."""
    return HEAD + methods_table(read_mapping(MEASURED, "what was measured") if MEASURED.exists() else {}) + FOOT


WRITING_HEAD = """\
# Data that models write, and samplers that ask them

Systems of write stages ([how they work](../write.md)), each with its recipe and the status of what it does, and samplers that
choose by what models say (`sampler:` of a stage). Terms are in [another table](README.md).

| system | what | source | status | recipes | measured |
|---|---|---|---|---|---|
"""
SAMPLERS_HEAD = """
| sampler | what | source | status | measured |
|---|---|---|---|---|
"""
WRITING_FOOT = "\nThis page is written by `python -m mmkd.testing.method_tables`; edit `writing.yaml`, not the page.\n"


def writing_page() -> str:
    """The whole of `docs/methods/writing.md`."""
    given = read_mapping(WRITING, "table of methods")
    rows, samplers = [], []
    for name, row in given["systems"].items():
        links = ", ".join(f"[`{recipe}`](../../scripts/recipes/write/{recipe}.yaml)" for recipe in row["recipes"])
        about = f"{name} | {row['what']} | {row['source']} | {row['status']}"
        rows.append(f"| {about} | {links} | {row.get('measured', NOT_YET)} |\n")
    for name, row in given["samplers"].items():
        summary = registry("samplers").about(name).summary
        samplers.append(f"| `{name}` | {summary} | {row['source']} | {row['status']} | {row.get('measured', NOT_YET)} |\n")
    return WRITING_HEAD + "".join(rows) + SAMPLERS_HEAD + "".join(samplers) + WRITING_FOOT


if __name__ == "__main__":
    (FOLDER / "writing.md").write_text(writing_page(), encoding="utf-8")
    target = FOLDER / "README.md"
    target.write_text(readme(), encoding="utf-8")
    print(f"wrote {target}")
