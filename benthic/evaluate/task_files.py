"""Task files: what a model is asked, a JSON object a line, checked line by line before anything is computed.

The keys of a line say what kind of problem it is; the first line may be ``{"task": {...}}`` with settings of all.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from benthic.config.base import Natural, Positive, Settings
from benthic.config.complain import complaint, shown
from benthic.data.text_files import MAX_LINE_BYTES
from benthic.errors import InputError
from benthic.evaluate import match

MAX_BYTES = 256 << 20
"""Of a file."""
REASONING_GYM = "reasoning_gym:"

_Pattern = Annotated[str, Field(min_length=1, max_length=match.MAX_PATTERN)]


class Message(Settings):
    """A turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class Asked(Settings):
    """Problems that begin with a plain text, or with a conversation that goes through the model's chat template."""

    prompt: str | None = None
    messages: tuple[Message, ...] = ()

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.prompt is None) == (not self.messages):
            raise ValueError("must have either a prompt or messages")
        return self


class MultipleChoice(Asked):
    """The model is asked nothing: the choice it finds likeliest is its answer."""

    choices: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=2, max_length=1000)]
    answer: Natural
    """Index of the right one."""

    @model_validator(mode="after")
    def _answer_is_one(self) -> Self:
        if self.answer >= len(self.choices):
            raise ValueError(f"answer = {self.answer}: must be from 0 to {len(self.choices) - 1}, a place in choices")
        if len(set(self.choices)) < len(self.choices):
            raise ValueError("choices must differ")
        return self


class Question(Asked):
    """The model writes an answer, and a verifier says whether it is right."""

    answer: tuple[str, ...] = Field(min_length=1)
    """Any of these is right; a regular expression each where the verifier is ``regex``."""
    verifier: str = "exact"
    entry: dict[str, Any] | None = None
    """The problem as reasoning-gym makes it."""

    @field_validator("answer", mode="before")
    @classmethod
    def _several(cls, given: Any) -> Any:
        answers = given if isinstance(given, list) else [given]
        numbers = (int, float)
        return [str(one) if isinstance(one, numbers) and not isinstance(one, bool) else one for one in answers]

    @model_validator(mode="after")
    def _verifiable(self) -> Self:
        if self.family is not None:
            if self.family not in match.families():
                raise ValueError(f"verifier = {shown(self.verifier)}: reasoning-gym has no such family")
            if self.entry is None or not {"answer", "metadata"} <= self.entry.keys():
                raise ValueError("entry: must be the problem as reasoning-gym makes it, with answer and metadata")
        elif self.verifier not in match.VERIFIERS:
            allowed = ", ".join([*match.VERIFIERS, REASONING_GYM + "FAMILY"])
            raise ValueError(f"verifier = {shown(self.verifier)}: must be one of {allowed}")
        elif self.entry is not None:
            raise ValueError(f"entry: is for verifier {REASONING_GYM}FAMILY")
        for answer in self.answer:
            if self.verifier == "numeric":
                match.number_of(answer)
            elif self.verifier == "regex":
                match.compiled(answer)
        return self

    @property
    def family(self) -> str | None:
        """Of reasoning-gym, where its scorer is to judge."""
        return self.verifier.removeprefix(REASONING_GYM) if self.verifier.startswith(REASONING_GYM) else None


class Text(Settings):
    """A document, of which bits per byte are measured."""

    text: Annotated[str, Field(min_length=1)]


class TextSettings(Settings):
    """Texts have none."""


class ChoiceSettings(Settings):
    """Of a file of multiple-choice problems."""

    chat: bool = False
    """A ``prompt`` is what a user says, and goes through the chat template."""


