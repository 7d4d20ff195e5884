"""The walk over the rows of a call of the row engine: chunks, blocks, and the way of the gradient back through the head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmkd.engine.compiled import Part, block_losses, can_compile
from mmkd.engine.products import HALVES, HeadProduct

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


@dataclass(frozen=True)
class Work:
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


# Rows of a chunk, its place, its terms, room for the logits of both models, rows of a block.
Rows = slice | Tensor
Piece = tuple[Rows, int, list[int], Tensor, Tensor | None, int]


class Walk:
    """One pass over the rows: `compute` for each of `pieces`. Then: `values [T, R]` and the gradients that were wanted."""

    def __init__(self, work: Work, hidden: Tensor, wanted: Sequence[bool]):
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

    def pieces(self) -> Iterator[Piece]:
        """The chunks of all groups of rows, in the order in which `compute` must take them."""
        for index, active in _groups(self.work.terms, self.hidden.shape[0]):
            yield from self._group(index, active)

    def _group(self, index: Tensor | None, active: list[int]) -> Iterator[Piece]:
        """Chunks of the rows `index` (all if None), on which the terms with the numbers `active` count."""
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
            yield pick if index is None else index[pick], place, active, mine, theirs, block
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

    def compute(
        self, pick: Rows, place: int, active: list[int], mine: Tensor, theirs: Tensor | None, block: int
    ) -> None:
        """Values and gradients of a chunk: the rows `pick`, whose values stand from `place` on. mine, theirs: room for logits."""
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
            elif (closed := self._closed(term)) is not None:
                values, part = closed(x, y if term.needs_teacher else None, known, shared, *extras[i])
            else:
                values, part = _evaluate(term, x, y, known, extras[i], self.wants_gradient and term.weight != 0)
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

    def _closed(self, term: RowTerm) -> Callable[..., tuple[Tensor, Tensor]] | None:
        """The term's closed form, where its gradient is wanted and it has one."""
        return getattr(term.loss, "value_and_grad", None) if self.wants_gradient and term.weight != 0 else None

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
    term: RowTerm, x, y, targets, extra: Sequence[Tensor], differentiate: bool
) -> tuple[Tensor, Tensor | None]:
    """Values `[b]` and, if wanted, the gradient `[b, V]` of one term; the caller may change the gradient in
    place."""
    y = y if term.needs_teacher else None
    if not differentiate:
        return term.loss(x, y, targets, *extra), None
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
