"""Every operation is tested twice: with the native kernels and with pure PyTorch."""

from collections.abc import Iterator

import pytest

from benthic.ops import native


@pytest.fixture(params=["native", "torch"], autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Which kernels the test runs on."""
    if request.param == "torch":
        monkeypatch.setattr(native, "_load", lambda: (None, "off"))
    elif native._load()[0] is None:
        pytest.skip(native.status())
    yield request.param
