"""Checks rows of two answers to one prompt, one preferred to the other. Knows no files and no tokens.

Texts, or messages as trl has them: the prompt a column of its own, or the beginning that both conversations share.
"""

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from loractl.adapters.training.conversations import BadConversation, checked_messages, checked_tools

ANSWERS = ("chosen", "rejected")


def checked_pair(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return prompt, chosen and rejected, all texts or all lists of messages; raises BadConversation naming the key."""
    chosen, rejected = (fields[name] for name in ANSWERS)
    prompt = fields.get("prompt")
    if isinstance(chosen, str) and isinstance(rejected, str):
        pair = _texts(prompt, chosen, rejected)
    else:
        pair = _conversations(prompt, chosen, rejected)
    if pair["chosen"] == pair["rejected"]:
        raise BadConversation("chosen and rejected are the same", key="rejected", hint="leave such rows out")
    if isinstance(prompt, list) and fields.get("tools"):
        pair["tools"] = checked_tools(fields["tools"], [*pair["prompt"], *pair["chosen"]])
    return pair


def _texts(prompt: Any, chosen: str, rejected: str) -> dict[str, Any]:
    if prompt is None:
        raise BadConversation("chosen and rejected are texts, but there is no column prompt", key="chosen")
    if not isinstance(prompt, str):
        raise BadConversation(f"prompt is {type(prompt).__name__}, but chosen is text", key="prompt")
    pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    for key, text in pair.items():
        if not text.strip():
            raise BadConversation(f"{key} is empty", key=key)
    return pair


def _conversations(prompt: Any, chosen: Any, rejected: Any) -> dict[str, Any]:
    turns = {name: _messages(name, value) for name, value in zip(ANSWERS, (chosen, rejected), strict=True)}
    if prompt is None:
        shared = zip(turns["chosen"], turns["rejected"], strict=False)
        num_shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], shared))
        head = turns["chosen"][:num_shared]
        turns = {name: own[num_shared:] for name, own in turns.items()}
    elif isinstance(prompt, list):
        head = checked_messages(prompt, key="prompt", needs_answer=False)
    else:
        raise BadConversation(
            f"prompt is {type(prompt).__name__}, but chosen is a list of messages", key="prompt", hint="both or neither"
        )
    if not head:
        raise BadConversation("chosen and rejected have no beginning in common", key="chosen")
    for name, own in turns.items():
        if not own or own[0]["role"] != "assistant":
            raise BadConversation(f"{name} does not begin with an assistant's message", key=name)
    return {"prompt": head, **turns}


def _messages(name: str, value: Any) -> list[dict[str, Any]]:
    return checked_messages([value] if isinstance(value, Mapping) else value, key=name)
