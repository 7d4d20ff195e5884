"""From samples to a model's inputs: chat template, tokenizer, image processor, targets, padding.

What is trained is what is met: the prompt of the last answer is rendered and goes through the processor once, exactly as it does
when it is asked, and the answer and its end stand behind it. Earlier answers are found in that prompt by marks that are taken out
before it is tokenised; they are learned there where the tokens before them and their own are those of asking for them.
Targets are shifted here and nowhere else.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from mmkd.errors import SampleError, TowerError
from mmkd.towers.chat import Chat, Facts
from mmkd.towers.families import GRIDS, family_of
from mmkd.towers.inputs import IGNORE, Encoded, TowerInputs
from mmkd.towers.kept import PreparedSamples
from mmkd.towers.samples import Sample, Turn
from mmkd.towers.templates import dated, prints_date, template_of
from mmkd.towers.thinking import holds_thinking, opening_of, without_thinking
from mmkd.towers.tokenless import for_decoder
from mmkd.towers.tokens import Controls, Guard, MarkedTokenizer, TextTokenizer, control_strings

logger = logging.getLogger(__name__)

# What a processor gives beside pixels; and marks of tokens, whose names end so.
_NO_PIXELS = frozenset({"input_ids", "attention_mask", "labels"})
_TOKEN_MARKS = "token_type_ids"
NO_TOKEN = -1  # an id that no token has
# What of a processor decides how many tokens a picture becomes.
_TOKEN_COUNTS = ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy", "image_seq_length")


class _Met:
    """What one template, on one processor, makes of prompts and answers: found out once."""

    def __init__(self, preparer: Preparer, template: str):
        processor, tokenizer = preparer.processor, preparer.tokenizer
        self.chat = Chat(processor, dated(template, preparer.day), thinking=preparer.thinking)
        self.facts: Facts = self.chat.facts
        self.controls = Controls(control_strings(processor, template))
        self.words = TextTokenizer(tokenizer, self.controls)
        guard = Guard(self.controls)
        last = max((found.start() for found in self.controls.own.finditer(self.facts.generation)), default=None)
        # What an answer's tokens depend on. Some tokenizers put a space of their own before a text without a control token.
        self.tail = self.facts.generation.lstrip() if last is None else self.facts.generation[last:]
        self.tail_ids = self.words.ids(self.tail, guard) if self.tail else []
        self.newline_ids = self.words.ids("\n", guard)
        self.end, self.trailer = self._ends(preparer)
        self.steady = self.facts.steady and not preparer.family.reads_ahead

    def _ends(self, preparer: Preparer) -> tuple[int, list[int]]:
        """The token that ends an answer, and those that the template writes behind it at the end of a conversation."""
        stops = preparer.stop_ids
        found: list[tuple[int, list[int]]] = []
        for after in self.facts.after:
            ids = self.words.ids("a" + after, Guard(self.controls))
            place = next((i for i, token in enumerate(ids) if token in stops), None)
            found += [(ids[place], ids[place + 1 :])] if place is not None else []
        last = self.words.ids("a" + self.facts.after[1], Guard(self.controls))
        end = found[0][0] if found else preparer.tokenizer.eos_token_id
        place = last.index(end) if end in last else len(last)
        return end, [] if preparer.family.reads_ahead else last[place + 1 :]

    def answer_ids(self, text: str, guard: Guard) -> list[int]:
        """Tokens of an answer as they follow the generation prompt, without its end."""
        for context, before in ((self.tail, self.tail_ids), ("\n", self.newline_ids)):
            ids = self.words.ids(context + text, guard)
            if before and len(ids) > len(before) and ids[: len(before)] == before:
                return ids[len(before) :]
        return self.words.ids(text, guard)


class Preparer:
    """Prepares samples for one model by its own processor. Of the model it reads configurations, no weights.

    thinking: whether thinking is a target (see `mmkd.towers.reading.Reading`).  day: what a template that prints a date prints.
    """

    def __init__(
        self, model: nn.Module, processor: Any, *, max_length: int, thinking: bool | None = None, day: date | None = None
    ):
        self.processor, self.tokenizer, self.max_length = processor, processor.tokenizer, max_length
        self.thinking, self._day = thinking, day or date.today()
        self._model = model
        self._kind = model.config.model_type
        self.family = family_of(self._kind)
        self._known: dict[tuple[str, frozenset[int]], _Met] = {}
        self._takes_text: bool | None = None
        self._said: set[str] = set()
        self._fingerprints: dict[tuple, str] = {}
        self.kept: PreparedSamples | None = None  # what shares prepared samples with other towers of this process
        if template_of(processor) is None:
            raise TowerError(
                f"{type(processor).__name__} has no chat template; give the tower one by its key `chat_template` (a file or the "
                "template itself), or assemble it with a template of mmkd.towers.templates.CHAT_TEMPLATES"
            )
        self.image_token_id = _image_token_id(model, processor, needed=not self.family.tokenless)

    @property
    def _met(self) -> _Met:
        template = template_of(self.processor)
        key = (template, frozenset(self.stop_ids))
        if key not in self._known:
            self._known[key] = _Met(self, template)
            self._tell(self._known[key].facts)
        return self._known[key]

    def _tell(self, facts: Facts) -> None:
        name = type(self.processor).__name__
        if facts.behind:
            logger.info(
                "%s: a conversation does not go on as the generation prompt %r does; answers and their end are put behind that",
                name, facts.generation,
            )  # fmt: skip
        if facts.opens and self.thinking is None:
            logger.warning(
                "%s: the generation prompt %r opens a thinking block, in which answers without thinking will stand; "
                "`thinking: false` closes it in the prompt, `thinking: true` teaches to close it",
                name, facts.generation,
            )  # fmt: skip

    def with_image_processor(self, image_processor: Any) -> Preparer:
        """The same with another image processor; this one stays as it is."""
        other = copy.copy(self)
        other.processor = copy.copy(self.processor)
        other.processor.image_processor = image_processor
        return other

    @property
    def prints_day(self) -> bool:
        """Whether the chat template asks for the date."""
        return prints_date(template_of(self.processor))

    @property
    def day(self) -> date:
        """What a template that asks for the date is told."""
        return self._day

    @day.setter
    def day(self, day: date) -> None:
        self._day = day
        self._known.clear()

    @property
    def stop_ids(self) -> set[int]:
        """Token ids that end an answer."""
        ids = self._model.generation_config.eos_token_id
        ids = ids if isinstance(ids, list) else [ids]
        return {i for i in (*ids, self.tokenizer.eos_token_id) if i is not None}

    @property
    def pad_id(self) -> int:
        """Any id will do under the attention mask, but never the image placeholder."""
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id

    @property
    def known_by(self) -> str:
        """`fingerprint`, computed once for each state that this object is brought into, with the family."""
        state = (template_of(self.processor), self.max_length, self.thinking, self._day, frozenset(self.stop_ids))
        if state not in self._fingerprints:
            facts = [self.fingerprint(), self._kind, self.pad_id, self.image_token_id, *map(str, state)]
            self._fingerprints[state] = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
        return self._fingerprints[state]

    def fingerprint(self) -> str:
        """Hash of what turns a sample into inputs: vocabulary, chat template and what it writes, image processor, length."""
        images = {k: v for k, v in self.processor.image_processor.to_dict().items() if "processor" not in k}
        images |= {f"{k} in every call": v for k, v in vars(self.processor).get("images_kwargs", {}).items()}
        layout = {name: getattr(self.processor, name, None) for name in _TOKEN_COUNTS}
        met = self._met
        probe = [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")]
        written = [met.chat.render(probe[:1], prompt=True), met.end, met.trailer, met.answer_ids("b", Guard(met.controls))]
        template = template_of(self.processor)
        facts = [sorted(self.tokenizer.get_vocab().items()), template, images, layout, self.max_length, written, self.thinking]
        text = json.dumps(facts, sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    # ---- one sample ------------------------------------------------------------------------------------------------------

    def encode(self, sample: Sample, *, with_answer: bool = True, pictures: list | None = None) -> Encoded:
        """One sample: its prompt as it is asked, and behind that, `with_answer`, the answer and its end.

        Earlier answers are targets too where the template lets them stand as they were given (`answers_apart` is False).
        `pictures` stand in for the sample's own, which are then not loaded. Raises SampleError for what cannot be prepared.
        """
        pictures = [ref.load() for ref in sample.images] if pictures is None else pictures
        met, guard = self._met, Guard(self._met.controls)
        sample = self._with_own_thinking(sample)
        if not with_answer:
            ids, pixels, _ = self._asked(met, sample, pictures, guard)
            return self._fit(sample, ids, [IGNORE] * len(ids), pixels, with_answer)
        answer = self._answer_of(sample)
        several = sample.answers > 1 and met.steady
        if sample.answers > 1 and not several:
            self._leave_out(sample)
        generation, lead, answer = self._around_thinking(met.facts, answer)
        ids, pixels, borders = self._asked(met, sample, pictures, guard, marked=several, cut=generation)
        targets = self._earlier_targets(met, sample, ids, borders, guard) if several else [IGNORE] * len(ids)
        own = [*met.answer_ids(lead + guard.hide(answer), guard), met.end]
        targets = [*targets[:-1], *own, *[IGNORE] * (1 + len(met.trailer))]
        return self._fit(sample, [*ids, *own, *met.trailer], targets, pixels, with_answer)

    @property
    def no_end(self) -> str:
        """Words that the template writes behind an answer at the end of a conversation, as an end that is no token."""
        met = self._met
        return met.controls.own.split(met.facts.after[1])[0].strip()

    def answers_apart(self, sample: Sample) -> bool:
        """Whether the sample's answers must be prepared one by one, since a later prompt holds earlier ones otherwise than given.

        That is so for templates that change or drop what they wrote before, for families that read a prompt in both directions,
        and for earlier answers that hold thinking, which most templates take out.
        """
        if sample.answers < 2:
            return False
        return not self._met.steady or any(holds_thinking(turn.text) for turn in sample.turns[:-1] if turn.role == "assistant")

    def prompt_text(self, sample: Sample) -> str:
        """The prompt as the chat template writes it, pictures as placeholders; none is loaded."""
        return self._met.chat.render(sample.prompt_turns, prompt=True, name=sample.id)

    def answer_tokens(self, sample: Sample, answer: str) -> list[int]:
        """Token ids with which `answer` to the sample's prompt is learned, up to and with the end."""
        met, guard = self._met, Guard(self._met.controls)
        _, lead, answer = self._around_thinking(met.facts, answer.strip())
        return [*met.answer_ids(lead + guard.hide(answer), guard), met.end]

    def misread(self, sample: Sample, encoded: Encoded) -> str | None:
        """How the targets of a prepared sample, decoded, differ from its answers; None where they are these and their ends.

        White space around an answer is the template's, and a tokenizer may compose letters and their accents (NFC).
        """
        met = self._met
        rows = (encoded.targets != IGNORE).nonzero().flatten().tolist()
        runs: list[list[int]] = []
        for number, row in enumerate(rows):
            if number == 0 or row != rows[number - 1] + 1 or int(encoded.targets[rows[number - 1]]) == met.end:
                runs.append([])
            runs[-1].append(int(encoded.targets[row]))
        answers = [turn.text for turn in self._with_own_thinking(sample).turns if turn.role == "assistant"]
        if len(runs) < len(answers):  # earlier ones are not learned, which was told
            runs, answers = runs[-1:], answers[-1:]
        for run, answer in zip(runs, answers, strict=True):
            _, lead, wanted = self._around_thinking(met.facts, answer.strip())
            said = self.tokenizer.decode(run[:-1] if run[-1] == met.end else run, clean_up_tokenization_spaces=False)
            said, wanted = (unicodedata.normalize("NFC", text.strip()) for text in (said, lead + wanted))
            if said != wanted and not (encoded.truncated and run is runs[-1] and wanted.startswith(said.rstrip("\ufffd"))):
                return f"sample {sample.id!r} is to answer {wanted!r}, its targets say {said!r}"
            if run[-1] != met.end and not encoded.truncated:
                return f"sample {sample.id!r} has no end behind the answer {wanted!r}"
        return None

    def _answer_of(self, sample: Sample) -> str:
        answer = sample.answer.strip()
        if not answer:
            raise SampleError(f"sample {sample.id!r} has an empty answer; there is nothing to learn from it")
        return answer

    def _with_own_thinking(self, sample: Sample) -> Sample:
        """The sample without thinking in its answers, where that is not to be learned."""
        if self.thinking is not False:
            return sample
        texts = [without_thinking(t.text)[0] or "" if t.role == "assistant" else t.text for t in sample.turns]
        return replace(sample, turns=tuple(replace(t, text=text) for t, text in zip(sample.turns, texts, strict=True)))

    def _around_thinking(self, facts: Facts, answer: str) -> tuple[int, str, str]:
        """(characters to cut from the prompt's end, lead, answer): an answer's own thinking stands in place of the template's."""
        opening = opening_of(answer)
        if not opening:
            return 0, facts.lead, answer
        if facts.opens and answer.lower().startswith(opening):
            return 0, "", answer[len(opening) :].lstrip()
        return facts.block, facts.lead if not facts.lead.strip() else "", answer

    def _asked(
        self, met: _Met, sample: Sample, pictures: list, guard: Guard, *, marked: bool = False, cut: int = 0
    ) -> tuple[list[int], dict[str, Tensor], list[int | None]]:
        """Token ids of a prompt, placeholders expanded by the processor, its pixels, and where marked answers begin and end."""
        self._check_count(sample)
        text = met.chat.render(sample.prompt_turns, guard.hide, prompt=True, marked=marked, name=sample.id)
        text = text[: len(text) - cut]
        bos = self.tokenizer.bos_token
        special = not (bos and text.startswith(bos))
        reader = MarkedTokenizer(met.words, guard)
        batch = self._processed(text, pictures, special, reader if marked or guard.hidden else None)
        ids = batch["input_ids"][0].tolist()
        pixels = _pixels_of(batch) if pictures else {}
        if self.family.nested:
            pixels = {k: v.transpose(0, 1) for k, v in pixels.items()}
        return ids, pixels, reader.borders if reader.ids == ids else []

    def _check_count(self, sample: Sample) -> None:
        """Raises SampleError for more or fewer pictures than the family reads."""
        count, takes = len(sample.images), self.family.pictures
        if (takes == "one" and count != 1) or (takes == "some" and not count):
            how = "exactly one picture" if takes == "one" else "at least one picture"
            raise SampleError(f"sample {sample.id!r} has {count} pictures, and {self._kind!r} reads {how} with a text")

    def _processed(self, text: str, pictures: list, special: bool, reader: MarkedTokenizer | None) -> Any:
        processor = self.processor
        if reader is not None:
            processor = copy.copy(processor)
            processor.tokenizer = reader
        if pictures:
            images = [pictures] if self.family.grouped else pictures
            return processor(text=[text], images=images, return_tensors="pt", add_special_tokens=special)
        if self._takes_text is None:
            self._takes_text = self._reads_text_alone()
        if self._takes_text:
            return processor(text=[text], return_tensors="pt", add_special_tokens=special)
        # A processor that wants a picture: what it writes around a text is what is left without the picture's tokens.
        image = getattr(self.processor, "image_token", None)
        if image is None:
            return processor.tokenizer([text], return_tensors="pt", add_special_tokens=special)
        blank = Image.new("RGB", (64, 64))
        batch = processor(text=[image + text], images=[blank], return_tensors="pt", add_special_tokens=special)
        ids = batch["input_ids"]
        return {"input_ids": ids[ids != self.image_token_id][None]}

    def _reads_text_alone(self) -> bool:
        try:
            self.processor(text=["a"])
        except (ValueError, TypeError):
            return False
        return True

    def _earlier_targets(self, met: _Met, sample: Sample, ids: list[int], borders: list[int | None], guard: Guard) -> list[int]:
        """Targets of the answers within the prompt `ids`. Each is learned where it was tokenised as it would be given."""
        targets = [IGNORE] * len(ids)
        answers = [turn.text.strip() for turn in sample.prompt_turns if turn.role == "assistant"]
        ends = borders[1::2]
        for number, text in enumerate(answers):
            own = met.answer_ids(met.facts.lead + guard.hide(text), guard) if text else []
            end = ends[number] if number < len(ends) and len(borders) == 2 * len(answers) else None
            start = -1 if end is None else end - len(own)
            before = ids[max(0, start - len(met.tail_ids)) : start]
            if start > 0 and own and ids[start:end] == own and before[1:] == met.tail_ids[1:]:
                targets[start - 1 : end] = [*own, met.end]
            else:
                self._leave_out(sample)
        return targets

    def _leave_out(self, sample: Sample) -> None:
        """Tells once that an earlier answer is no target."""
        if "left out" not in self._said:
            self._said.add("left out")
            logger.warning(
                "sample %r: an earlier answer is not learned, since the prompt of a later one holds it otherwise than it is "
                "given; nor are others like it. Samples with one answer each (`Sample.up_to_answer`) are learned whole",
                sample.id,
            )

    def _fit(self, sample: Sample, ids: list[int], targets: list[int], pixels: dict[str, Tensor], with_answer: bool) -> Encoded:
        """The sample within `max_length`."""
        length, wanted = len(ids), sum(target != IGNORE for target in targets)
        if length > self.max_length:
            targets = [*targets[: self.max_length - 1], IGNORE]
            kept = sum(target != IGNORE for target in targets)
            if not with_answer or kept == 0 or self.image_token_id in ids[self.max_length :]:
                raise SampleError(
                    f"sample {sample.id!r} has {length} tokens, more than max_length {self.max_length}, and would lose "
                    "its answer or part of a picture; raise max_length or shorten the prompt"
                )
            ids, wanted = ids[: self.max_length], wanted - kept
        else:
            wanted = 0
        encoded = Encoded(sample.id, torch.tensor(ids), torch.tensor(targets), pixels, len(sample.images), truncated=wanted)
        return for_decoder(encoded, self._decoder_start) if self.family.encoder_decoder else encoded

    @property
    def _decoder_start(self) -> int:
        """The token that the decoder of an encoder-decoder model begins with."""
        configs = (self._model.generation_config, self._model.config, self._model.config.get_text_config(decoder=True))
        starts = [getattr(config, name, None) for name in ("decoder_start_token_id", "bos_token_id") for config in configs]
        return next((start for start in starts if start is not None), self.pad_id)

    # ---- visual positions ------------------------------------------------------------------------------------------------

    def visual_count(self, encoded: Encoded) -> int:
        """Visual tokens of one prepared sample, all its images together."""
        return int((encoded.input_ids == self.image_token_id).sum())

    def with_visual_count(self, encoded: Encoded, count: int) -> Encoded:
        """The sample with `count` visual positions in place of its own: how the model reads another encoder's tokens."""
        is_visual = encoded.input_ids == self.image_token_id
        own = int(is_visual.sum())
        if own == count:
            return encoded
        if any(name in GRIDS for name in encoded.pixels):
            raise TowerError(
                f"{self._kind!r} places its {own} visual tokens by the grid of its own patches, so {count} "
                "tokens of another encoder have no place in it; use an encoder with the same count, or another teacher"
            )
        if count % encoded.images or own % encoded.images:
            raise TowerError(f"{count} visual tokens cannot be spread evenly over {encoded.images} images")
        # The first placeholder of each image becomes as many as are wanted, the others none.
        order = is_visual.cumsum(0) - 1
        first = is_visual & (order % (own // encoded.images) == 0)
        repeats = torch.where(is_visual, first.long() * (count // encoded.images), 1)
        targets = encoded.targets.repeat_interleave(repeats)
        return replace(encoded, input_ids=encoded.input_ids.repeat_interleave(repeats), targets=targets)

    # ---- a batch ---------------------------------------------------------------------------------------------------------

    def collate(self, encoded: Sequence[Encoded], *, padding_side: str = "right") -> TowerInputs:
        """Pads encoded samples into one batch."""
        length = max(len(e.input_ids) for e in encoded)

        def stack(rows: list[Tensor], value: int) -> Tensor:
            out = torch.full((len(rows), length), value, dtype=torch.long)  # [B, L]
            for b, row in enumerate(rows):
                place = slice(length - len(row), length) if padding_side == "left" else slice(0, len(row))
                out[b, place] = row
            return out

        input_ids = stack([e.input_ids for e in encoded], self.pad_id)
        mask = stack([torch.ones_like(e.input_ids) for e in encoded], 0)
        return TowerInputs(
            ids=[e.id for e in encoded],
            input_ids=input_ids,
            attention_mask=mask,
            targets=stack([e.targets for e in encoded], IGNORE),
            visual=(input_ids == self.image_token_id) & mask.bool(),
            pixels={} if self.family.tokenless else self._joined([e.pixels for e in encoded]),
            images=[e.images for e in encoded],
            each=[e.pixels for e in encoded] if self.family.tokenless else [],
            own=[e.own for e in encoded] if any(e.own for e in encoded) else [],
        )

    def _joined(self, pixels: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        for name, target in self.family.indexed.items():
            pixels = _counted_on(pixels, name, target)
        return _concatenate(pixels, wide=self.family.wide)


def _pixels_of(batch: Any) -> dict[str, Tensor]:
    given = {k: v for k, v in batch.items() if k not in _NO_PIXELS and not k.endswith(_TOKEN_MARKS)}
    return {k: torch.as_tensor(v) for k, v in given.items()}


def _concatenate(pixels: Sequence[dict[str, Tensor]], wide: bool) -> dict[str, Tensor]:
    """Pixel inputs of several pieces joined along the image (or patch) axis; `wide`: the pictures side by side.

    Families whose pictures differ in size or number of crops fill up with zeros at the end of the other axes, as their
    own processors do within one call.
    """
    names = sorted({name for piece in pixels for name in piece})
    pieces = {name: [piece[name] for piece in pixels if name in piece] for name in names}
    if wide:
        return {name: torch.cat(parts, dim=-1 if parts[0].is_floating_point() else 0) for name, parts in pieces.items()}
    return {name: torch.cat(_same_shape(parts)) for name, parts in pieces.items()}


def _counted_on(pixels: Sequence[dict[str, Tensor]], name: str, target: str) -> list[dict[str, Tensor]]:
    """The pieces with their indices `name` into the rows [n, k, ...] of `target` moved on by the pieces before; -1 is none."""
    moved, before = [], 0
    for piece in pixels:
        if name in piece:
            piece = piece | {name: torch.where(piece[name] >= 0, piece[name] + before, piece[name])}
            before += piece[target].shape[0] * piece[target].shape[1]
        moved.append(piece)
    return moved


def _same_shape(tensors: list[Tensor]) -> list[Tensor]:
    if len({t.shape[1:] for t in tensors}) == 1:
        return tensors
    sizes = [max(axis) for axis in zip(*(t.shape[1:] for t in tensors), strict=True)]
    missing = [[max_size - size for max_size, size in zip(sizes, t.shape[1:], strict=True)] for t in tensors]
    return [F.pad(t, [n for gap in reversed(gaps) for n in (0, gap)]) for t, gaps in zip(tensors, missing, strict=True)]


def _image_token_id(model: nn.Module, processor: Any, needed: bool) -> int:
    for owner in (model.config, processor):
        token = getattr(owner, "image_token_id", None)
        if token is not None:
            return token
    if not needed:
        return NO_TOKEN
    raise TowerError(f"{type(model).__name__} names no image token; it is not an image-text model that a tower can wrap")
