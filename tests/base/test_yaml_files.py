"""YAML as people write it, and bounds on what else it can be: one line each, at once."""

import os
import time

import pytest

from mmkd.base.yaml_files import MAX_BYTES, parse, read_mapping
from mmkd.errors import DataError

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {k: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join(['*' + old] * 10)}]}}\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
ODD = {
    "an int that is none": "seed: !!int abc",
    "a float that is none": "seed: !!float abc",
    "a time that is none": "seed: !!timestamp abc",
    "an alias bomb": BOMB,
    "a merge bomb": MERGES,
    "itself": "a: &a [*a]",
    "itself as a key": "a: &a {? *a : 1}",
    "itself by merging": "a: &a {<<: *a}",
    "many digits": "seed: " + "9" * 5000,
    "many digits of a float": "seed: " + "9" * 5000 + ".5",
    "deep lists": "a: " + "[" * 5000,
    "deep mappings": "".join(" " * n + f"k{n}:\n" for n in range(400)),
    "nul": 'output: "a\\0b"',
    "half a surrogate": 'output: "a\\ud800b"',
    "python": "!!python/object/apply:os.getcwd []",
    "an unknown tag": "a: !thing 1",
    "no alias": "a: *nowhere",
    "a list as a key": "? [a, b]\n: 1",
    "twice": "a: 1\na: 2",
    "two documents": "a: 1\n---\nb: 2",
    "a tab": "a:\n\t- 1",
    "binary": "a: \x07",
    "merge of a number": "<<: 5\na: 1",
    "sexagesimal": "a: !!int 1:9x:3",
    "base": "a: !!int 0b2",
}


@pytest.mark.parametrize("name", ODD)
def test_odd_yaml_is_refused_on_one_line_at_once(name, tmp_path):
    (tmp_path / "x.yaml").write_bytes(ODD[name].encode())
    began = time.process_time()
    with pytest.raises(DataError, match=r"x\.yaml is no valid YAML: \S") as caught:
        read_mapping(tmp_path / "x.yaml", "card")
    assert time.process_time() - began < 2 and len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 600


def test_files_that_are_none(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "large.yaml").write_text("a: 1\n" + "# and so on\n" * (MAX_BYTES // 10))
    for path in (tmp_path / "folder.yaml", tmp_path / "pipe.yaml", tmp_path / "large.yaml", "/dev/zero"):
        with pytest.raises(DataError, match="no valid YAML"):
            read_mapping(type(tmp_path)(path), "card")
    with pytest.raises(DataError, match="cannot be read"):
        read_mapping(tmp_path / ("n" * 5000), "card")
    with pytest.raises(DataError):
        read_mapping(tmp_path / "a\0b", "card")


def test_what_people_write_stays():
    text = "base: &base {lr: 1e-3, steps: 10}\nsft: {<<: *base, steps: 20}\nwhen: 2024-05-01\nn: 12_000\nlist: [*base, *base]"
    assert parse(text) == {
        "base": {"lr": 1e-3, "steps": 10}, "sft": {"lr": 1e-3, "steps": 20}, "when": "2024-05-01", "n": 12000,
        "list": [{"lr": 1e-3, "steps": 10}] * 2,
    }  # fmt: skip
    assert parse("2001-99-99") == "2001-99-99" and parse("[1, 2.5, -3e2, true, null]") == [1, 2.5, -300.0, True, None]
