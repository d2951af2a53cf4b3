"""What a test does where there are no native kernels."""

import platform
import shutil
import sys
from typing import NoReturn

import pytest


def missing(reason: str) -> NoReturn:
    """Skip; but where a compiler is expected, fail: a build that fails must not pass as tests skipped."""
    expected = sys.platform == "linux" and platform.machine() == "x86_64" and shutil.which("g++")
    (pytest.fail if expected else pytest.skip)(reason)
