"""Brings a database to this version's schema, and refuses one that is newer. Knows alembic, no table."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from loractl.adapters.errors import Incompatible
from loractl.hub.database import Database, database_url, open_database
from loractl.hub.settings import HubSettings

SCRIPTS = Path(__file__).parent / "migrations"
# Any number that nobody else locks by: two hubs that start at once migrate one after the other.
_MIGRATION_LOCK = 7_260_714


async def migrate(database: Database) -> None:
    """Apply the missing migrations in one transaction; raises Incompatible for a schema from a later loractl."""
    async with database.write() as connection:
        if not database.is_sqlite:
            await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
        await connection.run_sync(_upgrade)


async def migrate_hub(settings: HubSettings) -> None:
    """Bring a hub's database to this version's schema, and nothing else; raises Unreachable, Incompatible."""
    if settings.database_url is None:
        settings.root.mkdir(parents=True, exist_ok=True)
    database = open_database(database_url(settings.root, settings.database_url))
    try:
        await migrate(database)
    finally:
        await database.close()


def alembic_config(connection: Connection | None = None) -> Config:
    """What alembic needs to know; `connection` is the transaction to work in."""
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS))
    config.attributes["connection"] = connection
    return config


def _upgrade(connection: Connection) -> None:
    config = alembic_config(connection)
    scripts = ScriptDirectory.from_config(config)
    known = {script.revision for script in scripts.walk_revisions()}
    current = MigrationContext.configure(connection).get_current_revision()
    if current == scripts.get_current_head():
        # The usual case; alembic's own state is one for the whole process, which threads would get in each other's way.
        return
    if current is not None and current not in known:
        raise Incompatible(
            f"the hub's database has schema {current}, which this loractl does not know",
            hint="it was used by a newer loractl: update, or restore a backup",
        )
    command.upgrade(config, "head")
