"""Plain texts: the shapes of ``/v1/completions``, whole or streamed."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from benthic.inference.request import Completion, Token
from benthic.serve import answers
from benthic.serve.generation import Generation
from benthic.serve.models import Served
from benthic.serve.requests import CompletionRequest
from benthic.serve.stream import DONE, event


def settings_of(asked: CompletionRequest) -> dict[str, Any]:
    """Sampling settings that only this kind of request has."""
    if asked.logprobs is None:
        return {}
    given: dict[str, Any] = {"top_logprobs": asked.logprobs}
    if asked.echo:
        # Scoring programs cut off one token at the end of what they scored: it must be there, even if it ends a text.
        given |= {"prompt_logprobs": asked.logprobs, "ignore_eos": asked.max_tokens in (0, 1)}
    return given


def whole(served: Served, asked: CompletionRequest, completions: Sequence[Completion]) -> dict[str, Any]:
    """The answer in one piece; choices of the first prompt come first."""
    choices = [
        _choice(served, asked, number, asked.prompts[number // (asked.n or 1)], one)
        for number, one in enumerate(completions)
    ]
    head = answers.head("text_completion", "cmpl", served.name)
    usage = answers.usage(completions, completions[:: asked.n or 1], silent=asked.max_tokens == 0)
    return {**head, "choices": choices, "usage": usage}


def _choice(
    served: Served, asked: CompletionRequest, number: int, prompt: str | list[int], completion: Completion
) -> dict[str, Any]:
    silent = asked.max_tokens == 0
    text = "" if silent else completion.text
    if asked.echo:
        text = (prompt if isinstance(prompt, str) else served.tokenizer.decode(prompt)) + text
    logprobs = None
    if asked.logprobs is not None:
        written = [] if silent else [
            Token(index, "", logprob, top)
            for index, logprob, top in zip(
                completion.token_ids, completion.logprobs,
                completion.top_logprobs or ((),) * len(completion.token_ids), strict=True,
            )
        ]  # fmt: skip
        logprobs = answers.TextLogprobs(served.tokenizer).of([*completion.prompt_logprobs, *written])
    reason = "length" if silent else completion.finish_reason
    return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": reason}


async def streamed(served: Served, asked: CompletionRequest, generation: Generation) -> AsyncIterator[bytes]:
    """The answer as events. Raises ApiError when a choice fails."""
    head = answers.head("text_completion", "cmpl", served.name)
    columns = [answers.TextLogprobs(served.tokenizer) for _ in generation.requests]
    silent_usage = {"usage": None} if asked.include_usage else {}

    def chunk(number: int, text: str, logprobs: Any, reason: str | None) -> bytes:
        choice = {"index": number, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return event({**head, "choices": [choice], **silent_usage})

    ended: dict[int, Completion] = {}
    sent = [0] * len(generation.requests)
    async for number, token in generation.tokens():
        if token is None:
            ended[number] = generation.outcome(generation.requests[number])
            # What might have become a stop string is known to be none only now.
            yield chunk(number, ended[number].text[sent[number] :], None, ended[number].finish_reason)
        elif token.text or asked.logprobs is not None:
            logprobs = None if asked.logprobs is None else columns[number].of([token])
            sent[number] += len(token.text)
            yield chunk(number, token.text, logprobs, None)
    if asked.include_usage:
        completions = [ended[number] for number in sorted(ended)]
        usage = answers.usage(completions, completions[:: asked.n or 1])
        yield event({**head, "choices": [], "usage": usage})
    yield DONE
