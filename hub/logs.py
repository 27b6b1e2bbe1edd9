"""Logs as JSON lines on stderr: one line per request, with its id, without secrets. Knows no route."""

import json
import logging
import re
import sys
import traceback
from datetime import UTC, datetime
from typing import Any

# What must never be in a log, whatever else went wrong: tokens of this project and of its neighbours.
_SECRETS = re.compile(
    r"(?:lch_|lrh_|hf_|sk-|whsec_)[A-Za-z0-9_+/=-]{16,}|(?i:signature=)[^&\s\"']+|(?i:bearer\s+)[^\s\"']+"
)
_FIELDS = ("request_id", "method", "path", "status", "seconds", "sent_bytes", "actor")


class JsonLines(logging.Formatter):
    """One JSON object per record."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in _FIELDS if hasattr(record, name)}
        if record.exc_info:
            line["trace"] = "".join(traceback.format_exception(*record.exc_info))
        return redacted(json.dumps(line, ensure_ascii=False, default=str))


def redacted(text: str) -> str:
    """Text without anything that looks like a secret."""
    return _SECRETS.sub("[secret]", text)


def configure_logs(level: str) -> None:
    """Send everything to stderr as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for chatty in ("uvicorn.access", "aiosqlite", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
