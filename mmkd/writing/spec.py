"""How a recipe describes a stage of `kind: write`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from mmkd.base.schema import Strict, is_default
from mmkd.data.spec import DataSpec
from mmkd.errors import MmkdError
from mmkd.towers.sampling import Sampling
from mmkd.writing.card import PromptCard, RowSpec, load_prompt
from mmkd.writing.checks import CheckSpec
from mmkd.writing.forms import FormSpec

STUDENT = "student"
# Before a stage's own checks, unless it names them itself. The first stands before all others.
ALWAYS = ("instructions", "length", "overlap")
RESERVED = frozenset(
    {"model", "messages", "stream", "n", "temperature", "top_p", "top_k", "stop", "seed", "logprobs", "top_logprobs"}
)


class EndpointSpec(Strict):
    """An endpoint that speaks OpenAI's chat completions.

    endpoint: its address up to `/chat/completions`, such as https://api.example.com/v1.  key: the name of an environment
    variable that holds its key.  extra: further keys of each request.  at_once: requests under way.  patience: seconds that a
    silent server is waited for."""

    endpoint: str = Field(pattern=r"^https?://[^\s/?#@]+(/[^\s?#]*)?$")
    model: str = Field(min_length=1)  # what the endpoint calls it
    name: str | None = None  # by which checks and provenance call it; default: the model
    key: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    extra: dict[str, Any] = Field({})
    length_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"  # the name of the length in its requests
    seed: bool = True  # whether requests carry a seed of their own
    at_once: int = Field(8, ge=1, le=1024)
    timeout: float = Field(120.0, gt=0, le=1e5)  # seconds of one request
    patience: float = Field(300.0, ge=0, le=1e6)

    @field_validator("extra")
    @classmethod
    def free_keys(cls, given: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(RESERVED & given.keys()):
            raise ValueError(f"{', '.join(taken)} are set by the stage itself; take them out of `extra`")
        return given

    @property
    def called(self) -> str:
        return self.name or self.model


Author = Annotated[str | EndpointSpec, Field(union_mode="left_to_right")]


class WriteSpec(Strict):
    """A stage that writes data.

    by: teachers by name, "student" (as it is at that place of the recipe) or endpoints.  prompt: a card's name or file, or a
    card.
    per: what is asked of: each question of the data, each picture, or each region that the data tell.  context: by a name of
    one's own a write stage before this one, whose rows templates then know as `context.NAME.rows` and counts by category as
    `context.NAME.counts`. form, checks and row take the place of the card's.
    """

    model_config = ConfigDict(validate_default=True)

    kind: Literal["write"] = "write"  # says that the stage writes
    by: list[Author] = Field(min_length=1)
    prompt: str | PromptCard
    data: list[DataSpec] = Field(min_length=1)  # what is asked about
    per: Literal["question", "picture", "region"] = "question"
    samples: int = Field(1, ge=1, le=1000)  # answers of each author to each prompt
    temperature: float = Field(0.0, ge=0, le=100)  # of drawing; 0: the likeliest tokens
    top_p: float = Field(1.0, gt=0, le=1)  # drawn from the likeliest tokens of so much probability
    top_k: int = Field(0, ge=0)  # drawn from so many tokens; 0: all
    max_new_tokens: int = Field(256, ge=1, le=2**16)  # of an answer, at most
    keep_cut: bool = Field(False, exclude_if=is_default(False))  # whether answers that do not end in time may become rows
    stop: list[Annotated[str, Field(min_length=1)]] = Field([])  # texts that end an answer
    batch_size: int = Field(32, ge=1, le=4096)  # prompts that are claimed and asked together
    form: FormSpec | None = None  # the form of an answer, in place of the card's
    checks: list[CheckSpec] | None = None  # what answers must pass, in place of the card's
    row: RowSpec | None = None  # what becomes a row, in place of the card's
    context: dict[str, str] = Field({})  # write stages before this one, by names of your own
    before: str | None = Field(None, exclude_if=is_default(None))  # the train stage that it stands before; the recipe says it

    @field_validator("by", mode="before")
    @classmethod
    def one_author(cls, given: Any) -> Any:
        return given if isinstance(given, list) else [given]

    @model_validator(mode="after")
    def several_differ(self) -> WriteSpec:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples is {self.samples} at temperature 0: all would be the same; raise temperature, such as 0.7")
        names = self.authors
        if len(set(names)) < len(names):
            raise ValueError(f"by: {names[0]} is there twice; give endpoints a `name`")
        return self

    @model_validator(mode="after")
    def card_is_there(self) -> WriteSpec:
        try:
            wrong = row_errors(self)
        except MmkdError as error:
            raise ValueError(f"prompt: {error}") from error
        if wrong:
            raise ValueError("; and ".join(wrong))
        return self

    @property
    def authors(self) -> tuple[str, ...]:
        """The names of its authors."""
        return tuple(one if isinstance(one, str) else one.called for one in self.by)

    @property
    def card(self) -> PromptCard:
        """The card with what the stage has in its place. Raises DataError."""
        card = load_prompt(self.prompt) if isinstance(self.prompt, str) else self.prompt
        own = {"form": self.form, "row": self.row, "checks": None if self.checks is None else tuple(self.checks)}
        return card.model_copy(update={name: value for name, value in own.items() if value is not None})

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.max_new_tokens, self.temperature, self.top_p, self.top_k)

    @property
    def by_student(self) -> bool:
        return STUDENT in self.by

    def all_checks(self) -> list[CheckSpec]:
        """The checks in their order, those that stand in every stage among them."""
        own = list(self.card.checks)
        named = {check.kind for check in own}
        first = [CheckSpec(kind=name) for name in ALWAYS if name not in named]
        return first + own


def row_errors(spec: WriteSpec) -> list[str]:
    """Why no row can be made of its answers. Raises DataError for a card that is not there."""
    card = spec.card
    keys = card.form.made().keys()
    wrong = []
    if keys is not None and "answer" not in keys and card.row.answer is None:
        wrong.append(
            f"row.answer: the form {card.form.kind} gives {', '.join(keys)}; say which is the answer: row: {{answer: ...}}"
        )
    return wrong
