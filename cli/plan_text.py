"""Shows a plan to people, one line a subject. Decides nothing."""

from collections.abc import Sequence
from typing import Any

from loractl.adapters.byte_sizes import file_size, memory_size

_LABEL = 10


def plan_lines(plan: Any) -> list[str]:
    """The plan as lines: base, data, adapter, memory, full fine-tuning, steps."""
    data, memory, full = plan.data, plan.memory, plan.full_fine_tuning
    template = plan.base_chat_template_sha256
    lost = f"   too long: {data.num_overlong:,} rows, {data.num_tokens_lost:,} tokens lost" if data.num_overlong else ""
    rule = "ample" if plan.num_parameters >= data.num_learned_tokens else "small"
    held = {"int8": "int8", "nf4": "nf4", "none": "as it is"}[plan.quantize]
    return [
        _line(
            "Base",
            f"{plan.base_id}  {plan.base_fingerprint[:19]}  {held}"
            + (f"  template sha256:{template[:8]}" if template else "  no chat template"),
        ),
        _line(
            "Data",
            f"{data.num_rows:,} rows {data.form}  digest {plan.data_digest[:15]}  dup {data.num_duplicates:,}  "
            f"held out {data.num_eval_rows:,} (by conversation)",
        ),
        _line(
            "",
            f"tokens p50 {data.tokens_p50:,}  p95 {data.tokens_p95:,}  max {data.tokens_max:,}   "
            f"learned {data.learned_share:.0%}{lost}",
        ),
        _line(
            "Adapter",
            f"r={plan.rank} alpha={plan.alpha:g} {','.join(plan.targets)} ({plan.num_modules} modules)  "
            f"{plan.num_parameters:,} parameters, {file_size(plan.num_parameters * 4)} on disk",
        ),
        _line(
            "", f"{data.num_learned_tokens:,} learned tokens: the rank is {rule} (rule: parameters >= learned tokens)"
        ),
        _line("Memory", f"{_parts(memory, 'adapter+optimizer')} = {memory_size(memory.total)}{_room(plan)}"),
        *([_line("", "activations are computed again in the backward pass")] if plan.checkpoint_activations else []),
        _line("", f"full fine-tuning: {_parts(full, 'weights+optimizer')} = {memory_size(full.total)}"),
        _line(
            "Steps",
            f"{plan.epochs:g} epochs = {plan.num_steps:,} steps of {plan.rows_per_step} rows, "
            f"rate {plan.learning_rate:g}, {plan.num_padded_tokens:,} tokens with padding{_time(plan.seconds)}",
        ),
    ]


def server_line(findings: Sequence[Any]) -> str:
    """What a server says to the plan, in one line."""
    return _line("Server", " · ".join(f"{one.subject} {one.verdict}" for one in findings))


def _line(label: str, text: str) -> str:
    return f"{label:<{_LABEL}}{text}"


def _parts(memory: Any, adapter: str) -> str:
    parts = (
        ("base", memory.base),
        (adapter, memory.adapter),
        ("activations", memory.activations),
        ("loss", memory.loss),
        ("runtime", memory.runtime),
    )
    return " + ".join(f"{name} {memory_size(value)}" for name, value in parts if value)


def _room(plan: Any) -> str:
    return f" of {memory_size(plan.available_bytes)} free   {'fits' if plan.fits else 'DOES NOT FIT'}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "   (--probe measures the time)"
    return f"   ~{seconds / 60:.0f} min" if seconds >= 120 else f"   ~{seconds:.0f} s"
