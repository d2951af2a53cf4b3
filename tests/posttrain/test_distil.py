"""Answers of teachers that err, hang and write nonsense: what is kept, what is counted, and going on after a kill."""

import json
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from serving import PROGRAM, Server, make_model
from teachers import FakeTeacher, answer, cut_off, drip, endless, gone, hang, redirect

from benthic import api
from benthic.config.posttrain import DistilConfig
from benthic.data.conversations import Conversation, read_conversations
from benthic.errors import InputError, WorkFailed
from benthic.posttrain import distil, teacher
from benthic.posttrain.distil import ANSWERS, JOURNAL, MANIFEST, read_manifest
from benthic.posttrain.teacher import Endpoint, NoAnswer, Refused

PROMPTS = [f"what is {number} and {number}?" for number in range(12)]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(teacher, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(teacher, "_LONGEST_WAIT", 0.05)


@pytest.fixture
def fake():
    """Makes teachers, and closes them."""
    made = []

    def make(reply, **settings):
        made.append(FakeTeacher(reply, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def problems(tmp_path) -> Path:
    path = tmp_path / "sums.jsonl"
    lines = [{"prompt": prompt, "answer": str(2 * number)} for number, prompt in enumerate(PROMPTS)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def settings(url, problems, rewards=("exact",), **changes) -> DistilConfig:
    asked = {"file": str(problems), "rewards": tuple({"name": name} for name in rewards)}
    return DistilConfig.model_validate(
        {"teacher": url, "problems": (asked,), "at_once": 4, "timeout_seconds": 0.5, "retries": 3, **changes}
    )


def right(body, number=0):
    """What a teacher that can add says."""
    return answer(str(2 * int(body["messages"][-1]["content"].split()[2])))


def ask(url, **changes):
    """One question to an endpoint."""
    config = settings(url, "none.jsonl", **changes)
    endpoint = Endpoint(config)
    try:
        return endpoint.ask([{"role": "user", "content": "hello"}], 5)
    finally:
        endpoint.close()


# ---------------------------------------------------------------------- the endpoint


def named(reply):
    """The same in every process that collects tests."""
    return getattr(reply, "__name__", None) or str(reply)[:60]


@pytest.mark.parametrize(
    "trouble",
    [
        hang, drip, cut_off, endless, gone, b"", b"nonsense", b"\xff", b"[]", b"{}", b'{"choices": []}',
        b'{"choices": [{"message": null}]}', b'{"choices": [{"message": {"content": 5}}]}', b"[" * 100_000,
        b'{"choices": [{"message": {"content": "\\ud800"}}]}', (500, b"oh"), (503, b'{"error": 7}'),
        (429, b'{"error": {"message": "slow down"}}'), (408, b""),
    ],
    ids=named,
)  # fmt: skip
def test_what_fails_for_the_moment_is_tried_again(fake, trouble):
    there = fake(lambda body, number: trouble if number < 1 else answer("well"))
    begun = time.monotonic()
    assert ask(there.url).text == "well"
    assert len(there.asked) == 2
    assert time.monotonic() - begun < 10
    failing = fake(lambda body, number: trouble)
    with pytest.raises(NoAnswer, match=r"^http://127\.0\.0\.1:\d+/v1: .+"):
        ask(failing.url, retries=1, timeout_seconds=0.3)
    assert len(failing.asked) == 2


def test_a_reply_is_read_and_a_request_says_what_it_should(fake):
    there = fake(lambda body, number: answer("four", reasoning_content="two and two", finish="length"))
    told = ask(there.url, temperature=0.25, top_p=0.5, max_new_tokens=9)
    assert told == ("four", "two and two", False, 7)
    assert there.asked == [{
        "model": "fake", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 9, "temperature": 0.25,
        "top_p": 0.5, "seed": 5, "stream": False,
    }]  # fmt: skip
    assert "authorization" not in {name.lower() for name in there.headers[0]}


def test_a_prompt_that_is_refused_is_not_asked_again(fake):
    there = fake(lambda body, number: (400, b'{"error": {"message": "too\\nlong\\u001b[31m"}}'))
    with pytest.raises(Refused, match=r"^status 400: too long\[31m$"):
        ask(there.url)
    assert len(there.asked) == 1


@pytest.mark.parametrize("reply", [(401, b"key?"), (403, b""), (404, b""), redirect], ids=named)
def test_where_asking_is_of_no_use_it_ends(fake, reply):
    there = fake(lambda body, number: reply)
    with pytest.raises(InputError, match="/chat/completions: status"):
        ask(there.url)
    assert len(there.asked) == 1


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(fake, monkeypatch, problems, tmp_path):
    monkeypatch.setenv("TEACHERS_KEY", "s3cret-s3cret")
    there = fake(right)
    api.distil(settings(there.url, problems, api_key_env="TEACHERS_KEY"), tmp_path / "out")
    assert {headers["authorization"] for headers in there.headers} == {"Bearer s3cret-s3cret"}
    assert not any(b"s3cret" in path.read_bytes() for path in (tmp_path / "out").iterdir())
    with pytest.raises(InputError, match="the environment has no OTHER_KEY"):
        ask(there.url, api_key_env="OTHER_KEY")


def test_several_models_want_a_name(fake):
    there = fake(lambda body, number: answer("x"), models=("one", "two"))
    with pytest.raises(InputError, match=r"posttrain\.distil\.model: must be given; .* has one, two"):
        ask(there.url)
    assert ask(there.url, model="two").text == "x"
    assert there.asked[0]["model"] == "two"


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/v1",
        "http://",
        "http://host:port/v1",
        "http://[::1/v1",
        "http://user:word@host/v1",
        "http://host/v1?key=1",
    ],
)
def test_addresses_that_are_none(url):
    with pytest.raises(InputError, match=r"posttrain\.distil\.teacher"):
        ask(url)


def test_nobody_there():
    with pytest.raises(WorkFailed, match="ConnectionRefusedError"):
        ask("http://127.0.0.1:9/v1", retries=1)


# ---------------------------------------------------------------------- asking, judging, keeping


def test_what_is_kept_and_what_is_counted(fake, problems, tmp_path):
    def reply(body, number):
        which = PROMPTS.index(body["messages"][-1]["content"])
        odd = {0: answer("wrong"), 1: answer("2", finish="length"), 2: answer("  "), 3: (400, b"no"), 4: answer(None),
               5: answer("10", reasoning_content="five and five"), 6: answer(" 12\n")}  # fmt: skip
        return odd.get(which) or right(body)

    there, out = fake(reply), tmp_path / "out"
    config = settings(there.url, problems, system="Be brief.")
    found = api.distil(config, out)
    assert (found["asked"], found["kept"], found["without_answer"]) == (12, 7, 0)
    assert found["left_out"] == {"below the least reward": 1, "unfinished": 1, "empty": 2, "refused": 1}
    assert found["teacher"] == f"{there.url} fake"
    assert found == read_manifest(out)
    assert all(body["messages"][0] == {"role": "system", "content": "Be brief."} for body in there.asked)
    lines = [json.loads(line) for line in (out / ANSWERS).read_text().splitlines()]
    assert [line["messages"][0]["content"] for line in lines] == PROMPTS[5:]
    assert lines[0]["messages"][1] == {"role": "assistant", "content": "10", "reasoning_content": "five and five"}
    assert lines[1]["messages"][1] == {"role": "assistant", "content": "12"}
    provenance = lines[2]["provenance"]
    assert provenance.keys() >= {"when", "seconds", "seed"}
    assert {key: provenance[key] for key in ("teacher", "source", "number", "sample", "reward", "rewards")} == {
        "teacher": found["teacher"], "source": "sums", "number": 7, "sample": 0, "reward": 1.0,
        "rewards": {"exact": 1.0},
    }  # fmt: skip
    assert provenance["settings"]["system"] == "Be brief."
    read = list(read_conversations(str(out / ANSWERS)))
    assert [type(one) for one in read] == [Conversation] * 7
    assert there.most_at_once <= 4


def test_of_several_answers_the_best_are_kept(fake, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n{"prompt": "two"}\n{"prompt": "one"}\n')
    (tmp_path / "my_rewards.py").write_text("def length(prompt, answer, problem):\n    return len(answer) / 10\n")
    texts = ["aaa", "a", "aaaaa", "aaa"]

    def reply(body, number):
        seeds.setdefault(body["seed"], len(seeds) % 4)
        return answer(texts[seeds[body["seed"]]])

    seeds: dict[int, int] = {}
    there = fake(reply)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
        patch.syspath_prepend(str(tmp_path))
        config = settings(there.url, path, ["my_rewards:length"], samples=4, keep=2, least_reward=0.2, at_once=1)
        found = api.distil(config, tmp_path / "out")
        lines = [json.loads(line) for line in (tmp_path / "out" / ANSWERS).read_text().splitlines()]
        assert [(line["messages"][0]["content"], line["messages"][1]["content"]) for line in lines] == [
            ("one", "aaaaa"), ("one", "aaa"), ("two", "aaaaa"), ("two", "aaa"),
        ]  # fmt: skip
        assert found["left_out"] == {"below the least reward": 2, "the same again": 2}
        # Keeping more is a matter of what is there already.
        again = api.distil(config.model_copy(update={"keep": 1, "least_reward": 0.0}), tmp_path / "out")
    assert len(there.asked) == 8
    assert again["left_out"] == {"the same again": 2, "more than are kept": 4}


def test_it_goes_on_where_it_was_and_ends_the_same(fake, problems, tmp_path):
    whole = tmp_path / "whole"
    api.distil(settings(fake(right).url, problems, model="m"), whole)
    down = threading.Event()
    there = fake(lambda body, number: (503, b"") if down.is_set() and number >= 5 else right(body))
    config, out = settings(there.url, problems, model="m", retries=0), tmp_path / "out"
    down.set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distil, "_MOST_FAILED", 3)
        with pytest.raises(WorkFailed, match=r"3 problems in a row got no answer: .*status 503"):
            api.distil(config, out)
    assert not (out / ANSWERS).exists()
    with (out / JOURNAL).open("ab") as journal:
        journal.write(b'{"source": 0, "number": 11, "sam')  # a kill
    down.clear()
    before = len(there.asked)
    told = []
    found = api.distil(config, out, lambda *of: told.append(of))
    assert found["kept"] == 12
    assert len(there.asked) - before == 12 - 5
    assert told[-1] == ("answers", 12, 12)
    assert api.distil(config, out)["kept"] == 12
    assert len(there.asked) - before == 12 - 5

    def content(folder):
        lines = [json.loads(line) for line in (folder / ANSWERS).read_text().splitlines()]
        return [(line["messages"], line["provenance"]["seed"], line["provenance"]["rewards"]) for line in lines]

    assert content(out) == content(whole)


def test_ctrl_c_while_the_teacher_hangs(fake, problems, tmp_path):
    stuck = threading.Event()
    there = fake(lambda body, number: hang if stuck.is_set() and number >= 2 else right(body))
    recipe, out = tmp_path / "teacher.toml", tmp_path / "out"
    recipe.write_text(
        f'[model]\npreset = "tiny"\n[posttrain.distil]\nteacher = "{there.url}"\n'
        f'[[posttrain.distil.problems]]\nfile = "{problems}"\nrewards = [{{name = "exact"}}]\n'
    )
    command = [*PROGRAM, "distil", str(recipe), "--out", str(out)]
    stuck.set()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 120
        while len(there.asked) < 4 and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "stopped by Ctrl-C\n")
    stuck.clear()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{out / ANSWERS}: 12 of 12 answers\n"


def test_other_settings_want_another_folder(fake, problems, tmp_path):
    there, out = fake(right), tmp_path / "out"
    api.distil(settings(there.url, problems), out)
    before = (out / JOURNAL).read_bytes()
    for change in ({"temperature": 0.1}, {"seed": 1}, {"system": "x"}, {"model": "other"}, {"rewards": ("numeric",)}):
        with pytest.raises(InputError, match=r"asked\.jsonl: was begun with another"):
            api.distil(settings(there.url, problems, **change), out)
    problems.write_text('{"prompt": "another", "answer": "1"}\n')
    with pytest.raises(InputError, match="another sources"):
        api.distil(settings(there.url, problems), out)
    assert (out / JOURNAL).read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / MANIFEST).write_text("{}")
    with pytest.raises(InputError, match="give another --out"):
        api.distil(settings(there.url, problems), tmp_path / "other")


