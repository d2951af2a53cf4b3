"""A run with everything in it."""

from pathlib import Path

import pytest
from whole_run import write_run


@pytest.fixture
def full(tmp_path: Path) -> Path:
    return write_run(tmp_path / "a <b> run")
