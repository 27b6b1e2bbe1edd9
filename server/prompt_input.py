"""The several ways in which OpenAI lets a prompt be written, made token ids. Knows no sampling and no adapter."""

from typing import Any

from loractl.adapters.errors import BadRequest
from loractl.server.generation import MAX_PROMPTS
from loractl.server.openai_wire import MAX_CHOICES
from loractl.server.serving import Serving


async def read_prompts(
    serving: Serving, written: str | list[Any], *, field: str, num_choices: int = 1
) -> list[tuple[int, ...]]:
    """Tokenize a text, several texts, token ids, or several lists of them; raises BadRequest naming the field."""
    given: list[Any] = [written] if isinstance(written, str) else list(written)
    if given and all(isinstance(item, int) for item in given):
        given = [given]
    if not given or any(item in ("", []) for item in given):
        raise BadRequest(f"the {field} is empty", field=field)
    if len(given) * num_choices > MAX_PROMPTS * MAX_CHOICES or len(given) > MAX_PROMPTS:
        raise BadRequest(f"at most {MAX_PROMPTS} prompts in one request", field=field)
    tokenized: list[tuple[int, ...]] = []
    for item in given:
        if isinstance(item, str):
            serving.check_length(len(item), field=field)
            tokenized.append(await serving.prompts.from_text(item))
        elif isinstance(item, list):
            serving.prompts.check_ids(item, field=field)
            tokenized.append(tuple(item))
        else:
            raise BadRequest(f"{field} mixes texts and token ids", field=field)
    return tokenized
