"""Every operation is tested twice: with the native kernels and with pure PyTorch."""

import platform
import shutil
import sys

import pytest

from benthic.ops import native


@pytest.fixture(params=["native", "torch"], autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which kernels the test runs on."""
    if request.param == "torch":
        monkeypatch.setattr(native, "_load", lambda: (None, "off"))
    elif native._load()[0] is None:
        # Where kernels are expected to compile, a build that fails must not pass as tests skipped.
        expected = sys.platform == "linux" and platform.machine() == "x86_64" and shutil.which("g++")
        (pytest.fail if expected else pytest.skip)(native.status())
    return request.param
