"""Task files that are made: they can be read, their own answers are right, and mistakes are told in a line."""

import pytest

from benthic.evaluate import match
from benthic.evaluate.make_tasks import main
from benthic.evaluate.task_files import MultipleChoice, Question, read_task


def test_problems_of_reasoning_gym(tmp_path):
    gym = pytest.importorskip("reasoning_gym")
    command = ["reasoning-gym", "chain_sum", "gcd", "--size", "12", "--seed", "5", "--max-new-tokens", "9", "--out"]
    for folder in ("one", "two"):
        assert main([*command, str(tmp_path / folder)]) == 0
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["chain_sum.jsonl", "gcd.jsonl"]
    for family in ("chain_sum", "gcd"):
        path = tmp_path / "one" / f"{family}.jsonl"
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
        task = read_task(path)
        assert (task.settings.max_new_tokens, task.settings.chat, len(task.problems)) == (9, False, 12)
        problems = list(gym.create_dataset(family, size=12, seed=5))
        assert [problem.prompt for problem in task.problems] == [problem["question"] for problem in problems]
        for problem in task.problems:
            assert isinstance(problem, Question)
            assert match.reasoning_gym(problem.family, problem.answer[0], problem.entry) == 1
            assert match.reasoning_gym(problem.family, f"{problem.answer[0]}0001", problem.entry) < 1


def test_settings_of_a_family(tmp_path):
    pytest.importorskip("reasoning_gym")
    command = ["reasoning-gym", "chain_sum", "--size", "5", "--out", str(tmp_path), "--chat"]
    assert main([*command, "--set", "min_terms=2", "--set", "max_terms=2"]) == 0
    task = read_task(tmp_path / "chain_sum.jsonl")
    assert task.settings.chat
    assert all(problem.entry["metadata"]["num_terms"] == 2 for problem in task.problems)


@pytest.mark.parametrize(("given", "said"), [
    (["chain"], "chain: reasoning-gym has no such family; it has"), (["chain_sum", "--set", "min_term=2"], "min_term"),
    (["chain_sum", "--set", "min_terms"], "must be KEY=VALUE"), (["chain_sum", "--set", "min_terms=-1"], "chain_sum"),
])  # fmt: skip
def test_mistakes(tmp_path, capsys, given, said):
    pytest.importorskip("reasoning_gym")
    assert main(["reasoning-gym", *given, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert not (tmp_path / "out").exists()


def test_numbers_that_are_none(tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["reasoning-gym", "chain_sum", "--size", "0", "--out", str(tmp_path)])
    assert stop.value.code == 2


def test_facts_in_long_texts(tmp_path, served_model):
    filler = tmp_path / "filler.txt"
    filler.write_text("hello there I am well thank you " * 200)
    given = ["--lengths", "64", "128", "--size", "6", "--out", str(tmp_path), "--filler"]
    assert main(["retrieval", str(served_model), *given, str(filler)]) == 0
    for length in (64, 128):
        task = read_task(tmp_path / f"retrieval-{length}.jsonl")
        assert len(task.problems) == 6
        assert all(isinstance(problem, MultipleChoice) for problem in task.problems)
    assert main(["retrieval", str(tmp_path / "nowhere"), *given, str(filler)]) == 2
    assert main(["retrieval", str(served_model), *given, str(tmp_path / "none.txt")]) == 2
