"""The list, one adapter, two revisions side by side. Translates the registry's answers into pages; decides nothing."""

import asyncio
from dataclasses import dataclass
from typing import Annotated, Any

from litestar import Response, get
from litestar.params import FromPath, QueryParameter

from loractl.adapters.errors import LoractlError, UsageError
from loractl.adapters.reference import DEFAULT_REVISION, AdapterRef, parse_reference
from loractl.hub.access import ActorDep, HubDep, Policy, RepoDep, policy
from loractl.hub.actor import Actor
from loractl.hub.hf.addresses import decoded, public_base
from loractl.hub.pages.card import card_html
from loractl.hub.pages.loss_curve import HEIGHT, WIDTH, loss_curve
from loractl.hub.pages.rendering import AnyRequest, page
from loractl.hub.pages.usage import usages
from loractl.hub.registry.catalogue import Search
from loractl.hub.registry.records import Repo
from loractl.hub.registry.repos import RepoMoved
from loractl.hub.services import Hub
from loractl.hub.wire import AdapterDetail

_PAGE_SIZE = 50
_MAX_MOVES = 50
_SORTS = {"updated": "updated_at", "created": "created_at", "downloads": "num_downloads"}

Short = Annotated[str, QueryParameter(max_length=400)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """What a person has typed or clicked, as the form shows it again."""

    text: str
    base: str
    task: str
    rank: str
    sort: str

    @property
    def given(self) -> dict[str, str]:
        """Those that narrow the list, by the name that the address gives them."""
        named = {"q": self.text, "base": self.base, "task": self.task, "rank": self.rank}
        return {name: value for name, value in named.items() if value}


@get("/", opt=policy(Policy.PAGE))
async def list_page(
    *,
    request: AnyRequest,
    hub: HubDep,
    actor: ActorDep,
    q: Short = "",
    base: Short = "",
    task: Short = "",
    rank: Short = "",
    sort: Short = "updated",
    cursor: Short = "",
) -> Response[bytes]:
    """The adapters that this person may see."""
    filters = Filters(
        text=q.strip(),
        base=base.strip(),
        task=task.strip(),
        rank=rank.strip(),
        sort=sort if sort in _SORTS else "updated",
    )
    wanted = Search(
        text=filters.text or None,
        base=filters.base or None,
        task=filters.task or None,
        rank=_whole_number(filters.rank),
        sort=_SORTS[filters.sort],
        limit=_PAGE_SIZE,
        cursor=cursor or None,
    )
    found = await hub.catalogue.search(wanted, actor=actor)
    return page(
        request,
        "list.html",
        adapters=await hub.catalogue.summaries(found),
        filters=filters,
        next_cursor=found.next_cursor,
        is_first=not cursor,
    )


def _whole_number(text: str) -> int | None:
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 6:
        raise UsageError(f"rank {text[:20]!r} is not a whole number", hint="write 8, 16, ... or leave it empty")
    return int(text)


@get(["/{namespace:str}/{name:str}", "/{namespace:str}/{name:str}/"], opt=policy(Policy.PAGE_READ))
async def adapter_page(
    request: AnyRequest, hub: HubDep, repo: RepoDep, revision: Short = DEFAULT_REVISION
) -> Response[bytes]:
    """One adapter at a revision."""
    return await _adapter(request, hub, repo, revision)


@get(
    ["/{namespace:str}/{name:str}/tree/{revision:str}", "/{namespace:str}/{name:str}/commit/{revision:str}"],
    opt=policy(Policy.PAGE_READ),
)
async def revision_page(request: AnyRequest, hub: HubDep, repo: RepoDep, revision: FromPath[str]) -> Response[bytes]:
    """The same, by the addresses that Hugging Face clients print after a push."""
    return await _adapter(request, hub, repo, decoded(revision))


async def _adapter(request: AnyRequest, hub: Hub, repo: Repo, revision: str) -> Response[bytes]:
    detail = await hub.catalogue.detail(repo, revision)
    manifest = detail.manifest or {}
    return page(
        request,
        "adapter.html",
        detail=detail,
        revision=revision,
        facts=_facts(detail),
        recipe=sorted(_part(manifest, "recipe").items()),
        metrics=sorted(_part(manifest, "metrics").items()),
        moves=await hub.channels.history(repo, None, limit=_MAX_MOVES),
        # A long card would hold everybody else up.
        card=await asyncio.to_thread(card_html, detail.card) if detail.card else None,
        curve=loss_curve(manifest.get("loss_curve")),
        curve_box=(WIDTH, HEIGHT),
        usages=usages(detail, hub_url=public_base(request, hub)),
    )


def _part(manifest: dict[str, Any], name: str) -> dict[str, Any]:
    part = manifest.get(name)
    return part if isinstance(part, dict) else {}


def _facts(detail: AdapterDetail) -> dict[str, object]:
    """What a manifest tells of where an adapter comes from; it is a stranger's file, so every part may be anything."""
    manifest, config = detail.manifest or {}, detail.config or {}
    base, data = _part(manifest, "base"), _part(manifest, "data")
    return {
        "task": manifest.get("task") or config.get("task_type"),
        "targets": manifest.get("targets") or config.get("target_modules"),
        "alpha": config.get("lora_alpha"),
        "parameters": manifest.get("num_trainable_parameters"),
        "base_revision": base.get("revision"),
        "quantization": base.get("quantization"),
        "data_digest": data.get("digest"),
        "num_rows": data.get("num_rows"),
        "num_eval_rows": data.get("num_eval_rows"),
        "data_files": data.get("files"),
        "parent": manifest.get("parent"),
        "num_probes": len(probes) if isinstance(probes := manifest.get("probes"), list) else 0,
        "loractl_version": manifest.get("loractl_version"),
    }


@get("/adapters/diff", opt=policy(Policy.PAGE))
async def diff_page(request: AnyRequest, hub: HubDep, actor: ActorDep, a: Short = "", b: Short = "") -> Response[bytes]:
    """Two revisions side by side; without both, the form that asks for them."""
    if not (a and b):
        return page(request, "diff.html", a=a, b=b, diff=None, failure=None, largest=0.0)
    try:
        first, second = parse_reference(a.strip()), parse_reference(b.strip())
    except LoractlError as error:
        return page(request, "diff.html", status=400, a=a, b=b, diff=None, failure=error.message, largest=0.0)
    diff = await hub.comparison.diff(
        (await _repo_of(hub, first, actor), first.revision), (await _repo_of(hub, second, actor), second.revision)
    )
    norms = [norm for one in diff.layers for norm in (one.a, one.b, one.difference) if norm is not None]
    return page(request, "diff.html", a=a, b=b, diff=diff, failure=None, largest=max(norms, default=0.0))


async def _repo_of(hub: Hub, ref: AdapterRef, actor: Actor) -> Repo:
    try:
        return await hub.repos.find(ref.repo_id, actor=actor)
    except RepoMoved as moved:
        return await hub.repos.find(moved.repo_id, actor=actor)


ROUTES = [list_page, adapter_page, revision_page, diff_page]
