"""From messages or text to token ids and back, with the base's tokenizer and template, off the event loop.

Knows nothing of adapters and sampling. Templates come from the base alone: no request and no adapter can bring one.
"""

import asyncio
import functools
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jinja2

from loractl.adapters.errors import BadRequest
from loractl.server.openai_wire import Message, Tool

_T = TypeVar("_T")

# A text this short is tokenized faster than a thread is woken.
_INLINE_CHARS = 2_000


class Prompts:
    """Renders, tokenizes and detokenizes with one base's tokenizer (transformers); two threads do the long ones."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenizer")

    @classmethod
    def from_folder(cls, base: Path) -> "Prompts":
        from loractl.adapters.base_loading import load_tokenizer

        return cls(load_tokenizer(base))

    @property
    def vocab_size(self) -> int:
        return len(self.tokenizer)

    @functools.cached_property
    def longest_token_chars(self) -> int:
        """Characters of the longest entry of the vocabulary."""
        return max(len(piece) for piece in self.tokenizer.get_vocab())

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def from_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        opening: str = "",
    ) -> tuple[int, ...]:
        """Render the base's chat template and tokenize it; raises BadRequest(field=messages) where it cannot.

        `opening` is a beginning that the answer must have; it is put behind what the template wrote.
        """
        if continue_final_message and add_generation_prompt:
            raise BadRequest(
                "continue_final_message excludes add_generation_prompt",
                hint="set add_generation_prompt to false",
                field="continue_final_message",
            )
        turns = [_as_template_turn(message, index) for index, message in enumerate(messages)]
        specs = [_as_template_tool(tool) for tool in tools] or None

        def render() -> tuple[int, ...]:
            text = self.tokenizer.apply_chat_template(
                turns,
                tools=specs,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
            return self._encode(text + opening, special=False)

        if self.tokenizer.chat_template is None:
            raise BadRequest("this base has no chat template", hint="use /v1/completions", field="messages")
        try:
            return await self._in_thread(render)
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            # The base's template refuses what the client sent: roles out of order, a missing content.
            raise BadRequest(f"the base's chat template refuses these messages: {error}", field="messages") from error

    async def from_text(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Tokenize a text as it is."""
        if len(text) <= _INLINE_CHARS:
            return self._encode(text, special=add_special_tokens)
        return await self._in_thread(lambda: self._encode(text, special=add_special_tokens))

    async def to_text(self, token_ids: Sequence[int]) -> str:
        """Detokenize; raises BadRequest for an id beyond the vocabulary."""
        self.check_ids(token_ids, field="tokens")
        return await self._in_thread(lambda: str(self.tokenizer.decode(list(token_ids))))

    def check_ids(self, token_ids: Sequence[int], *, field: str) -> None:
        """Raise BadRequest unless every id is in the vocabulary."""
        if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self.vocab_size:
            raise BadRequest(
                f"{field}: token id {max(token_ids)} is not in the vocabulary of {self.vocab_size}", field=field
            )

    def token_text(self, token_id: int) -> str:
        """What one token shows as; an incomplete character shows as U+FFFD."""
        return self._token(token_id)[0]

    def token_bytes(self, token_id: int) -> list[int]:
        """The bytes that one token stands for, also where they are half a character."""
        return self._token(token_id)[1]

    @functools.cached_property
    def _token(self) -> Callable[[int], tuple[str, list[int]]]:
        as_bytes = _byte_level_alphabet(self.tokenizer)

        @functools.lru_cache(maxsize=65_536)
        def look_up(token_id: int) -> tuple[str, list[int]]:
            shown = str(self.tokenizer.decode([token_id]))
            piece = self.tokenizer.convert_ids_to_tokens(token_id) or ""
            if as_bytes is not None and all(character in as_bytes for character in piece):
                return shown, [as_bytes[character] for character in piece]
            return shown, list(shown.encode())

        return look_up

    def _encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        try:
            return tuple(self.tokenizer.encode(text, add_special_tokens=special))
        except (UnicodeEncodeError, TypeError) as error:
            # tokenizers says TypeError for a lone surrogate, which JSON can spell and UTF-8 cannot.
            raise BadRequest("the text is not valid Unicode") from error

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _as_template_turn(message: Message, index: int) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    turn["content"] = _as_text(message, index)
    if message.name is not None:
        turn["name"] = message.name
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                # Templates write the arguments with `tojson`: they expect the object, not its text.
                "function": {"name": call.function.name, "arguments": _as_object(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return turn


def _as_text(message: Message, index: int) -> str:
    if message.content is None:
        if message.role == "assistant" and message.tool_calls:
            return ""
        raise BadRequest(f"messages[{index}].content is missing", field=f"messages[{index}].content")
    if isinstance(message.content, str):
        return message.content
    texts: list[str] = []
    for position, part in enumerate(message.content):
        if part.type != "text" or part.text is None:
            field = f"messages[{index}].content[{position}].type"
            raise BadRequest(f"{field}: {part.type!r} is not served", hint="this base reads text only", field=field)
        texts.append(part.text)
    return "".join(texts)


def _as_object(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def _as_template_tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.function.name}
    if tool.function.description is not None:
        function["description"] = tool.function.description
    function["parameters"] = tool.function.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}


def _byte_level_alphabet(tokenizer: Any) -> dict[str, int] | None:
    """GPT-2's map from printable characters back to bytes, for tokenizers that use it; else None."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or "ByteLevel" not in repr(backend.decoder):
        return None
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(rest)}
