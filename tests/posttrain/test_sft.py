"""Fine-tuning as a stage of a run: what is learnt and what not, the split, resumption, runs that begin elsewhere."""

import json
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from interrupted import Killed, at_step, course, kill

from benthic.api import train
from benthic.config.load import load_run_config
from benthic.config.stages import stages
from benthic.convert.resolve import current_stage, load_model
from benthic.data.batches import Batch
from benthic.data.chat import ChatFormat
from benthic.data.conversations import Conversation, pieces, read_conversations
from benthic.data.document import digest
from benthic.data.shards import TokenStore
from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError
from benthic.model import build_model
from benthic.posttrain.packing import AnswerStore, in_order
from benthic.posttrain.sft import packed_batches, stage_settings
from benthic.posttrain.sft_data import prepare_sft
from benthic.train import loop
from benthic.train.checkpoint import committed, load
from benthic.train.metrics import read_metrics
from benthic.train.objective import Objective, prediction_targets
from benthic.train.schedule import StepSettings
from benthic.train.signals import Interrupted
from benthic.train.step import accumulate_gradients

NAMES = ["pretrain", "sft"]
KINDS = {
    "weights": {},
    "adapters, micro-batches": {"adapter": {"rank": 4, "targets": ("attention", "mtp")}, "batch_size": 4,
                                "micro_batch_size": 2},
}  # fmt: skip


def ended(out, stage):
    return load(committed(out / "checkpoints" / stage)[-1])


def assert_same_run(out, whole):
    assert course(out) == course(whole)
    for stage in NAMES:
        left, right = ended(out, stage), ended(whole, stage)
        assert left.state == right.state
        assert left.tensors.keys() == right.tensors.keys()
        for group, tensors in right.tensors.items():
            assert all(torch.equal(left.tensors[group][name], tensor) for name, tensor in tensors.items())


@pytest.fixture
def packed(sft_config, make_sft_run):
    """A model whose weights matter, a batch of packed samples, and the samples apart."""
    out, config = make_sft_run(), stage_settings(sft_config())
    prepare_sft(config, out)
    model = build_model(config.model.model_copy(update={"initializer_range": 0.1}), seed=5)
    return model, packed_batches(config, out).at(0, 4)


def apart(batch):
    """Each packed sample on its own: ids and marks."""
    for tokens, documents, learn in zip(*batch, strict=True):
        for number in range(int(documents.max()) + 1):
            yield tokens[documents == number], learn[documents == number]


def states_of(model, tokens):
    """States of the main model and of MTP modules over one sample, by the modules' own forward passes."""
    filled = torch.cat((tokens, tokens.new_zeros(len(model.mtp))))[None]
    return model.training_hidden(filled)[0]


def test_the_loss_is_that_of_each_answer_on_its_own(packed):
    model, batch = packed
    settings = StepSettings(0, 4, 1.0, 0.0, 0.3, 0.0)
    losses = accumulate_gradients(Objective(model), batch, settings, micro_batch_size=2, compute="fp32")
    nats, counts = torch.zeros(2), torch.zeros(2)
    with torch.no_grad():
        for tokens, learn in apart(batch):
            for depth, state in enumerate(states_of(model, tokens)):
                logits = model.transformer.head(state[0])
                for place in range(len(tokens) - 1 - depth):  # position by position
                    if learn[place + 1 + depth]:
                        nats[depth] += F.cross_entropy(logits[place], tokens[place + 1 + depth])
                        counts[depth] += 1
    assert counts.min() > 50
    torch.testing.assert_close(losses.cross_entropy_K, nats / counts, atol=1e-5, rtol=1e-5)


