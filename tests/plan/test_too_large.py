"""A model that does not fit into memory is refused, by as much of it as this machine would have."""

import pytest

from benthic.config.load import load_run_config
from benthic.errors import InputError
from benthic.plan import memory
from benthic.plan.counts import main_model, mtp_modules

TINY = load_run_config("tiny", [])
NEEDED = memory.TRAINING_BYTES * (main_model(TINY.model).total + mtp_modules(TINY.model).total)


def settle(monkeypatch, processes: int, here: int, room: float) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    monkeypatch.setattr(memory, "_memory_bytes", lambda: room)


@pytest.mark.parametrize(
    ("processes", "here", "replicate", "share"), [(1, 1, 1, 1), (8, 2, 1, 0.25), (8, 2, 4, 1), (8, 8, 2, 2)]
)
def test_processes_share_a_model_out(monkeypatch, processes, here, replicate, share):
    config = load_run_config("tiny", [f"parallel.replicate={replicate}", f"parallel.shard={processes // replicate}"])
    settle(monkeypatch, processes, here, share * NEEDED)
    memory.refuse_too_large_together(config)
    settle(monkeypatch, processes, here, share * NEEDED - 1)
    with pytest.raises(
        InputError, match="on each machine; this machine has" if share != 1 else "GiB; this machine has"
    ):
        memory.refuse_too_large_together(config)
