"""A teacher behind an endpoint: token ids go over, its likeliest tokens come back, and it has proven that it looks.

Nothing is taught before the server has shown, on samples of the training data, that it reads the very tokens that are compared
(same tokenizer, template, number of visual tokens, end), that pictures change what it says, and that it says the same when asked
again and at once. Each later answer is held against its request; a server that went away must say what it said before.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import groupby
from threading import Lock
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig

import mmkd.towers.encoders  # noqa: F401  registers the encoders that transformers does not know
from mmkd.data.samples import Sample
from mmkd.engine.positions import any_of, rows_at
from mmkd.errors import DataError, GuardError, MmkdError, TowerError
from mmkd.registry import register
from mmkd.teachers.live import load_tower
from mmkd.teachers.opening import Opening
from mmkd.teachers.spec import TeacherSpec
from mmkd.teachers.teacher import Gives, Teacher, TeacherSignals, head_of
from mmkd.teachers.wires import WIRES, Client, Rendered, Wire
from mmkd.towers.inputs import IGNORE
from mmkd.towers.tower import Encoded, Seen, Tower, TowerInputs

logger = logging.getLogger(__name__)

AT_ONCE = 8  # requests
KEPT = 200_000  # rows that are kept, by content
TRIED = 4  # samples with pictures, and as many without, on which a server is tried
FAINT = 1e-5  # by which other pictures change log-probabilities at least
CLOSE = 1e-3  # of log-probabilities that should be the same
POSITIONS = frozenset({"response", "given", "generated"})


@dataclass
class Served(Encoded):
    """A sample as the teacher's own processor prepares it, which the server must do alike; `sample` goes over."""

    sample: Sample | None = None


@dataclass
class ServedInputs(TowerInputs):
    """A batch of these."""

    asked: list[Served] = field(default_factory=list)


@dataclass(frozen=True)
class Top:
    """The k likeliest tokens at each row of an answer [R, k], their log-probabilities, the log of the rest [R], and that of the
    token that follows [R]."""

    ids: Tensor
    log_probs: Tensor
    tail: Tensor
    own: Tensor

    def differs(self, other: Top) -> float:
        """The largest difference of log-probabilities of the tokens that follow and of the likeliest."""
        pairs = ((self.own, other.own), (self.log_probs, other.log_probs))
        return max(float((a - b).abs().max()) if len(a) else 0.0 for a, b in pairs)


