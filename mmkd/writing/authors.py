"""Who answers: a model in this process, or an endpoint that speaks OpenAI's chat completions."""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import math
import os
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

from mmkd.data.samples import Sample
from mmkd.errors import DataError, ImageError, SampleError, TowerError, one_line
from mmkd.teachers.wires import Client, messages_of
from mmkd.towers.sampling import Sampling, sample
from mmkd.towers.thinking import UNCLOSED, decode_answers, without_thinking
from mmkd.towers.tower import Tower
from mmkd.writing.spec import EndpointSpec

logger = logging.getLogger(__name__)

KEPT = 2**16  # characters of an answer that are kept; no training answer is as long
UNPREPARED = (DataError, ImageError, SampleError)
LARGEST = 2**26  # bytes of one response
REFUSED = frozenset({400, 413, 415, 422, 451})  # of one request; others are of all


@dataclass(frozen=True)
class Request:
    """One answer that is wanted. number: which of several to the same prompt.  options: two words whose odds are wanted
    instead."""

    id: str
    sample: Sample
    number: int
    key: str
    options: tuple[str, str] | None = None

    @property
    def seed(self) -> int:
        """Of its draws: its own, whatever else is asked."""
        return int(self.key[:15], 16)


@dataclass(frozen=True)
class Said:
    """An answer. text: None where there is none, for `refused`.  cut: whether it ends before its end.  odds: of a request's
    options.

    usage: tokens that an endpoint counted.
    """

    text: str | None = None
    refused: str | None = None
    cut: bool = False
    odds: float | None = None
    usage: dict[str, int] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """What is kept of it."""
        text, row = self.text, {}
        if text is not None:
            row["text"] = text[:KEPT]
        if text is not None and len(text) > KEPT:
            row |= {"characters": len(text), "cut": True}
        more = {"refused": self.refused, "odds": self.odds, "usage": self.usage, "cut": self.cut}
        return row | {name: value for name, value in more.items() if value or (name == "odds" and value is not None)}


class Author(ABC):
    """Who is asked. name: as the recipe calls it.  model: what it is.  key: hash of what its answers follow from.

    whole: whether a chunk is asked whole again where a part of it is missing.
    """

    name: str
    model: str
    key: str
    whole = False

    @abstractmethod
    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Said]]:
        """An answer to each, as they come. Raises TowerError, DataError where none can be had at all."""


class LiveAuthor(Author):
    """A tower of this process. Draws belong to the request, so that an answer is the same in any batch and process."""

    whole = True

    def __init__(self, name: str, tower: Tower, model: str, how: Sampling, stop: Sequence[str] = ()):
        self.name, self.tower, self.model, self.how, self.stop = name, tower, model, how, tuple(stop)
        facts = [tower.fingerprint(), how.max_new_tokens, how.temperature, how.top_p, how.top_k, *stop]
        self.key = hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()
        if how.temperature > 0 and not tower.has_visual_tokens:
            raise TowerError(f"{name}: a model without visual tokens answers greedily alone; set temperature: 0")
        self._opens: bool | None = None

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Said]]:
        asked, prompts = [], []
        for request in requests:
            try:
                encoded = self.tower.encode(request.sample, with_answer=False)
            except UNPREPARED as error:
                yield request, Said(refused=f"cannot be prepared: {one_line(error, 200)}")
                continue
            asked.append(request)
            prompts.append((encoded, tuple(ref.key for ref in request.sample.images)))
        if not asked:
            return
        if asked[0].options is not None:
            yield from self._odds(asked)
            return
        for request, (text, ended) in zip(asked, self._texts(asked, prompts), strict=True):
            yield request, self._said(request, text, ended)

    def _texts(self, asked: Sequence[Request], prompts: Sequence[Any]) -> list[tuple[str, bool]]:
        """Each answer, and whether it came to its end."""
        if not self.tower.has_visual_tokens:
            texts = self.tower.answer([one.sample for one in asked], max_new_tokens=self.how.max_new_tokens)
            return [(text, self.tower.token_count([text]) < self.how.max_new_tokens) for text in texts]
        rows = sample(self.tower, prompts, [one.seed for one in asked], self.how)
        texts = decode_answers(self.tower.tokenizer, rows)
        return [(text, bool(row) and row[-1] in self.tower.stop_ids) for text, row in zip(texts, rows, strict=True)]

    def _said(self, request: Request, text: str, ended: bool) -> Said:
        if self._opens is None:
            self._opens = self.tower.opens_thinking(request.sample)
        return _thought(text, self._opens, self.stop, cut=not ended)

    def _odds(self, asked: Sequence[Request]) -> Iterator[tuple[Request, Said]]:
        samples, options = [one.sample for one in asked], [one.options for one in asked]
        _, found = self.tower.choose_with_likelihood(samples, options)
        for request, likelihood in zip(asked, found, strict=True):
            known = likelihood.choices
            yield request, Said(odds=known[0] - known[1]) if known and all(map(math.isfinite, known)) else Said(refused="no odds")


def _thought(text: str, opened: bool, stop: Sequence[str], *, cut: bool) -> Said:
    """An answer without its thinking, up to the first stop."""
    answer, thinking = without_thinking(text, opened)
    if thinking == UNCLOSED or answer is None:
        return Said(text="", cut=True)
    ends = [place for mark in stop if (place := answer.find(mark)) >= 0]
    return Said(text=(answer[: min(ends)] if ends else answer).strip(), cut=cut and not ends)


