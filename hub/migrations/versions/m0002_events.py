"""Events that outlive their repo, webhooks with a scope and a journal, quotas of repos, an append-only audit log."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_REFUSAL = "the audit log is append-only"


def upgrade() -> None:
    serial = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.add_column("event", sa.Column("repo", serial, nullable=True))
    op.add_column("namespace", sa.Column("quota_repos", sa.Integer(), nullable=True))
    op.add_column("webhook", sa.Column("scope", sa.Text(), nullable=False, server_default="*"))
    op.add_column("webhook", sa.Column("kinds", sa.Text(), nullable=False, server_default="[]"))
    op.add_column("webhook", sa.Column("created_by", sa.Text(), nullable=False, server_default=""))
    op.add_column("delivery", sa.Column("last_status", sa.Integer(), nullable=True))
    op.add_column("delivery", sa.Column("created_at", sa.Float(), nullable=False, server_default="0"))
    op.add_column("delivery", sa.Column("done_at", sa.Float(), nullable=True))
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER audit_no_{verb.lower()} BEFORE {verb} ON audit "
                f"BEGIN SELECT RAISE(ABORT, '{_REFUSAL}'); END"
            )
        return
    op.execute(
        "CREATE FUNCTION audit_is_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{_REFUSAL}'; END $$"
    )
    op.execute(
        "CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit "
        "FOR EACH STATEMENT EXECUTE FUNCTION audit_is_append_only()"
    )