def test_changing_one_sample_never_changes_anothers_loss(packed):
    model, batch = packed
    row = next(row for row in range(4) if int(batch.document_BS[row].max()) >= 2)
    one = batch.rows(slice(row, row + 1))
    document, learn = one.document_BS[0], one.learn_BS[0]

    @torch.no_grad()
    def nats(tokens):
        states, _ = model.training_hidden(tokens[:, :-1], one.document_BS[:, :-1])
        targets = prediction_targets(tokens, one.document_BS, 2, one.learn_BS)
        return [
            F.cross_entropy(model.transformer.head(state[0]), target[0], reduction="none", ignore_index=-100)
            for state, target in zip(states, targets, strict=True)
        ]

    before = nats(one.tokens_BS)
    counted = set()
    for changed in range(int(document.max()) + 1):
        tokens = one.tokens_BS.clone()
        tokens[0, document == changed] = (tokens[0, document == changed] + 17) % 320
        for depth, (was, now) in enumerate(zip(before, nats(tokens), strict=True)):
            of_sample = document[: len(was)] == changed
            torch.testing.assert_close(now[~of_sample], was[~of_sample], atol=1e-5, rtol=0)
            assert (now[of_sample] - was[of_sample]).abs().max() > 1e-2
            counted.add((depth, int((was != 0).sum())))
    assert counted == {
        (0, int(learn.sum())),
        (1, int((prediction_targets(*one[:2], 2, one.learn_BS)[1] != -100).sum())),
    }


def test_gradients_reach_the_sample_alone_and_prompts_are_no_targets(packed):
    model, batch = packed
    one = batch.rows(slice(0, 1))
    document = one.document_BS[0]
    embedded = []
    model.transformer.embed.register_forward_hook(lambda _, __, out: (out.retain_grad(), embedded.append(out))[0])
    only = one.learn_BS & (document == 1)
    targets = prediction_targets(one.tokens_BS, one.document_BS, 2, only)
    assert {int(token) for token in targets[0][targets[0] != -100]} <= {int(t) for t in one.tokens_BS[0][only[0]]}
    Objective(model)(one.tokens_BS, one.document_BS, targets).total(0.3, 0.0).backward()
    for depth, out in enumerate(embedded):
        reached = out.grad[0].abs().amax(-1) > 0
        length = len(reached)
        inside = document[depth : depth + length] == 1
        assert reached.any()
        # A module's input at a sample's last positions may be the next sample's token, which predicts nothing.
        assert not reached[~inside].any()


def test_packed_behind_others_a_sample_is_read_as_alone(packed):
    model, batch = packed
    with torch.no_grad():
        states = model.training_hidden(batch.tokens_BS[:, :-1], batch.document_BS[:, :-1])[0]
        alone = iter(apart(batch))
        for row in range(4):
            for number in range(int(batch.document_BS[row].max()) + 1):
                tokens, _ = next(alone)
                place = (batch.document_BS[row, : states[0].shape[1]] == number).nonzero()[:, 0]
                expected = states_of(model, tokens)[0][0][: len(place)]
                torch.testing.assert_close(states[0][row, place], expected, atol=1e-5, rtol=1e-4)


def test_held_out_conversations_are_those_of_pretraining(sft_config, make_sft_run, chats, tmp_path):
    out = make_sft_run()
    config = sft_config()
    tokenizer = Tokenizer.load(out / "tokenizer")
    store = TokenStore(out / "data", "val")
    ids, ends = store.take(np.arange(store.tokens)), store.document_ends_D.tolist()
    held_out = {tuple(ids[start:end].tolist()) for start, end in zip([0, *ends], ends, strict=False)}
    # Some more from elsewhere, among them a conversation that pretraining holds out.
    conversations = [item for item in read_conversations(str(chats)) if isinstance(item, Conversation)]
    chat = ChatFormat(tokenizer)
    known = next(one for one in conversations if tuple(chat.sample(one.messages).ids) in held_out)
    more = tmp_path / "more.jsonl"
    fresh = [[{"role": "user", "content": f"new {n}"}, {"role": "assistant", "content": "yes"}] for n in range(40)]
    more.write_text("\n".join(json.dumps({"messages": list(one)}) for one in [known.messages, *fresh]))
    given = sft_config(sources=[{"source": str(more), "weight": 0.5}, {"source": str(chats)}])
    for settings, count in ((config, 1), (given, 2)):
        prepare_sft(stage_settings(settings), out)
        found = {split: AnswerStore(TokenStore(out / "sft", split)) for split in ("train", "val")}
        stored = {
            split: {tuple(of.read(sample)[0].tolist()) for sample in range(len(of.lengths))}
            for split, of in found.items()
        }
        expected = {"train": set(), "val": set()}
        for one in conversations:
            split = "val" if tuple(chat.sample(one.messages).ids) in held_out else "train"
            expected[split] |= {tuple(sample.ids) for sample in pieces(one, chat, 49)}
        assert expected["val"] <= stored["val"]
        assert expected["train"] <= stored["train"]
        assert not stored["val"] & stored["train"]
        if count == 1:
            assert stored == expected
        samples = found["train"].store.manifest.settings["samples"]["train"]
        assert len(samples) == count
        assert sum(samples) == len(found["train"].lengths)
    keys = [digest(Conversation(tuple(one)).document, config.data.seed) for one in fresh]
    threshold = int(found["val"].store.manifest.settings["held_out_up_to"], 16)
    assert sum(found["val"].store.manifest.settings["samples"]["val"]) == len(expected_val(keys, threshold)) + len(
        [1 for one in conversations if tuple(chat.sample(one.messages).ids) in held_out for _ in pieces(one, chat, 49)]
    )


