"""Small pushes whose every file tells of which push it is, and the books of what was acknowledged. Knows no fault."""

import base64
import hashlib
import json
import sqlite3
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from loractl.hub.database import SQLITE_FILE


@dataclass
class Books:
    """What the clients were promised: commits with their files' hashes, channels, repos."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    commits: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict[tuple[str, str], dict[str, str]])
    deleted: set[str] = field(default_factory=set[str])
    num_acknowledged: int = 0
    num_unknown: int = 0


def push(http: httpx.Client, books: Books, repo: str, text: str) -> None:
    """One commit of two small files and one large; each holds the same random text, so that a mixture shows."""
    large = (text * 200).encode()
    oid = hashlib.sha256(large).hexdigest()
    wanted = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": oid, "size": len(large)}]}
    offered = http.post(f"/{repo}.git/info/lfs/objects/batch", json=wanted)
    offered.raise_for_status()
    actions = offered.json()["objects"][0].get("actions")
    if actions is not None:
        http.put(actions["upload"]["href"], content=large).raise_for_status()
    small = base64.b64encode(text.encode()).decode()
    lines: list[dict[str, Any]] = [{"key": "header", "value": {"summary": text}}]
    lines += [{"key": "file", "value": {"path": path, "content": small}} for path in ("a.txt", "b.txt")]
    lines.append({"key": "lfsFile", "value": {"path": "large.txt", "algo": "sha256", "oid": oid, "size": len(large)}})
    answer = http.post(f"/api/models/{repo}/commit/main", content="\n".join(json.dumps(line) for line in lines))
    answer.raise_for_status()
    digest = hashlib.sha256(text.encode()).hexdigest()
    with books.lock:
        books.commits[repo, answer.json()["commitOid"]] = {"a.txt": digest, "b.txt": digest, "large.txt": oid}
        books.num_acknowledged += 1


def look(root: Path, books: Books) -> tuple[int, set[str]]:
    """Read the folder without the hub: the database is whole, every commit has its files whole and of one push."""
    connection = sqlite3.connect(root / SQLITE_FILE)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    trees: dict[tuple[str, str], dict[str, str]] = {}
    rows = connection.execute(
        "SELECT n.namespace || '/' || n.name, c.oid, c.title, t.path, t.sha256 FROM repo n "
        "JOIN commit_log c ON c.repo = n.id LEFT JOIN tree_entry t ON t.commit_oid = c.oid"
    )
    named: set[str] = set()
    for repo, oid, title, path, sha256 in rows:
        tree = trees.setdefault((repo, oid), {})
        if path is None:
            continue
        tree[path] = sha256
        named.add(sha256)
        data = (root / "blobs/sha256" / sha256[:2] / sha256[2:4] / sha256).read_bytes()
        assert hashlib.sha256(data).hexdigest() == sha256
        assert data == title.encode() * (200 if path == "large.txt" else 1), f"{path} of {oid} is of another push"
    for key, files in trees.items():
        assert set(files) in (set(), {"a.txt", "b.txt", "large.txt"}), f"{key} is half there"
    for key, files in books.commits.items():
        if key[0] not in books.deleted:
            assert trees.get(key) == files, f"{key} was acknowledged and is gone"
    for (channel,) in connection.execute("SELECT commit_oid FROM ref"):
        assert any(oid == channel for _, oid in trees)
    connection.close()
    return len(trees), named
