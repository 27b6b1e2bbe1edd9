"""Writes answers: from a ticket's events to OpenAI's bodies and chunks. Knows no HTTP and no metrics."""

import itertools
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
from msgspec import UNSET

from loractl.server.engine.messages import Event, Failed, Finished, RequestId, Token, TokenLogprob
from loractl.server.openai_replies import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprobs,
    ChatReply,
    Delta,
    FinishReason,
    MessageOut,
    PromptDetails,
    TextChoice,
    TextLogprobs,
    TextReply,
    TokenLogprobItem,
    TopLogprob,
    Usage,
)
from loractl.server.prompts import Prompts
from loractl.server.stream import DONE, server_event

_encoder = msgspec.json.Encoder()

_Position = Sequence[TokenLogprob]


@dataclass(slots=True)
class Written:
    """What has come of one sequence."""

    text: list[str] = field(default_factory=list[str])
    tokens: list[Token] = field(default_factory=list[Token])
    finished: Finished | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What every body and chunk of one answer repeats."""

    id: str
    model: str
    prompts: Prompts
    num_choices: int
    with_logprobs: bool = False
    include_usage: bool = False
    echo: tuple[tuple[str, int], ...] = ()
    """Text and first token of each prompt, where the answer starts with its prompt."""
    with_prompt_logprobs: bool = False
    created: int = field(default_factory=lambda: int(time.time()))


class Writer(Protocol):
    """One of OpenAI's two formats."""

    def body(self, frame: Frame, written: Sequence[Written]) -> bytes: ...
    def opening(self, frame: Frame, num_sequences: int) -> bytes: ...
    def delta(self, frame: Frame, index: int, part: Written) -> bytes: ...
    def usage(self, frame: Frame, usage: Usage) -> bytes: ...


class Sequences(Protocol):
    """What a ticket, or a watch over one, looks like to a writer."""

    @property
    def ids(self) -> tuple[RequestId, ...]: ...
    @property
    def index(self) -> Mapping[RequestId, int]: ...
    def events(self) -> AsyncIterator[list[Event]]: ...


async def whole_answer(ticket: Sequences, frame: Frame, writer: Writer) -> bytes:
    """Wait for every sequence and write one body; raises the first sequence's error."""
    written = [Written() for _ in ticket.ids]
    async for batch in ticket.events():
        for event in batch:
            _add(written[ticket.index[event.id]], event)
    return writer.body(frame, written)


async def streamed_answer(ticket: Sequences, frame: Frame, writer: Writer) -> AsyncIterator[bytes]:
    """Write server-sent events as tokens come: what came together goes out together.

    The first item comes with the first token, so a request that fails before is still an HTTP error.
    """
    finished: list[Finished] = []
    is_open = False
    async for batch in ticket.events():
        parts: dict[int, Written] = {}
        for event in batch:
            _add(parts.setdefault(ticket.index[event.id], Written()), event)
        chunk = b"" if is_open else writer.opening(frame, len(ticket.ids))
        is_open = True
        for index, part in parts.items():
            if part.finished is not None:
                finished.append(part.finished)
            chunk += writer.delta(frame, index, part)
        if chunk:
            yield chunk
    last = writer.usage(frame, usage_of(finished, frame.num_choices)) if frame.include_usage else b""
    yield last + DONE


def _add(written: Written, event: Event) -> None:
    if isinstance(event, Failed):
        raise event.error
    if event.text:
        written.text.append(event.text)
    if isinstance(event, Finished):
        written.finished = event
    else:
        written.tokens.append(event)


def usage_of(finished: Iterable[Finished], num_choices: int) -> Usage:
    """Count a prompt once for all its choices, as OpenAI does."""
    ends = list(finished)
    prompt = sum(end.num_prompt_tokens for end in ends) // num_choices
    output = sum(end.num_output_tokens for end in ends)
    cached = min(prompt, max((end.num_cached_tokens for end in ends), default=0))
    return Usage(prompt, output, prompt + output, PromptDetails(cached))


