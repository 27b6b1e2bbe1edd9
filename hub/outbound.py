"""Sends to addresses that somebody else chose: to public ones alone, unless the operator allows more. Knows no webhook.

The name is resolved once, every address of it is judged, and the connection goes to the address that was judged, so a
name that means something else a moment later gains nothing. Redirects are not followed and proxies not used.
"""

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpcore

from loractl.adapters.errors import BadRequest, LoractlError, NotAllowed, Unreachable

_MAX_URL_LENGTH = 2000
# Beside these there is EAI_AGAIN: no name server answered.
_NO_SUCH_NAME = {socket.EAI_NONAME, socket.EAI_NODATA}


def check_url(url: str) -> None:
    """Raise BadRequest unless this can be the address of a receiver."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise BadRequest(f"not an address: {error}", field="url") from error
    if parts.scheme not in {"http", "https"} or not parts.hostname or port == 0 or not url.isascii():
        raise BadRequest("not an address that can be sent to", hint="https://host/path", field="url")
    if parts.username is not None or parts.fragment or len(url) > _MAX_URL_LENGTH or any(c <= " " for c in url):
        raise BadRequest("an address without user, fragment and blanks, please", hint="https://host/path", field="url")


def is_public(address: str) -> bool:
    """Tell whether an IP address is one of the public internet's; what embeds another address is judged by that."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo is not None else None)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


async def check_receiver(url: str, *, allow_private: bool) -> None:
    """Raise NotAllowed for a receiver on this machine or in its network, BadRequest for a name that does not exist.

    Raises Unreachable where nobody could be asked for the name: it may be a good one.
    """
    check_url(url)
    parts = urlsplit(url)
    try:
        await _judged(parts.hostname or "", parts.port or 443, allow_private=allow_private)
    except Unreachable as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno not in _NO_SUCH_NAME:
            raise
        raise BadRequest(error.message, hint="https://host/path", field="url") from error


async def post(url: str, *, body: bytes, headers: dict[str, str], timeout_s: float, allow_private: bool) -> int:
    """Send and give the status of the answer, whose body nobody reads. Raises NotAllowed, Unreachable."""
    encoded = [(name.encode("ascii"), value.encode("ascii")) for name, value in headers.items()]
    backend = _Guarded(allow_private=allow_private)
    with _as_unreachable():
        async with (
            asyncio.timeout(timeout_s),
            httpcore.AsyncConnectionPool(network_backend=backend, max_connections=1) as pool,
            pool.stream("POST", url, headers=encoded, content=body) as response,
        ):
            return int(response.status)


async def _judged(host: str, port: int, *, allow_private: bool) -> list[str]:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise Unreachable(f"{host[:200]} has no address") from error
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if not allow_private and not all(is_public(address) for address in addresses):
        raise NotAllowed(
            f"{host[:200]} is an address of this machine or its network",
            hint="the hub's operator may allow it by LORACTL_HUB_WEBHOOK_PRIVATE_ADDRESSES=1",
        )
    return addresses


class _Guarded(httpcore.AsyncNetworkBackend):
    """Connects to addresses that were judged."""

    def __init__(self, *, allow_private: bool) -> None:
        # Typed by what it is: httpcore puts a stand-in of the same name where anyio is missing.
        backend: Any = httpcore.AnyIOBackend
        self._inner: httpcore.AsyncNetworkBackend = backend()
        self._allow_private = allow_private

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - the name is httpcore's
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        addresses = await _judged(host, port, allow_private=self._allow_private)
        return await self._inner.connect_tcp(addresses[0], port, timeout, local_address, socket_options)

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)


@contextlib.contextmanager
def _as_unreachable() -> Iterator[None]:
    try:
        yield
    except LoractlError:
        raise
    except TimeoutError as error:
        raise Unreachable("no answer in time") from error
    except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError, OSError) as error:
        raise Unreachable(f"no answer: {type(error).__name__}") from error
