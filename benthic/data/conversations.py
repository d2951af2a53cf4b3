"""Conversations to learn from, as one reads them from files: messages with roles, calls and reasoning.

Pretraining reads the same files as plain documents (``benthic/data/text_files.py``). A conversation has the digest of
that document, so that one which was held out there is held out here.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, NamedTuple

from benthic.data.chat import Answers, ChatFormat, Sample, in_words
from benthic.data.chat_template import Message
from benthic.data.corpus import NAMED, read_corpus
from benthic.data.document import Document, Rejection, Turn
from benthic.data.text_files import RecordError, find_files, read_records
from benthic.errors import InputError

_ROLES = ("system", "developer", "user", "assistant", "tool")
_TEXTS = ("reasoning_content", "name", "tool_call_id")


class Conversation(NamedTuple):
    """Messages in the shape of OpenAI's API, and the functions that were on offer."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def document(self) -> Document:
        """What pretraining reads in it."""
        return Document(tuple(Turn(message["role"], message["content"]) for message in in_words(self.messages)))


def read_conversations(source: str) -> Iterator[Conversation | Rejection]:
    """The conversations of ``chitchat``, or of .jsonl files. Raises InputError for other sources."""
    if source in NAMED:
        for item in read_corpus([source]):
            yield item if isinstance(item, Rejection) else _spoken(item, source)
        return
    for path in find_files(Path(source)):
        if path.suffix.lower() != ".jsonl":
            raise InputError(f"{path}: holds no conversations; give .jsonl files")
        yield from read_records(path, parse_conversation)


def parse_conversation(record: Any) -> Conversation:
    """``{"messages": [...], "tools": [...]}``; raises a ``ValueError`` that says why not."""
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        raise RecordError('no list under "messages"')
    messages = tuple(_message(message) for message in record["messages"])
    if not any(message["role"] == "assistant" for message in messages):
        raise RecordError("no message of the assistant")
    tools = record.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RecordError('"tools" is no list of objects')
    conversation = Conversation(messages, tuple(tools))
    json.dumps([*messages, *tools], ensure_ascii=False).encode()  # a lone surrogate is no text
    return conversation


def pieces(conversation: Conversation, chat: ChatFormat, capacity: int, answers: Answers = "all") -> Iterator[Sample]:
    """A conversation in samples of at most ``capacity`` tokens, each with an answer in it.

    One that is too long is parted between exchanges, as a conversation is that has outgrown a model's context: each
    part begins with the system's message, if there is one. For its last answer alone, the oldest exchanges are left
    out. An exchange that alone is too long loses its end.
    """
    whole = chat.sample(conversation.messages, conversation.tools, answers)
    if len(whole.ids) <= capacity:
        yield from _learnable(whole)
        return
    system, exchanges = _exchanges(conversation.messages)
    if answers == "last":
        while len(exchanges) > 1 and len(whole.ids) > capacity:
            exchanges = exchanges[1:]
            whole = chat.sample([*system, *chain(*exchanges)], conversation.tools, answers)
        yield from _learnable(_beginning(whole, capacity))
        return
    sizes = [len(chat.sample(exchange).ids) for exchange in exchanges]
    start = 0
    while start < len(exchanges):
        # Exchanges apart are longer than together: each has a beginning and an end of its own.
        end = start + max(1, bisect_right(list(accumulate(sizes[start : start + capacity])), capacity))
        sample = _joined(conversation, chat, system, exchanges[start:end])
        while end > start + 1 and len(sample.ids) > capacity:
            end, sample = end - 1, _joined(conversation, chat, system, exchanges[start : end - 1])
        while end < len(exchanges):
            longer = _joined(conversation, chat, system, exchanges[start : end + 1])
            if len(longer.ids) > capacity:
                break
            end, sample = end + 1, longer
        yield from _learnable(_beginning(sample, capacity))
        start = end


def _joined(
    conversation: Conversation, chat: ChatFormat, system: list[Message], exchanges: list[list[Message]]
) -> Sample:
    return chat.sample([*system, *chain(*exchanges)], conversation.tools)


def _learnable(sample: Sample) -> Iterator[Sample]:
    if any(sample.learn):
        yield sample


def _beginning(sample: Sample, capacity: int) -> Sample:
    """The first ``capacity`` tokens, with the bytes of answers in proportion."""
    learn = sample.learn[:capacity]
    share = sum(learn) / max(1, sum(sample.learn))
    return Sample(sample.ids[:capacity], learn, round(share * sample.answer_bytes))


def _exchanges(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The system's messages at the beginning, and the rest from each user's message after an answer to the next."""
    start = next((index for index, one in enumerate(messages) if one["role"] not in ("system", "developer")), 0)
    parts: list[list[Message]] = []
    for before, message in zip([None, *messages[start:]], messages[start:], strict=False):
        if before is None or (before["role"] == "assistant" and message["role"] == "user"):
            parts.append([])
        parts[-1].append(message)
    return list(messages[:start]), parts


def _spoken(document: Document, source: str) -> Conversation | Rejection:
    if not any(turn.role == "assistant" for turn in document.turns):
        return Rejection(source, 0, "no message of the assistant")
    return Conversation(tuple({"role": turn.role, "content": turn.text} for turn in document.turns))


def _message(message: Any) -> Message:
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        raise RecordError(f'a message whose "role" is not one of {", ".join(_ROLES)}')
    calls = message.get("tool_calls") or []
    content = message.get("content")
    if isinstance(content, list) and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str) and not (content is None and calls):
        raise RecordError('a message without a string under "content"')
    if not isinstance(calls, list) or not all(map(_is_call, calls)):
        raise RecordError('"tool_calls" is no list of {"function": {"name": text, "arguments": text or object}}')
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise RecordError('a message\'s "weight" is not 0 or 1')
    found = {"role": message["role"], "content": content or ""}
    for key in _TEXTS:
        if message.get(key) is not None:
            if not isinstance(message[key], str):
                raise RecordError(f'a message\'s "{key}" is not a string')
            found[key] = message[key]
    return {**found, **({"tool_calls": calls} if calls else {}), **({} if weight else {"weight": 0})}


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    return (
        isinstance(function, dict)
        and isinstance(function.get("name"), str)
        and isinstance(function.get("arguments"), str | dict)
    )
