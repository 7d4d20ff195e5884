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
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmkd.engine.compiled import Part, block_losses, can_compile
from mmkd.engine.products import HALVES, HeadProduct
from mmkd.losses.divergence import CrossEntropy

# [block, V] float32 tensors alive at once in the worst loss (JSD through autograd).
_LIVE = 12
# Bytes of one [block, V] tensor that leave its companions in a CPU's cache.
_CPU_BLOCK_BYTES = 2 * 2**20
# How many columns of a product with the head take as long as one row of it that is looked up.
_LOOK_UP = 64
# Share of the budget for the piece of a head in half precision that is cast to float32 at a time.
_TILE_SHARE = 8


@dataclass(frozen=True)
class Head:
    """How hidden rows become logits: `softcap(scale * (h Wᵀ + b))` with `softcap(x) = c tanh(x / c)`."""

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class RowTerm:
    """One loss on logits.

    loss: `(student_logits [r, V], teacher_logits [r, V] or None, targets [r]) -> [r]`, differentiable in the
    first argument, each row's value a function of that row alone (rows come in blocks of any size). It must
    not change its arguments.

    If it has a method `value_and_grad(student, teacher, targets, shared) -> (values [r], gradient [r, V])`,
    that is used instead of autograd. `shared` is a dict that lives for one block, in which terms may leave
    what others can use: the losses of `mmkd.losses` share their softmaxes so. A loss whose gradient is 0 in all but
    `entries` columns of a row may also have `value_and_entries(student, teacher, targets, shared) -> (values [r],
    columns [r, k], gradient [r, k])`; where it stands alone before a frozen head of many more columns, no product with the
    whole head is formed in backward.

    weight: factor of the sum over rows in the total. A term of weight 0 is evaluated but not differentiated.
    needs_teacher: whether the loss reads the teacher's logits.
    rows: bool `[R]`, the rows on which the term counts; None for all. Masks on the CPU save the work on the
    other rows.
    row_weights: `[R]`, a factor of each row's value and gradient; None for 1.
    extra: tensors `[R, ...]` that the loss takes too, row by row: `loss(student, teacher, targets, *extra)`, and so does
    `value_and_grad`, after `shared`.
    """

    name: str
    weight: float
    loss: Callable[..., Tensor]
    needs_teacher: bool
    rows: Tensor | None = None
    row_weights: Tensor | None = None
    extra: tuple[Tensor, ...] = ()


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
    work = _Work(student_head, targets, tuple(terms), teacher_hidden, teacher_head, vocabulary, chunk_bytes, compiled)
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
    work = _Work(head, targets, (term,), None, None, vocabulary, chunk_bytes)
    _check(work, hidden)
    return _RowLogProbs.apply(work, hidden, head.weight, head.bias)


@dataclass(frozen=True)
class _Work:
    """What the walk needs besides the tensors with gradient."""

    head: Head
    targets: Tensor
    terms: tuple[RowTerm, ...]
    teacher_hidden: Tensor | None
    teacher_head: Head | None
    vocabulary: int | None
    chunk_bytes: int
    compiled: bool = False

    @property
    def columns(self) -> int:
        return self.head.weight.shape[0] if self.vocabulary is None else self.vocabulary


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, work, grad_enabled, hidden, weight, bias):
        wanted = [grad_enabled and x is not None and x.requires_grad for x in (hidden, weight, bias)]
        with torch.autocast(hidden.device.type, enabled=False):
            walk = _Walk(work, hidden.detach(), wanted)
            walk.run()
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


def _walked(work: _Work, hidden: Tensor, wanted: Sequence[bool]) -> "_Walk":
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        walk = _Walk(work, hidden.detach(), wanted)
        walk.run()
    return walk


