"""Calls in what a model writes, in each family's form, however the text is cut or made up."""

import json
import random
import time
from types import SimpleNamespace

import pytest

from benthic.inference.request import Completion
from benthic.serve import chat
from benthic.serve.requests import ChatRequest, parse
from benthic.serve.tools import HERMES, ToolScanner, parse_calls, style_of

DEEPSEEK = style_of("<｜tool▁calls▁begin｜>")  # noqa: RUF001
KIMI = style_of("<|tool_calls_section_begin|>")
NAMES = {"get_weather", "f"}
HARD = {"city": "</tool_call> } <tool_call>{", "n": [1, {"a": "\n"}]}


def written(style, name, arguments):
    """A call as a model of that family writes it."""
    text = json.dumps(arguments)
    if style is HERMES:
        return f'<tool_call>\n{{"name": "{name}", "arguments": {text}}}\n</tool_call>'
    if style is KIMI:
        return f"<|tool_call_begin|>functions.{name}:0<|tool_call_argument_begin|>{text}<|tool_call_end|>"
    return f"{style.call}function<｜tool▁sep｜>{name}\n```json\n{text}\n```{style.end}"  # noqa: RUF001


def found(text, style):
    return [(call.name, json.loads(call.arguments)) for call in parse_calls(text, style, NAMES)]


@pytest.mark.parametrize("style", [HERMES, DEEPSEEK, KIMI], ids=["hermes", "deepseek", "kimi"])
def test_calls_are_found(style):
    calls = [("f", {}), ("get_weather", HARD), ("f", {"x": "{"})]
    text = "\n".join(written(style, *call) for call in calls)
    assert found(text, style) == calls
    assert found(text + "\nand more", style) == calls
    assert found(text + style.call + '{"name": "f", "argu', style) == calls  # broken off
    assert found(text + written(style, "unknown", {}), style) == []
    assert found(text + style.call + "{" + style.end, style) == []
    assert found("no call", style) == []


def test_other_ways_of_writing():
    assert found('<tool_call>{"name": "f", "parameters": {"x": 1}} ', HERMES) == [("f", {"x": 1})]
    assert found('<tool_call>{"name": "f", "arguments": {}} and so on', HERMES) == []
    assert found("<tool_call> ", HERMES) == []
    assert found('<tool_call>{"name": "f", "arguments": []}</tool_call>', HERMES) == []
    version_3_1 = '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"x": 1}<｜tool▁call▁end｜>'  # noqa: RUF001
    assert found(version_3_1, DEEPSEEK) == [("f", {"x": 1})]


@pytest.mark.parametrize("style", [HERMES, DEEPSEEK, KIMI], ids=["hermes", "deepseek", "kimi"])
@pytest.mark.parametrize("unit", ["{}{} ", "{}{{}}", "{}f", '{}{{"name": "f", "arguments": {{}}}}', "{}" + "[" * 50])
def test_a_long_text_of_beginnings_is_read_in_no_time(style, unit):
    text = unit.format(*[style.call] * 2) * 20_000
    begun = time.process_time()
    assert found(text, style) == []
    assert found(text + style.end, style) == []
    assert time.process_time() - begun < 1


@pytest.mark.parametrize("seed", range(5))
def test_pieces_make_no_difference(seed):
    rng = random.Random(seed)
    said, calls = "I look < it up. ", [("f", {"a": 1}), ("get_weather", HARD)]
    text = said + "".join(written(HERMES, *call) for call in calls)
    scanner, content = ToolScanner(HERMES, sorted(NAMES)), ""
    while text:
        size = rng.randint(1, 9)
        content += scanner.push(text[:size])
        text = text[size:]
    rest, parsed = scanner.finish()
    assert content + rest == said
    assert [(call.name, json.loads(call.arguments)) for call in parsed] == calls


@pytest.mark.parametrize("style", [HERMES, DEEPSEEK, KIMI], ids=["hermes", "deepseek", "kimi"])
def test_an_answer_cut_off_within_a_further_call_says_so(style):
    templates = {HERMES: None, DEEPSEEK: DEEPSEEK.begin, KIMI: KIMI.begin}
    served = SimpleNamespace(name="x", tokenizer=SimpleNamespace(chat_template=templates[style]))
    tools = [{"type": "function", "function": {"name": "f"}}]
    body = {"model": "x", "messages": [{"role": "user", "content": "?"}], "tools": tools}
    asked = parse(ChatRequest, json.dumps(body).encode())
    first = ("" if style is HERMES else style.begin) + written(style, "f", {})

    def reason(text, ended):
        (choice,) = chat.whole(served, asked, [Completion(text, (), (), ended)])["choices"]
        assert len(choice["message"]["tool_calls"]) == 1
        return choice["finish_reason"]

    assert reason(first, "stop") == reason(first, "length") == "tool_calls"
    assert reason(first + style.call + '{"name": "f", "argu', "length") == "length"
    assert reason(first + style.call + '{"name": "f", "argu', "stop") == "tool_calls"
