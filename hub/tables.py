"""The tables of the hub's database, once for SQLite and PostgreSQL; migrations make them. Knows no rule.

namespace 1-n repo 1-n commit 1-n tree_entry n-1 blob
                |        `-- validation, yank
                |-- ref (channels and tags) 1-1 canary    ref_log (append-only)
                |-- repo_alias (old names)      repo_blob (which repo may use which blob)
token   upload_session   upkeep (append-only)   event (append-only)   audit (append-only)   webhook 1-n delivery
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)

# Named, so that a later migration can drop them on both databases.
metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite gives row numbers of its own only to INTEGER keys.
_Serial = BigInteger().with_variant(Integer, "sqlite")


def _key() -> "Column[int]":
    return Column("id", _Serial, primary_key=True, autoincrement=True)


namespace = Table(
    "namespace",
    metadata,
    Column("name", Text, primary_key=True),
    # Null: the hub's own default. Nought: no limit.
    Column("quota_bytes", BigInteger, nullable=True),
    Column("quota_repos", Integer, nullable=True),
    Column("created_at", Float, nullable=False),
)

repo = Table(
    "repo",
    metadata,
    _key(),
    Column("namespace", Text, ForeignKey("namespace.name"), nullable=False, index=True),
    Column("name", Text, nullable=False),
    # Two names that differ in case only would be one folder in the clients' caches.
    Column("folded", Text, nullable=False, unique=True),
    Column("private", Boolean, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("updated_at", Float, nullable=False, index=True),
    Column("num_downloads", BigInteger, nullable=False, default=0),
    Column("next_version", Integer, nullable=False, default=1),
    UniqueConstraint("namespace", "name"),
    # The number of a deleted repo is never given to another.
    sqlite_autoincrement=True,
)

repo_alias = Table(
    "repo_alias",
    metadata,
    Column("folded", Text, primary_key=True),
    Column("repo", _Serial, ForeignKey("repo.id", ondelete="CASCADE"), nullable=False),
)

blob = Table(
    "blob",
    metadata,
    Column("sha256", Text, primary_key=True),
    Column("size_bytes", BigInteger, nullable=False),
    # ready -> deleting (by gc) -> gone; see collect.py
    Column("state", Text, nullable=False),
    Column("touched_at", Float, nullable=False, index=True),
    # CRC-32 of each MiB, so that a flipped bit is found before it is sent, in ranges too.
    Column("block_crc32", LargeBinary, nullable=False),
)

repo_blob = Table(
    "repo_blob",
    metadata,
    Column("repo", _Serial, ForeignKey("repo.id", ondelete="CASCADE"), primary_key=True),
    Column("sha256", Text, ForeignKey("blob.sha256", ondelete="CASCADE"), primary_key=True, index=True),
)

commit = Table(
    "commit_log",
    metadata,
    Column("oid", Text, primary_key=True),
    Column("repo", _Serial, ForeignKey("repo.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("parent", Text, nullable=True),
    Column("title", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("author", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("tree_sha256", Text, nullable=False),
    Column("num_files", Integer, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    # What the adapter in the root of the tree says of itself; null where there is none.
    Column("version", Text, nullable=True),
    Column("digest", Text, nullable=True, index=True),
    Column("adapter_size_bytes", BigInteger, nullable=False, default=0),
    Column("base_id", Text, nullable=True, index=True),
    Column("base_fingerprint", Text, nullable=True, index=True),
    Column("task", Text, nullable=True),
    Column("rank", Integer, nullable=True),
    Column("metrics", Text, nullable=False, default="{}"),
    Column("tags", Text, nullable=False, default="[]"),
)

tree_entry = Table(
    "tree_entry",
    metadata,
    Column("commit_oid", Text, ForeignKey("commit_log.oid", ondelete="CASCADE"), primary_key=True),
    Column("path", Text, primary_key=True),
    Column("sha256", Text, ForeignKey("blob.sha256"), nullable=False, index=True),
    Column("git_sha1", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("is_lfs", Boolean, nullable=False),
)

ref = Table(
    "ref",
    metadata,
    Column("repo", _Serial, ForeignKey("repo.id", ondelete="CASCADE"), primary_key=True),
    Column("name", Text, primary_key=True),
    # branch (a channel), tag (somebody's), version (vN, ours, immutable)
    Column("kind", Text, nullable=False),
    Column("commit_oid", Text, ForeignKey("commit_log.oid"), nullable=False, index=True),
    Column("protected", Boolean, nullable=False, default=False),
    Column("message", Text, nullable=False, default=""),
    Column("updated_at", Float, nullable=False),
)

ref_log = Table(
    "ref_log",
    metadata,
    _key(),
    Column("repo", _Serial, ForeignKey("repo.id", ondelete="CASCADE"), nullable=False),
    Column("name", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("old_oid", Text, nullable=True),
    Column("new_oid", Text, nullable=True),
    Column("by", Text, nullable=False),
    Column("at", Float, nullable=False),
    Column("reason", Text, nullable=False, default=""),
    # Of callers, for the start of a canary; null for every other move.
    Column("share", Float, nullable=True),
    Index("ref_log_by_ref", "repo", "name", "id"),
)

# The revision that a share of a channel's callers gets in place of the one it points at.
canary = Table(
    "canary",
    metadata,
    Column("repo", _Serial, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("commit_oid", Text, ForeignKey("commit_log.oid"), nullable=False, index=True),
    Column("share", Float, nullable=False),
    Column("by", Text, nullable=False),
    Column("at", Float, nullable=False),
    Column("reason", Text, nullable=False),
    ForeignKeyConstraint(["repo", "name"], ["ref.repo", "ref.name"], ondelete="CASCADE"),
)

validation = Table(
    "validation",
    metadata,
    Column("commit_oid", Text, ForeignKey("commit_log.oid", ondelete="CASCADE"), primary_key=True),
    Column("validator_version", Text, nullable=False),
    Column("checked_at", Float, nullable=False),
    Column("record", Text, nullable=False),
)

yank = Table(
    "yank",
    metadata,
    Column("commit_oid", Text, ForeignKey("commit_log.oid", ondelete="CASCADE"), primary_key=True),
    Column("reason", Text, nullable=False),
    Column("by", Text, nullable=False),
    Column("at", Float, nullable=False),
)

token = Table(
    "token",
    metadata,
    Column("id", Text, primary_key=True),
    Column("secret_sha256", Text, nullable=False, unique=True),
    Column("last4", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("roles", Text, nullable=False),
    Column("pattern", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float, nullable=True),
    Column("last_used_at", Float, nullable=True),
    Column("revoked_at", Float, nullable=True),
)

upload_session = Table(
    "upload_session",
    metadata,
    Column("id", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("repo", _Serial, ForeignKey("repo.id", ondelete="CASCADE"), nullable=False),
    Column("owner", Text, nullable=False),
    Column("expires_at", Float, nullable=False, index=True),
)

event = Table(
    "event",
    metadata,
    _key(),
    Column("kind", Text, nullable=False),
    # No foreign key: a deleted repo's last event outlives it. Null with an empty repo_id: concerns the whole hub.
    Column("repo", _Serial, nullable=True),
    Column("repo_id", Text, nullable=False),
    Column("private", Boolean, nullable=False),
    Column("at", Float, nullable=False),
    Column("payload", Text, nullable=False),
)

audit = Table(
    "audit",
    metadata,
    _key(),
    Column("at", Float, nullable=False),
    Column("actor", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("target", Text, nullable=False),
    Column("detail", Text, nullable=False),
    Column("request_id", Text, nullable=False),
)

webhook = Table(
    "webhook",
    metadata,
    _key(),
    Column("url", Text, nullable=False),
    Column("pattern", Text, nullable=False),
    # The pattern of the token that made it: nothing beyond is ever sent.
    Column("scope", Text, nullable=False),
    Column("kinds", Text, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("secret", Text, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("active", Boolean, nullable=False),
)

delivery = Table(
    "delivery",
    metadata,
    _key(),
    Column("webhook", _Serial, ForeignKey("webhook.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("event", _Serial, ForeignKey("event.id"), nullable=False),
    # pending -> done | dead
    Column("state", Text, nullable=False),
    Column("num_attempts", Integer, nullable=False, default=0),
    Column("next_at", Float, nullable=False),
    Column("last_error", Text, nullable=True),
    Column("last_status", Integer, nullable=True),
    Column("created_at", Float, nullable=False),
    Column("done_at", Float, nullable=True),
    Index("delivery_due", "state", "next_at"),
)

upkeep = Table(
    "upkeep",
    metadata,
    _key(),
    # gc, scrub
    Column("kind", Text, nullable=False),
    Column("succeeded", Boolean, nullable=False),
    Column("at", Float, nullable=False),
    Column("num_blobs", BigInteger, nullable=False),
    Column("num_corrupt", BigInteger, nullable=False),
    Column("num_missing", BigInteger, nullable=False),
)

secret = Table(
    "secret",
    metadata,
    # Keys that the hub made for itself, shared by all its processes: the one that signs upload addresses.
    Column("name", Text, primary_key=True),
    Column("value", LargeBinary, nullable=False),
)
