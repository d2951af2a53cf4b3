"""`benthic eval --tasks`: scores as JSON and as a table, and mistakes in one line."""

import json

import pytest
from tasks import write_task

CHOICE = {"prompt": "hello", "choices": [" there", " x"], "answer": 0}


@pytest.fixture
def files(tmp_path):
    return [write_task(tmp_path / "texts.jsonl", {"text": "hello there"}, {"text": "I am well"}),
            write_task(tmp_path / "pick.jsonl", *[CHOICE] * 3),
            write_task(tmp_path / "write.jsonl", {"prompt": "hello", "answer": "x"}, max_new_tokens=2)]  # fmt: skip


def refused(done, *said):
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    for part in said:
        assert str(part) in done.stderr


def test_scores_of_several_files(benthic, served_model, files):
    done = benthic("eval", served_model, "--tasks", *files, "--json")
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    assert list(scores) == ["texts", "pick", "pick:accuracy_per_byte", "pick:accuracy_per_character", "write"]
    assert scores["pick"].keys() == {"metric", "value", "n", "ci95", "interval"}
    assert scores["pick"]["n"] == 3
    assert scores["pick"]["value"] in (0, 1)
    again = benthic("eval", served_model / "model", "--tasks", files[1], "--tasks", files[0])
    assert again.returncode == 0, again.stderr
    head, *rows = again.stdout.splitlines()
    assert head.split() == ["task", "metric", "value", "95%", "interval", "n"]
    assert [row.split()[0] for row in rows] == [*list(scores)[1:4], "texts"]
    assert f"{scores['texts']['value']:.4f}" in rows[-1]


def test_tasks_come_with_held_out_text_where_that_is_asked_for(benthic, small_run, files):
    done = benthic("eval", small_run, "--tasks", files[0], "--baseline", "--json")
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)) == ["validation", "xz_baseline", "texts"]
    alone = benthic("eval", small_run, "--json")
    assert json.loads(alone.stdout)["validation"] == json.loads(done.stdout)["validation"]


def test_mistakes(benthic, served_model, files, tmp_path):
    refused(benthic("eval", served_model, files[0]), files[0], "after --tasks")
    refused(benthic("eval", served_model, "--tasks", tmp_path / "no.jsonl"), "no.jsonl: no such file")
    wrong = write_task(tmp_path / "wrong.jsonl", CHOICE, {**CHOICE, "answer": 2})
    refused(
        benthic("eval", served_model, "--tasks", files[0], wrong), f"{wrong} line 2: answer = 2: must be from 0 to 1"
    )
    refused(benthic("eval", served_model), "holds no data/", "--tasks")
    refused(benthic("eval", tmp_path / "none", "--tasks", files[0]), "no such directory")
    validation = write_task(tmp_path / "long.jsonl", {**CHOICE, "prompt": "hello " * 900})
    refused(benthic("eval", served_model, "--tasks", validation), "long.jsonl line 1:", "the model takes 512")
