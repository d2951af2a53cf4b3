"""ledger.json: what each stage of a run has cost so far, written as the run goes.

Tokens and operations are those that led to the present weights. Time, energy and money are all that were spent, on
steps that were lost and done again too. Beside them stands what each stage was computed with.
"""

import json
import platform
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any, Self

import torch

from benthic.files import read_json_object, write_atomically
from benthic.plan.power import cpu_name
from benthic.train.energy import open_energy_meter
from benthic.version import VERSION

FILE_NAME = "ledger.json"
_SECONDS_BETWEEN_WRITES = 30.0


class Ledger:
    """The account of one stage, open while its context is. A resumed stage goes on from what was last written.

    ``price_per_hour`` is what one device costs in dollars an hour; without it, no cost is given.
    """

    def __init__(self, run: Path, stage: str, *, price_per_hour: float | None = None, devices: int = 1) -> None:
        self._path, self._stage = run / FILE_NAME, stage
        self._price, self._devices = price_per_hour, devices
        self._before = _stages(self._path).get(stage, {})
        earlier, now = _section(self._path, "made_with", list).get(stage, []), made_with_now()
        self._made_with = earlier if now in earlier else [*earlier, now]
        self._work: dict[str, float] = {}

    def __enter__(self) -> Self:
        self._meter = open_energy_meter()
        self._start = self._written = monotonic()
        return self

    def __exit__(self, *exception: object) -> None:
        # How the run ended is worth more than the account of its last half minute.
        with suppress(OSError):
            if self._work:
                self.write()
        self._meter.close()

    def update(self, tokens: int, flops: float) -> None:
        """Take note of the stage's training tokens and their floating-point operations; write twice a minute."""
        self._work = {"tokens": tokens, "flops": flops}
        if monotonic() - self._written >= _SECONDS_BETWEEN_WRITES:
            self.write()

    def write(self) -> None:
        """Record what was last noted, with time, energy and money spent."""
        self._written = monotonic()
        hours = (self._written - self._start) / 3600
        device_hours = hours * self._devices
        entry = {**self._work, **self._spent(hours, device_hours)}
        made_with = {**_section(self._path, "made_with", list), self._stage: self._made_with}
        content = {"stages": {**_stages(self._path), self._stage: entry}, "made_with": made_with}
        write_atomically(self._path, json.dumps(content, indent=1))

    def _spent(self, hours: float, device_hours: float) -> dict[str, float | str | None]:
        sources = {self._meter.source, *str(self._before.get("energy_source", self._meter.source)).split(" and ")}
        priced = self._price is not None or self._before.get("cost_usd") is not None
        return {
            "wall_hours": self._earlier("wall_hours") + hours,
            "device_hours": self._earlier("device_hours") + device_hours,
            "energy_kwh": self._earlier("energy_kwh") + self._meter.kwh(),
            "energy_source": " and ".join(sorted(sources)),
            "cost_usd": self._earlier("cost_usd") + (self._price or 0.0) * device_hours if priced else None,
        }

    def _earlier(self, key: str) -> float:
        """What was spent before this process began."""
        value = self._before.get(key)
        return float(value) if isinstance(value, int | float) else 0.0


def made_with_now() -> dict[str, str | int]:
    """Versions and processor of this process; ``made_with`` of the ledger lists all that a stage has had."""
    return {
        "benthic": VERSION,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": cpu_name(),
        "threads": torch.get_num_threads(),
    }


def _stages(path: Path) -> dict[str, Any]:
    return _section(path, "stages", dict)


def _section(path: Path, key: str, kind: type) -> dict[str, Any]:
    """By stage, what is of the right kind."""
    found = read_json_object(path).get(key) if path.exists() else None
    return {name: entry for name, entry in found.items() if isinstance(entry, kind)} if isinstance(found, dict) else {}
