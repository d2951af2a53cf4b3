"""Passes that DualPipeV pairs: one computes while the messages of the other are under way, and nothing else changes."""

import torch
import torch.distributed as dist
from processes import run_processes
from spread import InFloat32, settings, spread_over, spread_steps

from benthic.parallel.turns import Turns

LAYOUT = {"pipeline": 2, "expert": 2, "schedule": "dualpipev"}


class Message:
    """A message whose begin and end are written down."""

    def __init__(self, log, name, work):
        self._log, self._name, self._work = log, name, work
        log.append((name, "begins"))

    def wait(self):
        self._log.append((self._name, "is waited for"))
        self._work.wait()


def logged(rank, config, in_turns):
    """Steps of one rank, and when its messages to experts began and were waited for."""
    log, send = [], dist.all_to_all_single

    def all_to_all_single(*arguments, **options):
        return Message(log, len(log), send(*arguments, **options))

    dist.all_to_all_single = all_to_all_single
    if not in_turns:
        Turns.run = lambda _, first, second: (first(), second())
    outcome = spread_steps(rank, config, InFloat32())
    under_way, most = set(), 0
    for name, what in log:
        if what == "begins":
            under_way.add(name)
            most = max(most, len(under_way))
        else:
            under_way.remove(name)
    return outcome, most


def run(config, in_turns):
    outcomes = run_processes(logged, 4, config, in_turns)
    return outcomes[0][0], [most for _, most in outcomes]


def test_messages_of_both_are_under_way_at_once_and_results_are_the_same_bits():
    model = {"num_hidden_layers": 6, "first_k_dense_replace": 0}
    config = spread_over(settings(steps=3, model=model, recompute=True, compute="fp8"), **LAYOUT)
    one_by_one, most = run(config, in_turns=False)
    assert most == [1, 1, 1, 1]
    in_turns, most = run(config, in_turns=True)
    assert most == [2, 2, 2, 2]
    assert in_turns.losses == one_by_one.losses
    assert in_turns.sent == one_by_one.sent
    assert in_turns.loads == one_by_one.loads
    assert all(torch.equal(tensor, one_by_one.tensors[name]) for name, tensor in in_turns.tensors.items())
