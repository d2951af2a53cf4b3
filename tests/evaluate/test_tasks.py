"""Tasks from files to scores: against transformers, and against answers known beforehand."""

import itertools
import math

import pytest
import torch
from tasks import write_task

from benthic.errors import InputError
from benthic.evaluate.multiple_choice import judged
from benthic.evaluate.task_files import MultipleChoice, read_tasks
from benthic.evaluate.tasks import evaluate

WORDS = ["hello", " there", " how are you", " today?", " well", "\nThank you 🙂", " x", " get_weather"]


def run(small, *paths, **settings):
    return evaluate(*small, read_tasks(paths), **settings)


def logprob(peer, context, continuation):
    logits = peer(torch.tensor([[*context, *continuation]]))[0, len(context) - 1 : -1].double()
    return float(logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None]).sum())


@torch.no_grad()
@pytest.mark.parametrize("chat", [False, True])
def test_multiple_choice_is_what_transformers_finds_likeliest(small, peer, tmp_path, chat):
    tokenizer = small[1]
    problems, right = [], {"accuracy": [], "accuracy_per_byte": [], "accuracy_per_character": []}
    for number, (start, middle) in enumerate(itertools.permutations(WORDS[:4], 2)):
        prompt, choices = start + middle, [word for word in WORDS if word not in (start, middle)]
        answer = number % len(choices)
        context = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        if chat:
            context = tokenizer.apply_chat([{"role": "user", "content": prompt}])
        found = [logprob(peer, context, tokenizer.encode(choice)) for choice in choices]
        for metric, length in zip(right, (lambda choice: 1, lambda choice: len(choice.encode()), len), strict=True):
            shares = [one / length(choice) for one, choice in zip(found, choices, strict=True)]
            right[metric].append(shares.index(max(shares)) == answer)
        problems.append({"prompt": prompt, "choices": choices, "answer": answer})
    path = write_task(tmp_path / "pick.jsonl", *problems, **({"chat": True} if chat else {}))
    scores = run(small, path)
    assert list(scores) == ["pick", "pick:accuracy_per_byte", "pick:accuracy_per_character"]
    for score, expected in zip(scores.values(), right.values(), strict=True):
        assert (score.value, score.n, score.interval) == (sum(expected) / 12, 12, "wilson")
    assert 0 < sum(map(sum, right.values())) < 36


def test_lengths_decide_where_they_should():
    problem = MultipleChoice(prompt="", choices=("éé", "abc"), answer=1)
    per = judged([problem], [torch.tensor([-4.0, -5.0]).numpy()])  # per byte -1, -1.67; per character -2, -1.67
    assert per == {"accuracy": [False], "accuracy_per_byte": [False], "accuracy_per_character": [True]}


@torch.no_grad()
def test_bits_per_byte_of_texts_is_that_of_transformers(small, peer, tmp_path):
    model, tokenizer = small
    texts = ["hello there, how are you today? 🙂", "x", "I am well. " * 80]
    assert len(tokenizer.encode(texts[2])) > model.config.max_position_embeddings // 2
    bits = [-logprob(peer, [tokenizer.bos_id], tokenizer.encode(text)) / math.log(2) for text in texts]
    score = run(small, write_task(tmp_path / "texts.jsonl", *({"text": text} for text in texts)))["texts"]
    assert score.value == pytest.approx(sum(bits) / sum(len(text.encode()) for text in texts), rel=1e-5)
    assert (score.metric, score.n, score.interval) == ("bits_per_byte", 3, "bootstrap")
    assert score.ci95[0] <= score.value <= score.ci95[1]


def test_a_text_longer_than_the_model_takes(small, tmp_path):
    score = run(small, write_task(tmp_path / "long.jsonl", {"text": "hello there, I am well" * 300}))["long"]
    assert score.n == 1
    assert score.ci95 is None
    assert 0 < score.value < 60


@torch.no_grad()
@pytest.mark.parametrize("chat", [False, True])
def test_greedy_answers_are_those_of_transformers(small, peer, tmp_path, chat):
    tokenizer = small[1]
    problems = []
    for prompt in ("hello", "I am", "{"):
        ids = tokenizer.apply_chat([{"role": "user", "content": prompt}])
        if not chat:
            ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
        start = len(ids)
        for _ in range(6):
            ids.append(int(peer(torch.tensor([ids]))[0, -1].argmax()))
            if ids[-1] in tokenizer.stop_ids:
                ids.pop()
                break
        problems.append({"prompt": prompt, "answer": tokenizer.decode(ids[start:])})
    problems[1]["answer"] += " and more"
    given = {"max_new_tokens": 6, "chat": chat}
    score = run(small, write_task(tmp_path / "greedy.jsonl", *problems, **given))["greedy"]
    assert (score.metric, score.n) == ("accuracy", 3)
    assert score.value == pytest.approx(2 / 3)


def test_sampled_answers_are_the_same_in_any_company(small, tmp_path):
    problems = [{"prompt": word, "answer": "[a-m]", "verifier": "regex"} for word in WORDS[:5]]
    given = {"samples": 12, "temperature": 1.0, "max_new_tokens": 3, "seed": 1}
    first = write_task(tmp_path / "first.jsonl", *problems, **given)
    scores = run(small, first)
    assert [score.metric for score in scores.values()] == ["pass@1", "pass@12"]
    assert 0 < scores["first"].value < scores["first:pass@12"].value
    assert scores["first"].n == 5
    tasks = read_tasks([first])
    assert evaluate(*small, tasks, cache_gib=0.001) == scores
    other = write_task(tmp_path / "other.jsonl", *problems, **(given | {"seed": 2}))
    both = run(small, other, first)
    assert {name: both[name] for name in scores} == scores
    assert both["other"].value != scores["first"].value


def test_progress_and_several_kinds(small, tmp_path):
    seen = []
    paths = [write_task(tmp_path / "a.jsonl", {"text": "hello"}),
             write_task(tmp_path / "b.jsonl", {"prompt": "x", "choices": ["a", "b"], "answer": 0}),
             write_task(tmp_path / "c.jsonl", {"prompt": "", "answer": "x"}, max_new_tokens=2)]  # fmt: skip
    scores = run(small, *paths, progress=lambda *of: seen.append(of))
    assert {"a", "b", "c"} <= scores.keys()
    assert seen == [("a", 1, 1), ("b", 2, 2), ("c", 1, 1)]


@pytest.mark.parametrize("problem", [
    {"prompt": "hello there " * 400, "answer": "x"},
    {"prompt": "hello there " * 400, "choices": ["a", "b"], "answer": 0},
])  # fmt: skip
def test_a_problem_too_long_for_the_model(small, tmp_path, problem):
    path = write_task(tmp_path / "long.jsonl", {**problem, "prompt": "short"}, problem)
    with pytest.raises(InputError, match=r"long.jsonl line 2: \d+ tokens; the model takes 51[12]"):
        run(small, path)


def test_a_template_that_refuses(small, tmp_path):
    messages = [{"role": "tool", "content": "x"}]
    for problem in ({"answer": "x"}, {"choices": ["a", "b"], "answer": 0}):
        path = write_task(tmp_path / "tool.jsonl", {"messages": messages, **problem})
        with pytest.raises(InputError, match=r"tool.jsonl line 1: chat template: role must be"):
            run(small, path)
