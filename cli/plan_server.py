"""Asks a running server whether it will take the adapter that a plan would make. Loads no model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loractl.adapters.errors import NotAllowed, Unreachable


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was compared; `fits` is None where the server did not say."""

    subject: str
    verdict: str
    fits: bool | None


def compare_with_server(plan: Any, url: str, key: str | None) -> list[Finding]:
    """Compare base, rank, targets, slots, quantization and dtype; raises Unreachable or NotAllowed."""
    models = _get(f"{url}/v1/models", key)["data"]
    status = _get(f"{url}/admin/status", key)
    card: dict[str, Any] = next((one for one in models if one["id"] == status["base"]), {})
    findings = [_base(plan, card.get("digest"), status["base"])]
    max_rank = status["max_rank"]
    findings.append(
        Finding("rank", f"{plan.rank} <= {max_rank} ok", True)
        if plan.rank <= max_rank
        else Finding("rank", f"{plan.rank} > {max_rank}: refused, or cut where the server truncates", False)
    )
    findings.append(_targets(plan.targets, status.get("targets") or []))
    findings.append(_alike("held in", plan.quantize, status["quantization"]))
    findings.append(_alike("dtype", plan.dtype, status.get("dtype")))
    longest = plan.data.tokens_max
    window = status["max_model_len"]
    findings.append(
        Finding("window", f"{window:,} ok" if longest <= window else f"{window:,} < {longest:,}", longest <= window)
    )
    resident = sum(one["level"] == "device" for one in status["adapters"])
    findings.append(Finding("slots", f"{resident}/{status['num_slots']}", True))
    return findings


def _base(plan: Any, fingerprint: str | None, name: str) -> Finding:
    if fingerprint is None:
        return Finding("base", f"{name}: fingerprint not shown", None)
    if fingerprint == plan.base_fingerprint:
        return Finding("base and template", "ok", True)
    return Finding("base", f"serves {name} ({fingerprint[:19]}), not {plan.base_id}", False)


def _targets(wanted: Sequence[str], served: Sequence[str]) -> Finding:
    if not served:
        return Finding("targets", "not shown", None)
    missing = sorted(set(wanted) - set(served))
    return Finding("targets", f"no {', '.join(missing)} there" if missing else "ok", not missing)


def _alike(subject: str, trained: str, served: str | None) -> Finding:
    """Another number format is served all the same, only not with the very numbers of training."""
    if served is None:
        return Finding(subject, "not shown", None)
    if trained == served:
        return Finding(subject, f"{served} ok", True)
    return Finding(subject, f"{served}, trained in {trained}: loss differs a little", None)


def _get(url: str, key: str | None) -> Any:
    import httpx

    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.get(url, headers=headers, timeout=10)
    except httpx.HTTPError as error:
        raise Unreachable(f"{url} does not answer: {error}", hint="is `loractl serve` running there?") from error
    if answer.status_code in {401, 403}:
        raise NotAllowed(f"{url}: this key may not look", hint="LORACTL_API_KEY with the admin right")
    if answer.status_code != 200:
        raise Unreachable(f"{url} answers {answer.status_code}: it is no loractl server")
    return answer.json()
