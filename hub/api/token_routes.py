"""Tokens, for admins of the whole hub. Translates only."""

from litestar import delete, get, post
from litestar.params import FromPath, JSONBody

from loractl.hub.access import ActorDep, HubDep, Policy, policy
from loractl.hub.wire import API_PREFIX, TokenCreate, TokenCreated, TokenList, TokenView


@get(API_PREFIX + "/tokens", opt=policy(Policy.HUB_ADMIN))
async def list_tokens(hub: HubDep) -> TokenList:
    """All tokens, without their secrets."""
    return TokenList(tokens=await hub.tokens.list_all())


@post(API_PREFIX + "/tokens", opt=policy(Policy.HUB_ADMIN), status_code=201)
async def create_token(data: JSONBody[TokenCreate], hub: HubDep, actor: ActorDep) -> TokenCreated:
    """Make a token; its secret is shown this once."""
    return await hub.tokens.create(data, actor=actor)


@delete(API_PREFIX + "/tokens/{token_id:str}", opt=policy(Policy.HUB_ADMIN), status_code=200)
async def revoke_token(token_id: FromPath[str], hub: HubDep, actor: ActorDep) -> TokenView:
    """End a token."""
    return await hub.tokens.revoke(token_id, actor=actor)


ROUTES = [list_tokens, create_token, revoke_token]
