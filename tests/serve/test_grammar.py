"""The process that compiles schemas: ended with the server, however that ends; what is remembered of it."""

import json
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from benthic.serve import grammar
from benthic.serve.errors import ApiError

FOR_EVER = {"allOf": [{"type": "string", "pattern": f".*[a-z]{{{i}}}.*"} for i in range(5, 60)]}


@pytest.fixture
def make_grammars(served_model):
    made = []

    def make(seconds=60.0):
        made.append(grammar.Grammars(served_model / "tokenizer" / "tokenizer.json", 300, [1], seconds))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_what_took_too_long_may_pass_another_time(make_grammars):
    grammars, schema = make_grammars(), {"type": "integer"}
    checker = grammars._running_checker()
    checker._process.send_signal(signal.SIGSTOP)
    grammars._seconds = 0.1
    with pytest.raises(ApiError, match=r"response_format: not compiled within 0\.1 s") as late:
        grammars.schema(schema, "response_format")
    assert late.value.status == 400
    grammars._seconds = 60.0
    assert grammars.schema(schema, "response_format")().mask(300).any()


def test_what_is_wrong_is_remembered(make_grammars, monkeypatch):
    grammars = make_grammars()
    for _ in range(2):
        with pytest.raises(ApiError, match="response_format"):
            grammars.schema({"type": "nonsense"}, "response_format")
        monkeypatch.setattr(grammar._Checker, "check", None)  # not asked again


def test_closing_does_not_wait_for_the_process_to_start(make_grammars, monkeypatch, tmp_path):
    never = tmp_path / "never"
    never.write_text("#!/bin/sh\nexec sleep 600\n")
    never.chmod(0o755)
    monkeypatch.setattr(grammar, "sys", SimpleNamespace(executable=str(never)))
    grammars, ends = make_grammars(), []

    def ask():
        with pytest.raises(ApiError) as error:
            grammars.schema({"type": "integer"}, "response_format")
        ends.append(error.value.status)

    asking = threading.Thread(target=ask)
    asking.start()
    while grammars._checker is None:
        time.sleep(0.01)
    begun = time.monotonic()
    grammars.close()
    asking.join(30)
    assert time.monotonic() - begun < 10
    ask()  # and no further process is begun
    assert ends == [503, 503]
    assert not grammars._checker.alive


def test_it_ends_itself_when_nobody_is_left_to_end_it(served_model):
    arguments = [str(served_model / "tokenizer" / "tokenizer.json"), 300, [1], 0.5]
    command = [sys.executable, "-m", "benthic.serve.grammar_checker", json.dumps(arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert json.loads(process.stdout.readline()) == "ready"
        print(json.dumps({"schema": FOR_EVER, "lenient": False}), file=process.stdin, flush=True)
        try:
            assert process.wait(20) == -signal.SIGALRM
        finally:
            process.kill()
