"""What changed, as a page or as a stream. Translates only."""

from collections.abc import AsyncIterator
from typing import Annotated, Any

from litestar import Request, Response, get
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import QueryParameter
from litestar.response import Stream

from loractl.adapters.errors import BadRequest
from loractl.hub.access import ActorDep, HubDep, Policy, bearer, policy
from loractl.hub.actor import Actor
from loractl.hub.registry.event_log import EventFilter
from loractl.hub.registry.journal import KINDS
from loractl.hub.wire import API_PREFIX, DEFAULT_PAGE, MAX_PAGE, EventPage

_STREAM = "text/event-stream"

Number = Annotated[int | None, QueryParameter(ge=0, le=2**53)]
Limit = Annotated[int, QueryParameter(ge=1, le=MAX_PAGE)]


@get(
    API_PREFIX + "/events",
    opt=policy(Policy.TOKEN),
    responses={200: ResponseSpec(EventPage, generate_examples=False, description="A page of events, or their stream.")},
)
async def events(
    *,
    request: "Request[Any, Any, Any]",
    hub: HubDep,
    actor: ActorDep,
    after: Number = None,
    kind: Annotated[list[str] | None, QueryParameter()] = None,
    pattern: Annotated[str | None, QueryParameter(name="repo", max_length=200)] = None,
    channel: Annotated[str | None, QueryParameter(max_length=200)] = None,
    limit: Limit = DEFAULT_PAGE,
) -> Response[Any]:
    """Give what changed after an event; with `Accept: text/event-stream` a stream that goes on.

    Without `after` a stream begins now and a page with the oldest event that is kept. `Last-Event-ID` counts as
    `after`. A stream says `ready` when all that was missed is told, and `gone` (status 410 at the start) when some of
    it is no longer kept: look at everything afresh, then follow without `after`.
    """
    wanted = EventFilter(kinds=_known_kinds(kind or []), repo=pattern, channel=channel)
    if after is None:
        after = _last_event_id(request)
    if _STREAM not in request.headers.get("accept", ""):
        start = await hub.events.oldest_kept() if after is None else after
        return Response(await hub.events.after(start, actor=actor, wanted=wanted, limit=limit))
    start = await hub.feed.start(after=after)
    # Asked once before the answer begins, so that 410 is a status and not a message.
    await hub.events.after(start, actor=actor, limit=1)
    secret, request_id = bearer(request), actor.request_id

    async def still() -> Actor:
        return await hub.tokens.authenticate(secret, request_id=request_id)

    body: AsyncIterator[bytes] = hub.feed.stream(start, wanted=wanted, actor=still)
    # A proxy that buffers would hold the events back.
    return Stream(body, media_type=_STREAM, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})


def _known_kinds(kinds: list[str]) -> frozenset[str]:
    for one in kinds:
        if one not in KINDS:
            raise BadRequest(f"unknown kind of event {one[:40]!r}", hint=f"one of {', '.join(KINDS)}", field="kind")
    return frozenset(kinds)


def _last_event_id(request: "Request[Any, Any, Any]") -> int | None:
    text = request.headers.get("last-event-id")
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 15:
        raise BadRequest("Last-Event-ID is not a number of an event", field="Last-Event-ID")
    return int(text)


ROUTES = [events]
