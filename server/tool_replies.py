"""Writes chats whose answers may hold tool calls, whole or as deltas. Knows no format of calls (see `tool_calls`)."""

from collections.abc import Iterator

from msgspec import UNSET

from loractl.server.openai_replies import ChatChunkChoice, Delta, FinishReason, FunctionOut, MessageOut, ToolCallOut
from loractl.server.replies import ChatWriter, Frame, Written, chat_logprobs, finish_reason
from loractl.server.tool_calls import CallPart, Read, ToolCallReader, joined
from loractl.server.tool_plan import ToolPlan


class ToolWriter(ChatWriter):
    """As ChatWriter, with one reader of calls per choice; good for one answer."""

    def __init__(self, plan: ToolPlan) -> None:
        self._plan = plan
        self._readers: dict[int, ToolCallReader] = {}

    def message(self, index: int, written: Written) -> tuple[MessageOut, FinishReason]:
        reads = list(self._read(index, written))
        content = "".join(read.content for read in reads)
        calls = joined(part for read in reads for part in read.calls)
        out = MessageOut(
            content if content.strip() or not calls else None,
            tool_calls=[_whole(call) for call in calls] if calls else UNSET,
        )
        return out, self._reason(index, written)

    def delta(self, frame: Frame, index: int, part: Written) -> bytes:
        reads = list(self._read(index, part))
        content = "".join(read.content for read in reads)
        calls = [_delta(call) for read in reads for call in read.calls]
        logprobs = chat_logprobs(frame, part.tokens)
        chunk = b""
        if content or (logprobs is not None and logprobs.content):
            chunk += self.chunk(frame, ChatChunkChoice(index, Delta(content=content), logprobs=logprobs))
        for call in calls:
            chunk += self.chunk(frame, ChatChunkChoice(index, Delta(tool_calls=[call])))
        if part.finished is not None:
            end = ChatChunkChoice(
                index, Delta(), finish_reason=self._reason(index, part), stop_reason=part.finished.stop_reason
            )
            chunk += self.chunk(frame, end)
        return chunk

    def _read(self, index: int, written: Written) -> Iterator[Read]:
        reader = self._readers.get(index)
        if reader is None:
            reader = self._readers[index] = self._plan.reader()
            # A forced call has begun before the first token of the answer.
            yield self._limited(reader.forced)
        for token in written.tokens:
            yield self._limited(reader.feed(self._plan.markers.get(token.token_id, "") + token.text))
        if written.finished is not None:
            yield self._limited(reader.feed(written.finished.text))
            yield self._limited(reader.finish())

    def _limited(self, read: Read) -> Read:
        return Read(read.content, [part for part in read.calls if not (self._plan.is_single and part.index)])

    def _reason(self, index: int, written: Written) -> FinishReason:
        assert written.finished is not None
        reason = finish_reason(written.finished)
        return "tool_calls" if reason == "stop" and self._readers[index].num_calls else reason


def _whole(call: CallPart) -> ToolCallOut:
    return ToolCallOut(FunctionOut(call.arguments, name=call.name), id=call.id, type="function")


def _delta(part: CallPart) -> ToolCallOut:
    function = FunctionOut(part.arguments, name=part.name)
    return ToolCallOut(function, id=part.id, type="function" if part.id else None, index=part.index)