def finish_reason(finished: Finished) -> FinishReason:
    """OpenAI's word for how a sequence ended."""
    return "abort" if finished.reason == "cancelled" else finished.reason


class ChatWriter:
    """`chat.completion` and its chunks."""

    def body(self, frame: Frame, written: Sequence[Written]) -> bytes:
        ends = [each.finished for each in written if each.finished is not None]
        messages = [self.message(index, each) for index, each in enumerate(written)]
        choices = [
            ChatChoice(
                index=index,
                message=messages[index][0],
                finish_reason=messages[index][1],
                logprobs=chat_logprobs(frame, each.tokens),
                stop_reason=end.stop_reason,
            )
            for index, (each, end) in enumerate(zip(written, ends, strict=True))
        ]
        reply = ChatReply(
            id=frame.id,
            created=frame.created,
            model=frame.model,
            choices=choices,
            usage=usage_of(ends, frame.num_choices),
            prompt_logprobs=prompt_logprobs(frame, ends[0]) if frame.with_prompt_logprobs else UNSET,
        )
        return _encoder.encode(reply)

    def message(self, index: int, written: Written) -> tuple[MessageOut, FinishReason]:
        """The message of a sequence that has ended, and how it ended."""
        del index
        assert written.finished is not None
        return MessageOut("".join(written.text)), finish_reason(written.finished)

    def opening(self, frame: Frame, num_sequences: int) -> bytes:
        return b"".join(
            self.chunk(frame, ChatChunkChoice(index, Delta(role="assistant", content="")))
            for index in range(num_sequences)
        )

    def delta(self, frame: Frame, index: int, part: Written) -> bytes:
        text, logprobs = "".join(part.text), chat_logprobs(frame, part.tokens)
        chunk = b""
        if text or (logprobs is not None and logprobs.content):
            chunk += self.chunk(frame, ChatChunkChoice(index, Delta(content=text), logprobs=logprobs))
        if part.finished is not None:
            end = part.finished
            choice = ChatChunkChoice(index, Delta(), finish_reason=finish_reason(end), stop_reason=end.stop_reason)
            chunk += self.chunk(frame, choice)
        return chunk

    def usage(self, frame: Frame, usage: Usage) -> bytes:
        chunk = ChatChunk(id=frame.id, created=frame.created, model=frame.model, choices=[], usage=usage)
        return server_event(_encoder.encode(chunk))

    def chunk(self, frame: Frame, choice: ChatChunkChoice) -> bytes:
        """One event with one choice's change."""
        chunk = ChatChunk(
            id=frame.id,
            created=frame.created,
            model=frame.model,
            choices=[choice],
            usage=None if frame.include_usage else UNSET,
        )
        return server_event(_encoder.encode(chunk))


