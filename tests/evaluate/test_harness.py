"""lm-eval's tasks on Benthic's model: against lm-eval's own model class over transformers, against `benthic serve`, and
against Benthic's task files of the same problems.
"""

import json
import math
import textwrap

import numpy as np
import pytest
from serving import Server
from tasks import write_task

from benthic.errors import InputError
from benthic.evaluate.task_files import read_tasks
from benthic.evaluate.tasks import evaluate

lm_eval = pytest.importorskip("lm_eval")
pytestmark = [
    # Of lm-eval and what it loads.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("offline"),
]
WORDS = ["hello", " there", " how are you", " today?", " well", " 🙂", " x", " get_weather"]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def make_task(tmp_path):
    """A task of lm-eval's over the same rows."""
    rows = [
        {"prompt": one + two, "choices": [word for word in WORDS if word not in (one, two)], "answer": at % 6}
        for at, (one, two) in enumerate((a, b) for a in WORDS[:3] for b in WORDS[:5] if a != b)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(name, text):
        path = tmp_path / f"{name}.yaml"
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        path.write_text(head + textwrap.dedent(text))
        return path

    make.rows = rows
    return make


@pytest.fixture
def pick(make_task):
    return make_task("pick", """
        output_type: multiple_choice
        doc_to_text: "{{prompt}}"
        doc_to_choice: "{{choices}}"
        doc_to_target: "{{answer}}"
        target_delimiter: ""
        metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
        """)  # fmt: skip


@pytest.fixture
def write(make_task):
    return make_task("write", """
        output_type: generate_until
        doc_to_text: "{{prompt}}"
        doc_to_target: "{{choices[0]}}"
        generation_kwargs: {until: ["e", "\\n"], max_gen_toks: 8}
        """)  # fmt: skip


@pytest.fixture
def roll(make_task):
    return make_task("roll", """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{prompt}}"
        metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]
        """)  # fmt: skip


def local_tasks():
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False)


def samples(model, *tasks, **settings):
    found = lm_eval.simple_evaluate(
        model=model, tasks=list(map(str, tasks)), task_manager=local_tasks(), bootstrap_iters=0, **settings
    )
    return {task: [one["filtered_resps"] for one in own] for task, own in found["samples"].items()}


def ours(small):
    from benthic.evaluate.harness import HarnessModel

    return HarnessModel(*small)


def same_answers(one, other):
    """Texts are equal, and log-probabilities but for rounding."""
    assert one.keys() == other.keys()
    for task, answers in one.items():
        for mine, theirs in zip(answers, other[task], strict=True):
            if isinstance(mine[0], str):
                # A character that the limit cut is left out here, and shown as U+FFFD there.
                assert [text.rstrip("\ufffd") for text in mine] == [text.rstrip("\ufffd") for text in theirs]
            else:
                assert np.array(mine, dtype=float) == pytest.approx(np.array(theirs, dtype=float), abs=1e-3)


def test_answers_are_those_of_lm_evals_own_model(small, served_model, pick, write, roll):
    pytest.importorskip("transformers")
    given = {"pretrained": str(served_model / "model"), "device": "cpu", "dtype": "float32"}
    theirs = samples("hf", pick, write, model_args=given | {"add_bos_token": True}, batch_size=4)
    # Of rolling texts, that setting has the begin token scored as a part of the text.
    theirs |= samples("hf", roll, model_args=given | {"add_bos_token": False}, batch_size=4)
    mine = samples(ours(small), pick, write, roll)
    same_answers(mine, theirs)
    assert any(mine["write"])


def test_scores_are_those_of_a_task_file(small, pick, make_task, tmp_path):
    from benthic.evaluate.harness import harness

    native = evaluate(*small, read_tasks([write_task(tmp_path / "native.jsonl", *make_task.rows)]))
    through = harness(*small, [str(pick)])
    assert list(through) == ["pick", "pick:acc_norm", "pick:acc_bytes"]
    for mine, name in (("native", "pick"), ("native:accuracy_per_byte", "pick:acc_bytes"),
                       ("native:accuracy_per_character", "pick:acc_norm")):  # fmt: skip
        assert (native[mine].value, native[mine].n, native[mine].ci95) == (
            through[name].value, through[name].n, through[name].ci95,
        )  # fmt: skip


def test_a_metric_that_is_a_ratio_has_an_interval(small, roll, make_task):
    from benthic.evaluate.harness import harness

    scores = harness(*small, [str(roll)])
    bits = next(score for score in scores.values() if score.metric == "bits_per_byte")
    perplexity = next(score for score in scores.values() if score.metric == "byte_perplexity")
    assert bits.ci95[0] < bits.value < bits.ci95[1]
    assert perplexity.value == pytest.approx(2**bits.value)
    assert perplexity.ci95 == pytest.approx([2**end for end in bits.ci95])
    assert bits.n == len(make_task.rows)
    assert math.isfinite(bits.value)


def test_what_is_no_task(small, tmp_path):
    from benthic.evaluate.harness import harness

    with pytest.raises(InputError, match=r"nowhere\.yaml: no such file"):
        harness(*small, [str(tmp_path / "nowhere.yaml")])
    (tmp_path / "bad.yaml").write_text("task: [\n")
    with pytest.raises(InputError, match=r"bad\.yaml"):
        harness(*small, [str(tmp_path / "bad.yaml")])


@pytest.mark.slow
def test_local_completions_gives_the_same_through_the_server(
    benthic, small, served_model, pick, write, make_task, tmp_path
):
    """lm-eval asks the server with token ids, echo and log-probabilities."""
    server = Server(f"small={served_model}")
    try:
        given = {
            "model": "small", "base_url": f"{server.url}/v1/completions", "tokenizer": str(served_model / "model"),
            "tokenizer_backend": "huggingface", "add_bos_token": True, "num_concurrent": 4, "max_length": 512,
        }  # fmt: skip
        theirs = samples("local-completions", pick, write, model_args=given)
        scored = lm_eval.simple_evaluate("local-completions", given, tasks=[str(pick)], task_manager=local_tasks())
    finally:
        assert server.terminate() == 0
    same_answers(samples(ours(small), pick, write), theirs)
    file = write_task(tmp_path / "native.jsonl", *make_task.rows)
    done = benthic("eval", served_model, "--tasks", file, "--lm-eval", pick, "--json")
    assert done.returncode == 0, done.stderr
    mine, found = json.loads(done.stdout), scored["results"]["pick"]
    for key, native, through in (("acc,none", "native", "pick"),
                                 ("acc_bytes,none", "native:accuracy_per_byte", "pick:acc_bytes"),
                                 ("acc_norm,none", "native:accuracy_per_character", "pick:acc_norm")):  # fmt: skip
        assert mine[native]["value"] == mine[through]["value"] == found[key]