def expected_val(keys, threshold):
    return [key for key in keys if key <= threshold]


def test_every_stage_leaves_its_rows_and_answers_get_better(sft_config, make_sft_run, run_all):
    out, config = make_sft_run(), sft_config(steps=30, validate_every=10)
    result = run_all(config, out)
    rows = read_metrics(out / "metrics.jsonl")
    steps = [(row["stage"], row["step"]) for row in rows if "loss" in row]
    assert steps == [("pretrain", n) for n in range(1, 5)] + [("sft", n) for n in range(1, 31)]
    bits = {row["step"]: row["answer_bits_per_byte"] for row in rows if "answer_bits_per_byte" in row}
    assert list(bits) == [0, 10, 20, 30]
    assert bits[30] < 0.9 * bits[0]
    assert (result.bits_per_byte, result.measure) == (bits[30], "bits per byte of held-out answers")
    rates = [row["learning_rate"] for row in rows if row["stage"] == "sft" and "loss" in row]
    expected = [2e-4 + (2e-3 - 2e-4) * 0.5 * (1 + math.cos(math.pi * n / 30)) for n in range(30)]
    assert rates == pytest.approx(expected)
    account = json.loads((out / "ledger.json").read_text())["stages"]
    assert account["sft"]["tokens"] == 30 * 3 * 48
    assert load_run_config(out / "config.toml") == result.config
    stage, newest = current_stage(out)
    assert (stage.name, newest.name) == ("sft", "step-30")
    loaded = load_model(out)[0].state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in result.model.state_dict().items())


def test_bits_per_byte_are_those_of_the_answers_one_by_one(sft_config, make_sft_run, run_all):
    out = make_sft_run()
    result = run_all(sft_config(), out)
    answers = AnswerStore(TokenStore(out / "sft", "val"))
    tokenizer, total, size = Tokenizer.load(out / "tokenizer"), 0.0, 0
    model = result.model.double()
    with torch.no_grad():
        for sample in range(len(answers.lengths)):
            ids, learn = map(torch.from_numpy, answers.read(sample))
            nats = F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none")
            total += float((nats * learn[1:]).sum())
            text = tokenizer.decode(
                [index for index, marked in zip(ids.tolist(), learn.tolist(), strict=True) if marked]
            )
            ends = sum(index in tokenizer.stop_ids for index in ids[learn.bool()].tolist())
            size += len(text.encode()) + ends
    assert size == answers.store.manifest.val.bytes
    assert result.bits_per_byte == pytest.approx(total / math.log(2) / size, rel=1e-5)


def test_the_stage_begins_with_the_average_where_one_is_kept(sft_config, make_sft_run, run_all):
    out = make_sft_run()
    config = sft_config(train={"ema_decay": 0.8}, learning_rate=1e-12, final_learning_rate=0.0, steps=1)
    run_all(config, out)
    before, after = ended(out, "pretrain"), ended(out, "sft")
    assert "average" not in after.tensors
    for name, average in before.tensors["average"].items():
        torch.testing.assert_close(after.tensors["model"][name], average, atol=1e-6, rtol=1e-5)
        assert not torch.equal(average, before.tensors["model"][name]) or average.ndim < 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_in_any_stage_goes_on_exactly(sft_config, make_sft_run, run_all, monkeypatch, kind):
    config = sft_config(**KINDS[kind], epochs=None)
    whole, out = make_sft_run("whole"), make_sft_run("killed")
    result = run_all(config, whole)
    taken = 0
    for moment in (3, 5, 7, 9):  # steps 1 to 4 are of pretraining; 5 is the stage's first
        with monkeypatch.context() as patch:
            at_step(patch, moment - taken, kill)
            with pytest.raises(Killed):
                run_all(config, out)
        taken = max(saved for saved in (0, 2, 4, 7) if saved < moment)
    assert run_all(config, out).bits_per_byte == result.bits_per_byte
    assert_same_run(out, whole)


