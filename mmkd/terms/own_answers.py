"""Terms on answers that the student drew itself."""

from __future__ import annotations

from mmkd.terms.term import Place


class OnOwnAnswers:
    """Before a term's other base: its rows are those of the student's own answers."""

    place: Place

    @property
    def positions(self) -> str:
        """The student's own answers: `response` means them here."""
        return "generated" if self.place.positions == "response" else self.place.positions
