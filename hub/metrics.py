"""What the hub counts for Prometheus; no label carries a name that a client chose. Knows no route and no rule."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from loractl.adapters.errors import LoractlError, Overloaded
from loractl.hub.registry.records import UpkeepKind, UpkeepTotals

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)


class HubMetrics:
    """One registry per hub, so that two in one process do not add up."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.build_info = Gauge("loractl_hub_build_info", "Always 1.", ["version"], registry=registry)
        self.ready = Gauge("loractl_hub_ready", "Whether database and blobs answer.", registry=registry)
        self.http_requests = Counter(
            "loractl_hub_http_requests_total", "Requests that were answered.", ["route", "method", "code"],
            registry=registry,
        )  # fmt: skip
        self.http_seconds = Histogram(
            "loractl_hub_http_request_seconds", "Time to the end of the answer.", ["route"], buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.http_in_flight = Gauge("loractl_hub_http_in_flight", "Requests being answered.", registry=registry)
        self.upload_bytes = Counter("loractl_hub_upload_bytes_total", "Bytes of files taken in.", registry=registry)
        self.uploads_in_progress = Gauge(
            "loractl_hub_uploads_in_progress", "Files and parts of files that are arriving.", registry=registry
        )
        self.upload_seconds = Histogram(
            "loractl_hub_upload_seconds",
            "Time to take in one file or part of one.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.download_bytes = Counter(
            "loractl_hub_download_bytes_total", "Bytes of files sent.", ["backend"], registry=registry
        )
        self.commits = Counter("loractl_hub_commits_total", "Commits by outcome.", ["result"], registry=registry)
        self.validation_failures = Counter(
            "loractl_hub_validation_failures_total", "Rejections by check.", ["reason"], registry=registry
        )
        self.auth_failures = Counter(
            "loractl_hub_auth_failures_total", "Requests refused for their token.", ["reason"], registry=registry
        )
        self.blobs = Gauge("loractl_hub_blobs", "Blobs in the books.", registry=registry)
        self.blob_bytes = Gauge("loractl_hub_blob_bytes", "Their bytes.", registry=registry)
        self.repos = Gauge("loractl_hub_repos", "Repos.", registry=registry)
        self.revisions = Gauge("loractl_hub_revisions", "Commits.", registry=registry)
        self.db_connections = Gauge("loractl_hub_db_pool", "Connections to the database.", ["state"], registry=registry)
        self.deliveries_pending = Gauge(
            "loractl_hub_webhook_deliveries_pending", "Messages to webhooks that wait to be sent.", registry=registry
        )
        self.storage_free_bytes = Gauge(
            "loractl_hub_storage_free_bytes", "Room left for blobs, where there is an end.", registry=registry
        )
        self.webhook_lag = Gauge(
            "loractl_hub_webhook_lag_seconds", "How long the oldest waiting message has waited.", registry=registry
        )
        self.blob_dedup_bytes = Counter(
            "loractl_hub_blob_dedup_bytes_total", "Bytes of pushed files that were there already.", registry=registry
        )
        self.db_seconds = Histogram(
            "loractl_hub_db_seconds", "Time from asking for a connection to the end of the transaction.", ["op"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.db_errors = Counter("loractl_hub_db_errors_total", "Database failures.", ["kind"], registry=registry)
        self.storage_seconds = Histogram(
            "loractl_hub_storage_seconds", "Time in the store of blobs, without waiting for clients.",
            ["op", "backend"], buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.storage_errors = Counter(
            "loractl_hub_storage_errors_total", "Failures of the store of blobs.", ["op", "code"], registry=registry
        )
        self.rate_limited = Counter(
            "loractl_hub_rate_limited_total", "Requests that were told to come later.", ["scope"], registry=registry
        )
        self.blob_errors = Counter(
            "loractl_hub_blob_errors_total", "Blobs that were found missing or damaged.", ["kind"], registry=registry
        )
        self.upkeep = UpkeepCollector()
        registry.register(self.upkeep)
        self._start_at_zero()

    def _start_at_zero(self) -> None:
        """Let every series whose labels are known exist from the start, so that its first increase is seen."""
        for result in ("ok", "unchanged", "conflict", "invalid", "quota", "refused"):
            self.commits.labels(result=result)
        for reason in ("unauthenticated", "not_allowed"):
            self.auth_failures.labels(reason=reason)
        for kind in ("busy", "connection", "disk_full", "serialization"):
            self.db_errors.labels(kind=kind)
        for kind in ("missing", "corrupt"):
            self.blob_errors.labels(kind=kind)
        for op in ("read", "write"):
            self.db_seconds.labels(op=op)
        for op in ("receive", "publish", "read", "size", "delete", "list", "copy", "stage"):
            for code in ("UNREACHABLE", "WILL_NOT_FIT"):
                self.storage_errors.labels(op=op, code=code)
        self.rate_limited.labels(scope="event_streams")

    @contextlib.contextmanager
    def upload(self) -> Iterator[None]:
        """Count an upload while the block lasts, and how long it took."""
        with self.uploads_in_progress.track_inprogress(), self.upload_seconds.time():
            yield

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self.registry)

    def count_error(self, error: LoractlError) -> None:
        """Count what went wrong, by the code that the client saw."""
        if error.code in {"BLOB_MISSING", "BLOB_CORRUPT"}:
            self.blob_errors.labels(kind=error.code.removeprefix("BLOB_").lower()).inc()
        elif error.code in {"UNAUTHENTICATED", "NOT_ALLOWED"}:
            self.auth_failures.labels(reason=error.code.lower()).inc()
        elif isinstance(error, Overloaded):
            # The one thing of which a hub has only so many.
            self.rate_limited.labels(scope="event_streams").inc()


class UpkeepCollector(Collector):
    """Counts that are the database's, since gc and fsck run in processes of their own; as last read."""

    def __init__(self) -> None:
        self.totals: Mapping[UpkeepKind, UpkeepTotals] = dict.fromkeys(UpkeepKind, UpkeepTotals())

    def collect(self) -> Iterable[Metric]:
        """The families, with a sample of every result."""
        gc, scrub = self.totals[UpkeepKind.GC], self.totals[UpkeepKind.SCRUB]
        runs = CounterMetricFamily("loractl_hub_gc_runs", "Runs of gc.", labels=["result"])
        runs.add_metric(["ok"], gc.num_succeeded)
        runs.add_metric(["failed"], gc.num_failed)
        yield runs
        yield CounterMetricFamily("loractl_hub_gc_deleted_blobs", "Blobs that gc removed.", value=gc.num_blobs)
        blobs = CounterMetricFamily("loractl_hub_scrub_blobs", "Blobs that fsck read.", labels=["result"])
        blobs.add_metric(["ok"], scrub.num_blobs - scrub.num_corrupt - scrub.num_missing)
        blobs.add_metric(["corrupt"], scrub.num_corrupt)
        blobs.add_metric(["missing"], scrub.num_missing)
        yield blobs
        for name, work, last in (("gc", "gc", gc), ("scrub", "fsck that found all sound", scrub)):
            yield GaugeMetricFamily(
                f"loractl_hub_{name}_last_success_timestamp_seconds",
                f"When the last {work} ended; 0: never.",
                value=last.last_success_at,
            )
