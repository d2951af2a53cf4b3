"""Task files: what is read, and that a mistake is told with file, line, key and what is allowed."""

import json

import pytest
from tasks import write_task

from benthic.errors import InputError
from benthic.evaluate.task_files import MultipleChoice, Question, QuestionSettings, Text, read_task, read_tasks

QUESTION = {"prompt": "1+1=", "answer": 2}
CHOICE = {"prompt": "1+1=", "choices": ["2", "3"], "answer": 0}
TEXT = {"text": "some text"}


def refusal(path):
    with pytest.raises(InputError) as caught:
        read_task(path)
    line = str(caught.value)
    assert line.count("\n") == 0
    assert str(path) in line
    return line


def test_each_kind(tmp_path):
    for problem, kind in ((QUESTION, Question), (CHOICE, MultipleChoice), (TEXT, Text)):
        task = read_task(write_task(tmp_path / "some.jsonl", problem, problem))
        assert (task.name, len(task.problems), task.lines) == ("some", 2, (1, 2))
        assert all(type(problem) is kind for problem in task.problems)


def test_settings_blank_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "task.jsonl"
    lines = [json.dumps({"task": {"samples": 4, "temperature": 0.5}}), "", json.dumps(QUESTION), "  "]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    task = read_task(path)
    assert isinstance(task.settings, QuestionSettings)
    assert (task.settings.samples, task.problems[0].answer, task.lines) == (4, ("2",), (3,))
    assert task.where(0) == f"{path} line 3"


def test_answers_may_be_several_and_numbers(tmp_path):
    write_task(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "?"}], "answer": [1, "one", 0.5]})
    assert read_task(tmp_path / "a.jsonl").problems[0].answer == ("1", "one", "0.5")


@pytest.mark.parametrize(("problem", "said"), [
    ({"prompt": "x"}, "must have one of the keys text, choices, answer"),
    ({**QUESTION, "verifyer": "exact"}, "no such setting; did you mean 'verifier'?"),
    ({**QUESTION, "verifier": "fuzzy"}, "must be one of exact, numeric, contains, regex, reasoning_gym:FAMILY"),
    ({**QUESTION, "answer": []}, "answer"), ({**QUESTION, "answer": None}, "answer"),
    ({**QUESTION, "answer": True}, "answer"), ({**QUESTION, "answer": "two", "verifier": "numeric"}, "no number"),
    ({**QUESTION, "answer": "(", "verifier": "regex"}, "no regular expression"),
    ({**QUESTION, "entry": {}}, "entry"), ({**QUESTION, "messages": [{"role": "user", "content": "x"}]}, "either"),
    ({"answer": "x"}, "either a prompt or messages"), ({"messages": [], "answer": "x"}, "either"),
    ({"messages": [{"role": "robot", "content": "x"}], "answer": "x"}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": "x", "nmae": "y"}], "answer": "x"}, "messages.0.nmae"),
    ({**CHOICE, "answer": 2}, "from 0 to 1"), ({**CHOICE, "answer": -1}, "answer = -1"),
    ({**CHOICE, "choices": ["a"]}, "choices"), ({**CHOICE, "choices": ["a", "a"]}, "choices must differ"),
    ({**CHOICE, "choices": ["a", ""]}, "choices.1"), ({"text": ""}, "text"), ({"text": 5}, "text = 5"),
    ({"text": "\ud800"}, "text"), ({"text": "a", "prompt": "b"}, "no such setting"),
])  # fmt: skip
def test_a_wrong_problem(tmp_path, problem, said):
    line = refusal(write_task(tmp_path / "task.jsonl", problem))
    assert said in line
    assert "task.jsonl line 1: " in line


@pytest.mark.parametrize(("problem", "settings", "said"), [
    (QUESTION, {"sample": 3}, "did you mean 'samples'"), (QUESTION, {"samples": 4}, "temperature must be above 0"),
    (QUESTION, {"samples": 4, "temperature": 1, "pass_at": [8]}, "at most samples, which is 4"),
    (QUESTION, {"pass_at": [1]}, "needs samples"), (QUESTION, {"temperature": 3}, "temperature = 3"),
    (QUESTION, {"extract": "("}, "no regular expression"), (QUESTION, {"max_new_tokens": 0}, "max_new_tokens"),
    (QUESTION, {"stop": [""]}, "stop.0"), (CHOICE, {"samples": 2}, "samples"), (TEXT, {"chat": True}, "chat"),
])  # fmt: skip
def test_wrong_settings(tmp_path, problem, settings, said):
    line = refusal(write_task(tmp_path / "task.jsonl", problem, **settings))
    assert said in line
    assert "line 1:" in line


@pytest.mark.parametrize(("content", "said"), [
    (b"", "holds no problems"), (b'{"task": {}}\n', "holds no problems"), (b"{\n", "line 1: is not JSON"),
    (b'\n{"text": "\xff"}\n', "line 2: is not UTF-8"), (b"[1]\n", "must be a JSON object"),
    (b"[" * 100_000, "nested too deeply"), (b'{"task": 3}\n', '{"task": {settings}}'),
    (b'{"task": {}, "text": "x"}\n', '{"task": {settings}}'),
    (b'{"text": "x"}\n{"task": {}}\n', "line 2: must have one of the keys"),
    (b'{"text": "x"}\n{"prompt": "", "answer": "y"}\n', "line 2: is a question, but the file began with a text"),
])  # fmt: skip
def test_a_file_that_is_none(tmp_path, content, said):
    path = tmp_path / "task.jsonl"
    path.write_bytes(content)
    assert said in refusal(path)


def test_what_is_too_long(tmp_path, monkeypatch):
    path = write_task(tmp_path / "task.jsonl", {"text": "x" * 500})
    monkeypatch.setattr("benthic.evaluate.task_files.MAX_LINE_BYTES", 400)
    assert "line 1: longer than 400 bytes" in refusal(path)
    monkeypatch.setattr("benthic.evaluate.task_files.MAX_BYTES", 100)
    assert "bytes; at most 100 are read" in refusal(path)


def test_paths_that_are_wrong(tmp_path):
    assert "no such file" in refusal(tmp_path / "nowhere.jsonl")
    assert "not a file" in refusal(tmp_path)
    (tmp_path / "b").mkdir()
    paths = [write_task(folder / "same.jsonl", TEXT) for folder in (tmp_path, tmp_path / "b")]
    with pytest.raises(InputError, match="a task of the same name; rename"):
        read_tasks(paths)


def test_a_family_of_reasoning_gym(tmp_path):
    pytest.importorskip("reasoning_gym")
    question = {**QUESTION, "verifier": "reasoning_gym:chain_sum"}
    entry = {"answer": "2", "metadata": {}}
    assert read_task(write_task(tmp_path / "a.jsonl", {**question, "entry": entry})).problems[0].family == "chain_sum"
    assert "entry: must be the problem" in refusal(write_task(tmp_path / "b.jsonl", question))
    wrong = {**question, "verifier": "reasoning_gym:chain", "entry": entry}
    assert "reasoning-gym has no such family" in refusal(write_task(tmp_path / "c.jsonl", wrong))
