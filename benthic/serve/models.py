"""The models that one server offers: each with its tokenizer, its engine and the name that requests give."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benthic.config.load import inference_defaults
from benthic.config.schema import InferenceConfig, ServeConfig
from benthic.convert.resolve import find_tokenizer, load_model
from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError
from benthic.inference.batching import BatchEngine
from benthic.model import LanguageModel
from benthic.serve.errors import ApiError, bad, queue_full
from benthic.serve.grammar import Grammars

_LONGEST_RETRY_S = 60


@dataclass
class Served:
    """A model at work."""

    name: str
    model: LanguageModel
    tokenizer: Tokenizer
    engine: BatchEngine
    defaults: InferenceConfig
    grammars: Grammars
    slots: int
    """Choices that may be worked on or wait."""
    created: int = field(default_factory=lambda: int(time.time()))
    admitted: int = 0
    """Choices that are being prepared, waited for or written."""
    mean_seconds: float = 1.0
    """Of late, from a choice's submission to its end."""

    @property
    def context(self) -> int:
        """Tokens of the longest text."""
        return self.model.config.max_position_embeddings

    def admit(self, choices: int, param: str) -> Callable[[], None]:
        """Take a place for each choice, and return what gives them back, once.

        Raises:
            ApiError: 429, the queue is full; 400 that names ``param``, there will never be room for so many.
        """
        if choices > self.slots:
            raise bad(f"{param}: {choices} choices at once; at most {self.slots}", param)
        if self.admitted + choices > self.slots:
            raise queue_full(self._retry_s())
        self.admitted += choices
        held = [choices]

        def leave() -> None:
            self.admitted -= held.pop() if held else 0

        return leave

    def describe(self) -> dict[str, Any]:
        """As ``/v1/models`` tells it."""
        return {
            "id": self.name, "object": "model", "created": self.created, "owned_by": "benthic",
            "max_model_len": self.context,
        }  # fmt: skip

    def close(self, drain_s: float = 0) -> None:
        """End its threads and processes."""
        self.engine.close(drain_s=drain_s)
        self.grammars.close()

    def _retry_s(self) -> int:
        """Seconds until the queue is likely to have moved on by a batch."""
        return max(1, min(_LONGEST_RETRY_S, round(self.mean_seconds)))


class Models:
    """Models by name; the first is the page's."""

    def __init__(self, served: Sequence[Served]) -> None:
        self._by_name = {one.name: one for one in served}

    def __iter__(self) -> Any:
        return iter(self._by_name.values())

    def find(self, name: str) -> Served:
        """The model of a request. Raises 404."""
        if name not in self._by_name:
            message = f"the model {name[:100]!r} does not exist; there are {', '.join(self._by_name)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self._by_name[name]


def load_models(paths: Mapping[str, Path], config: ServeConfig) -> Models:
    """Load each model and start its engine.

    Raises:
        InputError: a path holds no model or tokenizer, or something in it is damaged.
    """
    return Models([_load(name, path, config) for name, path in paths.items()])


def _load(name: str, path: Path, config: ServeConfig) -> Served:
    folder = find_tokenizer(path)
    tokenizer = Tokenizer.load(folder)
    defaults = inference_defaults(path)
    model, _ = load_model(path)
    slots = config.max_batch + config.max_queue
    engine = BatchEngine(
        model.eval(), tokenizer, defaults, cache_gib=config.cache_gib, max_batch=config.max_batch,
        precision=config.precision, cache_precision=config.cache_precision,
        max_queue=slots,  # for a moment, all that are admitted wait
    )  # fmt: skip
    grammars = Grammars(
        folder / "tokenizer.json", model.config.vocab_size, sorted(tokenizer.stop_ids), config.grammar_seconds
    )
    return Served(name, model, tokenizer, engine, defaults, grammars, slots)


def name_models(given: Sequence[str], configured: Mapping[str, str]) -> dict[str, Path]:
    """Names and paths from ``NAME=PATH`` or ``PATH`` arguments, whose folder is the name, then from the settings.

    Raises:
        InputError: none is given, or two have the same name.
    """
    named: dict[str, Path] = {}
    for name, path in [*map(_named, given), *configured.items()]:
        if name in named:
            raise InputError(f"two models are called {name!r}; name them with NAME=PATH")
        named[name] = Path(path)
    if not named:
        raise InputError("no model: give a run, an exported or a Hugging Face directory")
    return named


def _named(argument: str) -> tuple[str, str]:
    name, equals, path = argument.partition("=")
    if equals and name and not Path(argument).exists():
        return name, path
    return Path(argument).absolute().name, argument
