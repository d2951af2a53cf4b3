"""Task files for tests."""

import json
from pathlib import Path
from typing import Any


def write_task(path: Path, *problems: dict[str, Any], **settings: Any) -> Path:
    """A task file with these problems, and settings where there are any."""
    lines = ([{"task": settings}] if settings else []) + list(problems)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
