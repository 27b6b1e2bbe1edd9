"""Canaries on channels, and their share in the history."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    serial = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.add_column("ref_log", sa.Column("share", sa.Float(), nullable=True))
    op.create_table(
        "canary",
        sa.Column("repo", serial, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("commit_oid", sa.Text(), nullable=False),
        sa.Column("share", sa.Float(), nullable=False),
        sa.Column("by", sa.Text(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["commit_oid"], ["commit_log.oid"], name=op.f("fk_canary_commit_oid")),
        sa.ForeignKeyConstraint(
            ["repo", "name"], ["ref.repo", "ref.name"], name=op.f("fk_canary_repo_name"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("repo", "name", name=op.f("pk_canary")),
    )
    op.create_index(op.f("ix_canary_commit_oid"), "canary", ["commit_oid"])