def test_adapters_change_their_targets_alone(sft_config, make_sft_run, run_all):
    out = make_sft_run()
    run_all(sft_config(adapter={"rank": 4, "targets": ["attention"]}), out)
    before, after = ended(out, "pretrain"), ended(out, "sft")
    changed = {
        name for name, was in before.tensors["model"].items() if not torch.equal(was, after.tensors["model"][name])
    }
    assert changed
    biases = {name for name in changed if name.endswith("router.bias")}  # the balance of experts is kept up
    assert all(".attention." in name for name in changed - biases)
    for name, weight in after.tensors["model"].items():
        if name in changed - biases:
            down, up = (after.tensors["adapters"][f"{name}.{part}"] for part in ("down", "up"))
            torch.testing.assert_close(weight, before.tensors["model"][name] + 32 / 4 * up @ down, atol=1e-6, rtol=1e-5)


def test_a_signal_saves_and_the_run_goes_on(sft_config, make_sft_run, run_all, monkeypatch):
    config = sft_config()
    whole, out = make_sft_run("whole"), make_sft_run("stopped")
    run_all(config, whole)
    with monkeypatch.context() as patch:
        at_step(patch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted) as stopped:
            run_all(config, out)
    assert stopped.value.message == f"stopped after step 2 of sft, saved in {out}"
    run_all(config, out)
    assert course(out) == course(whole)


def test_the_section_may_be_added_to_a_run_that_is_pretrained(sft_config, make_sft_run, run_all):
    out, whole, config = make_sft_run(), make_sft_run("whole"), sft_config()
    run_all(config.model_copy(update={"posttrain": type(config.posttrain)()}), out)
    assert [stage.name for stage in stages(load_run_config(out / "config.toml"))] == ["pretrain"]
    run_all(config, out)
    run_all(config, whole)
    assert course(out) == course(whole)
    left, right = ended(out, "sft"), ended(whole, "sft")
    assert left.state == right.state
    assert all(torch.equal(left.tensors["model"][name], tensor) for name, tensor in right.tensors["model"].items())


def test_what_has_begun_is_not_changed(sft_config, make_sft_run, run_all, chats, tmp_path, monkeypatch):
    out = make_sft_run()
    own = tmp_path / "own.jsonl"
    shutil.copyfile(chats, own)
    sources = [{"source": str(own)}]
    at_step(monkeypatch, 9, kill)
    with pytest.raises(Killed):
        run_all(sft_config(sources=sources), out)
    with pytest.raises(InputError, match=r"posttrain.sft.learning_rate: saved 0.002, given 0.001"):
        run_all(sft_config(sources=sources, learning_rate=1e-3), out)
    with pytest.raises(InputError, match=r"step-4: is of a stage|step-3: is of a stage that is not asked for"):
        loop.train(sft_config().model_copy(update={"posttrain": type(sft_config().posttrain)()}), out)
    own.write_text("\n".join(own.read_text().split("\n")[:-1]))
    with pytest.raises(InputError, match=r"corpus.sft: saved \w+, given \w+"):
        run_all(sft_config(sources=sources), out)


def test_damaged_samples_are_made_anew(sft_config, make_sft_run, run_all):
    out, config = make_sft_run(), sft_config()
    result = run_all(config, out)
    shard = out / "sft" / "train-00000.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2] + b"\0\0")
    assert run_all(config, out).bits_per_byte == result.bits_per_byte
    assert shard.read_bytes() == whole