class TextWriter:
    """`text_completion`, which is its own chunk."""

    def body(self, frame: Frame, written: Sequence[Written]) -> bytes:
        ends = [each.finished for each in written if each.finished is not None]
        choices = [
            TextChoice(
                index=index,
                text=self._echo(frame, index) + "".join(each.text),
                finish_reason=finish_reason(end),
                logprobs=self._logprobs(frame, index, each, end),
                stop_reason=end.stop_reason,
                prompt_logprobs=prompt_logprobs(frame, end) if frame.with_prompt_logprobs else UNSET,
            )
            for index, (each, end) in enumerate(zip(written, ends, strict=True))
        ]
        return _encoder.encode(self._reply(frame, choices, usage_of(ends, frame.num_choices)))

    def opening(self, frame: Frame, num_sequences: int) -> bytes:
        if not frame.echo:
            return b""
        return b"".join(
            self._chunk(frame, TextChoice(index, self._echo(frame, index))) for index in range(num_sequences)
        )

    def delta(self, frame: Frame, index: int, part: Written) -> bytes:
        text, end = "".join(part.text), part.finished
        if not text and end is None and not (frame.with_logprobs and part.tokens):
            return b""
        choice = TextChoice(
            index,
            text,
            finish_reason=finish_reason(end) if end is not None else None,
            logprobs=text_logprobs(frame, part.tokens) if frame.with_logprobs else None,
            stop_reason=end.stop_reason if end is not None else None,
        )
        return self._chunk(frame, choice)

    def usage(self, frame: Frame, usage: Usage) -> bytes:
        return server_event(_encoder.encode(self._reply(frame, [], usage)))

    def _echo(self, frame: Frame, index: int) -> str:
        return frame.echo[index // frame.num_choices][0] if frame.echo else ""

    def _logprobs(self, frame: Frame, index: int, written: Written, end: Finished) -> TextLogprobs | None:
        if not frame.with_logprobs:
            return None
        if not frame.echo:
            return text_logprobs(frame, written.tokens)
        first = frame.echo[index // frame.num_choices][1]
        return text_logprobs(frame, written.tokens, echoed=first, before=end.prompt_logprobs or ())

    def _chunk(self, frame: Frame, choice: TextChoice) -> bytes:
        return server_event(_encoder.encode(self._reply(frame, [choice], None if frame.include_usage else UNSET)))

    def _reply(self, frame: Frame, choices: list[TextChoice], usage: Any) -> TextReply:
        return TextReply(id=frame.id, created=frame.created, model=frame.model, choices=choices, usage=usage)


def chat_logprobs(frame: Frame, tokens: Sequence[Token]) -> ChatLogprobs | None:
    """Chosen tokens with their alternatives, in the chat format."""
    if not frame.with_logprobs:
        return None
    prompts = frame.prompts
    items = [
        TokenLogprobItem(
            token=prompts.token_text(token.token_id),
            logprob=_finite(token.logprob),
            bytes=prompts.token_bytes(token.token_id),
            top_logprobs=[
                TopLogprob(prompts.token_text(top.token_id), _finite(top.logprob), prompts.token_bytes(top.token_id))
                for top in token.top
            ],
        )
        for token in tokens
    ]
    return ChatLogprobs(items)


def text_logprobs(
    frame: Frame, tokens: Sequence[Token], *, echoed: int | None = None, before: Sequence[_Position] = ()
) -> TextLogprobs:
    """The same in the completion format; `echoed` is an echoed prompt's first token, `before` what followed it."""
    rows: list[tuple[int, float | None, _Position]] = [] if echoed is None else [(echoed, None, ())]
    rows += [(position[0].token_id, _finite(position[0].logprob), position[1:]) for position in before]
    rows += [(token.token_id, _finite(token.logprob), token.top) for token in tokens]
    texts = [frame.prompts.token_text(token_id) for token_id, _, _ in rows]
    tops: list[dict[str, float] | None] = [
        None if logprob is None else {frame.prompts.token_text(each.token_id): _finite(each.logprob) for each in top}
        for _, logprob, top in rows
    ]
    return TextLogprobs(
        tokens=texts,
        token_logprobs=[logprob for _, logprob, _ in rows],
        top_logprobs=tops,
        text_offset=list(itertools.accumulate((len(text) for text in texts[:-1]), initial=0)) if texts else [],
    )


def prompt_logprobs(frame: Frame, end: Finished) -> list[dict[str, Any] | None]:
    """vLLM's form: nothing for the first token, then per position the token's and the likeliest."""
    return [
        None,
        *(
            {
                str(each.token_id): {
                    "logprob": _finite(each.logprob),
                    "decoded_token": frame.prompts.token_text(each.token_id),
                }
                for each in position
            }
            for position in end.prompt_logprobs or ()
        ),
    ]


def _finite(logprob: float | None) -> float:
    """JSON has no infinity; OpenAI writes -9999 for what cannot be."""
    return max(-9999.0, logprob) if logprob is not None else -9999.0
