"""Losses on the logits of many rows, with memory that grows neither with the rows nor with the vocabulary.

`[R, V]` logits are never kept. The rows are walked in chunks; a chunk's logits are made by one matrix product
a model, all terms are evaluated on them, and their gradient is pushed back through the head at once, in the
forward pass. What stays is the gradient with respect to the hidden rows, and to the head if the head is
trained. Backward only multiplies it by the incoming factor.

Two sizes, both taken from one byte budget:

- a *chunk* is as many rows as half the budget holds in logits, float32 or wider (`engine/products.py`). It should be large:
  each chunk reads both heads' weights `[V, D]` again, which on a CPU costs as much as the product of some 20 rows.
- a *block* is the rows of a chunk on which the loss maths runs at a time, in float32. On a CPU it should be
  small enough for its temporaries to stay in the cache; on a GPU, large enough to fill it. The gradient
  overwrites the student's logits.

Which of the terms count on a row is known before the walk if the masks are on the CPU: rows are then grouped
by their terms, and a row without a term, or a teacher row without a use, costs nothing. Masks on an
accelerator would have to be waited for, so there the terms run on all rows and the masks multiply. Nothing
here waits for the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mmkd.engine.walk import Head, RowTerm, Walk, Work
from mmkd.losses.divergence import CrossEntropy

__all__ = ["Head", "RowTerm", "row_log_probs", "row_losses", "row_values"]


def row_losses(
    student_hidden: Tensor,
    student_head: Head,
    targets: Tensor,
    terms: Sequence[RowTerm],
    *,
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | None = None,
    vocabulary: int | None = None,
    chunk_bytes: int = 256 * 2**20,
    compiled: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Evaluate all terms on all rows: `(Σ_terms weight * Σ_rows loss, {name: Σ_rows loss})`.

    student_hidden `[R, Ds]`, targets `[R]` (int64; any value on rows where no term reads it), teacher_hidden
    `[R, Dt]`: the same rows of both models. The total is a scalar with gradient to student_hidden and, if
    they require it, to the student head's weight and bias; the sums are detached. The teacher gets no
    gradient. Both are sums: divide by the (global) count yourself. R = 0 gives 0, still attached to the
    graph.

    vocabulary: cut both heads to their first n columns (one tokenizer, different padding).
    chunk_bytes: budget for logits and loss temporaries; at least one row is always taken. The gradient of a
    trained head comes on top: `[V, D]` in float32.
    compiled: whether torch.compile makes one function of a block's dense closed forms (`engine/compiled.py`).

    Loss maths is in float32 (float64 where a head or the hidden rows are). The products with a head take their
    factors in that head's dtype, autocast or not, and end in float32 also where it is in half precision. Under
    `no_grad` only values are computed. With a trained head backward works once: its gradient is given away, and a
    second backward through the same graph raises RuntimeError.
    Raises ValueError when shapes, vocabularies or terms do not fit.
    """
    work = Work(student_head, targets, tuple(terms), teacher_hidden, teacher_head, vocabulary, chunk_bytes, compiled)
    _check(work, student_hidden)
    total, sums = _RowLosses.apply(
        work, torch.is_grad_enabled(), student_hidden, student_head.weight, student_head.bias
    )
    return total, {term.name: sums[i] for i, term in enumerate(work.terms)}


def row_log_probs(
    hidden: Tensor, head: Head, targets: Tensor, *, vocabulary: int | None = None, chunk_bytes: int = 256 * 2**20
) -> Tensor:
    """`log softmax(logits)[target]` of each row, `[R]`, differentiable: for losses of a sequence's sum of them.

    hidden `[R, D]`, targets `[R]`. What weight a row's gradient gets is known only in backward, so the logits are made
    twice, chunk by chunk, and kept neither time; what is kept is the hidden rows. vocabulary, chunk_bytes, dtypes and
    errors are those of `row_losses`.
    """
    term = RowTerm("log_prob", 1.0, CrossEntropy(), needs_teacher=False)
    work = Work(head, targets, (term,), None, None, vocabulary, chunk_bytes)
    _check(work, hidden)
    return _RowLogProbs.apply(work, hidden, head.weight, head.bias)


def row_values(
    hidden: Tensor, head: Head, targets: Tensor, loss: Callable[..., Tensor], *, teacher_hidden: Tensor | None = None,
    teacher_head: Head | None = None, extra: tuple[Tensor, ...] = (), vocabulary: int | None = None,
    chunk_bytes: int = 256 * 2**20,
) -> Tensor:  # fmt: skip
    """Each row's loss, `[R]`, without gradient. loss, extra: of `RowTerm`; the others as in `row_losses`."""
    term = RowTerm("value", 1.0, loss, teacher_hidden is not None, extra=extra)
    work = Work(head, targets, (term,), teacher_hidden, teacher_head, vocabulary, chunk_bytes)
    _check(work, hidden)
    return _walked(work, hidden, [False, False, False]).values[0]


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, work, grad_enabled, hidden, weight, bias):
        wanted = [grad_enabled and x is not None and x.requires_grad for x in (hidden, weight, bias)]
        with torch.autocast(hidden.device.type, enabled=False):
            walk = Walk(work, hidden.detach(), wanted)
            for piece in walk.pieces():
                walk.compute(*piece)
            sums = walk.values.sum(-1)  # [T]
            total = sums.new_zeros(())
            for term, value in zip(work.terms, sums, strict=False):
                total = total + term.weight * value if term.weight != 0 else total
        # Kept on ctx, not by save_for_backward: they are no inputs or outputs, and backward frees them.
        ctx.gradients = (walk.to_hidden, walk.to_weight, walk.to_bias)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.spent = False
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, factor, _):
        to_hidden, to_weight, to_bias = ctx.gradients
        if ctx.spent:
            raise RuntimeError(
                "second backward through a row_losses with a trained head, whose gradient went to the first; "
                "call row_losses again, or add the losses up for one backward"
            )
        # [V, D] is too large for a second copy: the head's gradient is scaled in place and given away.
        ctx.spent = to_weight is not None
        ctx.gradients = (to_hidden, None, to_bias)
        hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
        to_hidden = None if to_hidden is None else (to_hidden * factor).to(hidden_dtype)
        to_weight = None if to_weight is None else to_weight.mul_(factor).to(weight_dtype)
        to_bias = None if to_bias is None else (to_bias * factor).to(bias_dtype)
        return None, None, to_hidden, to_weight, to_bias


