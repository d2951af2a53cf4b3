"""Where problems come from, that those held out stay out, and the files that are made of them."""

import json

import pytest

from benthic.config.posttrain import ProblemsConfig, RlConfig
from benthic.errors import InputError
from benthic.posttrain.problem_files import write_problems
from benthic.posttrain.problems import HELD_OUT_SEED, Family, File, open_sources, order
from benthic.posttrain.rewards import reasoning_gym

_SUMS = {"family": "chain_sum", "settings": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}
"""Two hundred different problems."""


def _sums(**settings):
    pytest.importorskip("reasoning_gym")
    return ProblemsConfig.model_validate({**_SUMS, **settings})


def test_what_is_held_out_is_never_trained_on():
    family = Family(_sums(), held_out=80)
    held_out = {problem.prompt for problem in family.held_out}
    assert len(held_out) == 80
    trained = {family.training(number).prompt for number in [*range(300), 10**7, 10**7 + 1]}
    assert len(trained) > 60
    assert not trained & held_out


def test_equal_numbers_are_equal_problems_and_others_of_other_seeds():
    one, two = (Family(_sums(), held_out=10) for _ in range(2))
    assert [one.training(number) for number in range(20)] == [two.training(number) for number in range(20)]
    assert [problem.facts for problem in one.held_out] == [problem.facts for problem in two.held_out]
    seeds = {problem.facts["metadata"]["source_index"] for problem in one.held_out}
    assert min(seeds) >= HELD_OUT_SEED
    assert all(one.training(number).facts["metadata"]["source_index"] < HELD_OUT_SEED for number in range(20))


def test_a_problem_can_be_judged_after_it_has_been_json():
    problem = Family(_sums(), held_out=5).training(3)
    facts = json.loads(json.dumps(problem.facts))
    assert reasoning_gym(problem.prompt, facts["answer"], facts) == 1


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"family": "chain_some"}, "no such family.*chain_sum"),
        ({"settings": {"max_term": 2}}, "settings: .*max_term"),
        ({"settings": {"min_terms": 3, "max_terms": 2}}, "settings: "),
    ],
)
def test_a_family_that_is_none_is_refused(settings, told):
    with pytest.raises(InputError, match=told):
        Family(_sums(**settings), held_out=5)


def test_a_family_with_too_few_problems_is_refused():
    with pytest.raises(InputError, match="200 different problems"):
        _ = Family(_sums(), held_out=500).held_out
    with pytest.raises(InputError, match="hardly a problem that is not among the 200"):
        Family(_sums(), held_out=200).training(0)


def _file(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return ProblemsConfig(file=str(path))


def test_a_file_of_problems(tmp_path):
    talk = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 and 1"}]
    rows = [
        {"prompt": "a", "answer": "b"},
        {"messages": talk, "answer": 2},
        {"prompt": "a", "answer": "c"},
        {"prompt": "d"},
    ]
    source = File(_file(tmp_path, *rows), held_out=1)
    assert source.name == "rows"
    assert [problem.prompt for problem in source.held_out] == ["d"]
    assert [source.training(number).prompt for number in range(3)] == ["a", "1 and 1", "a"]
    assert source.training(1).messages == tuple(talk)
    assert source.training(1).facts["answer"] == 2
    assert [reward.name for reward in source.training(0).rewards] == ["exact"]


@pytest.mark.parametrize(
    "row",
    ["[]", "{}", '{"prompt": 1}', '{"messages": []}', '{"messages": [{"role": "assistant", "content": "x"}]}', "{"],
)
def test_a_line_that_is_no_problem_is_refused_with_its_place(tmp_path, row):
    with pytest.raises(InputError, match=r"rows\.jsonl: byte 16: "):
        File(_file(tmp_path, {"prompt": "a"}, row), held_out=1)


def test_files_that_are_not_there_or_too_short_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        File(ProblemsConfig(file=str(tmp_path / "none.jsonl")), held_out=1)
    with pytest.raises(InputError, match="leave none to learn from"):
        File(_file(tmp_path, {"prompt": "a"}), held_out=1)
    with pytest.raises(InputError, match="is there twice"):
        open_sources([_file(tmp_path, {"prompt": "a"}, {"prompt": "b"})] * 2, held_out=1)


def test_sources_take_turns_by_weight():
    whole = order([2.0, 1.0, 1.0], 0, 400)
    assert [sum(source == one for source, _ in whole) for one in range(3)] == [200, 100, 100]
    for one in range(3):
        assert [number for source, number in whole if source == one] == list(range(200 if one == 0 else 100))
    assert order([2.0, 1.0, 1.0], 123, 50) == whole[123:173]
    for start in range(0, 400, 8):
        assert sum(source == 0 for source, _ in whole[start : start + 8]) == 4


def test_problems_are_written_for_other_stages(tmp_path):
    rows = [{"prompt": f"q{number}", "answer": f"a{number}"} for number in range(8)]
    rl = RlConfig(problems=(_sums(), _file(tmp_path, *rows)), held_out=3, max_new_tokens=7)
    paths = write_problems(rl, tmp_path / "out", 40)
    assert [path.name for path in paths] == ["answered.jsonl", "chain_sum.jsonl", "rows.jsonl"]
    answered, sums, others = ([json.loads(line) for line in path.read_text().splitlines()] for path in paths)
    held_out = {task["messages"][0]["content"] for task in [*sums[1:], *others[1:]]}
    assert len(held_out) == 6
    for conversation in answered:
        asked, said = conversation["messages"]
        assert asked["content"] not in held_out
        assert (asked["role"], said["role"]) == ("user", "assistant")
    assert {"role": "assistant", "content": "a3"} in [conversation["messages"][1] for conversation in answered]
    assert sums[0] == {"task": {"max_new_tokens": 7}}
    assert sums[1]["verifier"] == "reasoning_gym:chain_sum"
    assert sums[1]["entry"]["answer"] == sums[1]["answer"]
    assert others[1] == {"messages": [{"role": "user", "content": "q5"}], "answer": "a5", "verifier": "exact"}


def test_without_an_answer_there_is_none_to_tell(tmp_path):
    rl = RlConfig(problems=(_file(tmp_path, {"prompt": "a"}, {"prompt": "b"}),), held_out=1)
    with pytest.raises(InputError, match="no answer that could be told: 'a'"):
        write_problems(rl, tmp_path / "out", 1)
