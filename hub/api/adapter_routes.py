"""Adapters by revision: resolve, list, show, validation, history, promote, rollback. Translates only."""

from typing import Annotated

from litestar import get, post
from litestar.params import FromQuery, JSONBody, QueryParameter

from loractl.adapters.errors import NotFound
from loractl.adapters.reference import DEFAULT_REVISION, parse_reference
from loractl.hub.access import ActorDep, HubDep, Policy, RepoDep, policy
from loractl.hub.registry.catalogue import Search
from loractl.hub.registry.repos import RepoMoved
from loractl.hub.wire import (
    API_PREFIX,
    DEFAULT_PAGE,
    MAX_PAGE,
    AdapterDetail,
    AdapterPage,
    ChannelMove,
    ChannelView,
    Diff,
    History,
    Promote,
    Protect,
    Resolved,
    Rollback,
    ValidationRecord,
    Yank,
)

_ADAPTER = API_PREFIX + "/adapters/{namespace:str}/{name:str}"

Limit = Annotated[int, QueryParameter(ge=1, le=MAX_PAGE)]


@get(API_PREFIX + "/resolve", opt=policy(Policy.TOKEN))
async def resolve(
    hub: HubDep,
    actor: ActorDep,
    repo_id: Annotated[str, QueryParameter(name="repo")],
    revision: FromQuery[str] = DEFAULT_REVISION,
) -> Resolved:
    """Make a revision exact."""
    try:
        repo = await hub.repos.find(repo_id, actor=actor)
    except RepoMoved as moved:
        # Its answer says the present name, by which the files are fetched.
        repo = await hub.repos.find(moved.repo_id, actor=actor)
    return await hub.catalogue.resolved(repo, revision)


@get(API_PREFIX + "/adapters", opt=policy(Policy.TOKEN))
async def list_adapters(
    *,
    hub: HubDep,
    actor: ActorDep,
    base: FromQuery[str | None] = None,
    text: FromQuery[str | None] = None,
    task: FromQuery[str | None] = None,
    rank: FromQuery[int | None] = None,
    namespace: FromQuery[str | None] = None,
    author: FromQuery[str | None] = None,
    limit: Limit = DEFAULT_PAGE,
    cursor: FromQuery[str | None] = None,
) -> AdapterPage:
    """List the adapters that this token may see, newest first."""
    wanted = Search(
        base=base,
        text=text,
        task=task,
        rank=rank,
        namespace=namespace,
        author=author,
        limit=limit,
        cursor=cursor,
    )
    page = await hub.catalogue.search(wanted, actor=actor)
    return AdapterPage(adapters=await hub.catalogue.summaries(page), next_cursor=page.next_cursor)


@get(API_PREFIX + "/diff", opt=policy(Policy.TOKEN))
async def diff(
    hub: HubDep,
    actor: ActorDep,
    a: Annotated[str, QueryParameter(max_length=400)],
    b: Annotated[str, QueryParameter(max_length=400)],
) -> Diff:
    """Compare two revisions, written as `team/name@revision`."""
    first, second = parse_reference(a), parse_reference(b)
    return await hub.comparison.diff(
        (await hub.repos.find(first.repo_id, actor=actor), first.revision),
        (await hub.repos.find(second.repo_id, actor=actor), second.revision),
    )


@get(_ADAPTER, opt=policy(Policy.READ))
async def show(hub: HubDep, repo: RepoDep, revision: FromQuery[str] = DEFAULT_REVISION) -> AdapterDetail:
    """Everything on one adapter."""
    return await hub.catalogue.detail(repo, revision)


@get(_ADAPTER + "/validation", opt=policy(Policy.READ))
async def validation(hub: HubDep, repo: RepoDep, revision: FromQuery[str] = DEFAULT_REVISION) -> ValidationRecord:
    """What the checks said of a revision when it was pushed."""
    record = await hub.catalogue.validation(repo, revision)
    if record is None:
        raise NotFound(f"{repo.repo_id}@{revision} holds nothing that was checked")
    return record


@get(_ADAPTER + "/history", opt=policy(Policy.READ))
async def history(
    hub: HubDep, repo: RepoDep, channel: FromQuery[str | None] = None, limit: Limit = DEFAULT_PAGE
) -> History:
    """Who moved which channel, newest first."""
    return History(moves=await hub.channels.history(repo, channel, limit=limit))


@post(_ADAPTER + "/promote", opt=policy(Policy.READ), status_code=200)
async def promote(data: JSONBody[Promote], hub: HubDep, actor: ActorDep, repo: RepoDep) -> ChannelMove:
    """Move a channel to a revision."""
    return await hub.channels.promote(repo, data, actor=actor)


@post(_ADAPTER + "/rollback", opt=policy(Policy.READ), status_code=200)
async def rollback(data: JSONBody[Rollback], hub: HubDep, actor: ActorDep, repo: RepoDep) -> ChannelMove:
    """Move a channel back to where it was."""
    return await hub.channels.rollback(repo, data, actor=actor)


@post(_ADAPTER + "/protect", opt=policy(Policy.ADMIN), status_code=200)
async def protect(data: JSONBody[Protect], hub: HubDep, actor: ActorDep, repo: RepoDep) -> ChannelView:
    """Protect a channel, or let everybody who may write move it again."""
    await hub.channels.protect(repo, data.channel, protected=data.protected, actor=actor)
    detail = await hub.catalogue.detail(repo, data.channel)
    return next(view for view in detail.channels if view.channel == data.channel)


@post(_ADAPTER + "/yank", opt=policy(Policy.WRITE), status_code=200)
async def yank(data: JSONBody[Yank], hub: HubDep, actor: ActorDep, repo: RepoDep) -> Resolved:
    """Withdraw a version, or take that back."""
    await hub.channels.yank(repo, data, actor=actor)
    return await hub.catalogue.resolved(repo, data.revision)


ROUTES = [resolve, list_adapters, diff, show, validation, history, promote, rollback, protect, yank]
