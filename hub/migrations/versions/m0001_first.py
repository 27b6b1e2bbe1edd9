"""The schema of the first release. Never edit it: a change of the schema is another migration."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "audit",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit")),
    )
    op.create_table(
        "blob",
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("touched_at", sa.Float(), nullable=False),
        sa.Column("block_crc32", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("sha256", name=op.f("pk_blob")),
    )
    with op.batch_alter_table("blob", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_blob_touched_at"), ["touched_at"], unique=False)

    op.create_table(
        "event",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("repo_id", sa.Text(), nullable=False),
        sa.Column("private", sa.Boolean(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("payload", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_event")),
    )
    op.create_table(
        "namespace",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("quota_bytes", sa.BigInteger(), nullable=True),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_namespace")),
    )
    op.create_table(
        "secret",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_secret")),
    )
    op.create_table(
        "token",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("secret_sha256", sa.Text(), nullable=False),
        sa.Column("last4", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("roles", sa.Text(), nullable=False),
        sa.Column("pattern", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=True),
        sa.Column("last_used_at", sa.Float(), nullable=True),
        sa.Column("revoked_at", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_token")),
        sa.UniqueConstraint("secret_sha256", name=op.f("uq_token_secret_sha256")),
    )
    op.create_table(
        "webhook",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("pattern", sa.Text(), nullable=False),
        sa.Column("secret", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("active", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook")),
    )
    op.create_table(
        "delivery",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("webhook", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("event", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("num_attempts", sa.Integer(), nullable=False),
        sa.Column("next_at", sa.Float(), nullable=False),
        sa.Column("last_error", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["event"], ["event.id"], name=op.f("fk_delivery_event")),
        sa.ForeignKeyConstraint(["webhook"], ["webhook.id"], name=op.f("fk_delivery_webhook"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_delivery")),
    )
    with op.batch_alter_table("delivery", schema=None) as batch_op:
        batch_op.create_index("delivery_due", ["state", "next_at"], unique=False)
        batch_op.create_index(batch_op.f("ix_delivery_webhook"), ["webhook"], unique=False)

    op.create_table(
        "repo",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("namespace", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("folded", sa.Text(), nullable=False),
        sa.Column("private", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("updated_at", sa.Float(), nullable=False),
        sa.Column("num_downloads", sa.BigInteger(), nullable=False),
        sa.Column("next_version", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["namespace"], ["namespace.name"], name=op.f("fk_repo_namespace")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_repo")),
        sa.UniqueConstraint("folded", name=op.f("uq_repo_folded")),
        sa.UniqueConstraint("namespace", "name", name=op.f("uq_repo_namespace_name")),
        sqlite_autoincrement=True,
    )
    with op.batch_alter_table("repo", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_repo_namespace"), ["namespace"], unique=False)
        batch_op.create_index(batch_op.f("ix_repo_updated_at"), ["updated_at"], unique=False)

    op.create_table(
        "commit_log",
        sa.Column("oid", sa.Text(), nullable=False),
        sa.Column("repo", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("parent", sa.Text(), nullable=True),
        sa.Column("title", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("author", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("tree_sha256", sa.Text(), nullable=False),
        sa.Column("num_files", sa.Integer(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("version", sa.Text(), nullable=True),
        sa.Column("digest", sa.Text(), nullable=True),
        sa.Column("adapter_size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("base_id", sa.Text(), nullable=True),
        sa.Column("base_fingerprint", sa.Text(), nullable=True),
        sa.Column("task", sa.Text(), nullable=True),
        sa.Column("rank", sa.Integer(), nullable=True),
        sa.Column("metrics", sa.Text(), nullable=False),
        sa.Column("tags", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["repo"], ["repo.id"], name=op.f("fk_commit_log_repo"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("oid", name=op.f("pk_commit_log")),
    )
    with op.batch_alter_table("commit_log", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_commit_log_base_fingerprint"), ["base_fingerprint"], unique=False)
        batch_op.create_index(batch_op.f("ix_commit_log_base_id"), ["base_id"], unique=False)
        batch_op.create_index(batch_op.f("ix_commit_log_digest"), ["digest"], unique=False)
        batch_op.create_index(batch_op.f("ix_commit_log_repo"), ["repo"], unique=False)

    op.create_table(
        "ref_log",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("repo", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("old_oid", sa.Text(), nullable=True),
        sa.Column("new_oid", sa.Text(), nullable=True),
        sa.Column("by", sa.Text(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["repo"], ["repo.id"], name=op.f("fk_ref_log_repo"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_ref_log")),
    )
    with op.batch_alter_table("ref_log", schema=None) as batch_op:
        batch_op.create_index("ref_log_by_ref", ["repo", "name", "id"], unique=False)

    op.create_table(
        "repo_alias",
        sa.Column("folded", sa.Text(), nullable=False),
        sa.Column("repo", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.ForeignKeyConstraint(["repo"], ["repo.id"], name=op.f("fk_repo_alias_repo"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("folded", name=op.f("pk_repo_alias")),
    )
    op.create_table(
        "repo_blob",
        sa.Column("repo", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["repo"], ["repo.id"], name=op.f("fk_repo_blob_repo"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["sha256"], ["blob.sha256"], name=op.f("fk_repo_blob_sha256"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("repo", "sha256", name=op.f("pk_repo_blob")),
    )
    with op.batch_alter_table("repo_blob", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_repo_blob_sha256"), ["sha256"], unique=False)

    op.create_table(
        "upload_session",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("repo", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["repo"], ["repo.id"], name=op.f("fk_upload_session_repo"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_upload_session")),
    )
    with op.batch_alter_table("upload_session", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_upload_session_expires_at"), ["expires_at"], unique=False)

    op.create_table(
        "ref",
        sa.Column("repo", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("commit_oid", sa.Text(), nullable=False),
        sa.Column("protected", sa.Boolean(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("updated_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["commit_oid"], ["commit_log.oid"], name=op.f("fk_ref_commit_oid")),
        sa.ForeignKeyConstraint(["repo"], ["repo.id"], name=op.f("fk_ref_repo"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("repo", "name", name=op.f("pk_ref")),
    )
    with op.batch_alter_table("ref", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_ref_commit_oid"), ["commit_oid"], unique=False)

    op.create_table(
        "tree_entry",
        sa.Column("commit_oid", sa.Text(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("git_sha1", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("is_lfs", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(
            ["commit_oid"], ["commit_log.oid"], name=op.f("fk_tree_entry_commit_oid"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["sha256"], ["blob.sha256"], name=op.f("fk_tree_entry_sha256")),
        sa.PrimaryKeyConstraint("commit_oid", "path", name=op.f("pk_tree_entry")),
    )
    with op.batch_alter_table("tree_entry", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_tree_entry_sha256"), ["sha256"], unique=False)

    op.create_table(
        "validation",
        sa.Column("commit_oid", sa.Text(), nullable=False),
        sa.Column("validator_version", sa.Text(), nullable=False),
        sa.Column("checked_at", sa.Float(), nullable=False),
        sa.Column("record", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["commit_oid"], ["commit_log.oid"], name=op.f("fk_validation_commit_oid"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("commit_oid", name=op.f("pk_validation")),
    )
    op.create_table(
        "yank",
        sa.Column("commit_oid", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("by", sa.Text(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["commit_oid"], ["commit_log.oid"], name=op.f("fk_yank_commit_oid"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("commit_oid", name=op.f("pk_yank")),
    )
