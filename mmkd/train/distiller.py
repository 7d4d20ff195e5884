"""The distiller: one module that holds student, teacher and terms, and turns a batch into a loss.

    signals: student rows, teacher rows, switch rows, vision features     each computed at most once, and only if needed
    terms:   weight * sum / global count

Hidden states are gathered at the rows that the terms name before either head is applied.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmkd import losses
from mmkd.engine.compiled import check_compiler
from mmkd.engine.rows import Head, RowTerm, row_losses
from mmkd.errors import TowerError
from mmkd.teachers.ahead import TeacherPass
from mmkd.teachers.stored import top_k_loss
from mmkd.terms.alignment import Alignment, span_losses
from mmkd.terms.term import Term, rows_at
from mmkd.towers.experts import Routing, recorded_routing, sparse_blocks
from mmkd.towers.tower import Seen, Tower, TowerInputs
from mmkd.train.collate import COUNTS, Batch
from mmkd.train.sharded import held, look_at_nothing
from mmkd.train.shared_encoder import sees_alike


class Distiller(nn.Module):
    """Student and terms as one module, so that whatever wraps it (DDP, FSDP, DeepSpeed) sees the heads used inside.

    The teacher is kept out of the module tree: it is never trained, sharded with the student, or saved.
    """

    def __init__(
        self, student: Tower, teacher: Tower | None, terms: Sequence[Term], *, chunk_bytes: int = 256 * 2**20,
        compiled: bool = False,
    ):
        super().__init__()
        if any(t.kind == "load_balance" for t in terms) and not sparse_blocks(student):
            raise TowerError("load_balance needs a student with experts; give this stage or an earlier one `upcycle:`")
        if teacher is not None and any(t.is_row_term and t.needs_teacher for t in terms):
            check_vocabularies(student, teacher)
        self.student = student.model
        self._no_split_modules = student.model._no_split_modules  # the layers that FSDP2 shards one by one
        self.terms = tuple(terms)
        self.chunk_bytes = chunk_bytes
        self.compiled = compiled
        if compiled:
            check_compiler(student.device)
        self.lockstep = False  # all processes must go through the same modules in one order, with pictures or without
        wants_spans = teacher is not None and any(t.kind == "spans" for t in terms)
        self.alignment = Alignment(student, teacher) if wants_spans else None
        self.routed: dict[int, Tensor] = {}  # of the last batch: places that each expert got, by layer, each [E]
        self._sees_alike: bool | None = None  # found out on the first batch with pictures
        self._towers = (student, teacher.freeze() if teacher is not None else None)
        # What a term trains beside the student; it goes into checkpoints, not into the saved student.
        self.extras = nn.ModuleDict({t.name: m for t in self.terms if (m := _extra(t, student, teacher)) is not None})
        self.extras.to(student.device)

    @property
    def tower(self) -> Tower:
        return self._towers[0]

    @property
    def teacher(self) -> Tower | None:
        return self._towers[1]

    def train(self, mode: bool = True) -> Distiller:
        """Frozen parts stay in evaluation mode: no dropout, no moving batch statistics."""
        super().train(mode)
        for part in (self.tower.vision, self.tower.projector, self.tower.language):
            if not any(p.requires_grad for p in part.parameters()):
                part.eval()
        return self

    def forward(
        self, batch: Batch, counts: Tensor | None = None, progress: Tensor | float = 0.0
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """The loss of a (micro-)batch and, per term, (sum, count) for the log.

        counts: [len(COUNTS)] global counts over ranks and accumulation steps; the batch's own when None.
        progress: 0..1 of the stage, for scheduled weights.
        """
        divisors = {name: n.clamp(min=1) for name, n in _by_name(batch.counts if counts is None else counts).items()}
        own = _by_name(batch.counts)
        signals = self.signals(batch)
        total = signals.zero if batch.student.pixels else self._unreached(signals)
        log: dict[str, tuple[Tensor, Tensor]] = {}
        for group in self._row_groups():
            part, sums = self._row_losses(signals, group, divisors, float(progress))
            total = total + part
            log |= {t.name: (sums[t.name], own[t.count]) for t in group if t.name in sums}
        for term in self.terms:
            if term.is_row_term:
                continue
            value = self._image_loss(signals, term)
            if signals.blank is not None:
                value = value + signals.idle(term)
            total = total + term.weight.at(float(progress)) * value / float(divisors[term.count])
            log[term.name] = (value.detach(), own[term.count])
        self.routed = signals.routed()
        return total, log | signals.observed

    def signals(self, batch: Batch) -> Signals:
        return Signals(self, batch)

    def sees_alike(self, batch: Batch) -> bool:
        """Whether one pass of the vision encoder serves both towers."""
        if batch.teacher is not batch.student or not batch.student.pixels:
            return False
        if self._sees_alike is None:
            self._sees_alike = sees_alike(self.tower, self.teacher, batch.student)
        return self._sees_alike

    def teacher_pass(self, batch: Batch) -> TeacherPass:
        """The teacher's own pass over a batch, as the terms of this distiller need it."""
        shared = not self.lockstep and self.sees_alike(batch)  # in lockstep every process runs the student's encoder itself
        reads = any(t.needs_teacher and t.kind != "feature_match" for t in self.terms)
        with torch.inference_mode():
            seen = self.teacher.see(batch.teacher)
            return TeacherPass(seen, read_by(self.teacher, batch.teacher, seen) if reads else None, shared)

    def _unreached(self, signals: Signals) -> Tensor:
        """0, attached to what a micro-batch without pictures does not reach: data-parallel wrappers wait for the gradient of
        every trained parameter."""
        return held(self) if signals.blank is None else sum(tokens.sum() for tokens in signals.blank.tokens) * 0.0

    def _row_groups(self) -> list[list[Term]]:
        """Row terms by path: those of one path share hidden rows, logits and chunks."""
        groups = [[t for t in self.terms if t.is_row_term and t.path == path] for path in ("student", "switch")]
        return [group for group in groups if group]

    def _row_losses(
        self, signals: Signals, terms: list[Term], divisors: dict[str, Tensor], progress: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        named = signals.switch_rows if terms[0].path == "switch" else signals.student_rows
        rows = named({t.positions for t in terms})
        if rows is None:  # no picture in this micro-batch: nothing was switched
            return sum((signals.idle(t) for t in terms), signals.zero), {}
        total = signals.zero
        # The engine multiplies sums by a number; a divisor on the device would cost a host synchronisation a term.
        scale = {t.name: t.weight.at(progress) for t in terms}
        engine_terms = [rows.engine_term(t, scale[t.name] / float(divisors[t.count])) for t in terms]
        needs_teacher = any(t.needs_teacher for t in engine_terms)
        part, sums = row_losses(
            rows.student,
            rows.student_head,
            rows.targets,
            engine_terms,
            teacher_hidden=rows.teacher["hidden"] if needs_teacher else None,
            teacher_head=head_of(self.teacher) if needs_teacher else None,
            vocabulary=signals.vocabulary,
            chunk_bytes=self.chunk_bytes,
            compiled=self.compiled,
        )
        return total + part, sums

    def _image_loss(self, signals: Signals, term: Term) -> Tensor:
        """Sum over images of a term that compares pictures, not rows."""
        if term.kind == "relation":
            return signals.relation(**dict(term.options))
        if term.kind == "load_balance":
            return signals.load_balance()
        if term.kind == "contrastive":
            return signals.contrastive(self.extras[term.name])
        if term.kind == "tags":
            return signals.tags(self.extras[term.name])
        if term.kind == "spans":
            return signals.spans(dict(term.options))
        return signals.feature_match(self.extras[term.name], dict(term.options))


def check_vocabularies(student: Tower, teacher: Tower) -> None:
    """Both tokenizers must give every token the same id; tokens added to one of them only may differ.

    Padding rows of a head do not matter. Raises TowerError for unrelated tokenizers.
    """
    own, other = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    added = {*student.tokenizer.get_added_vocab(), *teacher.tokenizer.get_added_vocab()}
    differing = [t for t in {*own, *other} if own.get(t) != other.get(t) and (t not in added or (t in own and t in other))]
    if differing:
        raise TowerError(
            f"{len(differing):,} tokens of the student's {len(own):,} and the teacher's {len(other):,} have another id or none "
            f"in the other tokenizer (for example {sorted(differing)[:3]}), so their logits cannot be compared; build the "
            "student on a language model with the teacher's tokenizer"
        )


class Rows:
    """Hidden rows of both towers at the positions that some terms name, before any head."""

    def __init__(
        self, student: Tensor, student_head: Head, teacher: dict[str, Tensor], targets: Tensor, masks: dict[str, Tensor]
    ):
        self.student = student  # [R, Ds]
        self.student_head = student_head
        self.teacher = teacher  # "hidden" [R, Dt], what a top-k cache has (`cache.TOP_K`), or nothing
        self.targets = targets  # [R]
        self._masks = masks  # by kind of position, each [R] bool, on the CPU; a row may be of two kinds

    def mask(self, positions: str) -> Tensor | None:
        """Rows of a kind of position; None when all rows are."""
        return None if len(self._masks) == 1 else self._masks[positions]

    def engine_term(self, term: Term, weight: float) -> RowTerm:
        """The term for the row engine; against a top-k teacher it reads what is cached, not the teacher's logits."""
        loss, with_logits, extra = term.row_loss(), term.needs_teacher, ()
        if term.needs_teacher and "hidden" not in self.teacher:
            loss, extra = top_k_loss(self.teacher)
            with_logits = False
        return RowTerm(term.name, weight, loss, with_logits, self.mask(term.positions), extra=extra)


class Signals:
    """What the terms compare, for one batch; each pass runs at most once and only if it is asked for."""

    def __init__(self, distiller: Distiller, batch: Batch):
        self.distiller = distiller
        self.batch = batch
        self.student, self.teacher = distiller.tower, distiller.teacher
        self.observed: dict[str, tuple[Tensor, Tensor]] = {}  # what else goes into the log: name -> (sum, count)

    @property
    def zero(self) -> Tensor:
        return torch.zeros((), device=self.batch.student.input_ids.device)

    @cached_property
    def vocabulary(self) -> int | None:
        """Columns that both heads share: the tokenizer's length, so that padding rows of a head never matter."""
        sizes = [self.student.vocabulary, self.student.head.weight.shape[0]]
        if self.teacher is not None and any(t.is_row_term and t.needs_teacher for t in self.distiller.terms):
            sizes += [self.teacher.vocabulary, self.teacher.head.weight.shape[0]]
        return min(sizes)

    # ---- passes ----

    @cached_property
    def blank(self) -> Seen | None:
        """A look at nothing, by which a micro-batch without pictures keeps step with those of other processes."""
        wanted = self.distiller.lockstep and not self.batch.student.pixels
        return look_at_nothing(self.student) if wanted else None

    def idle(self, term: Term) -> Tensor:
        """0 by way of what a term trains beside the student, at the place where it would have looked at pictures."""
        if self.blank is None or term.name not in self.distiller.extras:
            return self.zero
        extra = self.distiller.extras[term.name]
        if isinstance(extra, Temperature):
            embedded = self.student.model.get_input_embeddings()(self.batch.student.input_ids[:1, :1])
            return (extra() + embedded.sum()) * 0.0
        features = self.blank.features[0]
        arguments = (features, len(features)) if isinstance(extra, Bridge) else (features,)
        return extra(*arguments).sum() * 0.0

    @cached_property
    def student_seen(self) -> Seen:
        if self.batch.ahead is not None and self.batch.ahead.shared:
            return Seen(self.teacher_features, self.student.project(self.teacher_features))
        return self.student.see(self.batch.student)

    @cached_property
    def student_read(self) -> tuple[Tensor, dict[int, Routing]]:
        with recorded_routing(self.student) as routing:
            return self.student.read(self.batch.student, self.student_seen), routing  # [B, L, Ds]

    @property
    def student_hidden(self) -> Tensor:
        return self.student_read[0]

    def _frozen(self) -> Any:
        """Inference mode for the teacher's own passes; not beside the switch, whose gradients pass through what the teacher's
        modules keep between calls."""
        switched = any(t.path == "switch" for t in self.distiller.terms)
        return torch.no_grad() if switched else torch.inference_mode()

    @cached_property
    def teacher_seen(self) -> Seen:
        if self.batch.ahead is not None:
            return self.batch.ahead.seen
        if self.distiller.sees_alike(self.batch):
            features = [f.detach() for f in self.student_seen.features]
            with self._frozen():
                return Seen(features, self.teacher.project(features))
        with self._frozen():
            return self.teacher.see(self.batch.teacher)

    @cached_property
    def teacher_features(self) -> list[Tensor]:
        """Vision features of each image, [n_i, Dv], as tensors that autograd may keep."""
        if self.batch.said is not None:
            return self.batch.said.features
        return [features.clone() for features in self.teacher_seen.features]

    @cached_property
    def teacher_hidden(self) -> Tensor:
        if self.batch.ahead is not None:
            return self.batch.ahead.hidden
        seen = self.teacher_seen
        with self._frozen():
            return read_by(self.teacher, self.batch.teacher, seen)  # [B, L, Dt]

    @cached_property
    def switch_hidden(self) -> Tensor:
        """The teacher's projector and language model on the student's vision features; gradient into the encoder only."""
        features = self.student_seen.features
        bridge = next((self.distiller.extras[t.name] for t in self.distiller.terms if t.bridge), None)
        if bridge is not None:
            features = [bridge(f, len(f)) for f in features]
        tokens = self.teacher.project(features)
        return self.teacher.read(self.batch.switch, tokens)  # [Bi, Ls, Dt]

    # ---- rows ----

    def student_rows(self, positions: set[str]) -> Rows:
        inputs = self.batch.on_host.student
        places = {name: rows_at(inputs, name) for name in sorted(positions)}  # each [B, L]
        where = _any(places.values())
        masks = {name: place[where] for name, place in places.items()}  # each [R]
        targets = torch.where(inputs.response, inputs.targets, inputs.next_ids)[where]
        _ = self.student_seen  # first in every process: they gather their shards in one order
        theirs = self._teacher_rows(masks)  # before the student's pass, whose activations stay: the teacher's are gone by then
        return Rows(
            gathered(self.student_hidden, where),
            head_of(self.student),
            theirs,
            targets.to(self.zero.device, non_blocking=True),
            masks,
        )

    def _teacher_rows(self, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the teacher says on the rows where a term compares with it, 0 in other rows of the student; each [R, ...]."""
        compared = {t.positions for t in self.distiller.terms if t.is_row_term and t.needs_teacher and t.path == "student"}
        if not compared:
            return {}
        if self.batch.said is not None:
            found = self.batch.said.at(compared)
        else:
            inputs = self.batch.on_host.teacher
            found = {"hidden": gathered(self.teacher_hidden, _any(rows_at(inputs, name) for name in compared))}
        where = _any(masks[name] for name in compared)
        return {name: spread(rows, where) for name, rows in found.items()}

    def switch_rows(self, positions: set[str]) -> Rows | None:
        """Rows of the samples with pictures: switched against ordinary teacher."""
        if self.batch.switch is None:
            return None
        inputs = self.batch.on_host.switch
        places = {name: rows_at(inputs, name) for name in sorted(positions)}  # each [Bi, Ls]
        where = _any(places.values())
        targets = torch.where(inputs.response, inputs.targets, inputs.next_ids)[where]
        return Rows(
            gathered(self.switch_hidden, where),
            head_of(self.teacher),
            self._pictured_rows(positions),
            targets.to(self.zero.device, non_blocking=True),
            {name: place[where] for name, place in places.items()},
        )

    def _pictured_rows(self, positions: set[str]) -> dict[str, Tensor]:
        """What the teacher, unswitched, says at these positions of the samples with pictures."""
        pictured = [n > 0 for n in self.batch.student.images]
        if self.batch.said is not None:
            return self.batch.said.at(positions, pictured)
        host = self.batch.on_host.teacher
        where = _any(rows_at(host, name) for name in positions) & torch.tensor(pictured)[:, None]  # [B, L]
        return {"hidden": gathered(self.teacher_hidden, where)}

    # ---- other tokenizers ----

    def spans(self, options: dict) -> Tensor:
        """Sum over the student's answer tokens of the loss of the span of text that each belongs to."""
        host = self.batch.on_host
        inputs = (host.student, host.teacher)
        aligned = self.distiller.alignment.of(inputs[0].targets, inputs[1].targets)
        self.observed["aligned"] = (aligned.tokens.sum().float(), inputs[0].response.sum())
        hidden = (self.student_hidden, self.teacher_hidden)
        targets = [x.targets[x.response].to(self.zero.device, non_blocking=True) for x in inputs]
        return span_losses(
            tuple(gathered(h, x.response) for h, x in zip(hidden, inputs, strict=True)),
            (head_of(self.student), head_of(self.teacher)),
            (self.student.vocabulary, self.teacher.vocabulary),
            tuple(targets),
            aligned,
            self.distiller.alignment.matched,
            self.distiller.chunk_bytes,
            **options,
        )

    # ---- experts ----

    def load_balance(self) -> Tensor:
        """Balance of the sparse layers over this micro-batch's tokens without padding, times their number.

        The balance is a product of means, so it is one of this micro-batch (as in the published codes); the mean over
        micro-batches and ranks, weighted by tokens, is our choice.
        """
        return self._balance(self.batch.student, self.student_read[1])

    def _balance(self, inputs: TowerInputs, routing: dict[int, Routing]) -> Tensor:
        mask = inputs.attention_mask.flatten().bool()  # [B * L]
        layers = [found.logits for found in routing.values()]
        return losses.balance_of_layers(layers, mask) * float(self.batch.counts[COUNTS.index("token")])

    def routed(self) -> dict[int, Tensor]:
        """Places that each expert got, padding left out, by layer; empty when no term read through a sparse student."""
        if "student_read" not in self.__dict__:
            return {}
        mask = self.batch.student.attention_mask.flatten().bool()
        return {layer: routing.tokens(mask) for layer, routing in self.student_read[1].items()}

    # ---- pictures ----

    def relation(self, source: str = "logits") -> Tensor:
        """Sum over images of the relation distance of their visual rows (LLaVA-KD's RDist, per image)."""
        student = _per_image_rows(self.student_hidden, self.batch.on_host.student)
        teacher = self._teacher_image_rows()
        total = self.zero
        capped = any(tower.logit_rule[1] is not None for tower in (self.student, self.teacher))
        if source == "logits" and capped:
            raise TowerError(
                "relation goes through the heads' Gram matrices, which a soft cap on the logits does not allow; compare the "
                "hidden states themselves with `source: hidden`"
            )
        grams = (self.student_gram, self.teacher_gram) if source == "logits" else (None, None)
        for own, other in zip(student, teacher, strict=True):
            total = total + losses.relation_from_hidden(own, grams[0], other, grams[1], source)
        return total

    def _teacher_image_rows(self) -> Sequence[Tensor]:
        """The teacher's hidden rows at the visual positions, one [N, Dt] an image."""
        if self.batch.said is not None:
            return self.batch.said.at(["visual"])["hidden"].split(self.batch.said.images)
        return _per_image_rows(self.teacher_hidden, self.batch.on_host.teacher)

    @cached_property
    def student_gram(self) -> Tensor:
        head = head_of(self.student)
        return losses.head_gram(head.weight[: self.vocabulary], None if head.bias is None else head.bias[: self.vocabulary])

    @property
    def teacher_gram(self) -> Tensor:
        kept = self.teacher.__dict__.setdefault("_grams", {})
        if self.vocabulary not in kept:
            head = head_of(self.teacher)
            bias = None if head.bias is None else head.bias[: self.vocabulary]
            with torch.no_grad():
                kept[self.vocabulary] = losses.head_gram(head.weight[: self.vocabulary], bias)
        return kept[self.vocabulary]

    def feature_match(self, bridge: Bridge, options: dict) -> Tensor:
        """Sum over images of the mean distance of their vision features."""
        total = self.zero
        for own, other in zip(self.student_seen.features, self.teacher_features, strict=True):
            total = total + losses.feature_match(bridge(own, len(other)), other, **options).mean()
        return total

    def contrastive(self, temperature: Temperature) -> Tensor:
        """Sum over pictured samples of the image-text contrastive loss, both ways; negatives are the micro-batch's.

        Similarity by late interaction (FILIP, arXiv 2111.07783): each answer token looks for its best visual token, in
        the language model's own embedding space; the mean over answer tokens. It teaches encoder, projector and embeddings that
        a visual token and the word for what it shows are near, which a language model's attention can use from the start.
        """
        inputs = self.batch.on_host.student
        pictured = [b for b, n in enumerate(inputs.images) if n]
        if not pictured:
            return self.zero
        first = [sum(inputs.images[:b]) for b in pictured]  # a sample's first image stands for it
        visual = F.normalize(torch.stack([self.student_seen.tokens[i] for i in first]).float(), dim=-1)  # [n, N, D]
        answers, given = (x.to(self.zero.device, non_blocking=True) for x in _packed(inputs.targets[pictured]))  # [n, T]
        words = F.normalize(self.student.model.get_input_embeddings()(answers).float(), dim=-1)  # [n, T, D]
        best = torch.stack([(words @ image.T).amax(-1) for image in visual])  # [n images, n texts, T]
        similarities = (best * given).sum(-1) / given.sum(-1)  # [n, n]
        positives = (answers[:, None] == answers[None, :]).all(-1)  # equal answers are positives of one another
        tau = temperature()
        both = losses.contrastive(similarities, positives, tau) + losses.contrastive(similarities.T, positives, tau)
        return both.sum() / 2


    def tags(self, head: nn.Module) -> Tensor:
        """Sum over pictured samples of the loss of telling the answer's words from the picture alone.

        Each word is looked for at every place of the picture; the best place counts. It teaches the vision encoder only.
        """
        inputs = self.batch.on_host.student
        pictured = [b for b, n in enumerate(inputs.images) if n]
        if not pictured:
            return self.zero
        first = [sum(inputs.images[:b]) for b in pictured]
        features = torch.stack([self.student_seen.features[i] for i in first])  # [n, N, Dv]
        answers, given = _packed(inputs.targets[pictured])  # [n, T]
        present = torch.zeros(len(first), head.out_features, dtype=torch.bool)  # [n, V]
        present[torch.arange(len(first))[:, None].expand_as(answers)[given], answers[given]] = True
        return losses.tags(head(features).amax(1), present.to(features.device, non_blocking=True)).sum()


def _packed(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Answer tokens moved to the front, 0 behind them, and which places hold one. [n, L] -> [n, T], [n, T] bool"""
    rows = [row[row >= 0] for row in targets]
    answers = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    given = nn.utils.rnn.pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
    return answers, given


class Temperature(nn.Module):
    """The contrastive temperature, learned, kept in [0.001, 0.5] (starts at 0.07 as in CLIP)."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([1 / 0.07]).log())  # FSDP2 takes no scalars

    def forward(self) -> Tensor:
        return (-self.log_scale).exp().clamp(0.001, 0.5).squeeze()


class Bridge(nn.Module):
    """Brings the student's vision features to the teacher's width (trained) and token count (interpolated)."""

    def __init__(self, width: int, teacher_width: int):
        super().__init__()
        self.linear = nn.Linear(width, teacher_width) if width != teacher_width else nn.Identity()

    def forward(self, features: Tensor, count: int) -> Tensor:
        """[n, Ds] -> [count, Dt]"""
        return self.linear(_resample(features, count))


def _extra(term: Term, student: Tower, teacher: Tower | None) -> nn.Module | None:
    if term.kind == "contrastive":
        return Temperature()
    if term.kind == "tags":
        head = nn.Linear(student.feature_width, student.vocabulary)
        nn.init.constant_(head.bias, -3.0)  # most words are absent
        return head
    if (term.kind == "feature_match" or term.bridge) and teacher is not None:
        return Bridge(student.feature_width, teacher.feature_width)
    return None


def _resample(features: Tensor, count: int) -> Tensor:
    """[n, D] -> [count, D]: on the square grid where both counts are squares, else along the sequence."""
    if len(features) == count:
        return features
    side, new_side = round(len(features) ** 0.5), round(count**0.5)
    if side**2 == len(features) and new_side**2 == count:
        grid = features.T.reshape(1, -1, side, side)
        out = F.interpolate(grid, size=(new_side, new_side), mode="bilinear", align_corners=False)
        return out.flatten(2)[0].T
    return F.interpolate(features.T[None], size=count, mode="linear", align_corners=False)[0].T


def _by_name(counts: Tensor) -> dict[str, Tensor]:
    """Counts by what a term may be divided by."""
    by = dict(zip(COUNTS, counts, strict=True))
    by |= {"answer": by["response"], "text": by["response"] + by["prompt"], "all": by["token"]}
    return by | {
        "switch_answer": by["switch"], "switch_text": by["switch"] + by["switch_prompt"], "switch_all": by["switch_token"]
    }


def _any(masks: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.logical_or, masks)


def gathered(hidden: Tensor, where: Tensor) -> Tensor:
    """Rows of hidden [B, L, D] at `where` [B, L] (bool, on the CPU, so that nothing waits for the device). [R, D]"""
    index = where.flatten().nonzero().squeeze(-1)
    return hidden.flatten(0, 1).index_select(0, index.to(hidden.device, non_blocking=True))


def spread(rows: Tensor, where: Tensor) -> Tensor:
    """Rows [r, ...] at the r places of `where` [R] (bool, on the CPU), 0 elsewhere. [R, ...]"""
    if bool(where.all()):
        return rows
    index = where.nonzero().squeeze(-1).to(rows.device, non_blocking=True)
    return rows.new_zeros(len(where), *rows.shape[1:]).index_copy_(0, index, rows)


def _per_image_rows(hidden: Tensor, inputs: TowerInputs) -> list[Tensor]:
    """Hidden rows at the visual positions, one [N, D] an image (the images of a sample have equal token counts).

    inputs: on the CPU.
    """
    samples = gathered(hidden, inputs.visual).split(inputs.visual.sum(1).tolist())
    return [rows for own, images in zip(samples, inputs.images, strict=True) if images for rows in own.chunk(images)]


def read_by(tower: Tower, inputs: TowerInputs, seen: Seen) -> Tensor:
    """Hidden states over what was seen, by another tower's encoder perhaps. [B, L, D]"""
    return tower.read(inputs, seen.tokens if seen.output is None else seen)


def head_of(tower: Tower) -> Head:
    """The tower's head as the row engine takes it, with what its family puts on the logits."""
    scale, softcap = tower.logit_rule
    return Head(weight=tower.head.weight, bias=tower.head.bias, scale=scale, softcap=softcap)
