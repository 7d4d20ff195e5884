"""What messages make of text that is none of ours."""

from mmkd.errors import one_line, printable, shown


def test_a_terminal_is_not_written_to_by_names_in_data():
    assert printable("\x1b]0;owned\x07 a\x9b31m\r b\u202eexe") == "\\x1b]0;owned\\x07 a\\x9b31m\\r b\\u202eexe"
    assert printable("日本語 👩‍🔬 é\n\tkept") == "日本語 👩‍🔬 é\n\tkept" and printable("\ud800") == "\\ud800"


def test_long_and_unprintable_values_are_short():
    assert len(one_line("x\n" * 5000)) == 300 and "\n" not in one_line("a\n b\tc")
    assert shown(10**5000) == "a int that is too long to be shown" and len(shown("x" * 9999)) == 120
