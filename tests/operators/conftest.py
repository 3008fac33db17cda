from __future__ import annotations

import pytest

from tests.native.conftest import use


@pytest.fixture(autouse=True, params=["body", "kernel"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the operators by their functions, and by the native library."""
    use(request.param, monkeypatch)
