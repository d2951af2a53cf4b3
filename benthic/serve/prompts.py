"""From what a request says to token ids and sampling settings. All of it may take a while, and runs off the event
loop.
"""

from collections.abc import Mapping
from typing import Any

from benthic.data.chat import ChatFormat
from benthic.data.tokenizer import TooLong
from benthic.errors import InputError
from benthic.inference.request import Sampling
from benthic.serve import tools
from benthic.serve.errors import ApiError, bad
from benthic.serve.generation import Job
from benthic.serve.grammar import Grammar
from benthic.serve.models import Served
from benthic.serve.requests import Asked, ChatRequest, JsonObjectFormat, JsonSchemaFormat, RegexFormat

_TINY = 1e-9
"""Stands for a ``top_p`` of 0, which leaves the likeliest token alone."""


def chat_jobs(served: Served, asked: ChatRequest, longest: int, grammar: Grammar | None) -> list[Job]:
    """The choices of a conversation, of at most ``longest`` new tokens each. Raises 400."""
    ids = chat_ids(served, asked)
    sampling = sampling_of(served, asked, asked.limit, longest, {"top_logprobs": asked.top_logprobs or 0})
    return _choices(ids, sampling, asked, grammar)


def text_jobs(served: Served, asked: Asked, prompt: str | list[int], sampling: Sampling) -> list[Job]:
    """The choices that go on from one text. Raises 400."""
    return _choices(text_ids(served, prompt, "prompt"), sampling, asked)


def _choices(ids: list[int], sampling: Sampling, asked: Asked, grammar: Grammar | None = None) -> list[Job]:
    """With a seed each choice has its own, so that they differ and can be had again."""
    return [
        (ids, sampling.model_copy(update={
            "seed": None if asked.seed is None else (asked.seed + number) % 2**63,
            "constraint": grammar() if grammar else None,
        }))
        for number in range(asked.n or 1)
    ]  # fmt: skip


def chat_ids(served: Served, asked: ChatRequest) -> list[int]:
    """A conversation as the model's template renders it. Raises 400."""
    messages, told = map(tools.as_message, asked.messages), map(tools.schema, asked.usable_tools)
    try:
        # To encode megabytes takes seconds.
        ids = ChatFormat(served.tokenizer).prompt([*messages], [*told], fewer_than=served.context)
    except TooLong as error:
        raise _too_long(served, f"at least {error.fewest}", "messages") from None
    except InputError as error:
        raise bad(f"messages: {error}", "messages") from None
    return _checked(served, ids, "messages")


def text_ids(served: Served, prompt: str | list[int], param: str) -> list[int]:
    """Ids of a text, after the begin token, or ids as they are. Raises 400."""
    if not prompt:
        raise bad(f"{param}: must not be empty", param)
    if not isinstance(prompt, str):
        return _checked(served, prompt, param)
    if (fewest := served.tokenizer.fewest(len(prompt.encode(errors="surrogatepass")))) >= served.context:
        raise _too_long(served, f"at least {fewest}", param)
    try:
        return _checked(served, [served.tokenizer.bos_id, *served.tokenizer.encode(prompt)], param)
    except InputError as error:
        raise bad(f"{param}: {error}", param) from None


def _too_long(served: Served, tokens: str, param: str) -> ApiError:
    message = f"{param}: {tokens} tokens; this model takes fewer than {served.context}"
    return bad(message, param, "context_length_exceeded")


def _checked(served: Served, ids: list[int], param: str) -> list[int]:
    if len(ids) >= served.context:
        raise _too_long(served, str(len(ids)), param)
    vocabulary = served.model.config.vocab_size
    if (wrong := next((index for index in ids if index >= vocabulary), None)) is not None:
        raise bad(f"{param}: no token {wrong}; they go up to {vocabulary - 1}", param)
    return ids


def sampling_of(
    served: Served, asked: Asked, limit: int | None, longest: int, further: Mapping[str, Any]
) -> Sampling:  # fmt: skip
    """Settings for the engine. Raises 400.

    Args:
        served: the model, whose run has defaults.
        asked: the request.
        limit: new tokens it asks for.
        longest: new tokens that any request may ask for.
        further: settings that only one kind of request has.
    """
    if limit is not None and limit > longest:
        name = "max_tokens" if getattr(asked, "max_completion_tokens", None) is None else "max_completion_tokens"
        raise bad(f"{name}: {limit}; this server writes at most {longest}", name)
    given: dict[str, Any] = {"stop": asked.stops, "logit_bias": _bias(served, asked), **further}
    given["max_new_tokens"] = min(served.defaults.max_new_tokens, longest) if limit is None else max(limit, 1)
    for key in ("temperature", "presence_penalty", "frequency_penalty", "top_k", "min_p", "repetition_penalty"):
        if (value := getattr(asked, key)) is not None:
            given[key] = value
    if asked.top_p is not None:
        given["top_p"] = max(asked.top_p, _TINY)
    try:
        return Sampling.checked(served.defaults, given)
    except InputError as error:
        raise bad(str(error)) from None


def _bias(served: Served, asked: Asked) -> dict[int, float]:
    bias = {int(index): value for index, value in (asked.logit_bias or {}).items()}
    if (wrong := max(bias, default=0)) >= served.model.config.vocab_size:
        raise bad(f"logit_bias: no token {wrong}; they go up to {served.model.config.vocab_size - 1}", "logit_bias")
    return bias


def grammar_of(served: Served, asked: ChatRequest) -> Grammar | None:
    """What the answer must keep to: the form asked for, or a call of a function. Raises 400, also for other tools'
    parameters that are no schema.
    """
    for tool in asked.usable_tools:
        served.grammars.schema(tool.function.parameters or {}, "tools", lenient=True)
    if asked.forced_tools:
        return served.grammars.schema(tools.schema_of_call(asked.forced_tools), "tools")
    match asked.response_format:
        case JsonObjectFormat():
            return _schema_or_calls(served, asked, {"type": "object"})
        case JsonSchemaFormat(json_schema=given):
            return _schema_or_calls(served, asked, given.schema_)
        case RegexFormat(regex=regex):
            if asked.usable_tools:
                raise bad("response_format: a regex is not together with tools", "response_format")
            return served.grammars.regex(regex, "response_format")
    return None


def _schema_or_calls(served: Served, asked: ChatRequest, schema: dict[str, Any]) -> Grammar:
    if not asked.usable_tools:
        return served.grammars.schema(schema, "response_format")
    if tools.style_of(served.tokenizer.chat_template) is not tools.HERMES:
        message = "response_format: not together with tools, of which this model writes calls in a form of its own"
        raise bad(message, "response_format")
    call, several = tools.schema_of_call(asked.usable_tools), asked.parallel_tool_calls is not False
    return served.grammars.schema_or_calls(schema, call, "response_format", several=several)