def test_epochs_become_steps(sft_config, make_sft_run, run_all):
    out = make_sft_run()
    result = run_all(sft_config(steps=None, epochs=2), out)
    sequences = packed_batches(stage_settings(result.config), out).sequences(2)
    sft = result.config.posttrain.sft
    assert (sft.steps, sft.epochs) == (-(-sequences // 3), None)
    lengths = AnswerStore(TokenStore(out / "sft", "train")).lengths
    assert sequences >= 2 * lengths.sum() / 49
    assert committed(out / "checkpoints" / "sft")[-1].name == f"step-{sft.steps}"
    run_all(sft_config(steps=None, epochs=2), out)  # and does so again


def test_a_run_that_begins_with_another(sft_config, make_sft_run, run_all, tmp_path, monkeypatch):
    base, config = make_sft_run("base"), sft_config()
    run_all(config.model_copy(update={"posttrain": type(config.posttrain)()}), base)
    own = make_sft_run("own")
    run_all(config, own)
    begun = config.posttrain.model_copy(update={"base": str(base)})
    config = config.model_copy(update={"posttrain": begun})
    out = tmp_path / "out"
    at_step(monkeypatch, 5, kill)
    with pytest.raises(Killed):
        train(config, out)
    gone = base.rename(tmp_path / "gone")
    with pytest.raises(InputError, match=r"rehearsed data"):
        train(config, out)
    gone.rename(base)
    train(config, out)
    # The same as a stage of one run: weights, split, batches and all.
    left, right = ended(out, "sft"), ended(own, "sft")
    assert all(torch.equal(left.tensors["model"][name], tensor) for name, tensor in right.tensors["model"].items())
    rows = [{**row, "tokens": 0} for row in course(out)]
    assert rows == [{**row, "tokens": 0} for row in course(own) if row["stage"] == "sft"]
    assert current_stage(out)[0].name == "sft"
    assert Tokenizer.load(out).stop_ids == Tokenizer.load(own).stop_ids
    assert (out / "model" / "config.json").is_file()


def test_a_directory_with_something_else_is_not_begun_in(sft_config, make_sft_run, run_all, tmp_path):
    base, config = make_sft_run("base"), sft_config()
    config = config.model_copy(update={"posttrain": config.posttrain.model_copy(update={"base": str(base)})})
    with pytest.raises(InputError, match=r"holds no config.json, model/ or checkpoints/"):
        train(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"data: already there; give a directory of its own"):
        train(config, make_sft_run("other"))


def test_a_batch_without_answers_at_a_depth_is_no_error(packed):
    model, batch = packed
    nothing = Batch(batch.tokens_BS, batch.document_BS, torch.zeros_like(batch.learn_BS))
    settings = StepSettings(0, 4, 1.0, 0.0, 0.3, 0.0)
    losses = accumulate_gradients(Objective(model), nothing, settings, micro_batch_size=2, compute="fp32")
    assert losses.cross_entropy_K.tolist() == [0.0, 0.0]


def test_validation_reads_every_held_out_answer_once(sft_config, make_sft_run):
    out = make_sft_run()
    prepare_sft(stage_settings(sft_config()), out)
    answers = AnswerStore(TokenStore(out / "sft", "val"))
    counted = sum(
        int((prediction_targets(*batch[:2], 1, batch.learn_BS) != -100).sum())
        for batch in in_order(answers, 48, 1, 3, 1)
    )
    assert counted == answers.answer_tokens() > 100


def test_a_conversation_that_cannot_be_rendered_is_named(sft_config, make_sft_run, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    shutil.copytree(make_sft_run("prepared") / "tokenizer", out / "tokenizer")
    settings = json.loads((out / "tokenizer" / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ raise_exception('roles must alternate') }}"
    (out / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"chats.jsonl: the conversation that begins '0 .*roles must alternate"):
        prepare_sft(stage_settings(sft_config()), out)
    assert not (out / "sft").exists()


def test_answers_in_neither_split_are_refused(sft_config, make_sft_run, tmp_path):
    path = tmp_path / "long.jsonl"
    asked = [[{"role": "user", "content": f"{n} deep" * 30}, {"role": "assistant", "content": "x"}] for n in range(9)]
    path.write_text("\n".join(json.dumps({"messages": one}) for one in asked))
    with pytest.raises(InputError, match=r"of .*long.jsonl, no conversation to learn from holds an answer"):
        prepare_sft(stage_settings(sft_config(sources=[{"source": str(path)}])), make_sft_run())