@register("teachers", "served")
class ServedTeacher(Teacher):
    """A model on a server, which is asked for its likeliest tokens at each row of an answer."""

    remote = True
    options: ClassVar[tuple[str, ...]] = ("served", "served_name", "wire", "top_k", "verify", "patience")

    def __init__(self, body: Tower, wire: Wire, top_k: int, name: str = "teacher", verify: Any = None, view: Any = None):
        """body: configuration and processor of the model that is served.  verify: a function that gives the model itself."""
        self.body, self.wire, self.top_k, self.name = body.freeze(), wire, top_k, name
        self.view_of_sample, self._verify = view, verify
        self._proof: list[tuple[Served, Top]] = []  # what it said when it was tried
        self._lost, self._lock = 0, Lock()
        self._known: OrderedDict[bytes, Top] = OrderedDict()
        self._rows = 0

    @classmethod
    def open(cls, spec: TeacherSpec, opening: Opening) -> ServedTeacher:
        """Reads the processor from `model` and asks the server what it serves. Raises DataError, TowerError."""
        client = Client(spec.served, spec.patience)
        wire = WIRES[spec.wire](client, spec.served_name or spec.model)
        known = wire.models()
        if spec.served_name is None and len(known) == 1:
            (wire.model,) = known
        if wire.model not in known:
            raise DataError(
                f"{spec.served} serves {', '.join(known) or 'nothing'}, not {wire.model!r}; name one as teacher.served_name"
            )
        longest = min(opening.max_length, (known[wire.model] or math.inf) - 1)  # it generates one token behind the answer
        if longest < opening.max_length:
            logger.info("%s reads %d tokens at most; longer samples are left out or cut there", spec.served, longest)
        body = body_of(spec, longest)
        verify = (lambda: load_tower(spec, longest)) if spec.verify else None
        return cls(body, wire, spec.top_k, opening.name, verify, spec.view)

    @property
    def gives(self) -> Gives:
        name, why = f"the server {self.wire.client.url}", "a server gives its likeliest tokens at rows of answers alone"
        return Gives(name, frozenset({"rows"}), POSITIONS, self.top_k, f"its top {self.top_k}", why)

    def fingerprint(self) -> str:
        facts = f"{self.wire.client.url} {self.wire.model} {self.top_k} {self.body.processor_fingerprint()}"
        return hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()

    def alike(self, student: Tower) -> bool:
        return False

    def prepare(self, sample: Sample, encoded: Encoded, *, student: Tower, alike: bool) -> Served:
        return self.prepared(sample, self.body.encode(self.view(sample)))

    def prepared(self, sample: Sample, own: Encoded) -> Served:
        return Served(**{f.name: getattr(own, f.name) for f in fields(Encoded)}, sample=self.view(sample))

    def collate(self, prepared: Sequence[Served]) -> ServedInputs:
        inputs = self.body.collate(prepared)
        return ServedInputs(**{f.name: getattr(inputs, f.name) for f in fields(TowerInputs)}, asked=list(prepared))

    def say(
        self, inputs: ServedInputs, host: ServedInputs, *, shared: Seen | None = None, differentiable: bool = False
    ) -> ServedSignals:
        return ServedSignals(self, host, inputs.input_ids.device)

    def answer_loss(self, inputs: ServedInputs) -> float | None:
        own = torch.cat([top.own for top in self.tops(inputs.asked)])
        return -float(own.mean()) if len(own) else None

    # ---- asking ----

    def tops(self, asked: Sequence[Served]) -> list[Top]:
        """What the server says of each sample's answer, several asked at once. Raises DataError, TowerError."""
        keys = [_key(one) for one in asked]
        with self._lock:
            found = {key: self._known[key] for key in keys if key in self._known}
        missing = {key: one for key, one in zip(keys, asked, strict=True) if key not in found}
        if missing:
            with ThreadPoolExecutor(min(AT_ONCE, len(missing))) as pool:
                found |= dict(zip(missing, pool.map(self._ask, missing.values()), strict=True))
            if self.wire.client.lost != self._lost:  # it went away meanwhile: is it what it was?
                self._try_again()
            with self._lock:
                for key in missing:
                    self._keep(key, found[key])
        return [found[key] for key in keys]

    def _keep(self, key: bytes, top: Top) -> None:
        self._known[key] = top
        self._rows += len(top.own)
        while self._rows > KEPT:
            _, dropped = self._known.popitem(last=False)
            self._rows -= len(dropped.own)

    def _ask(self, one: Served, pictures: Sequence[Any] | None = None) -> Top:
        rendered = self.wire.render(one.sample, pictures)
        if pictures is None:
            self._check_prompt(one, rendered)
        ids, rows = one.input_ids.tolist(), (one.targets != IGNORE).nonzero()[:, 0].tolist()
        prompt = rows[0] + 1 if rows else len(ids)
        if not rows:
            return Top(torch.zeros(0, self.top_k, dtype=torch.long), torch.zeros(0, self.top_k), torch.zeros(0), torch.zeros(0))
        sent = [*rendered.ids, *ids[prompt : rows[-1] + 2]]
        shift = len(rendered.ids) - prompt
        if rows != list(range(rows[0], rows[-1] + 1)):
            raise DataError(f"sample {one.id!r} has several answers, a server is asked for one; set `one_answer: true`")
        found = self.wire.top(rendered, sent, self.top_k)
        if len(found) != len(sent):
            raise DataError(f"{self._who}: sample {one.id!r} has {len(sent)} tokens, but log-probabilities come for {len(found)}")
        return self._top(one, [(int(one.targets[row]), found[row + 1 + shift]) for row in rows])

    def _top(self, one: Served, rows: Sequence[tuple[int, dict[int, float] | None]]) -> Top:
        ids, values, tail, own = [], [], [], []
        for place, (token, entry) in enumerate(rows):
            if entry is None or token not in entry:
                raise DataError(f"{self._who}: what it says of sample {one.id!r}, answer token {place}, is not of token {token}")
            best = sorted(entry.items(), key=lambda pair: -pair[1])[: self.top_k]
            mass = sum(math.exp(value) for _, value in best)
            if len(best) < self.top_k:
                raise DataError(
                    f"{self._who} gives {len(best)} tokens of a row, fewer than teacher.top_k {self.top_k}; start it with "
                    f"--max-logprobs {self.top_k}, or lower teacher.top_k"
                )
            if not all(math.isfinite(value) and value <= CLOSE for _, value in best) or mass > 1 + CLOSE:
                raise DataError(f"{self._who}: what it says of sample {one.id!r}, answer token {place}, is no log-probabilities")
            ids.append([i for i, _ in best])
            values.append([value for _, value in best])
            tail.append(math.log1p(-mass) if mass < 1 else -math.inf)
            own.append(entry[token])
        return Top(torch.tensor(ids), torch.tensor(values), torch.tensor(tail), torch.tensor(own))

    @property
    def _who(self) -> str:
        return f"the server {self.wire.client.url} ({self.wire.model})"

    def _check_prompt(self, one: Served, rendered: Rendered) -> None:
        """Raises DataError where the server's processor makes other tokens of the prompt."""
        rows = (one.targets != IGNORE).nonzero()[:, 0]
        own = one.input_ids[: int(rows[0]) + 1 if len(rows) else None].tolist()
        if own == rendered.ids:
            return
        image = self.body.image_token_id
        here, there = own.count(image), rendered.ids.count(image)
        where = f"{self._who}, sample {one.id!r}: "
        if here and not there:
            raise DataError(f"{where}its prompt has no visual token, ours {here}; it does not get the pictures")
        if here != there:
            raise DataError(
                f"{where}its processor makes {there} visual tokens, ours {here}; give it the same processor options (min_pixels, "
                "max_pixels, size), or name them as teacher.processor"
            )
        if _runs(own, image) != _runs(rendered.ids, image) and sorted(_runs(own, image)) == sorted(_runs(rendered.ids, image)):
            raise DataError(
                f"{where}its pictures stand in another order: they have {_runs(rendered.ids, image)} visual tokens, ours "
                f"{_runs(own, image)}; serve the model with the pictures where the prompt has them"
            )
        pairs = enumerate(zip(own, rendered.ids, strict=False))
        place = next((n for n, (a, b) in pairs if a != b), min(len(own), len(rendered.ids)))
        said = [self.body.tokenizer.decode(ids[place : place + 8]) for ids in (rendered.ids, own)]
        raise DataError(
            f"{where}its prompt has {len(rendered.ids)} tokens, ours {len(own)}; from token {place} on it reads {said[0]!r} "
            f"where ours reads {said[1]!r}: it has another chat template or tokenizer; start it with that of teacher.model, or "
            "set teacher.chat_template"
        )

    # ---- before step 1 ----

    def check(self, samples: Sequence[Sample]) -> None:
        """Tries the server on some samples. Raises GuardError with what is wrong, DataError, TowerError."""
        if self._proof:
            return
        step = max(1, len(samples) // 64)
        some = [samples[place] for place in range(0, len(samples), step)]
        chosen = [s for s in some if s.images][:TRIED] + [s for s in some if not s.images][:TRIED]
        prepared = []
        for sample in chosen:
            try:
                prepared.append(self.prepared(sample, self.body.encode(self.view(sample.by_answer()[-1]))))
            except DataError as error:  # it will be left out
                logger.info("not used to try the server: %s", error)
        if not prepared:
            raise GuardError(f"{self._who} cannot be tried: none of {len(chosen)} samples can be prepared for it")
        alone = [self._ask(one) for one in prepared]
        self._check_end(prepared[0])
        self._check_pictures(prepared, alone)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            together = list(pool.map(self._ask, [*prepared, *prepared[::-1]]))
        self._same("asked alone and at once", [*prepared, *prepared[::-1]], [*alone, *alone[::-1]], together)
        if self._verify is not None:
            self._check_model(prepared, alone)
        self._proof, self._lost = list(zip(prepared, alone, strict=True)), self.wire.client.lost
        logger.info("%s reads %d samples as we do and sees their pictures", self._who, len(prepared))

    def _try_again(self) -> None:
        with self._lock:
            self._lost = self.wire.client.lost
            again = [self._ask(one) for one, _ in self._proof]
            proven = [one for one, _ in self._proof]
            before = [top for _, top in self._proof]
            self._same("asked before and after it was away; it is another model or version", proven, before, again)

    def _same(self, when: str, asked: Sequence[Served], before: Sequence[Top], after: Sequence[Top]) -> None:
        far = [(one.id, gap) for one, a, b in zip(asked, before, after, strict=True) if (gap := a.differs(b)) > CLOSE]
        if far:
            raise GuardError(
                f"{self._who} says other things when {when}: log-probabilities of {len(far)} of {len(asked)} samples differ, of "
                f"{far[0][0]!r} by {far[0][1]:.2g}"
            )

    def _check_end(self, one: Served) -> None:
        """The server's template must end an answer with the token that ours does."""
        rows = (one.targets != IGNORE).nonzero()[:, 0].tolist()
        wanted = one.input_ids[: rows[-1] + 2].tolist()
        found = self.wire.render(one.sample, answer=one.sample.answer).ids
        if wanted[-1] in self.body.stop_ids and wanted[-1] not in found[rows[0] + 1 :]:
            raise GuardError(
                f"{self._who} ends answers otherwise: its conversation has no token {wanted[-1]} "
                f"({self.body.tokenizer.decode(wanted[-1:])!r}) behind the prompt; give it the template of teacher.model"
            )

    def _check_pictures(self, asked: Sequence[Served], said: Sequence[Top]) -> None:
        """Other pictures of the same size must change what it says."""
        pictured = [(one, top) for one, top in zip(asked, said, strict=True) if one.sample.images]
        changed, tried = 0, 0
        for one, top in pictured:
            own = {ref.key for ref in one.sample.images}
            other = next((ref for o, _ in pictured for ref in o.sample.images if ref.key not in own), None)
            if other is None:
                continue
            tried += 1
            pictures = [other.load().resize(ref.load().size) for ref in one.sample.images]
            changed += self._ask(one, pictures).differs(top) > FAINT
        if tried and not changed:
            raise GuardError(f"{self._who} says the same of {tried} samples whatever their pictures are: it does not see them")

    def _check_model(self, asked: Sequence[Served], said: Sequence[Top]) -> None:
        """Against the model itself in this process (`verify`), a few rows."""
        tower = self._verify()
        with torch.no_grad():
            for one, top in zip(asked, said, strict=True):
                inputs = tower.collate([one]).to(tower.device)
                hidden = tower.read(inputs, tower.see(inputs))[inputs.response]
                head = head_of(tower)
                logits = (torch.nn.functional.linear(hidden, head.weight, head.bias) * head.scale).float()
                logits = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
                gap = float((logits.log_softmax(-1).cpu().gather(-1, top.ids) - top.log_probs).abs().max())
                if gap > CLOSE * (1 if tower.model.dtype == torch.float32 else 50):
                    raise GuardError(
                        f"{self._who} is not the model {tower.model.name_or_path!r}: log-probabilities of {one.id!r} differ "
                        f"by up to {gap:.2g}; serve these weights, with the pictures in this order"
                    )


class ServedSignals(TeacherSignals):
    """What a server says of a batch; it is asked when rows are."""

    def __init__(self, teacher: ServedTeacher, host: ServedInputs, device: torch.device):
        self.teacher, self.host, self.device = teacher, host, device

    @cached_property
    def _tops(self) -> list[Top]:
        return self.teacher.tops(self.host.asked)

    def rows(self, positions: Iterable[str], samples: Sequence[bool] | None = None) -> dict[str, Tensor]:
        where = any_of(rows_at(self.host, name) for name in positions)[self.host.response]  # [R]
        found = {name: torch.cat([getattr(top, name) for top in self._tops])[where] for name in ("ids", "log_probs", "tail")}
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in found.items()}

    def visual_rows(self) -> Sequence[Tensor]:
        raise TowerError(f"{self.teacher.name}: a server gives no hidden rows")

    def features(self) -> list[Tensor]:
        raise TowerError(f"{self.teacher.name}: a server gives no vision features")


def _runs(ids: Sequence[int], token: int) -> list[int]:
    """How often a token stands behind itself, run by run."""
    return [len(list(run)) for same, run in groupby(ids, lambda one: one == token) if same]


def _key(one: Served) -> bytes:
    """A sample by what goes over."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in (one.input_ids, one.targets, *(one.pixels[name] for name in sorted(one.pixels))):
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode() + tensor.contiguous().numpy().tobytes())
    return digest.digest()


def body_of(spec: TeacherSpec, max_length: int) -> Tower:
    """Configuration and processor of the served model; no weight is read. Raises TowerError."""
    options = {"trust_remote_code": spec.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(spec.model, **options)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, **options)
        processor = AutoProcessor.from_pretrained(spec.model, **options)
    except MmkdError:
        raise
    except Exception as error:
        raise TowerError(f"no configuration and processor can be loaded from {spec.model!r}: {error}") from error
    try:
        model.generation_config = GenerationConfig.from_pretrained(spec.model)
    except OSError:
        logger.info("%s has no generation configuration; the tokenizer's end token ends answers", spec.model)
    body = Tower(model, processor, max_length=max_length, reading=spec.reading)
    body.logit_rule = (1.0, None)  # not asked for: no logits are made of it
    return body

