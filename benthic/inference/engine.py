"""The engine: prompts in, text out, decoded token by token over the latent cache.

A prompt is read in one pass, with attention in the naive form; every further token runs in the absorbed form.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from benthic.config.complain import complaint
from benthic.config.schema import InferenceConfig
from benthic.data.stream_decoder import StreamDecoder
from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError
from benthic.inference.cache import LatentCache
from benthic.inference.context import Context
from benthic.inference.huge_pages import use_huge_pages
from benthic.inference.sampling import draw
from benthic.inference.stopping import StopScanner
from benthic.model import LanguageModel

Prompt = str | Sequence[int]
"""Text that a document begins with, or token ids of anything, such as a conversation."""


class Sampling(InferenceConfig):
    """Settings of one request."""

    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings that end the text; they are not part of it."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Equal seeds give equal text; by default every request differs."""


@dataclass(frozen=True)
class Completion:
    """What followed a prompt."""

    text: str
    token_ids: tuple[int, ...]
    """Without the token that ended it."""
    logprobs: tuple[float, ...]
    """Log-probability of each token as the model gave it, before temperature and cut-offs."""
    finish_reason: Literal["stop", "length"]
    """``stop``: a token or string that ends the text; ``length``: as long as asked for, or as the model takes."""


class Engine:
    """A model that completes prompts.

    Args:
        model: stays on its device and in its precision.
        tokenizer: the one the model was trained with.
        defaults: settings of requests that give no others.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, defaults: InferenceConfig | None = None) -> None:
        self.model, self.config, self.tokenizer = model.eval(), model.config, tokenizer
        self.defaults = defaults or InferenceConfig()
        use_huge_pages(self.model)

    def generate(self, prompts: str | Sequence[Prompt], **sampling: Any) -> list[Completion]:
        """Complete each prompt by itself: the outcome depends on nothing but prompt, settings and seed.

        Args:
            prompts: one text, or a list of texts and of lists of token ids.
            **sampling: fields of :class:`Sampling` that differ from the defaults.

        Raises:
            InputError: a setting is wrong, or a prompt is empty or too long.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        return [_outcome(stream) for stream in [self.stream(prompt, **sampling) for prompt in prompts]]

    def stream(
        self, prompt: Prompt, *, context: Context | None = None, **sampling: Any
    ) -> Generator[str, None, Completion]:
        """Complete a prompt piece by piece; the pieces joined are the text of the completion that is returned.

        Args:
            prompt: text or token ids.
            context: of a conversation; what the prompt shares with the last one is not read again.
            **sampling: as for :meth:`generate`, whose errors it raises, before the first piece.
        """
        settings, ids = self.settings(**sampling), self._prompt_ids(prompt)
        return self._complete(ids, settings, context or self.new_context())

    def new_context(self) -> Context:
        """An empty memory for a conversation."""
        weight = self.model.transformer.embed.weight
        layers, latent_dim = self.config.num_hidden_layers, self.config.latent_dim
        return Context(LatentCache(layers, 1, latent_dim, dtype=weight.dtype, device=weight.device))

    def settings(self, /, **sampling: Any) -> Sampling:
        """The defaults with ``sampling`` over them; raises ``InputError`` if a key or value is wrong."""
        try:
            return Sampling.model_validate(self.defaults.model_dump() | sampling)
        except ValidationError as error:
            raise InputError(complaint(error, Sampling, "sampling")) from None

    def _complete(self, ids: list[int], settings: Sampling, context: Context) -> Generator[str, None, Completion]:
        decoder, scanner = StreamDecoder(self.tokenizer), StopScanner(settings.stop)
        tokens: list[int] = []
        logprobs: list[float] = []
        pieces: list[str] = []
        ended = False
        for token, logprob in self._tokens(ids, settings, context):
            if ended := token in self.tokenizer.stop_ids:
                break
            tokens.append(token)
            logprobs.append(logprob)
            if piece := scanner.push(decoder.push(token)):
                pieces.append(piece)
                yield piece
            if scanner.stopped:
                break
        if piece := scanner.push(decoder.finish()) + scanner.finish():
            pieces.append(piece)
            yield piece
        reason: Literal["stop", "length"] = "stop" if ended or scanner.stopped else "length"
        return Completion("".join(pieces), tuple(tokens), tuple(logprobs), reason)

    def _tokens(self, ids: list[int], settings: Sampling, context: Context) -> Iterator[tuple[int, float]]:
        """Tokens as they are drawn, with their log-probabilities, until the request or the model allows no more."""
        generator = _generator(settings.seed)
        unread = context.keep_common_beginning(ids)
        for _ in range(min(settings.max_new_tokens, self.config.max_position_embeddings - len(ids))):
            logits_V = self._read(unread, context)
            token = draw(
                logits_V, generator, temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p
            )
            exact = torch.promote_types(logits_V.dtype, torch.float32)
            yield token, float(logits_V.log_softmax(dim=0, dtype=exact)[token])
            unread = [token]

    @torch.inference_mode()
    def _read(self, ids: list[int], context: Context) -> Tensor:
        """Logits (V,) of the token after ``ids``, which follow what the context holds."""
        transformer = self.model.transformer
        tokens_BT = torch.tensor([ids], device=transformer.embed.weight.device)
        hidden_BTD, _ = transformer.hidden(tokens_BT, cache=context.cache)
        context.have_read(ids)
        logits_V: Tensor = transformer.head(hidden_BTD[0, -1])
        return logits_V

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if not prompt:
            raise InputError("prompt: must not be empty")
        ids = [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)] if isinstance(prompt, str) else list(prompt)
        limit, vocab_size = self.config.max_position_embeddings, self.config.vocab_size
        if len(ids) >= limit:
            raise InputError(f"prompt: {len(ids)} tokens; must be fewer than max_position_embeddings={limit}")
        for token in ids:
            if not 0 <= token < vocab_size:
                raise InputError(f"prompt: token id {token}; must be from 0 to {vocab_size - 1}")
        return ids


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def _outcome(stream: Generator[str, None, Completion]) -> Completion:
    while True:
        try:
            next(stream)
        except StopIteration as end:
            completion: Completion = end.value
            return completion
