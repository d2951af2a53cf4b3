"""What any layout saves, any other loads: every tensor bit for bit, and all that a run goes on with."""

import itertools
from pathlib import Path

import pytest
import torch
from layouts import MODEL, layouts_of
from processes import run_processes
from spread import take_steps

from benthic.config.schema import RunConfig
from benthic.parallel.group import Group
from benthic.parallel.local import local
from benthic.parallel.world import ALONE, World
from benthic.train.checkpoint import load, save
from benthic.train.joint import JointSaves
from benthic.train.schedule import Course
from benthic.train.state import TrainState

STEP = 2


def config_of(**parallel) -> RunConfig:
    """Of a run with an average, whose second step has MTP no more in it."""
    train = {
        "steps": 4, "batch_size": 8, "micro_batch_size": 1, "sequence_length": 12, "ema_decay": 0.9,
        "optimizer": {"name": "muon", "learning_rate": 1e-3}, "schedule": {"bias_update_speed": 0.01},
    }  # fmt: skip
    settings = {"model": MODEL, "train": train, "precision": {"compute": "fp32"}, "parallel": parallel}
    return RunConfig.model_validate(settings)


def named(parallel) -> str:
    return "-".join(map(str, parallel.values())) or "one"


def one_process(folder: Path) -> Path:
    """A checkpoint of one process, every number of which is another."""
    config = config_of()
    state = TrainState(config)
    take = config.model_copy(update={"train": config.train.model_copy(update={"steps": STEP})})
    outcome = take_steps(take, ALONE, _Model())
    checkpoint = state.to_checkpoint({"of": "this run"}, on_schedule=True)
    for name, tensor in outcome.tensors.items():
        group, _, name = name.partition(": ")
        checkpoint.tensors[group][name] = tensor if not tensor.ndim else torch.randn(tensor.shape).to(tensor.dtype)
    health = {"losses": [2.5, 2.25], "grad_norms": [0.5], "skipped": 2}
    checkpoint.state.update(step=STEP, bits_per_byte=1.5, sequences_passed_over=3, health=health)
    assert {"model", "optimizer", "average"} == checkpoint.tensors.keys()
    return save(folder / "one", STEP, checkpoint, keep=None)


class _Model:
    def build(self, config):
        from benthic.model import LanguageModel

        return LanguageModel(config)


def state_of(parallel) -> tuple[TrainState, Group]:
    config = config_of(**parallel)
    world = Group(config.parallel)
    return TrainState(config, world=world), world


def spoil(state: TrainState) -> None:
    """Leave nothing in it right."""
    found = state.to_checkpoint({}, on_schedule=True)
    assert found.tensors.keys() == {"model", "optimizer", "average"}
    for tensors in found.tensors.values():
        for tensor in tensors.values():
            local(tensor.detach()).fill_(torch.nan)
    state.step = state.sequences_passed_over = -1
    state.bits_per_byte = torch.nan
    state.health.restore({"losses": [], "grad_norms": [], "skipped": -1}, "nothing")


def save_under(rank: int, folder: str, source: str, layouts: list) -> int:
    """Load one checkpoint under each layout, and save it again; how many names a rank holds at most."""
    names = 0
    for parallel in layouts:
        state, world = state_of(parallel)
        spoil(state)
        state.restore(state.load(Path(source)), source)
        saves = JointSaves(world.board())
        checkpoint = state.to_checkpoint({"of": "this run"}, on_schedule=True)
        saves.save(Path(folder, named(parallel)), STEP, state.shares.owned(checkpoint), checkpoint.state, None)
        names = max(names, len(checkpoint.tensors["model"]))
    return names


def load_under(rank: int, folder: str, reference: str, pairs: list) -> tuple[int, list[list[int]]]:
    """Load what other layouts have saved and compare it with the reference.

    Returns how many numbers were compared, and under each layout the sequences that this rank reads next.
    """
    whole, compared, following = load(Path(reference)), 0, []
    for parallel, sources in pairs:
        state, world = state_of(parallel)
        for source in sources:
            spoil(state)
            path = Path(folder, source, f"step-{STEP}")
            state.restore(state.load(path), str(path))
            found = state.to_checkpoint({"of": "this run"}, on_schedule=True)
            assert found.state == whole.state
            assert found.tensors.keys() == whole.tensors.keys()
            for group, tensors in found.tensors.items():
                for name, tensor in tensors.items():
                    expected = whole.tensors[group][name]
                    expected = expected[state.shares.wanted(group, name, tuple(expected.shape)).slices]
                    assert torch.equal(local(tensor), expected), (parallel, source, group, name)
                    assert tensor.dtype == expected.dtype
                    compared += expected.numel()
            state.compare_copies()
        following.append(next_sequences(state, world) if world.layout.coordinates(rank).pipeline == 0 else [])
    return compared, following


def next_sequences(state: TrainState, world: World) -> list[int]:
    """What a data rank reads in the next step, as the loop finds it."""
    train = config_of().train
    now = Course(train.schedule, train.steps, train.batch_size, train.micro_batch_size).at(state.step)
    first = now.first_sequence + state.sequences_passed_over
    return [first + row for row in world.rows(now.batch_size, train.micro_batch_size)]


def check_pairs(tmp_path, layouts, sources_of) -> None:
    """Save under each layout, by world, and load under each what those have saved that ``sources_of`` names."""
    reference = one_process(tmp_path)
    for world, found in layouts.items():
        run_processes(save_under, world, str(tmp_path), str(reference), found, timeout=14400)
    everything = [named(parallel) for found in layouts.values() for parallel in found]
    whole = load(reference)
    for name in everything:
        # What one process reads of it, as export, eval and chat do.
        found = load(tmp_path / name / f"step-{STEP}")
        assert found.state == whole.state
        for group, tensors in whole.tensors.items():
            assert found.tensors[group].keys() == tensors.keys()
            assert all(torch.equal(found.tensors[group][key], tensor) for key, tensor in tensors.items())
    total = sum(tensor.numel() for tensors in whole.tensors.values() for tensor in tensors.values())
    number = 0
    state = TrainState(config_of())
    state.restore(whole, str(reference))
    following_of_one = next_sequences(state, ALONE)
    assert following_of_one == list(range(8 * STEP + 3, 8 * STEP + 3 + 8))
    for world, found in layouts.items():
        pairs = []
        for parallel in found:
            pairs.append((parallel, sources_of(number, everything)))
            number += 1
        ends = run_processes(load_under, world, str(tmp_path), str(reference), pairs, timeout=14400)
        assert sum(compared for compared, _ in ends) >= total * sum(len(sources) for _, sources in pairs)
        for read in zip(*(following for _, following in ends), strict=True):
            assert sorted(itertools.chain(*read)) == following_of_one


@pytest.mark.timeout(900)  # of a busy machine
def test_some_layouts_load_one_anothers_checkpoints(tmp_path):
    few = {2: layouts_of(2)[::2], 4: layouts_of(4)[1::4]}
    check_pairs(tmp_path, few, lambda number, everything: [everything[number - 1]])


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_all_pairs_of_layouts_of_two_and_four(tmp_path):
    check_pairs(tmp_path, {world: layouts_of(world) for world in (2, 4)}, lambda _, everything: everything)


@pytest.mark.slow
@pytest.mark.timeout(14400)
def test_all_pairs_of_layouts_of_up_to_eight(tmp_path):
    check_pairs(tmp_path, {world: layouts_of(world) for world in (2, 4, 8)}, lambda _, everything: everything)
