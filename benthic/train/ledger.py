"""ledger.json: what each stage of a run has cost so far, written as the run goes."""

import json
import time
from pathlib import Path
from typing import Any

from benthic.files import read_json_object, write_atomically

FILE_NAME = "ledger.json"


class Ledger:
    """The account of one stage on one device. A resumed stage goes on from what it had spent when last written."""

    def __init__(self, run: Path, stage: str, devices: int = 1) -> None:
        self._path, self._stage, self._devices = run / FILE_NAME, stage, devices
        self._spent = float(self._stages().get(stage, {}).get("wall_hours", 0.0))
        self._start = time.monotonic()

    def write(self, tokens: int, flops: float) -> None:
        """Record the stage's training tokens and their floating-point operations, with the time spent."""
        wall_hours = self._spent + (time.monotonic() - self._start) / 3600
        entry = {"tokens": tokens, "flops": flops, "wall_hours": wall_hours, "device_hours": wall_hours * self._devices}
        content = {"stages": {**self._stages(), self._stage: entry}}
        write_atomically(self._path, json.dumps(content, indent=1))

    def _stages(self) -> dict[str, Any]:
        stages = read_json_object(self._path).get("stages") if self._path.exists() else None
        return stages if isinstance(stages, dict) else {}
