"""What is measured of a stage's model: each figure against a slow way of finding it."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

from benthic.config.load import load_run_config
from benthic.config.stages import stages
from benthic.convert.resolve import load_checkpoint
from benthic.data.conversations import read_conversations
from benthic.data.shards import TokenStore
from benthic.data.tokenizer import Tokenizer
from benthic.evaluate.context_extension import as_long, by_position, read
from benthic.evaluate.records import EvaluationRecord
from benthic.posttrain.packing import AnswerStore
from benthic.run.evaluation import finished
from benthic.run.measures import measures


@pytest.fixture(scope="module")
def run(whole_run):
    config = load_run_config(whole_run / "config.toml")
    records = {path.stem: EvaluationRecord.load(path) for path in (whole_run / "evaluation").glob("*.json")}
    models = {stage.name: load_checkpoint(stage.config.model, path)[0] for stage, path in finished(whole_run, config)}
    return whole_run, config, records, models


STAGES = ["pretrain", "extend-1", "sft", "rl"]


def test_every_stage_has_all_of_it(run):
    out, config, records, _ = run
    assert [stage.name for stage in stages(config)] == STAGES
    names = {"validation", "answers-problems", "answers-chats", "letters", "choice", "retrieval-64", "retrieval-128",
             "positions 0-32", "positions 64-128"}  # fmt: skip
    for name in STAGES:
        record = records[name]
        assert record.scores.keys() >= names, name
        assert list(record.not_measured) == ["retrieval-32"]
        assert "too short" in record.not_measured["retrieval-32"]
        assert len(record.acceptance) == 2
        assert [sample.prompt for sample in record.samples[-2:]] == ["hello", "sea"]
        assert record.samples[0].wanted is not None
        assert (record.pretrained_length, record.by_position[0].ends[-1]) == (32, 128)
        assert record.by_position[0].name == ("without YaRN" if name == "pretrain" else "with YaRN")
    assert {measure.name for measure in measures(out, config)} >= {"acceptance", "samples", "by position"}
    assert records["pretrain"].scores["validation"].value > records["sft"].scores["validation"].value - 1


def test_validation_is_what_training_found(run):
    out, _, records, _ = run
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["stage"] == "pretrain" and "validation_bits_per_byte" in row][-1]
    assert records["pretrain"].scores["validation"].value == pytest.approx(last["validation_bits_per_byte"], rel=1e-6)


@torch.no_grad()
def test_drafts_are_accepted_where_the_model_has_the_same_favourite(run):
    """Document by document and token by token, each prediction from a pass of its own."""
    out, _, records, models = run
    store = TokenStore(out / "data", "val")
    for name, depth in itertools.product(("pretrain", "rl"), (1, 2)):
        right = total = 0
        for start in range(0, (store.tokens - 1) // 32 * 32, 32):
            row = store.take(np.arange(start, start + 33)).tolist()
            ends = [end - start for end in store.document_ends_D.tolist() if start < end < start + 33]
            for low, high in zip([0, *ends], [*ends, 33], strict=True):
                found, count = _accepted(models[name], row[low:high], depth, length=31 - low)
                right, total = right + found, total + count
        score = records[name].acceptance[depth - 1]
        assert score.n == pytest.approx(total, abs=33)  # the last, shorter sequence
        assert score.value == pytest.approx(right / total, abs=0.01)


def _accepted(model, ids, depth, length):
    """Of one document's part of a sequence of which ``length`` positions can be drafted from."""
    right = total = 0
    for last in range(min(len(ids) - depth - 1, length - depth)):
        # The module reads the tokens up to ``last`` and the ``depth`` after it.
        tokens = torch.tensor([ids[: last + 1 + depth] + [0] * (2 - depth)])
        states, _ = model.training_hidden(tokens, None, depths=2)
        drafted = model.transformer.head(states[depth][0, last]).argmax()
        own = model(torch.tensor([ids[: last + depth + 1]]))[0, -1].argmax()
        right += int(drafted == own)
        total += 1
    return right, total


@torch.no_grad()
def test_answers_of_each_source_by_themselves(run, sources):
    out, _, records, models = run
    tokenizer, store = Tokenizer.load(out / "tokenizer"), AnswerStore(TokenStore(out / "sft", "val"))
    said = {message["content"] for item in read_conversations(str(sources / "chats.jsonl"))
            for message in item.messages if message["role"] == "assistant"}  # fmt: skip
    nats, size = {"answers-chats": 0.0, "answers-problems": 0.0}, {"answers-chats": 0, "answers-problems": 0}
    for sample in range(len(store.lengths)):
        ids, learn = store.read(sample)
        text = tokenizer.decode(ids[learn.astype(bool)].tolist())
        name = "answers-chats" if text in said else "answers-problems"
        logprob_TV = models["sft"](torch.tensor(ids[None, :-1]))[0].log_softmax(-1)
        for place in range(1, len(ids)):
            if learn[place]:
                nats[name] -= float(logprob_TV[place - 1, ids[place]])
        size[name] += len(text.encode()) + 1
    for name in nats:
        found = records["sft"].scores[name]
        assert found.value == pytest.approx(nats[name] / math.log(2) / size[name], rel=1e-4), name
        assert found.n > 1


def test_positions_are_those_of_sequences_spread_over_the_held_out_text(run):
    out, _, records, models = run
    store = TokenStore(out / "data", "val")
    whole = (store.tokens - 1) // 128
    starts = [number * whole // 3 * 128 for number in range(3)]
    tokens_BS = torch.stack([torch.from_numpy(store.take(np.arange(start, start + 129))) for start in starts])
    per_token = store.manifest.val.bytes / store.tokens
    unextended = as_long(models["pretrain"], 128, yarn=False)
    for name, model in (("extend-1", models["extend-1"]), ("pretrain", unextended)):
        told = by_position(read(model, tokens_BS, 32, lambda *_: None), per_token)
        scores = records[name].scores
        assert scores["positions 0-32"] == told.within
        assert scores["positions 64-128"] == told.beyond
        assert scores["last tokens, 32 read"] == told.last_read_short
        assert scores["last tokens, 128 read"] == told.last_read_long
        curve = records[name].by_position[0].bits_per_byte
        assert sum(curve[:4]) / 4 == pytest.approx(told.within.value, rel=1e-6)
        assert sum(curve[8:]) / 8 == pytest.approx(told.beyond.value, rel=1e-6)
