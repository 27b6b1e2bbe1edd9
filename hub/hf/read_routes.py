"""Reading what is there: model info, lists, trees, refs, commits. Translates only."""

from typing import Any
from urllib.parse import urlencode

import msgspec
from litestar import Request, Response, get, post
from litestar.params import FromPath

from loractl.adapters.errors import BadRequest, EntryNotFound
from loractl.adapters.reference import DEFAULT_REVISION
from loractl.hub.access import ActorDep, HubDep, Policy, RepoDep, policy
from loractl.hub.error_answers import header_text
from loractl.hub.hf.addresses import decoded, decoded_path, is_true, public_base
from loractl.hub.hf.views import children, commit_view, file_view, folder_view, model_view, siblings_view
from loractl.hub.registry.catalogue import Search
from loractl.hub.services import Hub

AnyRequest = Request[Any, Any, Any]

_PAGE = 1000
_MAX_PAGE = 1000
_COMMITS_PAGE = 50
_SORTS = {
    "lastModified": "updated_at",
    "last_modified": "updated_at",
    "createdAt": "created_at",
    "created_at": "created_at",
    "downloads": "num_downloads",
    # Nobody likes or trends here: what was changed last comes first.
    "likes": "updated_at",
    "trendingScore": "updated_at",
    "trending_score": "updated_at",
}


@get("/api/models", opt=policy(Policy.TOKEN))
async def list_models(request: AnyRequest, hub: HubDep, actor: ActorDep) -> Response[list[dict[str, Any]]]:
    """List repos, filtered; the header `Link` leads to the next page."""
    query = request.query_params
    sort = query.get("sort") or "lastModified"
    if sort not in _SORTS:
        raise BadRequest(f"cannot sort by {sort[:40]!r}", hint=f"one of {', '.join(sorted(_SORTS))}", field="sort")
    limit = _number(query.get("limit"), default=_PAGE)
    page = await hub.catalogue.search(
        Search(
            text=query.get("search"),
            namespace=query.get("author"),
            tags=tuple(query.getall("filter", [])),
            sort=_SORTS[sort],
            limit=min(limit, _MAX_PAGE),
            cursor=query.get("cursor"),
        ),
        actor=actor,
    )
    full = is_true(query.get("full"))
    found: list[dict[str, Any]] = []
    for one in page.found:
        view = model_view(one.repo, one.head)
        if full:
            _, tree = await hub.revisions.tree(one.repo, one.head.oid)
            view["siblings"] = siblings_view(tree, with_blobs=False)
        found.append(view)
    headers = {}
    if page.next_cursor is not None:
        headers = _next_page(request, hub, cursor=page.next_cursor)
    return Response(found, headers=headers)


@get(
    ["/api/models/{namespace:str}/{name:str}", "/api/models/{namespace:str}/{name:str}/revision/{revision:str}"],
    opt=policy(Policy.READ),
)
async def model_info(request: AnyRequest, hub: HubDep, repo: RepoDep) -> Response[dict[str, Any]]:
    """Everything on one revision of a repo."""
    revision = decoded(request.path_params.get("revision", DEFAULT_REVISION))
    commit, tree = await hub.revisions.tree(repo, revision)
    view = model_view(repo, commit)
    view["siblings"] = siblings_view(tree, with_blobs=is_true(request.query_params.get("blobs")))
    view["usedStorage"] = commit.size_bytes
    return Response(view, headers=await warning_headers(hub, commit.oid))


@get(
    [
        "/api/models/{namespace:str}/{name:str}/tree/{revision:str}",
        "/api/models/{namespace:str}/{name:str}/tree/{revision:str}/{path:path}",
    ],
    opt=policy(Policy.READ),
)
async def list_tree(
    request: AnyRequest, hub: HubDep, repo: RepoDep, revision: FromPath[str]
) -> Response[list[dict[str, Any]]]:
    """Folders and files below a folder of a revision."""
    query = request.query_params
    folder = decoded_path(request.path_params.get("path", "")).strip("/")
    commit, tree = await hub.revisions.tree(repo, decoded(revision))
    folders, files = children(tree, folder, recursive=is_true(query.get("recursive")))
    if folder and not folders and not files:
        raise EntryNotFound(f"{repo.repo_id}@{decoded(revision)} has no folder {folder!r}")
    expanded = commit if is_true(query.get("expand")) else None
    views = [folder_view(found, commit=expanded) for found in folders]
    views += [file_view(entry, commit=expanded) for entry in files]
    return _paged(request, hub, sorted(views, key=lambda view: view["path"]), page=_PAGE)


