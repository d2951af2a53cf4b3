"""Checkpoints written in the background: of the state at the step boundary, in order, with failures told."""

import os
import sys
import threading
import time

import pytest
import torch

from benthic.train import background, loop
from benthic.train.background import BackgroundWriter, on_host
from benthic.train.checkpoint import Checkpoint, CheckpointFailed, committed, load
from benthic.train.loop import train
from benthic.train.metrics import read_metrics


class Gate:
    """Lets writes begin only once it is open."""

    def __init__(self, monkeypatch) -> None:
        self.open, self.reached, self.writes = threading.Event(), threading.Event(), []
        original = background.save

        def held(root, step, checkpoint, keep):
            self.reached.set()
            assert self.open.wait(30)
            self.writes.append(step)
            return original(root, step, checkpoint, keep)

        monkeypatch.setattr(background, "save", held)


def weights(value: float) -> Checkpoint:
    return Checkpoint({"model": {"w": torch.full((3, 4), value)}}, {"step": int(value)})


def test_what_is_written_is_the_state_when_save_was_called(tmp_path, monkeypatch):
    gate, checkpoint = Gate(monkeypatch), weights(1)
    with BackgroundWriter(tmp_path) as writer:
        writer.save(1, checkpoint, keep=1)
        checkpoint.tensors["model"]["w"].fill_(7)
        writer.check()
        assert not committed(tmp_path)
        gate.open.set()
    assert torch.equal(load(tmp_path / "step-1").tensors["model"]["w"], torch.ones(3, 4))


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_the_writing_thread_gives_way_to_training(tmp_path, monkeypatch):
    def priority():
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before, writing = priority(), []
    monkeypatch.setattr(background, "save", lambda *_: writing.append(priority()))
    with BackgroundWriter(tmp_path) as writer:
        writer.save(1, weights(1), keep=1)
        writer.wait()
    assert writing == [19]
    assert priority() == before


def work(seconds: float) -> None:
    """Keep the calling thread's processor busy."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no clock that others read")
def test_the_writing_thread_counts_its_own_processor_time(tmp_path, monkeypatch):
    monkeypatch.setattr(background, "save", lambda *_: work(0.2))
    with BackgroundWriter(tmp_path) as writer:
        assert writer.processor_seconds == 0
        writer.save(1, weights(1), keep=1)
        work(0.2)
        writer.wait()
        assert 0.2 <= writer.processor_seconds < 0.3
        writer.save(2, weights(2), keep=1)
        writer.wait()
        assert 0.4 <= writer.processor_seconds < 0.5


def test_the_next_save_waits_for_the_one_before(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    with BackgroundWriter(tmp_path) as writer:
        writer.save(1, weights(1), keep=2)
        assert gate.reached.wait(30)
        threading.Timer(0.2, gate.open.set).start()
        start = time.monotonic()
        writer.save(2, weights(2), keep=2)
        assert time.monotonic() - start > 0.1
        assert gate.writes[0] == 1
        writer.wait()
    assert gate.writes == [1, 2]
    assert [path.name for path in committed(tmp_path)] == ["step-1", "step-2"]


@pytest.mark.parametrize("call", ["check", "wait", "save"])
def test_a_failure_is_raised_once_by_the_next_call(tmp_path, call):
    (tmp_path / "file").touch()
    with BackgroundWriter(tmp_path / "file") as writer:
        writer.save(1, weights(1), keep=1)
        writer._thread.submit(int).result()  # the write before it is over
        with pytest.raises(CheckpointFailed, match="step-1: not saved"):
            writer.save(2, weights(2), keep=1) if call == "save" else getattr(writer, call)()
        writer.check()


def test_copies_share_no_memory_even_where_tensors_did():
    shared = torch.arange(12.0).view(3, 4)
    copy = on_host(Checkpoint({"model": {"a": shared, "b": shared.mT}}, {"step": 1})).tensors["model"]
    assert len({tensor.data_ptr() for tensor in (shared, *copy.values())}) == 3
    assert torch.equal(copy["b"], shared.mT)
    assert copy["b"].is_contiguous()


def test_training_goes_on_while_a_checkpoint_is_written(tiny_run_config, make_run, monkeypatch):
    out, whole = make_run(), make_run("whole")
    train(tiny_run_config(), whole)
    gate, real_step, count = Gate(monkeypatch), loop.train_step, 0

    def step(*args, **kwargs):
        nonlocal count
        count += 1
        if count == 14:  # with the checkpoint of step 10 not written yet
            assert not committed(out / "checkpoints" / "pretrain")
            gate.open.set()
        return real_step(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", step)
    train(tiny_run_config(), out)
    assert gate.writes == [10, 20]
    for step in ("step-10", "step-20"):
        left, right = (load(run / "checkpoints" / "pretrain" / step) for run in (out, whole))
        assert left.state == right.state
        for group, tensors in right.tensors.items():
            assert all(torch.equal(left.tensors[group][name], tensor) for name, tensor in tensors.items())


def test_a_failed_write_stops_the_run_at_the_next_step(tiny_run_config, make_run, monkeypatch):
    out = make_run()
    with monkeypatch.context() as patch:
        original = background.save

        def failing(root, step, checkpoint, keep):
            if step == 8:
                raise CheckpointFailed("step-8: not saved (disk full)")
            return original(root, step, checkpoint, keep)

        patch.setattr(background, "save", failing)
        # The step after waits for the failure, so that it is not left to chance which one is stopped.
        original_check = BackgroundWriter.check
        patch.setattr(BackgroundWriter, "check", lambda self: (self._thread.submit(int).result(), original_check(self)))
        with pytest.raises(CheckpointFailed, match="step-8"):
            train(tiny_run_config(checkpoint_every=4), out)
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl")][-1] == 8
    assert load(committed(out / "checkpoints" / "pretrain")[-1]).state["step"] == 4


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no clock that others read")
def test_a_steps_processor_time_leaves_the_writers_out(tiny_run_config, make_run, monkeypatch):
    out, written = make_run(), threading.Event()
    monkeypatch.setattr(background, "save", lambda *_: (work(1.0), written.set()))
    real_step, count = loop.train_step, 0

    def step(*args, **kwargs):
        nonlocal count
        count += 1
        if count == 11:  # the writer is busy since step 10
            assert written.wait(120)
        return real_step(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", step)
    train(tiny_run_config(steps=11), out)
    seconds = {row["step"]: row["processor_seconds"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row}
    assert 0 < seconds[11] < 0.7
