"""What loading a recipe says when it refuses."""

from pathlib import Path

import pytest

from benthic.config.load import load_run_config
from benthic.errors import InputError


def refusal(path: Path | str, *overrides: str) -> str:
    """The one line with which a recipe is refused."""
    with pytest.raises(InputError) as caught:
        load_run_config(path, overrides)
    line = str(caught.value)
    assert "\n" not in line
    return line
