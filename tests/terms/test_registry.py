"""What holds for every registered term, and the table of methods that is made from them."""

import dataclasses
import inspect

import pytest
import torch

from mmkd.engine.positions import COUNTS, counts_by_name
from mmkd.registry import registry
from mmkd.terms.signals import SIGNALS
from mmkd.terms.spec import TermSpec
from mmkd.terms.term import Term
from mmkd.testing import method_tables

OBJECTIVES = (
    "taid", "sinkd", "pld", "bd_kd", "dac_kl", "span_consistency", "topkld", "first", "swing", "pwce", "skew_kl",
    "skew_reverse_kl", "adaptive_kl",
)  # fmt: skip
NAMES = sorted(method_tables.own_terms())


def test_all_objectives_are_there():
    assert set(OBJECTIVES) <= {*NAMES} and len(NAMES) >= 26


@pytest.mark.parametrize("name", NAMES)
def test_every_term_is_declared_in_full(name):
    found = registry("terms").get(name)
    assert issubclass(found, Term) and dataclasses.is_dataclass(found)
    term = TermSpec(kind=name, **found.example).build("t")
    assert type(term) is found and term.name == "t" and term.kind == name
    with pytest.raises(dataclasses.FrozenInstanceError):
        term.place = None
    assert term.needs and set(term.needs) <= {*SIGNALS}
    assert term.count in counts_by_name(torch.zeros(len(COUNTS)))
    about = registry("terms").about(name)
    assert about.summary.endswith(".")
    assert not about.summary.startswith(f"{found.__name__}("), "its docstring is the dataclass's own"
    assert set(about.options) == {f.name for f in dataclasses.fields(found)} - {"place"}
    assert found.origin and found.status.startswith(("confirmed", "our choice"))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_at_most_60_lines(name):
    assert len(inspect.getsource(registry("terms").get(name)).splitlines()) <= 60


def test_which_caches_serve_a_term():
    served = {name: method_tables.served_by(method_tables.described(name)) for name in NAMES}
    assert {name for name, word in served.items() if word == "exact, top-k"} == {
        "confident_teachers", "feature_match", "first", "forward_kl", "gated_teachers", "jsd", "mixed_teachers", "residual_match",
        "routed_teachers",
    }  # fmt: skip
    assert {name for name, word in served.items() if word == "no"} == {"adpa", "policy_gradient", "rewarded_reverse_kl", "spans"}
    assert {name for name, word in served.items() if word == "kept reference"} == {"dpo", "kto_pair"}
    without = {name for name, word in served.items() if word == "needs no teacher"}
    assert without == {"aspects", "contrastive", "cross_entropy", "group_reward", "load_balance", "pwce", "tags"}


def test_the_table_of_methods_is_current():
    text = (method_tables.FOLDER / "README.md").read_text(encoding="utf-8")
    assert text == method_tables.readme(), "run `python -m mmkd.testing.method_tables`"
    assert all(f"| `{name}` |" in text for name in NAMES)


def test_what_was_measured_stands_in_its_row():
    rows = method_tables.methods_table({"taid": "+1.2 ± 0.3 points"}).splitlines()
    assert [row for row in rows if "+1.2 ± 0.3 points" in row] == [row for row in rows if row.startswith("| `taid` |")]
    assert sum(method_tables.NOT_YET in row for row in rows) == len(rows) - 1
