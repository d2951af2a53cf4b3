import io
import sys

import pytest

from benthic.errors import InputError
from benthic.inference.chat import Conversation, chat, converse
from benthic.inference.engine import Engine
from benthic.inference.paged_cache import PAGE
from benthic.model import build_model


@pytest.fixture
def talk(engine):
    """Feed lines to a conversation; returns it and what was written."""

    def run(*lines, **sampling):
        conversation = Conversation(engine, **{"temperature": 0.0, "max_new_tokens": 6} | sampling)
        out = io.StringIO()
        converse(conversation, [f"{line}\n" for line in lines], out)
        return conversation, out.getvalue()

    return run


def expected_answer(engine, *messages, **sampling):
    roles = ["user", "assistant"] * len(messages)
    history = [{"role": role, "content": text} for role, text in zip(roles, messages, strict=False)]
    settings = {"temperature": 0.0, "max_new_tokens": 6} | sampling
    return engine.generate([engine.tokenizer.apply_chat(history)], **settings)[0].text


def test_answers_each_line_with_the_history_before_it(talk, engine):
    conversation, _ = talk("hello", "", "how are you")
    first = expected_answer(engine, "hello")
    second = expected_answer(engine, "hello", first, "how are you")
    assert [message["content"] for message in conversation.messages] == ["hello", first, "how are you", second]
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2


def test_off_a_terminal_only_the_answers_are_written(scripted, tokenizer):
    case = scripted(tokenizer.encode("well"))
    case.engine.model.transformer.prompt_length = len(tokenizer.apply_chat([{"role": "user", "content": "x"}]))
    out = io.StringIO()
    converse(Conversation(case.engine), ["x"], out)
    assert out.getvalue() == "well\n"


def test_control_characters_do_not_reach_the_terminal(scripted, tokenizer):
    case = scripted(tokenizer.encode("a\x1b[31mb\tc\nd\x07\u202e\x9be"))
    case.engine.model.transformer.prompt_length = len(tokenizer.apply_chat([{"role": "user", "content": "x"}]))
    out = io.StringIO()
    converse(Conversation(case.engine), ["x"], out)
    assert out.getvalue() == "a[31mb\tc\nde\n"


def test_reset_and_system(talk):
    conversation, written = talk("hello", "/system be brief", "hello")
    assert [message["role"] for message in conversation.messages] == ["system", "user", "assistant"]
    assert "[new conversation]" in written
    for forget in ("/reset", "/clear"):
        conversation, _ = talk("/system be brief", "hello", forget)
        assert conversation.messages == []


def test_settings_change_what_follows(talk, engine):
    conversation, written = talk("/set max_new_tokens=2", "hello")
    assert conversation.messages[1]["content"] == expected_answer(engine, "hello", max_new_tokens=2)
    assert "[max_new_tokens = 2]" in written


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/set temperature=9", ["error", "temperature", "9"]),
        ("/set temperature", ["error", "/help"]),
        ("/set colour=red", ["error", "colour"]),
        ("/set self=1", ["error", "self"]),
        ("/dance", ["error", "/dance", "/help"]),
        ("long " * 300, ["error", "max_position_embeddings"]),
    ],
)
def test_a_mistake_is_told_and_changes_nothing(talk, line, words):
    _, written = talk(line)
    assert all(word in written for word in words)
    conversation, _ = talk("hello", line)
    undisturbed, _ = talk("hello")
    assert conversation.messages == undisturbed.messages
    assert talk(line, "hello")[1].endswith(talk("hello")[1])


def test_a_refused_message_is_refused_at_the_call_and_leaves_the_history(config, tokenizer):
    page = config.num_hidden_layers * PAGE * config.latent_dim * 4
    engine = Engine(build_model(config, seed=3), tokenizer, cache_gib=2.5 * page / 2**30, max_draft=0)
    conversation = Conversation(engine, temperature=0.0, max_new_tokens=6)
    list(conversation.answer("hello"))
    before = list(conversation.messages)
    assert len(before) == 2
    conversation.set(max_new_tokens=200)
    with pytest.raises(InputError, match="cache_gib"):
        conversation.answer("how are you")
    assert conversation.messages == before


def test_the_oldest_exchanges_make_room(talk, engine):
    lines = [f"number {i} of a long talk, is it not so?" for i in range(12)]
    conversation, written = talk("/system be brief", *lines)
    kept = [message["content"] for message in conversation.messages if message["role"] == "user"]
    assert "error" not in written
    assert 1 <= len(kept) < len(lines)
    assert kept == lines[-len(kept) :]
    assert conversation.messages[0] == {"role": "system", "content": "be brief"}


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on(engine, monkeypatch):
    stream = Engine.stream

    def interrupted(self, prompt, **settings):
        monkeypatch.setattr(Engine, "stream", stream)
        yield next(stream(self, prompt, **settings))
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "stream", interrupted)
    conversation, out = Conversation(engine, temperature=0.0, max_new_tokens=6), io.StringIO()
    converse(conversation, ["hello", "how are you"], out)
    assert "[stopped]" in out.getvalue()
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2
    whole = expected_answer(engine, "hello")
    said = conversation.messages[1]["content"]
    assert said
    assert whole.startswith(said)
    assert len(said) < len(whole)


def test_help_names_every_command(talk):
    _, written = talk("/help")
    commands = ("/reset", "/clear", "/system", "/set", "/help", "/quit", "/exit", "Ctrl-D")
    assert all(command in written for command in commands)


def test_chat_answers_what_is_piped_in(engine, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    chat(engine, temperature=0.0, max_new_tokens=6)
    out = io.StringIO()
    converse(Conversation(engine, temperature=0.0, max_new_tokens=6), ["hello"], out)
    assert capsys.readouterr().out == out.getvalue()


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_line_that_is_no_text_is_left_out_and_the_others_answered(engine, monkeypatch, capsys, talk, errors):
    piped = io.TextIOWrapper(io.BytesIO(b"hello\n\xff\xfe\n/\xff\nhello\n"), encoding="utf-8", errors=errors)
    monkeypatch.setattr(sys, "stdin", piped)
    chat(engine, temperature=0.0, max_new_tokens=6)
    error = "error: this line is not UTF-8 text; it is left out\n"
    first, second = capsys.readouterr().out.split(2 * error)
    assert first + second == talk("hello", "hello")[1]


@pytest.mark.parametrize("command", ["/quit", "/exit"])
def test_leaving(talk, command):
    assert talk("hello", command, "hello")[1] == talk("hello")[1]