def test_rewards_that_judge_nothing_end_it(fake, problems, tmp_path, monkeypatch):
    monkeypatch.setattr(distil, "_MOST_UNJUDGED", 3)
    there = fake(right)
    with pytest.raises(WorkFailed, match=r"none of 3 answers could be judged: json_schema: .*schema"):
        api.distil(settings(there.url, problems, ["json_schema"]), tmp_path / "out")
    with pytest.raises(InputError, match="reward 'nonsense'"):
        api.distil(settings(there.url, problems, ["nonsense"]), tmp_path / "other")


def test_nothing_worth_keeping_is_told(fake, problems, tmp_path):
    with pytest.raises(WorkFailed, match=r"no answer was kept \(12 below the least reward\)"):
        api.distil(settings(fake(lambda *of: answer("no")).url, problems), tmp_path / "out")


def test_files_that_cannot_be_asked(tmp_path):
    there = settings("http://127.0.0.1:9/v1", tmp_path / "none.jsonl", model="m")
    with pytest.raises(InputError, match="no such file"):
        api.distil(there, tmp_path / "out")
    (tmp_path / "few.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(InputError, match="leave none to ask"):
        api.distil(settings("http://127.0.0.1:9/v1", tmp_path / "few.jsonl", model="m", held_out=1), tmp_path / "out")


def test_a_family_is_asked_what_nobody_holds_out(fake, tmp_path):
    pytest.importorskip("reasoning_gym")
    config = DistilConfig.model_validate({
        "teacher": fake(lambda body, number: answer("5")).url, "count": 6, "least_reward": 0.0, "timeout_seconds": 5.0,
        "problems": ({"family": "chain_sum", "settings": {"max_digits": 1}},),
    })  # fmt: skip
    found = api.distil(config, tmp_path / "out")
    assert found["kept"] == found["asked"] >= 4
    held_out = {problem.prompt for problem in distil.Family(config.problems[0], 500).held_out}
    lines = [json.loads(line) for line in (tmp_path / "out" / ANSWERS).read_text().splitlines()]
    assert not held_out & {line["messages"][0]["content"] for line in lines}
    assert all(0 <= line["provenance"]["rewards"]["reasoning_gym"] <= 1 for line in lines)


def test_small_families_say_so_before_anything_is_asked(fake, tmp_path):
    pytest.importorskip("reasoning_gym")
    there, one = fake(lambda body, number: answer("5")), {"min_terms": 2, "max_terms": 2, "max_digits": 1}
    config = DistilConfig.model_validate({
        "teacher": there.url, "count": 3, "least_reward": 0.0, "timeout_seconds": 5.0,
        "problems": ({"family": "chain_sum", "settings": one},),
    })  # fmt: skip
    with pytest.raises(InputError, match=r"^posttrain\.distil: chain_sum has \d+ different problems.*held_out"):
        api.distil(config, tmp_path / "out")
    assert (there.asked, (tmp_path / "out").exists()) == ([], False)
    assert api.distil(config.model_copy(update={"held_out": 0}), tmp_path / "out")["kept"] == 3


@pytest.mark.slow
def test_a_served_model_answers_as_it_does_in_this_process(problems, tmp_path):
    model = make_model(tmp_path / "run")
    changes = {"max_new_tokens": 24, "temperature": 1.0, "samples": 3, "keep": 3, "timeout_seconds": 60.0}
    server = Server(f"teacher={model}")
    try:
        api.distil(settings(f"{server.url}/v1", problems, [], **changes), tmp_path / "served")
    finally:
        server.terminate()
    api.distil(settings(str(model), problems, [], **changes), tmp_path / "own")
    served, own = (
        [json.loads(line) for line in (tmp_path / name / ANSWERS).read_text().splitlines()]
        for name in ("served", "own")
    )
    assert [line["messages"] for line in served] == [line["messages"] for line in own]
    assert len(served) > 5
    assert served[0]["provenance"]["teacher"].endswith("/v1 teacher")


def test_a_model_of_ones_own_is_a_teacher(problems, tmp_path):
    model = make_model(tmp_path / "run")
    config = settings(
        str(model), problems, [], max_new_tokens=24, temperature=1.0, samples=2, keep=2, timeout_seconds=60.0
    )
    found = api.distil(config, tmp_path / "one")
    assert found["asked"] == 24
    assert found["kept"] + sum(found["left_out"].values()) == 24
    again = api.distil(config.model_copy(update={"at_once": 1}), tmp_path / "two")
    assert again["kept"] == found["kept"]

    def texts(folder):
        return [json.loads(line)["messages"] for line in (folder / ANSWERS).read_text().splitlines()]

    assert texts(tmp_path / "one") == texts(tmp_path / "two")