class _Walk:
    """One pass over the rows. After `run`: `values [T, R]` and the gradients that were wanted."""

    def __init__(self, work: _Work, hidden: Tensor, wanted: Sequence[bool]):
        self.work, self.hidden = work, hidden
        self.columns = work.columns
        self.student = _cut(work.head, self.columns)
        self.teacher = None if work.teacher_head is None else _cut(work.teacher_head, self.columns)
        self.maths = _maths_dtype(hidden, work.head, work.teacher_hidden, work.teacher_head)
        self.mine = HeadProduct(self.student.weight, self._tile_bytes)
        self.theirs = None if self.teacher is None else HeadProduct(self.teacher.weight, self._tile_bytes)
        self.values = hidden.new_zeros(len(work.terms), hidden.shape[0], dtype=self.maths)  # [T, R]
        self.walked = (
            0  # rows of the groups that are done; a row's place in `values` is the order of the walk
        )
        self.to_hidden, self.to_weight, self.to_bias = self._stores(wanted)
        self.first = True

    def _stores(self, wanted: Sequence[bool]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        head, hidden = self.work.head, self.hidden
        dtype = torch.float32 if hidden.dtype in HALVES else hidden.dtype  # rounded once, after the incoming factor
        to_hidden = torch.zeros_like(hidden, dtype=dtype) if wanted[0] else None  # [R, D]
        to_weight = torch.zeros_like(head.weight, dtype=self.maths) if wanted[1] else None  # [V, D]
        to_bias = torch.zeros_like(head.bias, dtype=self.maths) if wanted[2] else None  # [V]
        return to_hidden, to_weight, to_bias

    @property
    def _tile_bytes(self) -> int:
        tile = self.work.chunk_bytes // _TILE_SHARE
        return min(tile, _CPU_BLOCK_BYTES) if self.hidden.device.type == "cpu" else tile

    @property
    def wants_gradient(self) -> bool:
        return any(x is not None for x in (self.to_hidden, self.to_weight, self.to_bias))

    def run(self) -> None:
        for index, active in _groups(self.work.terms, self.hidden.shape[0]):
            self._group(index, active)

    def _group(self, index: Tensor | None, active: list[int]) -> None:
        """Walk the rows `index` (all if None), on which the terms with the numbers `active` count."""
        rows = self.hidden.shape[0] if index is None else index.shape[0]
        if rows == 0 or not active:
            return
        with_teacher = any(self.work.terms[i].needs_teacher for i in active)
        self.sparse = self._sparse(active)
        chunk, block = self._sizes(rows, with_teacher)
        if index is not None:
            index = index.to(self.hidden.device, non_blocking=True)
        mine = self._buffer(self.mine, chunk)  # [chunk, V]
        theirs = self._buffer(self.theirs, chunk) if with_teacher else None  # [chunk, V]
        for start in range(0, rows, chunk):
            pick = slice(start, min(start + chunk, rows))
            place = self.walked + start
            self._chunk(pick if index is None else index[pick], place, active, mine, theirs, block)
        self.walked += rows

    def _sparse(self, active: list[int]) -> int | None:
        """The number of the only term with a gradient, if that is 0 in most columns and nothing but hidden rows takes it."""
        given = [i for i in active if self.work.terms[i].weight != 0]
        if self.to_hidden is None or self.to_weight is not None or self.to_bias is not None or len(given) != 1:
            return None
        entries = getattr(self.work.terms[given[0]].loss, "entries", None)
        return given[0] if entries is not None and entries * _LOOK_UP <= self.columns else None

    def _sizes(self, rows: int, with_teacher: bool) -> tuple[int, int]:
        """Rows of a chunk and of a block."""
        half = self.work.chunk_bytes // 2
        row = self.columns * self.mine.dtype.itemsize
        if with_teacher:
            row += self.columns * self.theirs.dtype.itemsize
        chunk = max(1, half // row)
        chunk = -(-rows // -(-rows // chunk))  # chunks of about equal size
        wide = self.columns * (8 if self.maths == torch.float64 else 4)
        block = half // (wide * _LIVE)
        if self.hidden.device.type == "cpu":
            block = min(block, _CPU_BLOCK_BYTES // wide)
        return chunk, min(chunk, max(1, block))

    def _buffer(self, product: HeadProduct, chunk: int) -> Tensor:
        return torch.empty(chunk, self.columns, dtype=product.dtype, device=self.hidden.device)

    def _chunk(
        self, pick, place: int, active: list[int], mine: Tensor, theirs: Tensor | None, block: int
    ) -> None:
        work = self.work
        hidden = self.mine.rows(self.hidden[pick])  # [c, D]
        size = hidden.shape[0]
        mine = self.mine.logits(hidden, mine[:size])  # [c, V]
        store = self.mine.gradient_store(mine)  # [c, V]
        if theirs is not None:
            teacher_hidden = self.theirs.rows(work.teacher_hidden.detach()[pick])  # [c, Dt]
            theirs = self.theirs.logits(teacher_hidden, theirs[:size])  # [c, V]
        targets = work.targets[pick]  # [c]
        masks = self._masks(active, pick)
        factors = {i: w[pick] for i in active if (w := work.terms[i].row_weights) is not None}  # each [c]
        extras = {i: [e[pick] for e in work.terms[i].extra] for i in active}  # each [c, ...]
        back = []  # of the sparse gradient, each [b, D]
        for start in range(0, size, block):
            part = slice(start, min(start + block, size))
            x = _logits(mine[part], self.student, self.maths)  # [b, V]
            y = None if theirs is None else _logits(theirs[part], self.teacher, self.maths)  # [b, V]
            here = {i: mask[part] for i, mask in masks.items()}
            weights = {i: factor[part] for i, factor in factors.items()}
            more = {i: [e[part] for e in extra] for i, extra in extras.items()}
            gradient, columns = self._block(x, y, targets[part], active, here, weights, more, place + start)  # [b, V]
            if self.sparse is not None:
                back.append(self._through_entries(gradient, columns, x))
            elif self.wants_gradient:
                self._through_logits(gradient, x, store[part])
        if self.sparse is not None:
            self.to_hidden[pick] = torch.cat(back).to(self.to_hidden.dtype)
        elif self.wants_gradient:
            self._through_head(store, hidden, pick)

    def _masks(self, active: list[int], pick) -> dict[int, Tensor]:
        """Masks `[c]` of the terms that must still be masked: none where row numbers already respect them."""
        if not isinstance(pick, slice):
            return {}
        rows = {i: self.work.terms[i].rows for i in active}
        device = self.hidden.device
        return {i: mask[pick].to(device, non_blocking=True) for i, mask in rows.items() if mask is not None}

    def _block(
        self,
        x,
        y,
        targets,
        active: list[int],
        masks: dict[int, Tensor],
        factors: dict[int, Tensor],
        extras: dict[int, list[Tensor]],
        start: int,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Evaluate the terms on one block; returns the gradient of their weighted sum with respect to x, and None. Of a sparse
        gradient: its entries `[b, k]` and their columns `[b, k]`."""
        fused = self._fused(active)
        gradient = self._block_compiled(x, y, targets, fused, masks, factors, extras, start) if fused else None  # [b, V]
        columns, shared = None, {}
        for i in (i for i in active if i not in fused):
            term, mask = self.work.terms[i], masks.get(i)
            known = targets if mask is None else targets.masked_fill(~mask, 0)  # [b]
            if i == self.sparse:
                values, columns, part = term.loss.value_and_entries(x, y, known, shared, *extras[i])
            else:
                values, part = _evaluate(term, x, y, known, shared, extras[i], self.wants_gradient and term.weight != 0)
            if i in factors:
                values = values * factors[i]
                part = None if part is None else part.mul_(factors[i].unsqueeze(-1))
            if mask is not None:
                values = values.masked_fill(~mask, 0)
            self.values[i, start : start + values.shape[0]] = values
            if part is None:
                continue
            if mask is not None:
                part = part.masked_fill_(~mask.unsqueeze(-1), 0)
            if gradient is None:
                gradient = part if term.weight == 1.0 else part.mul_(term.weight)
            else:
                gradient.add_(part, alpha=term.weight)
        return gradient, columns

    def _fused(self, active: list[int]) -> list[int]:
        """The terms that go into one compiled function."""
        if not (self.work.compiled and self.wants_gradient):
            return []
        return [i for i in active if self.work.terms[i].weight != 0 and can_compile(self.work.terms[i].loss)]

    def _block_compiled(self, x, y, targets, fused: list[int], masks, factors, extras, start: int) -> Tensor:
        terms = [(i, self.work.terms[i]) for i in fused]
        parts = [Part(t.loss, t.needs_teacher, t.weight, masks.get(i), factors.get(i), extras[i]) for i, t in terms]
        y = y if any(part.needs_teacher for part in parts) else None
        values, gradient = block_losses(x, y, targets, parts)
        for i, value in zip(fused, values, strict=True):
            self.values[i, start : start + len(value)] = value
        return gradient

    def _through_logits(self, gradient: Tensor | None, x: Tensor, out: Tensor) -> None:
        """From the gradient at the logits x to that at `h Wᵀ`, written over the raw logits `out`."""
        if gradient is None:
            out.zero_()
            return
        if self.student.softcap is not None:
            gradient.mul_(1 - (x / self.student.softcap).square_())
        factor = self.student.scale * self.mine.gain
        if factor != 1.0:
            gradient.mul_(factor)
        if self.to_bias is not None:
            self.to_bias[: self.columns].add_(gradient.sum(0), alpha=1 / self.mine.gain)
        out.copy_(gradient)

    def _through_entries(self, entries: Tensor, columns: Tensor, x: Tensor) -> Tensor:
        """From entries of the gradient at the logits x to that at the hidden rows, [b, D]."""
        if self.student.softcap is not None:
            entries.mul_(1 - (x.gather(-1, columns) / self.student.softcap).square_())
        if self.student.scale != 1.0:
            entries.mul_(self.student.scale)
        return self.mine.entries_to_hidden(columns, entries, self._tile_bytes)

    def _through_head(self, gradient: Tensor, hidden: Tensor, pick) -> None:
        if self.to_hidden is not None:
            self.to_hidden[pick] = self.mine.to_hidden(gradient).to(self.to_hidden.dtype)
        if self.to_weight is not None:
            self.mine.add_to_weight(gradient, hidden, self.to_weight[: self.columns], self.first)
            self.first = False


def _evaluate(
    term: RowTerm, x, y, targets, shared: dict, extra: Sequence[Tensor], differentiate: bool
) -> tuple[Tensor, Tensor | None]:
    """Values `[b]` and, if wanted, the gradient `[b, V]` of one term; the caller may change the gradient in
    place."""
    y = y if term.needs_teacher else None
    if not differentiate:
        return term.loss(x, y, targets, *extra), None
    closed = getattr(term.loss, "value_and_grad", None)
    if closed is not None:
        return closed(x, y, targets, shared, *extra)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()  # [b, V]
        values = term.loss(leaf, y, targets, *extra)  # [b]
        (gradient,) = torch.autograd.grad(values, leaf, torch.ones_like(values))
    # A sum's gradient, for one, comes as one number seen many times; contiguous() makes it a tensor of its
    # own.
    return values.detach(), gradient.contiguous()


def _groups(terms: Sequence[RowTerm], rows: int) -> list[tuple[Tensor | None, list[int]]]:
    """Rows with the same terms: pairs of row numbers (None for all rows) and the numbers of their terms."""
    everyone = list(range(len(terms)))
    masked = [i for i in everyone if terms[i].rows is not None]
    if not masked or any(terms[i].rows.device.type != "cpu" for i in masked):
        return [(None, everyone)]
    code = torch.zeros(rows, dtype=torch.long)  # [R] bit j: the j-th masked term counts
    for bit, i in enumerate(masked):
        code |= terms[i].rows.long() << bit
    groups = []
    for value in code.unique().tolist():
        off = {i for bit, i in enumerate(masked) if not value >> bit & 1}
        groups.append(((code == value).nonzero().squeeze(-1), [i for i in everyone if i not in off]))
    return groups


def _cut(head: Head, columns: int) -> Head:
    bias = None if head.bias is None else head.bias.detach()[:columns]
    return Head(head.weight.detach()[:columns], bias, head.scale, head.softcap)


def _logits(raw: Tensor, head: Head, dtype: torch.dtype) -> Tensor:
    """`h Wᵀ` -> logits in the dtype of the maths; overwrites `raw` if that already is its dtype."""
    x = raw.to(dtype)  # [b, V]
    if head.bias is not None:
        x.add_(head.bias)
    if head.scale != 1.0:
        x.mul_(head.scale)
    if head.softcap is not None:
        x.div_(head.softcap).tanh_().mul_(head.softcap)
    return x


def _maths_dtype(
    hidden: Tensor, head: Head, teacher_hidden: Tensor | None, teacher_head: Head | None
) -> torch.dtype:
    dtypes = [hidden.dtype, head.weight.dtype]
    if teacher_hidden is not None:
        dtypes += [teacher_hidden.dtype, teacher_head.weight.dtype]
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _check(work: _Work, hidden: Tensor) -> None:
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


def _check_teacher(work: _Work, rows: int) -> None:
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
