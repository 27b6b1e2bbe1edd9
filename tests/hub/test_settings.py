"""Settings as an operator writes them: in the environment, as text."""

from pathlib import Path

import pytest

from loractl.adapters.errors import UsageError
from loractl.hub.settings import read_settings


def test_settings_are_read_from_the_environment() -> None:
    environment = {
        "LORACTL_HUB_ROOT": "/srv/hub",
        "LORACTL_HUB_PORT": "9000",
        "LORACTL_HUB_GC_GRACE_S": "1.5",
        "LORACTL_HUB_ANONYMOUS_READ": "yes",
        "LORACTL_HUB_BLOBS": "s3://bucket/prefix",
    }
    settings = read_settings(environment, port=None, host="::1")
    assert (settings.root, settings.port, settings.gc_grace_s) == (Path("/srv/hub"), 9000, 1.5)
    assert (settings.anonymous_read, settings.blobs, settings.host) == (True, "s3://bucket/prefix", "::1")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("PORT", "eighty"), ("ANONYMOUS_READ", "perhaps"), ("GC_GRACE_S", "")),
        *(("GC_EVERY_S", "-5"), ("GC_EVERY_S", "nan"), ("S3_TIMEOUT_S", "inf"), ("MAX_FILES_PER_REPO", "-1")),
    ],
)
def test_setting_that_is_no_value_is_refused_by_its_name(name: str, text: str) -> None:
    with pytest.raises(UsageError, match=f"LORACTL_HUB_{name}"):
        read_settings({f"LORACTL_HUB_{name}": text})
