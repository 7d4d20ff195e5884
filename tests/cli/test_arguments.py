"""Values of options that several commands have."""

import argparse

import pytest

from mmkd.cli.arguments import values


def test_values_are_read_as_yaml():
    assert values("max_pixels=401408, enable_thinking=false,name=a b") == {
        "max_pixels": 401408, "enable_thinking": False, "name": "a b",
    }  # fmt: skip


@pytest.mark.parametrize("text", ["max_pixels", "=3", "a=[1"])
def test_what_is_no_value_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        values(text)
