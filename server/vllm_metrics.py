"""The few metrics that routers, dashboards and load tools ask of vLLM by its names, for those who want them.

Copies of our own under another name and with vLLM's label `model_name`; promtool dislikes colons, so they are optional.
"""

from collections.abc import Iterable, Mapping

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from loractl.server.engine_metrics import Snapshot, routing_page
from loractl.server.metrics import PREFIX, ServerMetrics

_ALIASES: Mapping[str, str] = {
    "requests_waiting": "vllm:num_requests_waiting",
    "requests_running": "vllm:num_requests_running",
    "kv_cache_usage_ratio": "vllm:kv_cache_usage_perc",
    "cache_config_info": "vllm:cache_config_info",
    "time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "inter_token_latency_seconds": "vllm:inter_token_latency_seconds",
    "e2e_request_seconds": "vllm:e2e_request_latency_seconds",
}


class VllmAliases(Collector):
    """Our families again, by vLLM's names."""

    def __init__(self, engine: Collector, metrics: ServerMetrics, *, model_name: str) -> None:
        self._sources: tuple[Collector, ...] = (engine, metrics.ttft, metrics.itl, metrics.e2e)
        self._model_name = model_name

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        for source in self._sources:
            for family in source.collect():
                name = _ALIASES.get(family.name.removeprefix(PREFIX))
                if name is not None:
                    yield self._renamed(family, name)

    def _renamed(self, family: Metric, name: str) -> Metric:
        alias = Metric(name, family.documentation, family.type)
        alias.samples = [
            sample._replace(
                name=name + sample.name.removeprefix(family.name),
                labels={"model_name": self._model_name, **sample.labels},
            )
            for sample in family.samples
            if not sample.name.endswith("_created")
        ]
        return alias


def vllm_routing_page(seen: Snapshot) -> str:
    """The page for routers by vLLM's names."""
    names = {**_ALIASES, "lora_requests_info": "vllm:lora_requests_info"}
    page = routing_page(seen)
    for ours, theirs in names.items():
        page = page.replace(PREFIX + ours, theirs)
    return page
