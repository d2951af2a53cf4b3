"""The arena is a process's for good, so each test has a process of its own."""

import subprocess
import sys
import textwrap

import pytest

from benthic.ops import native

pytestmark = pytest.mark.skipif(native.memory_library() is None, reason="no compiler")

BEGIN = """
import random, threading
import psutil
import torch
from benthic.train.memory import keep_large_tensors
small = torch.arange(7)
early = torch.full((300, 1000), 5.0)
assert keep_large_tensors() and keep_large_tensors()
"""


def in_a_process(script):
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + textwrap.dedent(script)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("seed", [0, 1])
def test_tensors_of_all_sizes_come_and_go_without_touching_each_other(seed):
    in_a_process(f"""
        def churn(seed):
            rng, alive = random.Random(seed), {{}}
            for number in range(1500):
                size = int(2 ** rng.uniform(0, 21))
                alive[number] = torch.full((size,), float(number))
                while sum(map(len, alive.values())) > 2**22:
                    key = rng.choice(list(alive))
                    tensor = alive.pop(key)
                    assert tensor.data_ptr() % 64 == 0 and bool((tensor == key).all())
            assert all(bool((tensor == key).all()) for key, tensor in alive.items())
        failures = []
        def guarded(seed):
            try: churn(seed)
            except BaseException as error: failures.append(error); raise
        threads = [threading.Thread(target=guarded, args=(10 * {seed} + k,)) for k in range(3)]
        [thread.start() for thread in threads]; [thread.join() for thread in threads]
        assert not failures
        assert bool((early == 5).all()) and small.tolist() == list(range(7))
        del early, small  # freed by the allocator they came from
    """)


def test_freed_blocks_are_used_again_and_joined():
    blocks, halves, whole = map(
        int,
        in_a_process("""
        def resident(): return psutil.Process().memory_info().rss
        MIB = 2**20
        start = resident()
        blocks = [torch.ones(MIB, dtype=torch.uint8) for _ in range(200)]
        first = resident() - start
        del blocks
        halves = [torch.ones(MIB // 2 + k, dtype=torch.uint8) for k in range(300)]
        second = resident() - start
        del halves
        whole = torch.ones(190 * MIB, dtype=torch.uint8)
        print(first, second, resident() - start)
    """),
    )
    assert 200 * 2**20 <= blocks < 215 * 2**20
    assert halves < blocks + 5 * 2**20
    assert whole < blocks + 5 * 2**20


def test_what_does_not_fit_goes_where_it_went_before():
    in_a_process("""
        try:
            torch.empty(2**50)
        except RuntimeError as error:
            assert "memory" in str(error)
        else:
            raise AssertionError
        assert float(torch.ones(2**20).sum()) == 2**20
    """)


def test_a_tensor_grows_in_place_of_its_storage():
    in_a_process("""
        tensor = torch.ones(2**18)
        tensor.resize_(2**20)
        assert bool((tensor[: 2**18] == 1).all())
        shared = torch.ones(2**18).share_memory_()
        assert float(shared.sum()) == 2**18
    """)
