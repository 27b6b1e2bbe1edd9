"""Skips chart tests, with the reason, where Helm cannot be had."""

import pytest

from chart_tools import HELM_3, HELM_4, ToolMissing, helm_binary


@pytest.fixture(scope="session")
def helm() -> None:
    """Both Helm majors are on this machine."""
    try:
        helm_binary(HELM_4)
        helm_binary(HELM_3)
    except ToolMissing as missing:
        pytest.skip(str(missing))
