"""The processes of a run, before anything is known of what they divide: one needs nothing that several do."""

from collections.abc import Iterator
from contextlib import contextmanager

from benthic import torchrun
from benthic.config.schema import RunConfig
from benthic.parallel.fits import refuse_misfit
from benthic.parallel.world import ALONE, World


@contextmanager
def open_world(config: RunConfig) -> Iterator[World]:
    """The processes that torchrun has started, or this one alone.

    Raises:
        InputError: the settings of ``parallel`` do not fit their number, or the model, or the batch.
    """
    refuse_misfit(config, torchrun.processes())
    if torchrun.processes() == 1:
        yield ALONE
        return
    from benthic.parallel.group import Group, process_group  # takes a second

    with process_group(config.parallel.timeout_seconds):
        yield Group(config.parallel)
