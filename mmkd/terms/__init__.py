"""Terms of the training loss; `mmkd.terms.term` says how to write one."""

from mmkd.terms.signals import SIGNALS, Signals
from mmkd.terms.term import Pair, Place, RowTerm, Term

__all__ = ["SIGNALS", "Pair", "Place", "RowTerm", "Signals", "Term"]
