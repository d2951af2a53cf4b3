"""Conversations out of files: what is read and refused, and how long ones are parted."""

import json
import random
from itertools import pairwise

import pytest

from benthic.data.chat import ChatFormat
from benthic.data.conversations import Conversation, parse_conversation, pieces, read_conversations
from benthic.data.document import Document, Rejection, digest
from benthic.data.text_files import read_file
from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError

ASK, ANSWER = {"role": "user", "content": "how deep?"}, {"role": "assistant", "content": "very"}
CALL = {"id": "1", "type": "function", "function": {"name": "depth", "arguments": "{}"}}


@pytest.fixture(scope="module")
def chat():
    return ChatFormat(Tokenizer.train(["reef kelp vent abyss krill"], 300))


def test_a_conversation_has_the_digest_of_the_document_that_pretraining_reads(tmp_path):
    records = [{"messages": [ASK, ANSWER]}, {"messages": [{"role": "system", "content": "<|end|>"}, ASK, ANSWER, ASK]}]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    documents = [item for item in read_file(path) if isinstance(item, Document)]
    found = [item for item in read_conversations(str(path)) if isinstance(item, Conversation)]
    assert len(found) == 2
    assert [digest(one.document, 7) for one in found] == [digest(one, 7) for one in documents]


@pytest.mark.parametrize(("record", "reason"), [
    ({"text": "x"}, 'no list under "messages"'),
    ({"messages": [ASK]}, "no message of the assistant"),
    ({"messages": [{"role": "villain", "content": "x"}, ANSWER]}, '"role" is not one of'),
    ({"messages": [{"role": "user", "content": 3}, ANSWER]}, 'without a string under "content"'),
    ({"messages": [ASK, {"role": "assistant", "content": None}]}, 'without a string under "content"'),
    ({"messages": [ASK, {**ANSWER, "tool_calls": [{"function": {"name": 3}}]}]}, '"tool_calls" is no list'),
    ({"messages": [ASK, {**ANSWER, "reasoning_content": 3}]}, '"reasoning_content" is not a string'),
    ({"messages": [ASK, {**ANSWER, "weight": 0.5}]}, '"weight" is not 0 or 1'),
    ({"messages": [ASK, ANSWER], "tools": "x"}, '"tools" is no list'),
    ({"messages": [ASK, {"role": "assistant", "content": "\ud800"}]}, "lone surrogate"),
])  # fmt: skip
def test_a_line_that_is_none_is_rejected_with_the_reason(tmp_path, record, reason):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(record) + "\n" + json.dumps({"messages": [ASK, ANSWER]}))
    rejected, read = read_conversations(str(path))
    assert isinstance(rejected, Rejection)
    assert reason in rejected.reason
    assert (rejected.file, rejected.offset) == (str(path), 0)
    assert read == Conversation((ASK, ANSWER))


def test_other_kinds_of_files_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"notes.txt: holds no conversations"):
        list(read_conversations(str(tmp_path / "notes.txt")))


def test_parts_of_text_and_empty_fields():
    parts = [{"type": "text", "text": "how "}, {"type": "text", "text": "deep?"}]
    called = {"role": "assistant", "content": None, "tool_calls": [CALL], "name": None}
    found = parse_conversation({"messages": [{"role": "user", "content": parts}, called]})
    assert found.messages == (ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]})


@pytest.mark.parametrize("seed", range(8))
def test_a_long_conversation_is_parted_between_exchanges(chat, seed):
    rng = random.Random(seed)
    system = [{"role": "system", "content": "be kind"}] if seed % 2 else []
    messages = [
        {"role": role, "content": f"{number} " + "kelp " * rng.randrange(12)}
        for number in range(15) for role in ("user", "assistant")
    ]  # fmt: skip
    capacity = rng.randrange(90, 200)
    found = list(pieces(Conversation((*system, *messages)), chat, capacity))
    assert len(found) > 1
    head = chat.prompt(system)[:-1] if system else [chat.prompt([])[0]]
    answers = []
    for sample in found:
        assert len(sample.ids) <= capacity
        assert sample.ids[: len(head)] == head
        answers += [index for index, marked in zip(sample.ids, sample.learn, strict=True) if marked]
    # Every answer is in one part, and no part could have taken in the next exchange.
    texts = [chat._tokenizer.encode(message["content"]) for message in messages if message["role"] == "assistant"]
    stops = chat._tokenizer.stop_ids
    assert [index for index in answers if index not in stops] == [index for text in texts for index in text]
    assert sum(sample.answer_bytes for sample in found) == sum(
        len(message["content"].encode()) + 1 for message in messages if message["role"] == "assistant"
    )
    for one, after in pairwise(found):
        first = after.ids[len(head) :]
        ends = [place for place, index in enumerate(first) if index == chat._tokenizer.role_ids["user"]]
        exchange = ends[1] if len(ends) > 1 else len(first) - 1
        assert len(one.ids) + exchange > capacity


def test_what_alone_is_too_long_loses_its_end(chat):
    long = {"role": "assistant", "content": "abcdefgh" * 20}
    (sample,) = pieces(Conversation((ASK, long)), chat, 60)
    whole = chat.sample([ASK, long])
    assert (sample.ids, sample.learn) == (whole.ids[:60], whole.learn[:60])
    assert sample.answer_bytes == round(whole.answer_bytes * sum(whole.learn[:60]) / sum(whole.learn))
    assert list(pieces(Conversation(({**ASK, "content": "abcdefgh" * 20}, ANSWER)), chat, 60)) == []


def test_for_the_last_answer_the_oldest_exchanges_are_left_out(chat):
    messages = [
        {**message, "content": f"{number}{message['content']}"} for number in range(9) for message in (ASK, ANSWER)
    ]
    (sample,) = pieces(Conversation(tuple(messages)), chat, 80, "last")
    kept = next(count for count in range(0, 18, 2) if len(chat.sample(messages[count:]).ids) <= 80)
    assert sample == chat.sample(messages[kept:], answers="last")
    assert 0 < kept < 16
