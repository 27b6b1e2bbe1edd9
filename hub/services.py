"""Everything that a request may need, opened once at the start and closed at the end. Knows no route."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from loractl.adapters.errors import UsageError
from loractl.adapters.validation import Policy
from loractl.hub.blobs.local import LocalBlobStore
from loractl.hub.blobs.metered import MeteredBlobStore
from loractl.hub.blobs.s3 import open_s3
from loractl.hub.blobs.store import BlobStore
from loractl.hub.database import Database, database_url, open_database
from loractl.hub.events import EventFeed
from loractl.hub.metrics import HubMetrics
from loractl.hub.migrate import migrate
from loractl.hub.registry.audit_log import AuditLog
from loractl.hub.registry.catalogue import Catalogue
from loractl.hub.registry.channels import Channels
from loractl.hub.registry.commits import Commits
from loractl.hub.registry.comparison import Comparison
from loractl.hub.registry.event_log import EventLog
from loractl.hub.registry.ledger import Ledger
from loractl.hub.registry.quotas import Quotas
from loractl.hub.registry.repos import Repos
from loractl.hub.registry.revisions import Revisions
from loractl.hub.registry.tokens import Tokens
from loractl.hub.registry.upkeep import Upkeep
from loractl.hub.registry.uploads import Uploads
from loractl.hub.registry.webhooks import Webhooks
from loractl.hub.registry.xet_uploads import XetUploads
from loractl.hub.settings import HubSettings
from loractl.hub.signing import Signer, load_signer
from loractl.hub.webhooks import Dispatcher


@dataclass(frozen=True, slots=True, kw_only=True)
class Hub:
    """One open hub."""

    settings: HubSettings
    policy: Policy
    database: Database
    store: BlobStore
    signer: Signer
    metrics: HubMetrics
    tokens: Tokens
    repos: Repos
    revisions: Revisions
    channels: Channels
    catalogue: Catalogue
    ledger: Ledger
    commits: Commits
    uploads: Uploads
    xet: XetUploads
    events: EventLog
    feed: EventFeed
    webhooks: Webhooks
    dispatcher: Dispatcher
    audit: AuditLog
    quotas: Quotas
    comparison: Comparison
    upkeep: Upkeep


@contextlib.asynccontextmanager
async def open_hub(settings: HubSettings, *, metrics: HubMetrics | None = None) -> AsyncIterator[Hub]:
    """Open database and blobs, bring the schema up to date. Raises Unreachable, Incompatible, UsageError."""
    try:
        settings.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--root {settings.root}: {error.strerror}") from error
    metrics = metrics or HubMetrics()
    database = open_database(database_url(settings.root, settings.database_url), metrics=metrics)
    try:
        await migrate(database)
        store = MeteredBlobStore(await open_store(settings), metrics)
        policy = Policy(max_files=settings.max_files_per_repo, max_file_bytes=settings.max_file_bytes)
        ledger = Ledger(database, store, settings, metrics)
        events = EventLog(database)
        quotas = Quotas(database, settings)
        catalogue = Catalogue(database, store)
        yield Hub(
            settings=settings,
            policy=policy,
            database=database,
            store=store,
            signer=await load_signer(database),
            metrics=metrics,
            tokens=Tokens(database, anonymous_read=settings.anonymous_read),
            repos=Repos(database, quotas),
            revisions=Revisions(database),
            channels=Channels(database),
            catalogue=catalogue,
            ledger=ledger,
            commits=Commits(database, store, policy, quotas),
            uploads=Uploads(database, store, ledger, settings),
            xet=XetUploads(store, ledger, settings),
            events=events,
            feed=EventFeed(events, settings),
            webhooks=Webhooks(database, settings),
            dispatcher=Dispatcher(database, settings),
            audit=AuditLog(database),
            quotas=quotas,
            comparison=Comparison(catalogue, store),
            upkeep=Upkeep(database),
        )
    finally:
        await database.close()


async def open_store(settings: HubSettings) -> BlobStore:
    """Open the place of the blobs; raises UsageError for an address that is not known, Unreachable."""
    if settings.blobs is None:
        return LocalBlobStore(settings.root)
    if settings.blobs.startswith("s3://"):
        return await open_s3(settings.blobs, timeout_s=settings.s3_timeout_s)
    raise UsageError(f"--blobs {settings.blobs} is not known", hint="s3://bucket/prefix, or nothing for a folder")