class _RowLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, work, hidden, weight, bias):
        ctx.work = work
        ctx.save_for_backward(hidden, weight, bias)
        return -_walked(work, hidden, [False, False, False]).values[0]  # [R]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, factors):
        hidden, weight, bias = ctx.saved_tensors
        term = replace(ctx.work.terms[0], row_weights=-factors)
        walk = _walked(replace(ctx.work, terms=(term,)), hidden, ctx.needs_input_grad[1:])
        found = (walk.to_hidden, walk.to_weight, walk.to_bias)
        given = (hidden, weight, bias)
        return None, *(None if g is None else g.to(x.dtype) for g, x in zip(found, given, strict=True))


def _walked(work: Work, hidden: Tensor, wanted: Sequence[bool]) -> Walk:
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        walk = Walk(work, hidden.detach(), wanted)
        for piece in walk.pieces():
            walk.compute(*piece)
    return walk


def _check(work: Work, hidden: Tensor) -> None:
    rows = hidden.shape[0]
    _check_head("student", hidden, work.head, work.vocabulary)
    if tuple(work.targets.shape) != (rows,):
        raise ValueError(f"targets have shape {tuple(work.targets.shape)}; {rows} rows need ({rows},)")
    names = [term.name for term in work.terms]
    if len(set(names)) != len(names):
        raise ValueError(f"terms are named {names}; give each its own name")
    if work.chunk_bytes < 1:
        raise ValueError(f"chunk_bytes is {work.chunk_bytes}; it must be above 0 (268435456 is the default)")
    _check_masks(work.terms, rows)
    _check_teacher(work, rows)


def _check_head(who: str, hidden: Tensor, head: Head, vocabulary: int | None) -> None:
    if hidden.dim() != 2 or hidden.shape[1] != head.weight.shape[1]:
        raise ValueError(
            f"{who} hidden rows {tuple(hidden.shape)} do not fit the head {tuple(head.weight.shape)}; "
            "they must be [R, D] and [V, D]"
        )
    if vocabulary is not None and not 1 <= vocabulary <= head.weight.shape[0]:
        raise ValueError(f"vocabulary is {vocabulary}, but the {who} head has {head.weight.shape[0]} columns")


def _check_masks(terms: Sequence[RowTerm], rows: int) -> None:
    for term in terms:
        if term.row_weights is not None and tuple(term.row_weights.shape) != (rows,):
            raise ValueError(
                f"term {term.name!r}: row_weights is {tuple(term.row_weights.shape)}; it must be ({rows},) or None"
            )
        short = next((tuple(e.shape) for e in term.extra if e.shape[:1] != (rows,)), None)
        if short is not None:
            raise ValueError(f"term {term.name!r}: a tensor of extra is {short}; {rows} rows need ({rows}, ...)")
        if term.rows is None:
            continue
        if term.rows.dtype != torch.bool or tuple(term.rows.shape) != (rows,):
            raise ValueError(
                f"term {term.name!r}: rows is {term.rows.dtype} {tuple(term.rows.shape)}; "
                f"it must be a bool mask ({rows},) or None"
            )
    if sum(term.rows is not None for term in terms) > 62:
        raise ValueError(f"{len(terms)} terms with row masks; at most 62 are supported in one call")


def _check_teacher(work: Work, rows: int) -> None:
    if (work.teacher_hidden is None) != (work.teacher_head is None):
        raise ValueError("teacher_hidden and teacher_head go together; one of them is None")
    if work.teacher_hidden is None:
        needy = [term.name for term in work.terms if term.needs_teacher]
        if needy:
            raise ValueError(f"terms {needy} need the teacher; pass teacher_hidden and teacher_head")
        return
    _check_head("teacher", work.teacher_hidden, work.teacher_head, work.vocabulary)
    if work.teacher_hidden.shape[0] != rows:
        raise ValueError(
            f"{rows} student rows and {work.teacher_hidden.shape[0]} teacher rows; gather the same positions"
        )
    mine, theirs = work.head.weight.shape[0], work.teacher_head.weight.shape[0]
    if work.vocabulary is None and mine != theirs:
        raise ValueError(
            f"the student head has {mine} columns and the teacher head {theirs}; if both share a tokenizer "
            "and differ in padding, pass vocabulary=len(tokenizer)"
        )
