"""What a processor draws under load, from its data sheet: enough for an estimate where nothing measures.

A machine draws more than its processors: memory, disks, fans and the loss of its power supply are not counted.
"""

import platform
from pathlib import Path
from typing import NamedTuple


class Processor(NamedTuple):
    """Thermal design power in watts, and cores."""

    watts: float
    cores: int


PROCESSORS = {
    "EPYC 9654": Processor(360, 96),
    "EPYC 9554": Processor(360, 64),
    "EPYC 7763": Processor(280, 64),
    "EPYC 7742": Processor(225, 64),
    "Xeon(R) Platinum 8592+": Processor(350, 64),
    "Xeon(R) Platinum 8480+": Processor(350, 56),
    "Xeon(R) Platinum 8380": Processor(270, 40),
    "Xeon(R) Gold 6230": Processor(125, 20),
    "Ryzen 9 7950X": Processor(170, 16),
    "Ryzen 7 5800X": Processor(105, 8),
    "i9-13900K": Processor(125, 24),
    "i7-12700": Processor(65, 12),
}
"""By a part of the name the system gives them; vendors' data sheets."""

OTHER_WATTS_PER_CORE = 6.0
"""Of a processor not listed: about the median of those that are."""


def watts_per_core(name: str) -> float:
    """Design power of a processor of this name, divided by its cores."""
    for part, processor in PROCESSORS.items():
        if part in name:
            return processor.watts / processor.cores
    return OTHER_WATTS_PER_CORE


def cpu_name() -> str:
    """The name the system gives this machine's processor; empty if it gives none."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
