"""`benthic run` as a user gives it: the plan beforehand, stages left out, what it says at the end."""

import pytest

SETTINGS = (
    "--set", "data.validation_fraction=0.2", "--set", "train.steps=2", "--set", "evaluation.max_new_tokens=4",
)  # fmt: skip


def settings(corpus):
    return "--set", f'data.sources=["{corpus}"]', *SETTINGS


def test_a_dry_run_shows_the_stages_and_writes_nothing(benthic, corpus, tmp_path):
    out = tmp_path / "out"
    done = benthic("run", "tiny", "--out", out, *settings(corpus), "--dry-run", "--set", "train.price_per_hour=3600")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["stage", "what", "time", "energy", "cost"]
    assert [line.split()[0] for line in lines[1:6]] == ["data", "pretrain", "evaluation", "export", "report"]
    assert "2 steps of 4 x 64 tokens" in lines[2]
    assert "measured" in lines[2]
    assert "by arithmetic" in lines[3]
    assert all("$" in line and "kWh" in line for line in lines[1:7])
    assert lines[6].split()[:2] == ["in", "all"]
    assert not out.exists()


def test_a_dry_run_without_a_price_says_so(benthic, corpus, tmp_path):
    done = benthic("run", "tiny", "--out", tmp_path / "out", *settings(corpus), "--dry-run", "--skip", "report,export")
    assert "no cost: give the price" in done.stdout
    assert "$" not in done.stdout
    assert "export" not in done.stdout


def test_stages_in_order_then_figures_of_each(benthic, small_run, corpus):
    """What was done is not done again; the last line says what to do with it."""
    done = benthic("run", small_run / "config.toml", "--out", small_run)
    assert done.returncode == 0, done.stderr
    assert "5/5 report" in done.stderr
    assert done.stdout.splitlines()[0].split() == ["pretrain"]
    assert done.stdout.splitlines()[1].startswith("validation  ")
    assert "drafts accepted, depth 1" in done.stdout
    last = done.stdout.splitlines()[-1]
    assert f"to talk to it: benthic chat {small_run}" in last
    assert f"all about it: {small_run / 'report.html'}" in last


def test_stages_left_out(benthic, corpus, tmp_path):
    out = tmp_path / "out"
    done = benthic("run", "tiny", "--out", out, *settings(corpus), "--skip", "evaluation, report,export")
    assert done.returncode == 0, done.stderr
    assert "2/2 pretrain 2/2" in done.stderr
    assert not any((out / name).exists() for name in ("evaluation", "model", "report.html"))
    assert "report.html" not in done.stdout


@pytest.mark.parametrize("skip", ["rl;sft", "everything", "pretrain"])
def test_a_wrong_skip_is_one_line(benthic, corpus, tmp_path, skip):
    done = benthic("run", "tiny", "--out", tmp_path / "out", *settings(corpus), "--skip", skip)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"--skip {skip}" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_failing_measure_is_status_1_and_all_else_is_done(benthic, corpus, tmp_path):
    out, task = tmp_path / "out", tmp_path / "task.jsonl"
    task.write_text('{"prompt": "' + "far too long " * 200 + '", "answer": "x"}\n')
    done = benthic("run", "tiny", "--out", out, *settings(corpus), "--set", f'evaluation.tasks=["{task}"]')
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert lines[0].startswith(f"error: evaluation: task of pretrain: {task} line 1: ")
    assert lines[-1] == (
        "error: evaluation: 1 of its measures failed; all else is done, and the same command tries again"
    )
    assert (out / "report.html").is_file()
    assert (out / "model" / "config.json").is_file()
    task.write_text('{"prompt": "short", "answer": "x"}\n')
    done = benthic("run", "tiny", "--out", out, *settings(corpus), "--set", f'evaluation.tasks=["{task}"]')
    assert done.returncode == 0, done.stderr


def test_problems_without_rewards_to_make_them_of(benthic, corpus, tmp_path):
    given = ("--set", 'posttrain.sft={steps=1, sources=[{source="problems"}]}')
    done = benthic("run", "tiny", "--out", tmp_path / "out", *settings(corpus), *given)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "problems" in done.stderr
    assert "posttrain.rl" in done.stderr
