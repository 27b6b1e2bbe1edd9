"""Points in time as the hub shows them. Knows no clock."""

from datetime import UTC, datetime


def iso(moment: float) -> str:
    """RFC 3339 in UTC with milliseconds, the form that Hugging Face clients parse."""
    text = datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


def iso_or_none(moment: float | None) -> str | None:
    return None if moment is None else iso(moment)
