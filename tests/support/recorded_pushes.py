"""A hub without its HTTP that pushes, promotes, deletes and collects in a folder, telling a file of each success.

Run as a program: recorded_pushes.py ROOT NUM_PUSHES
"""

import asyncio
import hashlib
import json
import os
import random
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from loractl.hub.actor import SYSTEM
from loractl.hub.collect import collect
from loractl.hub.registry.commits import Changes
from loractl.hub.registry.records import Repo, TreeEntry
from loractl.hub.registry.tree import git_blob_sha1
from loractl.hub.services import Hub, open_hub
from loractl.hub.settings import HubSettings
from loractl.hub.wire import Promote


async def _keep(hub: Hub, repo: Repo, path: str, data: bytes) -> TreeEntry:
    async def once() -> AsyncIterator[bytes]:
        yield data

    stored = await hub.ledger.keep(repo, once(), size_bytes=len(data))
    return TreeEntry(path, stored.sha256, git_blob_sha1(data), len(data), is_lfs=False)


async def _push(hub: Hub, number: int, tell: Any) -> None:
    repo = (await hub.repos.create("team", f"r{number // 4}", private=False, actor=SYSTEM)).repo
    text = f"content {number} "
    contents = {"a.txt": text.encode(), "b.txt": text.encode(), "large.txt": (text * 200).encode()}
    files = tuple([await _keep(hub, repo, path, data) for path, data in contents.items()])
    made = await hub.commits.commit(repo, "main", Changes(title=text, files=files), actor=SYSTEM)
    digests = {path: hashlib.sha256(data).hexdigest() for path, data in contents.items()}
    tell({"repo": repo.repo_id, "oid": made.commit.oid, "files": digests})
    await hub.channels.promote(repo, Promote(channel="prod", revision="main"), actor=SYSTEM)
    tell({"repo": repo.repo_id, "prod": made.commit.oid})


async def _main(root: Path, num_pushes: int) -> None:
    chance = random.Random(1)
    descriptor = os.open(root / "acks", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def tell(fact: dict[str, Any]) -> None:
        os.write(descriptor, json.dumps(fact).encode() + b"\n")

    settings = HubSettings(root=root, upload_ttl_s=0.0)
    number = 0
    while number < num_pushes:
        # Closed and opened again, which folds the write-ahead log in.
        async with open_hub(settings) as hub:
            for _ in range(min(12, num_pushes - number)):
                await _push(hub, number, tell)
                number += 1
                if number % 4 == 0 and chance.random() < 0.5:
                    repo_id = f"team/r{number // 4 - 1}"
                    tell({"repo": repo_id, "deleted": True})
                    await hub.repos.delete(await hub.repos.find(repo_id, actor=SYSTEM), actor=SYSTEM)
                    await collect(hub, grace_s=0.0)


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1]), int(sys.argv[2])))
