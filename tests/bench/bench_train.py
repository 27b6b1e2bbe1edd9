"""Compares training with transformers' Trainer on PEFT, and a fleet with its members alone: `make bench-train`.

Every run is a process of its own, so that its peak memory is its own. JSON lines on stdout, one a figure; the real
base, real sentences, the same rows in the same order from the same first weights on both sides. Nothing else should
run on the machine meanwhile.
"""

import argparse
import contextlib
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from demo_assets import demo_base
from demo_data import write_demo_data
from loractl.adapters.training.events import Progress, Started, Stepped
from loractl.adapters.training.recipe import Recipe, resolve_recipe

NUM_ROWS, NUM_HELD_OUT = 480, 200
NUM_MEMBERS, NUM_MEMBER_ROWS = 8, 96
_LORACTL = str(Path(sys.executable).with_name("loractl"))
_SETTINGS: dict[str, Any] = {
    "adapter.rank": 8,
    "adapter.alpha": 32,
    "adapter.targets": ["q_proj", "v_proj"],
    "train.epochs": 1,
    "train.batch_size": 8,
    "train.learning_rate": 5e-4,
    "data.template": "Review: {text} Label: {label}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side, taken in turns [3]")
    parser.add_argument(
        "--only", choices=["trainer", "seeds", "fleet", "served", "help"], help="one part alone; seeds runs only so"
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds over which losses on an int8 base are compared [3]")
    parser.add_argument("--rows-a-step", type=int, nargs="*", default=[2, 8], help="of each member of the fleet [2 8]")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        _part(json.loads(options.part))
        return
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        data = write_demo_data(folder, num_movies=NUM_ROWS, num_products=8, num_verdicts=8, num_held_out=NUM_HELD_OUT)
        parts: dict[str, Callable[[], None]] = {
            "trainer": lambda: _against_trainer(folder, data.movies, options.repeats),
            "seeds": lambda: _int8_over_seeds(folder, data.movies, options.seeds),
            "fleet": lambda: _fleet_against_alone(folder, data.movies, options.rows_a_step),
            "served": lambda: _last_step_to_first_token(folder, data.movies),
            "help": lambda: _help_times(options.repeats),
        }
        for name, run in parts.items():
            if options.only == name or (options.only is None and name != "seeds"):
                run()


def _against_trainer(folder: Path, data: Path, repeats: int) -> None:
    """Tokens a second, held-out loss and peak memory of one adapter, by us and by Trainer, per kind of base."""
    for quantize, dtype in (("int8", "auto"), ("none", "auto"), ("none", "float32")):
        base = {"quantize": quantize, "dtype": dtype, "data": str(data)}
        start = folder / f"start-{quantize}-{dtype}"
        _run_part(base | {"kind": "start", "out": str(start)})
        sides: dict[str, list[dict[str, Any]]] = {"ours": [], "trainer": []}
        for turn in range(repeats):
            for side, results in sides.items():
                out = folder / f"{side}-{quantize}-{dtype}-{turn}"
                results.append(_run_part(base | {"kind": side, "out": str(out), "start": str(start)}))
        ours, trainer = (sorted(results, key=lambda one: one["seconds"])[repeats // 2] for results in sides.values())
        _print(
            {
                "figure": "against Trainer and PEFT",
                "base": f"{quantize} {dtype}",
                "supervised_tokens_per_s": [ours["supervised_tokens_per_s"], trainer["supervised_tokens_per_s"]],
                "ratio": round(ours["supervised_tokens_per_s"] / trainer["supervised_tokens_per_s"], 2),
                "eval_loss": [ours["eval_loss"], trainer["eval_loss"]],
                "eval_loss_difference_percent": round(100 * (ours["eval_loss"] / trainer["eval_loss"] - 1), 3),
                "peak_mib": [ours["peak_mib"], trainer["peak_mib"]],
            }
        )


def _int8_over_seeds(folder: Path, data: Path, num_seeds: int) -> None:
    """Held-out loss over an int8 base by us and by Trainer, and what changes it: weights, attention, bf16."""
    for seed in range(num_seeds):
        base = {"quantize": "int8", "dtype": "auto", "data": str(data), "seed": seed}
        start = folder / f"start-seed{seed}"
        _run_part(base | {"kind": "start", "out": str(start)})
        for side, kind, more in (
            ("ours", "ours", {}),
            ("ours, in 8 bit", "ours", {"expand": False}),
            ("trainer", "trainer", {}),
            ("trainer, on our numbers", "trainer", {"expand": True}),
            ("trainer, plain attention", "trainer", {"attention": "eager"}),
            ("ours, float32", "ours", {"dtype": "float32"}),
            ("trainer, float32", "trainer", {"dtype": "float32"}),
        ):
            out = folder / f"{side.replace(' ', '')}-seed{seed}"
            loss = _run_part(base | more | {"kind": kind, "out": str(out), "start": str(start)})["eval_loss"]
            _print({"figure": "held-out loss over int8", "seed": seed, "side": side, "loss": loss})


def _fleet_against_alone(folder: Path, data: Path, sizes: list[int]) -> None:
    """Wall time and memory of eight adapters trained one after the other, in turns, and in shared passes."""
    rows = data.read_text().splitlines()
    for size in sizes:
        parts = []
        for member in range(NUM_MEMBERS):
            taken = rows[1 + member * 48 : 1 + member * 48 + NUM_MEMBER_ROWS]
            part = folder / f"part{member}.csv"
            part.write_text("\n".join([rows[0], *taken]) + "\n")
            parts.append(str(part))
        common = {"quantize": "int8", "batch_size": size}
        alone = [
            _run_part(common | {"kind": "fleet", "data": [part], "out": str(folder / f"alone{size}-{number}")})
            for number, part in enumerate(parts)
        ]
        in_turns = _run_part(common | {"kind": "fleet", "data": parts, "out": str(folder / f"turns{size}")})
        grouped = _run_part(
            common | {"kind": "fleet", "data": parts, "out": str(folder / f"grouped{size}"), "grouped": True}
        )
        sums = {key: sum(one[key] for one in alone) for key in ("wall_s", "seconds", "weights_bytes", "peak_mib")}
        _print(
            {
                "figure": "eight adapters",
                "rows_a_step": size,
                "wall_s": [round(sums["wall_s"], 1), in_turns["wall_s"], grouped["wall_s"]],
                "wall_ratio": [round(one["wall_s"] / sums["wall_s"], 2) for one in (in_turns, grouped)],
                "training_s": [round(sums["seconds"], 1), in_turns["seconds"], grouped["seconds"]],
                "training_ratio": [round(one["seconds"] / sums["seconds"], 2) for one in (in_turns, grouped)],
                "weights_and_optimizer_ratio": round(in_turns["weights_bytes"] / sums["weights_bytes"], 3),
                "peak_mib": [sums["peak_mib"], in_turns["peak_mib"], grouped["peak_mib"]],
            }
        )


def _last_step_to_first_token(folder: Path, data: Path) -> None:
    """Seconds from an adapter's last training step until a running server has sent its first token."""
    from demo_processes import free_port, start_service
    from loractl.hub.client import HubClient

    environment = {"LORACTL_CACHE": str(folder / "cache"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    hub_url, server_url = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    root = str(folder / "hub")
    created = subprocess.run(
        [_LORACTL, "hub", "token", "create", "--root", root, "--name", "bench", "--scope", "admin", "--json"],
        stdout=subprocess.PIPE,
        check=True,
    )
    token = json.loads(created.stdout)["token"]
    hub = start_service(
        "hub",
        *("hub", "serve", "--root", root, "--port", hub_url.rpartition(":")[2]),
        url=hub_url,
        folder=folder,
        environment=environment,
    )
    try:
        hub.wait_until_ready()
        environment |= {"LORACTL_TOKEN": token}
        server = start_service(
            "server",
            *("serve", str(demo_base()), "--hub", hub_url, "--port", server_url.rpartition(":")[2]),
            url=server_url,
            folder=folder,
            environment=environment,
        )
        try:
            server.wait_until_ready()
            client = HubClient(hub_url, token=token)
            for turn in range(3):
                _print(
                    {"figure": "last step to first served token"} | _serve_new(folder, data, client, server_url, turn)
                )
        finally:
            server.stop()
    finally:
        hub.stop()


def _serve_new(folder: Path, data: Path, client: Any, server_url: str, turn: int) -> dict[str, float]:
    import httpx

    from loractl.adapters.reference import parse_reference
    from loractl.adapters.training.run import run

    at: dict[str, float] = {}

    def listener(event: Progress) -> None:
        if isinstance(event, Stepped):
            at["last step"] = time.perf_counter()

    small = folder / "small.csv"
    small.write_text("\n".join(data.read_text().splitlines()[:65]) + "\n")
    outcome = run(_recipe(small, folder / f"served{turn}", "int8", batch_size=8), listener=listener)
    at["saved"] = time.perf_counter()
    client.push(outcome.folder, parse_reference(f"bench/served{turn}"), channel="main", message="")
    at["pushed"] = time.perf_counter()
    body = {"model": f"bench/served{turn}", "prompt": "Review: fine. Label:", "max_tokens": 4, "stream": True}
    with httpx.stream("POST", f"{server_url}/v1/completions", json=body, timeout=60) as answer:
        answer.raise_for_status()
        next(line for line in answer.iter_lines() if line.startswith("data:"))
    at["first token"] = time.perf_counter()
    names = list(at)
    steps = {f"{a} to {b} s": round(at[b] - at[a], 3) for a, b in itertools.pairwise(names)}
    return steps | {"whole_s": round(at["first token"] - at["last step"], 3)}


def _help_times(repeats: int) -> None:
    """Milliseconds of the two help texts, beside an interpreter that only starts."""
    for command in ([sys.executable, "-c", ""], [_LORACTL, "--help"], [_LORACTL, "train", "--help"]):
        times = []
        for _ in range(2 * repeats + 1):
            start = time.perf_counter()
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
            times.append(1000 * (time.perf_counter() - start))
        name = " ".join([Path(command[0]).name, *command[1:]])
        _print({"figure": "start-up", "command": name, "median_ms": round(sorted(times)[repeats], 1)})


def _recipe(
    data: Path,
    out: Path,
    quantize: str,
    *,
    dtype: str = "auto",
    batch_size: int = 8,
    start: str | None = None,
    **more: Any,
) -> Recipe:
    settings = _SETTINGS | {
        "base": str(demo_base()),
        "data.files": [str(data)],
        "out": str(out),
        "quantize": quantize,
        "dtype": dtype,
        "train.batch_size": batch_size,
        "data.eval_share": 0.2,
        "adapter.start_from": start,
        **{f"train.{key}": value for key, value in more.items()},
    }
    return resolve_recipe(preset=None, file=None, settings=settings)


# What follows runs in a process of its own, which prints one line.


def _part(wanted: dict[str, Any]) -> None:
    start = time.perf_counter()
    kinds: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "start": _make_start,
        "ours": _train_ours,
        "trainer": _train_by_trainer,
        "fleet": _train_fleet,
    }
    facts = kinds[wanted["kind"]](wanted)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    _print(facts | {"peak_mib": peak_mib, "part_s": round(time.perf_counter() - start, 2)})


def _make_start(wanted: dict[str, Any]) -> dict[str, Any]:
    """Save an adapter that has not learned yet, for both sides to begin with."""
    import torch
    from peft import LoraConfig, get_peft_model

    from loractl.adapters.base_loading import load_base_model

    torch.manual_seed(wanted.get("seed", 0))
    base = load_base_model(demo_base(), quantization=wanted["quantize"], dtype=wanted["dtype"])
    config = LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(wanted["out"])
    return {}


def _recipe_of(wanted: dict[str, Any], **more: Any) -> Recipe:
    return _recipe(
        Path(wanted["data"]),
        Path(wanted["out"]),
        wanted["quantize"],
        dtype=wanted["dtype"],
        seed=wanted.get("seed", 0),
        **more,
    )


def _train_ours(wanted: dict[str, Any]) -> dict[str, Any]:
    from loractl.adapters.training.run import run

    recipe = _recipe_of(wanted, start=wanted["start"], expand_int8=wanted.get("expand"))
    clock = _Clock()
    run(recipe, listener=clock)
    return clock.facts() | {"eval_loss": _held_out_loss(recipe)}


class _Clock:
    """Times the optimizer steps of a run, the first one, which warms up, left out."""

    def __init__(self) -> None:
        self.num_learned, self.num_steps = 0, 0
        self.first = self.last = 0.0

    def __call__(self, event: Progress) -> None:
        if isinstance(event, Started):
            self.begin(event.data.num_learned_tokens, event.num_steps)
        if isinstance(event, Stepped):
            self.stepped()

    def begin(self, num_learned: int, num_steps: int) -> None:
        self.num_learned, self.num_steps = num_learned, num_steps

    def stepped(self) -> None:
        self.last = time.perf_counter()
        self.first = self.first or self.last

    def facts(self) -> dict[str, Any]:
        seconds = self.last - self.first
        share = (self.num_steps - 1) / self.num_steps
        return {"seconds": round(seconds, 3), "supervised_tokens_per_s": round(self.num_learned * share / seconds, 1)}


def _train_by_trainer(wanted: dict[str, Any]) -> dict[str, Any]:
    """The same run by transformers' Trainer: its loop, its collation and its loss; our order, rate and optimizer."""
    import torch
    from peft import PeftModel
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from loractl.adapters.base_loading import load_base_model
    from loractl.adapters.training.batches import num_steps, step_rows
    from loractl.adapters.training.frozen_int8 import Int8Layers
    from loractl.adapters.training.rate import rate_at
    from loractl.adapters.training.run import prepare

    recipe = _recipe_of(wanted)
    inputs = prepare(recipe)
    steps = num_steps(len(inputs.train), recipe.train)
    rows = [
        {
            "input_ids": list(example.ids),
            "labels": [token if learned else -100 for token, learned in zip(example.ids, example.learned, strict=True)],
        }
        for batch in step_rows(len(inputs.train), recipe.train)
        for example in (inputs.train[index] for index in batch)
    ]
    base = load_base_model(demo_base(), quantization=recipe.quantize, dtype=recipe.dtype)
    model = PeftModel.from_pretrained(base, wanted["start"], is_trainable=True)
    if wanted.get("attention"):
        base.set_attn_implementation(wanted["attention"])
    if wanted.get("expand"):
        Int8Layers(model, expand=True, dtype=base.dtype)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=_SETTINGS["train.learning_rate"],
        weight_decay=0.0,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_at(min(step, steps - 1), num_steps=steps, train=recipe.train)
    )
    clock = _Clock()
    clock.begin(sum(example.num_learned for example in inputs.train), steps)

    class Clocked(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            del args, state, control, more
            clock.stepped()

    class InOrder(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            del train_dataset
            return SequentialSampler(rows)

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        longest = max(len(row["input_ids"]) for row in batch)
        padded: dict[str, Any] = {}
        for key, filler in (("input_ids", 0), ("labels", -100)):
            padded[key] = torch.tensor([row[key] + [filler] * (longest - len(row[key])) for row in batch])
        padded["attention_mask"] = torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in batch]
        )
        return padded

    arguments = TrainingArguments(
        output_dir=str(Path(wanted["out"]) / "work"),
        per_device_train_batch_size=recipe.train.batch_size,
        max_steps=steps,
        max_grad_norm=recipe.train.max_grad_norm,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
        remove_unused_columns=False,
    )
    with contextlib.redirect_stdout(sys.stderr):
        InOrder(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=collate,
            optimizers=(optimizer, scheduler),
            callbacks=[Clocked()],
        ).train()
    model.save_pretrained(wanted["out"])
    return clock.facts() | {"eval_loss": _held_out_loss(recipe)}


def _held_out_loss(recipe: Recipe) -> float:
    """The loss of the saved adapter, loaded anew: one way of measuring for both sides."""
    from peft import PeftModel

    from loractl.adapters.base_loading import load_base_model
    from loractl.adapters.training.evaluation import evaluate
    from loractl.adapters.training.run import prepare

    recipe.adapter.start_from = None
    held_out = prepare(recipe).held_out
    model = PeftModel.from_pretrained(
        load_base_model(demo_base(), quantization=recipe.quantize, dtype=recipe.dtype), recipe.out
    )
    return round(evaluate(model, held_out), 6)


def _train_fleet(wanted: dict[str, Any]) -> dict[str, Any]:
    from loractl.adapters.base_loading import load_base_model, memory_bytes
    from loractl.adapters.errors import LoractlError
    from loractl.adapters.training.run import Task, run_fleet

    recipes = [
        _recipe(Path(data), Path(wanted["out"]) / f"member{number}", "int8", batch_size=wanted["batch_size"])
        for number, data in enumerate(wanted["data"])
    ]
    start = time.perf_counter()
    clock = _Clock()
    outcomes = run_fleet(
        [Task(recipe) for recipe in recipes],
        listener=lambda _, event: clock(event),
        grouped=bool(wanted.get("grouped")),
    )
    wall_s = time.perf_counter() - start
    failed = [outcome for outcome in outcomes if isinstance(outcome, LoractlError)]
    if failed:
        raise failed[0]
    num_parameters = sum(
        outcome.manifest.num_trainable_parameters or 0 for outcome in outcomes if not isinstance(outcome, LoractlError)
    )
    base_bytes = sum(memory_bytes(load_base_model(demo_base(), quantization="int8")).values())
    # float32 weights, and AdamW's two moments of each.
    return {
        "wall_s": round(wall_s, 2),
        "seconds": round(clock.last - clock.first, 2),
        "weights_bytes": base_bytes + 12 * num_parameters,
    }


def _run_part(wanted: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, "--part", json.dumps(wanted)],
        stdout=subprocess.PIPE,
        stderr=None if os.environ.get("VERBOSE") else subprocess.DEVNULL,
        text=True,
        check=True,
    )
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if wanted["kind"] == "fleet":
        # A person waits for the start of the process too.
        facts["wall_s"] = round(facts["wall_s"] + time.perf_counter() - start - facts["part_s"], 2)
    return facts


def _print(facts: dict[str, Any]) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
