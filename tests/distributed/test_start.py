"""How a run by several processes begins: with one process's weights, and in no more memory than a rank's share takes.

Memory is what the system says of each process, as its highest mark, above what it had before.
"""

from pathlib import Path

import pytest
import torch
from layouts import MODEL, layouts_of
from processes import run_processes
from spread import InFloat32, InFloat64, Rows, settings, spread_over

from benthic.config.schema import ModelConfig, RunConfig
from benthic.model import LanguageModel
from benthic.model.layers import RMSNorm
from benthic.ops import mersenne
from benthic.ops.normal_stream import NormalStream
from benthic.parallel.group import Group
from benthic.parallel.local import local
from benthic.train.joint import JointSaves
from benthic.train.schedule import Course
from benthic.train.state import TrainState
from benthic.train.step import accumulate_gradients, train_step

MIB = 2**20
LARGE = {
    "vocab_size": 4000, "hidden_size": 256, "num_hidden_layers": 6, "first_k_dense_replace": 1,
    "intermediate_size": 512, "moe_intermediate_size": 128, "n_routed_experts": 32, "n_group": 1, "topk_group": 1,
    "num_attention_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}  # fmt: skip
"""22 million weights: 90 MB in fp32; with their average and moments four times that."""


def drawn_in_order(config: ModelConfig, seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights that a model begins with, written down without any of what is tested here."""
    model = LanguageModel(config).to(dtype)
    norms = {id(module.weight) for module in model.modules() if isinstance(module, RMSNorm)}
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if id(parameter) not in norms:
            parameter.data.normal_(0.0, config.initializer_range, generator=generator)
    return {name: tensor.float() if name.endswith(".bias") else tensor for name, tensor in model.state_dict().items()}


ARCHITECTURES = {torch.float32: InFloat32, torch.float64: InFloat64}


def config_of(seed: int, model: dict = MODEL, **parallel) -> RunConfig:
    return spread_over(settings(steps=1, model=model, seed=seed), **parallel)


@pytest.mark.parametrize("dtype", ARCHITECTURES)
def test_one_process_begins_with_what_is_drawn_in_order(dtype):
    config = config_of(5)
    state = TrainState(config, ARCHITECTURES[dtype]())
    expected = drawn_in_order(config.model, 5, dtype)
    assert state.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.model.state_dict().items())


def compare_first_weights(rank: int, layouts: list, dtype: torch.dtype) -> list[int]:
    """How many numbers each layout's states on this rank have; all are those of one process."""
    compared = []
    usual = mersenne._FARTHEST_DRAWN
    for seed, parallel in enumerate(layouts):
        # Once, most of what others hold is jumped over, as in a large model.
        mersenne._FARTHEST_DRAWN = 300 if seed == 1 else usual
        config = config_of(seed, **parallel)
        state = TrainState(config, ARCHITECTURES[dtype](), world=Group(config.parallel))
        expected = drawn_in_order(config.model, seed, dtype)
        held = {name: local(tensor) for name, tensor in state.model.state_dict().items()}
        assert held.keys() == state.shares.holding.keys()
        for name, tensor in held.items():
            assert torch.equal(tensor, expected[name][state.shares.holding[name].box.slices]), (parallel, name)
        for name, tensor in state.average.tensors.items():
            assert torch.equal(tensor, held[name])
        compared.append(sum(tensor.numel() for tensor in held.values()))
    return compared


@pytest.mark.parametrize(
    ("world", "dtype"),
    [
        (2, torch.float32),
        (4, torch.float64),
        pytest.param(4, torch.float32, marks=pytest.mark.slow),
        pytest.param(8, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_every_layout_begins_with_the_weights_of_one_process(world, dtype):
    layouts = layouts_of(world)
    compared = run_processes(compare_first_weights, world, layouts, dtype)
    numbers = sum(tensor.numel() for tensor in drawn_in_order(config_of(0).model, 0, dtype).values())
    for number, parallel in enumerate(layouts):
        assert sum(counts[number] for counts in compared) >= numbers * parallel["replicate"]


class HighestMark:
    """By how much this process's memory grows within it at most, in bytes."""

    def __enter__(self) -> "HighestMark":
        Path("/proc/self/clear_refs").write_text("5")  # sets the mark back
        self._before = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = _status("VmHWM") - self._before


def _status(field: str) -> int:
    found = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(found.split()[1]) * 1024


def bytes_held(state: TrainState) -> int:
    groups = state.to_checkpoint({}, on_schedule=True).tensors.values()
    return sum(local(tensor).nbytes for tensors in groups for tensor in tensors.values())


def warm_up(config: RunConfig) -> Group:
    """What is imported and kept for good when a state is made for the first time shall not count."""
    world = Group(config.parallel)
    TrainState(spread_over(settings(), **config.parallel.model_dump(mode="json")), world=world)
    return world


def begin(rank: int, config: RunConfig, folder: str) -> tuple[int, int]:
    """Bytes that a rank holds before its first step, and its highest mark until then; a checkpoint of the second."""
    world = warm_up(config)
    with HighestMark() as mark:
        state = TrainState(config, world=world)
    held = bytes_held(state)
    now, rows = Course(config.train.schedule, 1, 4).at(0), Rows(config)
    own = world.rows(4, 1)

    def gradients(*arguments, **options):
        return accumulate_gradients(*arguments, **options, world=world)

    train_step(
        state.objective, state.optimizer, rows.at(own.start, len(own)), now,
        micro_batch_size=1, compute="fp32", health=state.health, gradients=gradients, world=world,
    )  # fmt: skip
    state.step = 1
    checkpoint = state.to_checkpoint({}, on_schedule=True)
    saves = JointSaves(world.board())
    saves.save(Path(folder), 1, state.shares.owned(checkpoint), checkpoint.state, None)
    return held, mark.bytes


def resume(rank: int, config: RunConfig, folder: str) -> tuple[int, int, float]:
    """The same of a rank that goes on, without drawing anything; and the sum of the first moments' squares."""
    world, path = warm_up(config), Path(folder, "step-1")
    NormalStream.fill = None
    with HighestMark() as mark:
        state = TrainState(config, world=world, fresh=False)
        state.restore(state.load(path), str(path))
    # Of the embedding there may be a copy.
    moments = [
        t for name, t in state.optimizer.state_tensors().items() if name.endswith(".exp_avg") and "embed." not in name
    ]
    return bytes_held(state), mark.bytes, sum(float(tensor.double().square().sum()) for tensor in moments)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell memory's highest mark")
def test_no_rank_ever_holds_more_than_its_share(tmp_path):
    """From the start, and when it goes on, as it was or on another layout."""
    layouts = [{"pipeline": 2, "expert": 2}, {"expert": 2, "shard": 2}]
    first, other = (
        spread_over(settings(steps=1, batch_size=4, model=LARGE, schedule={}), **parallel) for parallel in layouts
    )
    for held, mark in run_processes(begin, 4, first, str(tmp_path)):
        assert 20 * MIB < held <= mark + MIB
        assert mark < 1.1 * held + 8 * MIB
    moments = []
    for config in (first, other):
        resumed = run_processes(resume, 4, config, str(tmp_path))
        for held, mark, _ in resumed:
            assert held > 40 * MIB
            assert mark < 1.1 * held + 32 * MIB  # blocks of files as they are checked, and a tensor's part of them
        moments.append(sum(found for *_, found in resumed))
    assert moments[0] == pytest.approx(moments[1], rel=1e-6)
    assert moments[0] > 0
