"""The tables of `evaluation/README.md`, from the cards: `python -m mmkd.testing.benchmark_tables` writes them."""

from __future__ import annotations

from pathlib import Path

from mmkd.base.cards import list_cards
from mmkd.evaluation.benchmarks import KIND, SUITES, benchmark_names, load_benchmark
from mmkd.evaluation.suites import load_suite
from mmkd.retrieval.benchmark import load_retrieval, retrieval_names

README_HEAD = """\
The code is in `mmkd/evaluation`; this folder holds cards only.

# Benchmarks

A card says where a benchmark's questions come from, how they are asked, and how the answers are scored. Try
`mmkd evaluate MODEL --benchmarks scienceqa --data-root DIR`: the data is looked for in `DIR/<root>`, then
in `DIR`. Cards of your own go into `<folder>/evaluation/`, with `MMKD_CARDS=<folder>`, or are given by path.

A result names its split, rows, prompt, OCR switch, parser and data fingerprint. Compare a number with a
published one only where all of these agree: ScienceQA alone goes by two numbers (all questions, image
questions), TextVQA by two prompts. Reference scores stand as their source states them; none was measured again here.

"""
README_FOOT = (
    "\nThese tables are written by `python -m mmkd.testing.benchmark_tables`; edit the cards, not the tables.\n"
)


def readme_table() -> str:
    """The cards of this project as a Markdown table, one row a benchmark."""
    lines = [
        "| benchmark | what | split (rows) | prompt | parser → metric | reference scores |",
        "|---|---|---|---|---|---|",
    ]
    for name in benchmark_names():
        card = load_benchmark(name)
        rows = f"{card.expected_rows:,}" if card.expected_rows else "any"
        prompt = card.prompt_style + (" + OCR tokens" if card.ocr else "")
        metrics = ", ".join((card.metric, *card.also))
        published = "; ".join(f"{r.model} {r.score:g} ({r.subset})" for r in card.reference_scores)
        lines.append(
            f"| `{name}` | {card.title} | {card.split} ({rows}) | {prompt} | {card.parser} → {metrics} "
            f"| {published or '–'} |"
        )
    return "\n".join(lines) + "\n"


SUITES_HEAD = """
# Suites

`mmkd evaluate MODEL --suite NAME --data-root DIR` asks all of them and writes `suite.json` with the average. Values that
only a test server knows are given by `--server-scores vqav2=77.7,vizwiz=41.5`.

| suite | what | benchmarks | average of published models |
|---|---|---|---|
"""


def suites_table() -> str:
    """The suites of this project as a Markdown table, one row a suite."""
    lines = []
    for name in (n.removeprefix(SUITES) for n in list_cards(KIND) if n.startswith(SUITES)):
        suite = load_suite(name)
        parts = ", ".join(part.benchmark for part in suite.parts)
        published = "; ".join(f"{r.model} {r.score:g}" for r in suite.reference_scores)
        lines.append(f"| `{name}` | {suite.title} | {parts} | {published or '–'} |\n")
    return SUITES_HEAD + "".join(lines)


RETRIEVAL_HEAD = """
# Retrieval

For dual encoders (CLIP, SigLIP, those of `mmkd rank`): `mmkd evaluate MODEL --benchmarks flickr30k --data-root DIR` gives
recall at 1, 5 and 10 both ways.

| benchmark | what | split (pictures) |
|---|---|---|
"""


def retrieval_table() -> str:
    """The retrieval cards of this project as a Markdown table."""
    cards = [load_retrieval(name) for name in retrieval_names()]
    return RETRIEVAL_HEAD + "".join(
        f"| `{card.name}` | {card.title} | {card.split} ({card.expected_pictures:,}) |\n" for card in cards
    )


def readme() -> str:
    """The whole of `evaluation/README.md`."""
    return README_HEAD + readme_table() + suites_table() + retrieval_table() + README_FOOT


if __name__ == "__main__":
    target = Path(__file__).resolve().parents[2] / KIND / "README.md"
    target.write_text(readme(), encoding="utf-8")
    print(f"wrote {target}")