@post("/api/models/{namespace:str}/{name:str}/paths-info/{revision:str}", opt=policy(Policy.READ), status_code=200)
async def paths_info(request: AnyRequest, hub: HubDep, repo: RepoDep, revision: FromPath[str]) -> list[dict[str, Any]]:
    """Files and folders by name; what is not there is left out. Takes a form or JSON, as clients differ."""
    paths, expand = await _paths_body(request)
    commit, tree = await hub.revisions.tree(repo, decoded(revision))
    by_path = {entry.path: entry for entry in tree}
    expanded = commit if expand else None
    views: list[dict[str, Any]] = []
    for path in dict.fromkeys(item.strip("/") for item in paths):
        if path in by_path:
            views.append(file_view(by_path[path], commit=expanded))
        elif any(name.startswith(f"{path}/") for name in by_path):
            views.append(folder_view(path, commit=expanded))
    return views


@get("/api/models/{namespace:str}/{name:str}/refs", opt=policy(Policy.READ))
async def list_refs(hub: HubDep, repo: RepoDep) -> dict[str, Any]:
    """Channels as branches; versions and tags as tags."""
    refs = await hub.revisions.refs(repo)
    branches = [ref for ref in refs if ref.kind == "branch"]
    tags = [ref for ref in refs if ref.kind != "branch"]
    return {
        "branches": [
            {"name": ref.name, "ref": f"refs/heads/{ref.name}", "targetCommit": ref.commit_oid} for ref in branches
        ],
        "tags": [{"name": ref.name, "ref": f"refs/tags/{ref.name}", "targetCommit": ref.commit_oid} for ref in tags],
        "converts": [],
        "pullRequests": [],
    }


@get("/api/models/{namespace:str}/{name:str}/commits/{revision:str}", opt=policy(Policy.READ))
async def list_commits(
    request: AnyRequest, hub: HubDep, repo: RepoDep, revision: FromPath[str]
) -> Response[list[dict[str, Any]]]:
    """A revision and its ancestors, newest first."""
    limit = min(_number(request.query_params.get("limit"), default=_COMMITS_PAGE), _MAX_PAGE)
    start = request.query_params.get("cursor") or decoded(revision)
    # One more than asked for: it is where the next page begins.
    commits = await hub.revisions.log(repo, start, limit=limit + 1)
    headers = _next_page(request, hub, cursor=commits[limit].oid) if len(commits) > limit else {}
    return Response([commit_view(commit) for commit in commits[:limit]], headers=headers)


async def warning_headers(hub: Hub, commit_oid: str) -> dict[str, str]:
    """The header by which stock clients tell their users that a revision was withdrawn."""
    reason = await hub.revisions.yank_reason(commit_oid)
    return {} if reason is None else {"X-HF-Warning": yank_warning(reason)}


def yank_warning(reason: str) -> str:
    return header_text(f"yanked; this revision was withdrawn: {reason}")


async def _paths_body(request: AnyRequest) -> tuple[list[str], bool]:
    if "json" in request.headers.get("content-type", ""):
        try:
            body = msgspec.json.decode(await request.body(), type=_PathsBody)
        except msgspec.DecodeError as error:
            raise BadRequest(f"the body is not a list of paths: {error}", field="paths") from error
        paths, expand = body.paths, body.expand
    else:
        form = await request.form()
        paths = [str(value) for value in form.getall("paths", [])]
        expand = is_true(str(form.get("expand", "")))
    if len(paths) > _MAX_PAGE:
        raise BadRequest(f"{len(paths)} paths are over the limit of {_MAX_PAGE}", field="paths")
    return paths, expand


class _PathsBody(msgspec.Struct):
    paths: list[str] = []
    expand: bool = False


def _paged(request: AnyRequest, hub: Hub, views: list[dict[str, Any]], *, page: int) -> Response[list[dict[str, Any]]]:
    """Cut a sorted list after the path that the cursor names."""
    after = request.query_params.get("cursor")
    limit = min(_number(request.query_params.get("limit"), default=page), _MAX_PAGE)
    rest = [view for view in views if after is None or view["path"] > after]
    headers = _next_page(request, hub, cursor=rest[limit - 1]["path"]) if len(rest) > limit else {}
    return Response(rest[:limit], headers=headers)


def _next_page(request: AnyRequest, hub: Hub, *, cursor: str) -> dict[str, str]:
    query = [(key, value) for key, value in request.query_params.multi_items() if key != "cursor"]
    query.append(("cursor", cursor))
    return {"Link": f'<{public_base(request, hub)}{request.scope["path"]}?{urlencode(query)}>; rel="next"'}


def _number(text: str | None, *, default: int) -> int:
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or not int(text[:9]) >= 1:
        raise BadRequest(f"limit={text[:40]!r} is not a number from 1", field="limit")
    return int(text[:9])


ROUTES = [list_models, model_info, list_tree, paths_info, list_refs, list_commits]
