"""Energy spent: by codecarbon, offline, where it is installed; otherwise processor cores at their design power."""

import importlib
import importlib.util
import logging
from time import monotonic
from typing import Any, Protocol

import torch

from benthic.plan.power import cpu_name, watts_per_core


class EnergyMeter(Protocol):
    """Counts from when it was made."""

    source: str
    """Where its figures come from."""

    def kwh(self) -> float:
        """Energy since the beginning."""

    def close(self) -> None:
        """Stop counting."""


class EstimatedEnergy:
    """So many watts all the time."""

    source = "estimated"

    def __init__(self, watts: float) -> None:
        self._watts, self._start = watts, monotonic()

    def kwh(self) -> float:
        """Energy since the beginning."""
        return self._watts / 1000 * (monotonic() - self._start) / 3600

    def close(self) -> None:
        """Nothing runs that would have to stop."""


class CodecarbonEnergy:
    """What codecarbon says the machine has used: it reads counters where it may, and estimates the rest."""

    source = "codecarbon"

    def __init__(self) -> None:
        codecarbon = importlib.import_module("codecarbon")
        logging.getLogger("codecarbon").setLevel(logging.ERROR)
        self._heard = _Listener()
        # Energy does not depend on the country; codecarbon's emissions, which do, are not used.
        self._tracker: Any = codecarbon.OfflineEmissionsTracker(
            country_iso_code="USA", output_methods=[], output_handlers=[self._heard],
            allow_multiple_runs=True, log_level="error",
        )  # fmt: skip
        self._tracker.start()

    def kwh(self) -> float:
        """Energy since the beginning."""
        self._tracker.flush()
        return self._heard.kwh

    def close(self) -> None:
        """Stop its threads."""
        self._tracker.stop()


class _Listener:
    """An output of codecarbon, to which it tells its figures when flushed."""

    kwh = 0.0

    def out(self, total: Any, delta: Any) -> None:
        self.kwh = float(total.energy_consumed)

    def live_out(self, total: Any, delta: Any) -> None:
        self.out(total, delta)

    def exit(self) -> None:
        """Nothing to close."""


def open_energy_meter() -> EnergyMeter:
    """Of codecarbon if it is installed, otherwise an estimate for the threads in use."""
    if importlib.util.find_spec("codecarbon") is not None:
        return CodecarbonEnergy()
    return EstimatedEnergy(torch.get_num_threads() * watts_per_core(cpu_name()))
