"""The lines that use an adapter, ready to be copied. Names come from strangers, so each is quoted for its language."""

import json
import shlex
from dataclasses import dataclass

from loractl.hub.wire import AdapterDetail


@dataclass(frozen=True, slots=True)
class Usage:
    """One way to use an adapter."""

    title: str
    lines: str


def usages(detail: AdapterDetail, *, hub_url: str) -> list[Usage]:
    """For PEFT, for this project's server and for clients of it, at the revision that is shown."""
    revision = detail.resolved.version or detail.resolved.commit
    name = f"{detail.repo_id}@{revision}"
    base = detail.resolved.base_id or "BASE"
    shown_url = shlex.quote(hub_url)
    body = json.dumps({"model": name, "prompt": "..."})
    return [
        Usage(
            "With PEFT",
            f"# export HF_ENDPOINT={shown_url} HF_TOKEN=...\n"
            f"base = AutoModelForCausalLM.from_pretrained({_python(base)})\n"
            f"model = PeftModel.from_pretrained(base, {_python(detail.repo_id)}, revision={_python(revision)})",
        ),
        Usage(
            "Serve it",
            f"export LORACTL_HUB={shown_url} LORACTL_TOKEN=...\n"
            f"loractl serve {shlex.quote(base)} &\n"
            f"curl localhost:8800/v1/completions -H content-type:application/json -d {shlex.quote(body)}",
        ),
        Usage("Only the files", f"export LORACTL_HUB={shown_url} LORACTL_TOKEN=...\nloractl pull {shlex.quote(name)}"),
    ]


def _python(text: str) -> str:
    """A Python string; JSON's is one, and it has no quotes that end early."""
    return json.dumps(text)
