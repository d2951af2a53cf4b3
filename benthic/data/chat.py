"""The chat format: messages become token ids, and it is known which of these are the assistant's own.

Training, reinforcement learning, ``benthic chat`` and the server all go through here, so that a model is asked in the
form in which it was taught. Messages are those of OpenAI's API: ``role`` and ``content``; of the assistant also
``tool_calls`` (each ``{"id", "type", "function": {"name", "arguments": text}}``) and ``reasoning_content``; of a tool's
result ``tool_call_id``. Whatever a message says stays text: only the format itself writes control tokens.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

from benthic.data.chat_template import CHAT_TEMPLATE, Message
from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError

Answers = Literal["all", "last"]
Tools = Sequence[Mapping[str, Any]]
_KEPT = 4096

_INSTRUCTION = (
    "You may call functions. Their signatures are between <tools> and </tools>:\n<tools>\n{}\n</tools>\n"
    'To call one, write <tool_call>\n{{"name": NAME, "arguments": OBJECT}}\n</tool_call>'
)


class Sample(NamedTuple):
    """A conversation to learn from."""

    ids: list[int]
    learn: list[bool]
    """Of each token, whether it belongs to an answer: its text, and the token that ends its turn."""
    answer_bytes: int
    """UTF-8 size of the answers' text, each with one newline, which stands for the token that ends its turn."""


