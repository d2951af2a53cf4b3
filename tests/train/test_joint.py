"""Checkpoints that several ranks write together, read back whole and under any other layout."""

import itertools
import json
import random

import pytest
import torch
from boards import on_ranks

from benthic.errors import InputError
from benthic.parallel.pieces import Cut, cut, whole
from benthic.train import parts
from benthic.train.checkpoint import Checkpoint, committed, latest, load, save
from benthic.train.joint import JointSaves
from benthic.train.shares import Shares

SHAPES = {"embed.weight": (13, 6), "norm.weight": (5,), "experts.down": (8, 3, 4), "router.bias": (8,)}
DTYPES = {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.float32}


def state_of(step: int, seed: int = 0, *, moments: bool = True, average: bool = True) -> Checkpoint:
    """A state as one process has it."""
    torch.manual_seed(100 * seed + step)
    model = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    groups = {"model": model, "optimizer": {}}
    for name in model if moments else ():
        if name != "router.bias":
            groups["optimizer"] |= {
                f"{name}.{key}": torch.randn(SHAPES[name]).to(dtype) for key, dtype in DTYPES.items()
            }
            groups["optimizer"][f"{name}.step"] = torch.tensor(float(step))
    if average:
        groups["average"] = {name: torch.randn(shape) for name, shape in SHAPES.items() if name != "router.bias"}
    groups["carried"] = {"answers": torch.randint(0, 100, (3, 7), dtype=torch.int32)}
    return Checkpoint(groups, {"step": step})


def layout(stages: int, experts: int, shards: int, copies: int):
    """What each rank holds, with layers spread over stages and the embedding on the first and the last."""
    holdings = []
    for stage, _, shard, expert in itertools.product(*map(range, (stages, copies, shards, experts))):
        holding = {}
        for number, (name, shape) in enumerate(SHAPES.items()):
            if number % stages != stage and not (name == "embed.weight" and stage == stages - 1):
                continue
            cuts = [Cut(0, shards * experts, shard * experts + expert)]
            if name == "experts.down":
                cuts = [Cut(0, experts, expert), Cut(0, shards, shard)]
            holding[name] = cut(whole(name, shape), () if name == "router.bias" else cuts)
        holdings.append(holding)
    return holdings


def held(checkpoint: Checkpoint, shares: Shares) -> Checkpoint:
    """What a rank has of a state."""
    tensors = {
        group: {
            name: tensor[box.slices]
            for name, tensor in named.items()
            if (box := shares.wanted(group, name, tuple(tensor.shape))) is not None
        }
        for group, named in checkpoint.tensors.items()
    }
    return checkpoint._replace(tensors=tensors)


def save_jointly(root, checkpoint: Checkpoint, holdings, keep=None) -> list:
    """All ranks save one state; what each returned or raised."""
    step = checkpoint.state["step"]

    def on_rank(board):
        shares = Shares(board.rank, holdings)
        owned = shares.owned(held(checkpoint, shares))
        return JointSaves(board).save(root, step, owned, checkpoint.state, keep)

    return on_ranks(len(holdings), on_rank)


def assert_equal(left: Checkpoint, right: Checkpoint) -> None:
    assert left.state == right.state
    assert left.tensors.keys() == right.tensors.keys()
    for group, tensors in right.tensors.items():
        assert left.tensors[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            found = left.tensors[group][name]
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor), (group, name)


LAYOUTS = [
    (1, 1, 1, 1),
    (1, 1, 4, 1),
    (1, 4, 1, 1),
    (1, 2, 2, 1),
    (2, 1, 1, 2),
    (1, 1, 2, 2),
    (2, 2, 2, 1),
    (4, 2, 1, 1),
]


@pytest.mark.parametrize("sizes", LAYOUTS)
def test_what_all_ranks_write_is_what_one_process_would(tmp_path, sizes):
    state = state_of(7, moments=sizes != (2, 1, 1, 2))
    assert save_jointly(tmp_path, state, layout(*sizes)) == [tmp_path / "step-7"] * len(layout(*sizes))
    assert_equal(load(tmp_path / "step-7"), state)
    assert_equal(load(tmp_path / "step-7", ("model",)), state._replace(tensors={"model": state.tensors["model"]}))


@pytest.mark.parametrize("saved", LAYOUTS)
def test_any_layout_reads_what_any_other_has_written(tmp_path, saved):
    state = state_of(3)
    save_jointly(tmp_path / "joint", state, layout(*saved))
    save(tmp_path / "alone", 3, state, keep=None)
    for sizes in LAYOUTS:
        holdings = layout(*sizes)
        for rank in range(len(holdings)):
            shares = Shares(rank, holdings)
            for kind in ("joint", "alone"):
                assert_equal(load(tmp_path / kind / "step-3", wanted=shares.wanted), held(state, shares))


