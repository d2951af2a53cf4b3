"""Every operation is tested twice: with the native kernels and with pure PyTorch."""

import pytest

from benthic.ops import native
from tests.support import compiled


@pytest.fixture(params=["native", "torch"], autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which kernels the test runs on."""
    if request.param == "torch":
        monkeypatch.setattr(native, "_load", lambda: (None, "off"))
    elif native._load()[0] is None:
        compiled.missing(native.status())
    return request.param
