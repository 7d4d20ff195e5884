"""Where pictures stand in what is said."""

from __future__ import annotations

import pytest

from mmkd.errors import DataError
from mmkd.teachers.store import text_key
from mmkd.towers.samples import Sample, Turn


def test_pictures_stand_at_the_head_unless_places_say_otherwise():
    assert Turn("user", "compare", 2).parts == [None, None, "compare"]
    assert Turn("user", "Is  left of ?", 2, (3, 12)).parts == ["Is ", None, " left of ", None, "?"]
    assert Turn("user", "what", 2, (0, 4)).parts == [None, "what", None]
    assert Turn("user", "what", 2, (4, 4)).parts == ["what", None, None]
    assert Turn("user", "", 1).parts == [None, ""]


@pytest.mark.parametrize(("images", "places"), [(1, (0, 1)), (2, (3, 1)), (1, (5,)), (1, (-1,))])
def test_places_that_cannot_be_are_refused(images, places):
    with pytest.raises(DataError, match="give each picture one offset"):
        Turn("user", "what", images, places)


def test_a_stored_signal_knows_where_pictures_stood():
    keys = {text_key(Sample("s", (), (Turn("user", "what", 1, places),))) for places in ((), (0,), (4,))}
    assert len(keys) == 3