def test_no_byte_is_written_twice(tmp_path):
    state = state_of(1)
    save_jointly(tmp_path, state, layout(2, 2, 1, 2))
    sizes = [tensor.numel() * tensor.element_size() for named in state.tensors.values() for tensor in named.values()]
    headers = sum(8 + int.from_bytes(p.read_bytes()[:8], "little") for p in (tmp_path / "step-1").glob("*.safetensors"))
    assert sum(p.stat().st_size for p in (tmp_path / "step-1").glob("*.safetensors")) == sum(sizes) + headers


def test_the_newest_stay(tmp_path):
    for step in (1, 2, 3):
        save_jointly(tmp_path, state_of(step), layout(1, 1, 2, 1), keep=2)
    assert [path.name for path in committed(tmp_path)] == ["step-2", "step-3"]


def test_one_rank_saves_again_and_again_on_one_board(tmp_path):
    holdings = layout(1, 1, 2, 1)

    def on_rank(board):
        saves, shares = JointSaves(board), Shares(board.rank, holdings)
        for step in (1, 2, 3):
            state = state_of(step)
            saves.save(tmp_path, step, shares.owned(held(state, shares)), state.state, keep=1)
        return board._store.num_keys() if board.rank == 0 else None

    keys, _ = on_ranks(2, on_rank)
    assert keys <= 2, "messages that are read are taken down"
    assert_equal(load(latest(tmp_path)), state_of(3))


def test_only_blocks_that_are_needed_are_read_and_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "BLOCK_BYTES", 512)
    tensors = {"model": {"a": torch.randn(64, 16), "b": torch.randn(64, 16)}}
    state = Checkpoint(tensors, {"step": 1})
    holdings = [{name: whole(name, (64, 16)) for name in "ab"}]
    save_jointly(tmp_path, state, holdings)
    path = tmp_path / "step-1" / "model-00000.safetensors"
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    at = begin + 40 * 64  # row 40 of a
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    for rank, fails in ((0, False), (2, True), (3, False)):
        rows = {name: cut(whole(name, (64, 16)), [Cut(0, 4, rank)]) for name in "ab"}
        shares = Shares(0, [rows, *({name: cut(whole(name, (64, 16)), [Cut(0, 4, other)]) for name in "ab"}
                                    for other in range(4) if other != rank)])  # fmt: skip
        if fails:
            with pytest.raises(InputError, match=r"model-00000.safetensors: damaged"):
                load(tmp_path / "step-1", wanted=shares.wanted)
        else:
            assert_equal(load(tmp_path / "step-1", wanted=shares.wanted), held(state, shares))


def test_pieces_that_are_no_whole_are_refused_when_read(tmp_path):
    save_jointly(tmp_path, state_of(1), layout(1, 1, 2, 1))
    path = tmp_path / "step-1" / "part-00001.json"
    part = json.loads(path.read_text())
    part["tensors"]["model"]["norm.weight"]["offset"] = [1]
    path.write_text(json.dumps(part))
    manifest = json.loads((tmp_path / "step-1" / "manifest.json").read_text())
    manifest["files"][path.name] = parts.describe_file(path)
    (tmp_path / "step-1" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"the parts of model tensor norm.weight do not make up the whole"):
        load(tmp_path / "step-1")


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"norm.weight": (5,)}, "is unknown to this model"),
        (SHAPES | {"norm.weight": (6,)}, r"norm.weight is \(5,\), this model's is \(6,\)"),
    ],
)
def test_another_models_tensors_are_refused(tmp_path, shapes, message):
    save_jointly(tmp_path, state_of(1), layout(1, 1, 2, 1))
    shares = Shares(0, [{name: whole(name, shape) for name, shape in shapes.items()}])
    with pytest.raises(InputError, match=message):
        load(tmp_path / "step-1", wanted=shares.wanted)


def test_random_slices(tmp_path, monkeypatch):
    """Boxes anywhere in pieces anywhere, along every dimension."""
    monkeypatch.setattr(parts, "BLOCK_BYTES", 64)
    rng = random.Random(0)
    for trial in range(20):
        shape = tuple(rng.randint(1, 7) for _ in range(rng.randint(1, 3)))
        tensor = torch.randn(shape, dtype=rng.choice([torch.float32, torch.float64]))
        cuts = [(rng.randrange(len(shape)), rng.randint(1, 3)) for _ in range(2)]
        numbers = itertools.product(*(range(parts_) for _, parts_ in cuts))
        holdings = [
            {"w": cut(whole("w", shape), [Cut(*c, n) for c, n in zip(cuts, number, strict=True)])} for number in numbers
        ]
        save_jointly(tmp_path / str(trial), Checkpoint({"model": {"w": tensor}}, {"step": 0}), holdings)
        for _ in range(5):
            offset = tuple(rng.randint(0, n) for n in shape)
            size = tuple(rng.randint(0, n - o) for n, o in zip(shape, offset, strict=True))
            box = parts.Box(offset, size)
            found = load(tmp_path / str(trial) / "step-0", wanted=lambda *_, box=box: box).tensors["model"]["w"]
            assert torch.equal(found, tensor[box.slices])
            assert found.dtype == tensor.dtype