class QuestionSettings(ChoiceSettings):
    """Of a file of questions."""

    max_new_tokens: Positive = 256
    stop: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=1024)], ...], Field(max_length=16)] = ()
    """Strings that end an answer."""
    extract: _Pattern | None = None
    """A regular expression whose last match, or its first group, is the answer within the text."""
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """How far numbers may be off, as a share of the right one."""
    samples: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Answers to each question."""
    pass_at: tuple[Positive, ...] = ()
    """The k of pass@k; by default 1 and ``samples``."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    """0 takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Natural = 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples = {self.samples}: temperature must be above 0, or all samples would be the same")
        if self.pass_at and self.samples == 1:
            raise ValueError("pass_at: needs samples of more than 1")
        if max(self.pass_at, default=0) > self.samples:
            raise ValueError(f"pass_at = {max(self.pass_at)}: must be at most samples, which is {self.samples}")
        if self.extract is not None:
            match.compiled(self.extract)
        return self


Problem = MultipleChoice | Question | Text
_KINDS: dict[str, tuple[type[Problem], type[Settings], str]] = {
    "text": (Text, TextSettings, "a text"),
    "choices": (MultipleChoice, ChoiceSettings, "a multiple-choice problem"),
    "answer": (Question, QuestionSettings, "a question"),
}
"""By the key that tells; the first that a line has."""


@dataclass(frozen=True)
class Task:
    """A file's problems, all of one kind."""

    name: str
    path: Path
    settings: Settings
    problems: tuple[Problem, ...]
    lines: tuple[int, ...]
    """Of each problem, in the file, counted from 1."""

    def where(self, index: int) -> str:
        """What an error about a problem begins with."""
        return f"{self.path} line {self.lines[index]}"


def read_tasks(paths: Sequence[Path]) -> list[Task]:
    """All files, each named after its file. Raises ``InputError`` as :func:`read_task`, and for equal names."""
    tasks = [read_task(path) for path in paths]
    for number, task in enumerate(tasks):
        for other in tasks[:number]:
            if other.name == task.name:
                raise InputError(f"{task.path}: {other.path} is a task of the same name; rename one of the files")
    return tasks


def read_task(path: Path) -> Task:
    """One file; raises ``InputError`` that names the line, the key and what is allowed."""
    if not path.is_file():
        raise InputError(f"{path}: {'not a file' if path.exists() else 'no such file'}; give a task file, JSON lines")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise InputError(f"{path}: {size} bytes; at most {MAX_BYTES} are read")
    given: dict[str, Any] | None = None
    given_at, kind, lines = "", None, list[int]()
    problems: list[Problem] = []
    for number, record in _records(path):
        where = f"{path} line {number}"
        if "task" in record and given is None and not problems:
            given, given_at = _header(record, where), where
            continue
        key = next((key for key in _KINDS if key in record), None)
        if key is None:
            raise InputError(f"{where}: must have one of the keys {', '.join(_KINDS)}")
        kind = kind or key
        if key != kind:
            raise InputError(f"{where}: is {_KINDS[key][2]}, but the file began with {_KINDS[kind][2]}; use two files")
        problems.append(_checked(_KINDS[key][0], record, where))
        lines.append(number)
    if kind is None:
        raise InputError(f"{path}: holds no problems")
    settings = _checked(_KINDS[kind][1], given or {}, given_at)
    return Task(path.stem, path, settings, tuple(problems), tuple(lines))


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and content of each line that is not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
            where = f"{path} line {number}"
            if len(line) > MAX_LINE_BYTES:
                raise InputError(f"{where}: longer than {MAX_LINE_BYTES} bytes")
            if line.strip():
                yield number, _record(line, where)


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise InputError(f"{where}: is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        why = f"column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        raise InputError(f"{where}: is not JSON ({why})") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: must be a JSON object")
    return record


def _header(record: dict[str, Any], where: str) -> dict[str, Any]:
    given = record["task"]
    if not isinstance(given, dict) or len(record) > 1:
        raise InputError(f'{where}: must be {{"task": {{settings}}}} and nothing else')
    return given


def _checked(kind: Any, record: dict[str, Any], where: str) -> Any:
    try:
        return kind.model_validate(record)
    except ValidationError as error:
        raise InputError(complaint(error, kind, where)) from None