class _Endpoint(Client):
    """A client that names itself to the server, and reads no more than a response should have."""

    def __init__(self, url: str, patience: float, key: str | None, timeout: float):
        super().__init__(url, patience)
        self._key, self._timeout = key, timeout

    def _once(self, path: str, body: dict[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        data = None if body is None else json.dumps(body).encode()
        with self._opener.open(urllib.request.Request(self.url + path, data, headers), timeout=self._timeout) as answer:
            content = answer.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise DataError(f"{self.url}{path} sends more than {LARGEST:,} bytes")
        try:
            return json.loads(content)
        except RecursionError as error:
            raise http.client.HTTPException("nested too deeply") from error


class EndpointAuthor(Author):
    """A model behind an endpoint, asked several things at once."""

    def __init__(self, name: str, spec: EndpointSpec, how: Sampling, stop: Sequence[str] = ()):
        if spec.key is not None and spec.key not in os.environ:
            raise DataError(
                f"by.key: the environment variable {spec.key} is not set; put the endpoint's key there, not into the recipe"
            )
        self.name, self.spec, self.model, self.how, self.stop = name, spec, spec.model, how, tuple(stop)
        self.client = _Endpoint(spec.endpoint, spec.patience, os.environ.get(spec.key or ""), spec.timeout)
        facts = [spec.endpoint, spec.model, spec.extra, how.max_new_tokens, how.temperature, how.top_p, how.top_k, *stop]
        self.key = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()
        self._answered = self._turned_down = 0

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[Request, Said]]:
        with ThreadPoolExecutor(min(self.spec.at_once, max(1, len(requests)))) as pool:
            asked = {pool.submit(self._ask, request): request for request in requests}
            try:
                for done in as_completed(asked):
                    yield asked[done], done.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _ask(self, request: Request) -> Said:
        try:
            body = self._body(request)
        except UNPREPARED as error:
            return Said(refused=f"cannot be prepared: {one_line(error, 200)}")
        try:
            found = self.client.ask("/chat/completions", body)
        except DataError as error:
            code = getattr(error.__cause__, "code", None)
            if code not in REFUSED:
                raise DataError(f"{error}; the endpoint is asked for model {self.spec.model!r} with the key of by.key") from error
            self._turned_down += 1
            if self._turned_down >= 20 and not self._answered:
                raise DataError(f"the first {self._turned_down} requests were refused, the last one so: {error}") from error
            return Said(refused=f"refused ({code})")
        self._answered += 1
        return _said(found, request, self.stop)

    def _body(self, request: Request) -> dict[str, Any]:
        how = self.how
        body: dict[str, Any] = {"model": self.spec.model, "messages": messages_of(request.sample), **self.spec.extra}
        if request.options is not None:
            return body | {"temperature": 0, "logprobs": True, "top_logprobs": 20, self.spec.length_key: 1}
        body |= {"temperature": how.temperature, self.spec.length_key: how.max_new_tokens}
        body |= {"top_p": how.top_p} if how.top_p < 1 else {}
        body |= {"top_k": how.top_k} if how.top_k > 0 else {}
        body |= {"stop": list(self.stop)} if self.stop else {}
        return body | ({"seed": request.seed % 2**31} if self.spec.seed else {})


def _said(found: Any, request: Request, stop: Sequence[str]) -> Said:
    """What a response says. One of another form than OpenAI's is an answer that is counted, not an end of the run."""
    try:
        choice = found["choices"][0]
        content = choice["message"].get("content")
        if isinstance(content, list):  # parts of text
            content = "".join(part["text"] for part in content if part.get("type") == "text")
        given = found.get("usage")
        given = given if isinstance(given, dict) else {}
        counted = {name: given.get(f"{name}_tokens") for name in ("prompt", "completion")}
        usage = {name: value for name, value in counted.items() if isinstance(value, int) and not isinstance(value, bool)}
        if request.options is not None:
            odds = _odds(choice["logprobs"]["content"][0]["top_logprobs"], request.options)
            return Said(odds=odds, usage=usage) if odds is not None else Said(refused="no odds", usage=usage)
        if content is None:
            return Said(refused="refused by the model" if choice["message"].get("refusal") else "no text", usage=usage)
        if not isinstance(content, str):
            return Said(refused="no text", usage=usage)
        if choice.get("finish_reason") == "content_filter":
            return Said(refused="filtered", usage=usage)
        said = _thought(content.encode("utf-8", "replace").decode(), False, stop, cut=choice.get("finish_reason") == "length")
        return Said(text=said.text, cut=said.cut, usage=usage)
    except (KeyError, IndexError, TypeError, AttributeError):
        return Said(refused="no chat completion")


def _odds(top: Any, options: tuple[str, str]) -> float | None:
    """log p(first) - log p(second) of the first token, by the words that it begins with; the last of the likeliest bounds one
    that is not among them."""
    mass = [0.0, 0.0]
    values = [(str(entry["token"]).strip().casefold(), float(entry["logprob"])) for entry in top]
    for token, value in values:
        for number, word in enumerate(options):
            if token and word.casefold().startswith(token):
                mass[number] += math.exp(value)
    if not values or not any(mass):
        return None
    floor = math.exp(min(value for _, value in values))
    yes, no = (max(part, min(floor, 1e-12) if part == 0 else part) for part in mass)
    return math.log(yes) - math.log(no)


def key_of(author: Author, sample: Sample, pictures: Sequence[str], number: int, options: Sequence[str] | None = None) -> str:
    """By what an answer is known: who is asked what, with which pictures, for the how many-th time."""
    facts = [author.key, sample.content, list(pictures), number, *([list(options)] if options is not None else [])]
    return hashlib.blake2b(json.dumps(facts, ensure_ascii=True).encode(), digest_size=16).hexdigest()