class ChatFormat:
    """How one tokenizer's model is talked to: in Benthic's own form, or as its own template has it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._encode = lru_cache(_KEPT)(tokenizer.encode)  # the same messages are asked for in parts and together
        template = tokenizer.chat_template or ""
        self._own = template == CHAT_TEMPLATE and len(tokenizer.role_ids) == 3
        self._knows_reasoning = "reasoning_content" in template

    def prompt(self, messages: Sequence[Message], tools: Tools = (), *, fewer_than: int | None = None) -> list[int]:
        """Ids of a conversation up to where the assistant is to answer.

        Raises InputError with the template's own complaint; TooLong, as ``Tokenizer.apply_chat``.
        """
        return self._render(messages, tools, add_generation_prompt=True, fewer_than=fewer_than)

    def sample(self, messages: Sequence[Message], tools: Tools = (), answers: Answers = "all") -> Sample:
        """A whole conversation, with the answers marked that are to be learnt.

        An assistant's message with ``"weight": 0`` is not. Raises InputError for a template that renders an answer
        otherwise once the conversation has gone on, so that its tokens cannot be told.
        """
        learnt = [index for index, message in enumerate(messages) if _is_learnt(message)]
        learnt = learnt[-1:] if answers == "last" else learnt
        ids, learn = (self._by_construction if self._own else self._by_prefixes)(messages, tools, learnt)
        worded = [_text_in_words(messages[index]) for index in learnt]
        return Sample(ids, learn, sum(len(text.encode()) + 1 for text in worded))

    def _by_construction(
        self, messages: Sequence[Message], tools: Tools, learnt: Sequence[int]
    ) -> tuple[list[int], list[bool]]:
        worded = in_words(messages, tools)
        told = len(worded) - len(messages)  # a message that tells of tools
        ids, learn, answer = [self._tokenizer.bos_id], [False], False
        for number, message in enumerate(worded):
            text = self._encode(message["content"])
            if message["role"] not in self._tokenizer.role_ids:
                raise InputError(f"role must be one of {', '.join(self._tokenizer.role_ids)}, not {message['role']!r}")
            ids.append(self._tokenizer.role_ids[message["role"]])
            learn.append(answer)  # the next speaker's marker ends an answer
            answer = number - told in learnt
            ids += text
            learn += [answer] * len(text)
        return [*ids, self._tokenizer.eos_id], [*learn, answer]

    def _by_prefixes(
        self, messages: Sequence[Message], tools: Tools, learnt: Sequence[int]
    ) -> tuple[list[int], list[bool]]:
        """By rendering the conversation up to each answer, and up to its end."""
        whole = self._render(messages, tools, add_generation_prompt=False)
        learn = [False] * len(whole)
        for index in learnt:
            before = self._render(messages[:index], tools, add_generation_prompt=True)
            after = self._render(messages[: index + 1], tools, add_generation_prompt=False)
            end = self._end(before, after, whole)
            if end is None:
                raise InputError(
                    f"chat template: answer {index + 1} of a conversation is rendered otherwise once it has gone on, "
                    'so that it cannot be told apart; answers = "last" learns the last one only'
                )
            learn[len(before) : end] = [True] * (end - len(before))
        return whole, learn

    def _end(self, before: list[int], after: list[int], whole: list[int]) -> int | None:
        """Where an answer that begins after ``before`` ends in ``whole``; None if it is not the one that ``after`` ends
        with.
        """
        end = len(after)
        if after[-1] == self._tokenizer.eos_id and after != whole[:end]:
            after = after[:-1]  # some end a conversation, not a turn, with it
        if whole[: len(before)] != before or whole[: len(after)] != after or len(after) < len(before):
            return None
        stops = [place for place in range(len(before), end) if whole[place] in self._tokenizer.stop_ids]
        return stops[-1] + 1 if stops else len(after)

    def _render(
        self, messages: Sequence[Message], tools: Tools, *, add_generation_prompt: bool, fewer_than: int | None = None
    ) -> list[int]:  # fmt: skip
        render = partial(
            self._tokenizer.apply_chat, add_generation_prompt=add_generation_prompt, fewer_than=fewer_than
        )  # fmt: skip
        if not self._tokenizer.knows_tools:
            return render(in_words(messages, tools, reasoning=not self._knows_reasoning))
        for_template = [self._for_template(message) for message in messages]
        try:
            return render([_with_objects(message) for message in for_template], tools=tools)
        except InputError:
            # Most want a call's arguments as an object, as transformers gives them; DeepSeek's joins them as text.
            if not any(message.get("tool_calls") for message in messages):
                raise
            return render(for_template, tools=tools)

    def _for_template(self, message: Message) -> Message:
        rendered = {key: value for key, value in message.items() if key != "weight" and value is not None}
        if not self._knows_reasoning:
            rendered.pop("reasoning_content", None)
        role = "system" if message["role"] == "developer" else message["role"]
        return {**rendered, "role": role, "content": _content(message, reasoning=not self._knows_reasoning)}


def in_words(messages: Sequence[Message], tools: Tools = (), *, reasoning: bool = True) -> list[dict[str, Any]]:
    """Messages for a format that knows only the roles system, user and assistant, with tools told in the first.

    Calls are written in the widespread form of Hermes. Without ``reasoning``, that is left to a template.
    """
    rendered = [_in_words(message, reasoning) for message in messages]
    if not tools:
        return rendered
    told = _INSTRUCTION.format("\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if rendered and rendered[0]["role"] == "system":
        return [{**rendered[0], "content": f"{rendered[0]['content']}\n\n{told}"}, *rendered[1:]]
    return [{"role": "system", "content": told}, *rendered]


def _in_words(message: Message, reasoning: bool) -> dict[str, Any]:
    role = {"developer": "system", "tool": "user"}.get(message["role"], message["role"])
    rendered = {"role": role, "content": _text_in_words(message, reasoning=reasoning)}
    if not reasoning and message.get("reasoning_content"):
        rendered["reasoning_content"] = message["reasoning_content"]
    return rendered


def _text_in_words(message: Message, *, reasoning: bool = True) -> str:
    content = _content(message, reasoning=reasoning)
    if message["role"] == "tool":
        return f"<tool_response>\n{content}\n</tool_response>"
    calls = [
        json.dumps({"name": call["function"]["name"], "arguments": _object(call["function"]["arguments"])},
                   ensure_ascii=False)
        for call in message.get("tool_calls") or ()
    ]  # fmt: skip
    return "\n".join([*([content] if content else []), *(f"<tool_call>\n{call}\n</tool_call>" for call in calls)])


def _content(message: Message, *, reasoning: bool) -> str:
    """A message's text, after its reasoning in the form of DeepSeek-R1."""
    content = str(message.get("content") or "")
    thought = message.get("reasoning_content") if reasoning else None
    return f"<think>\n{thought}\n</think>\n\n{content}" if thought else content


def _with_objects(message: Message) -> Message:
    """A message whose calls have their arguments as objects."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    functions = [{**call["function"], "arguments": _object(call["function"]["arguments"])} for call in calls]
    return {
        **message,
        "tool_calls": [{**call, "function": one} for call, one in zip(calls, functions, strict=True)],
    }


def _object(arguments: Any) -> Any:
    """As an object, or as the text they are if a model once wrote something else."""
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments


def _is_learnt(message: Message) -> bool:
    return bool(message["role"] == "assistant" and message.get("weight", 1))
