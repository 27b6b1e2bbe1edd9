"""Figures of our engine and training on a card beside other ways to do the same: bf16, transformers, PEFT, Trainer."""

import random
import statistics
import time
from collections.abc import Generator, Iterator
from typing import Any

import torch

from card_bench import EXPECTED, Bench, figure, median_burst
from loractl.adapters.base_loading import memory_bytes
from loractl.adapters.manifest import Quantization
from loractl.server.engine.measure import Work, burst


def dense(bench: Bench) -> Iterator[dict[str, Any]]:
    """int8 against the same shape unquantized, on our engine; then transformers' own batching on the unquantized."""
    work = bench.work(is_short=True)
    prefill = bench.work(min(8, bench.num_requests), output_tokens=1)
    rates: dict[str, tuple[float, float, float]] = {}
    held: dict[str, int] = {}
    theirs: float | None = None
    kinds: tuple[Quantization, ...] = ("int8", "none")
    for kind in kinds:
        model = bench.model(bench.llama, kind)
        held[kind] = sum(memory_bytes(model).values())
        if kind == "none":
            theirs = yield from continuous_batching(bench, model, work)
        engine = bench.engine(model, kind, num_slots=1, rank=1)
        decoded = median_burst(bench, engine, [()], work)
        prefilled = burst(engine, [()], prefill)
        step = work.num_requests / decoded.decode_s if decoded.decode_s else decoded.rate
        tokens = prefill.num_requests * prefill.num_prompt_tokens
        rates[kind] = (round(step, 1), round(tokens / prefilled.seconds, 1), round(decoded.rate, 1))
        engine.close()
        del model, engine
        bench.free()
    yield figure("int8 / bf16, decode, tokens/s", rates["int8"][0], rates["none"][0], ">= 1.3")
    yield figure("int8 / bf16, prefill, tokens/s", rates["int8"][1], rates["none"][1], ">= 0.9")
    yield figure("int8 / bf16, bytes of weights", held["int8"], held["none"], "<= 0.56")
    if theirs is not None:
        yield figure("ours int8 / transformers' continuous batching, bf16", rates["int8"][2], theirs, ">= 1.0")


def continuous_batching(bench: Bench, model: Any, work: Work) -> Generator[dict[str, Any], None, float | None]:
    """Yield nothing, or why it could not run; return its tokens per second."""
    from transformers import GenerationConfig

    draw = random.Random(0)
    prompts = [
        [draw.randrange(3, bench.llama.vocab_size) for _ in range(work.num_prompt_tokens)]
        for _ in range(work.num_requests)
    ]
    config = GenerationConfig(
        max_new_tokens=work.num_output_tokens, min_new_tokens=None, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    try:
        model.generate_batch(inputs=prompts[:2], generation_config=config)
        start = time.perf_counter()
        outputs = model.generate_batch(inputs=prompts, generation_config=config)
        seconds = time.perf_counter() - start
    except EXPECTED as error:
        yield figure("transformers' continuous batching, bf16", None, None, ">= 1.0", f"did not run: {error!r}"[:300])
        return None
    return round(sum(len(one.generated_tokens) for one in outputs.values()) / seconds, 1)


def against_peft(bench: Bench) -> Iterator[dict[str, Any]]:
    """The same requests, each with an adapter, by PEFT's `adapter_names` on bitsandbytes' own layers."""
    from peft import LoraConfig, get_peft_model

    rows = min(32, bench.num_requests)
    work = bench.work(rows, is_short=True, output_tokens=min(16, bench.output_tokens))
    engine = bench.engine(bench.model(bench.llama, "int8"), "int8", num_slots=bench.num_adapters)
    ours = round(median_burst(bench, engine, bench.uses(bench.llama, bench.num_adapters), work).rate, 1)
    engine.close()
    del engine
    bench.free()
    model: Any = bench.model(bench.llama, "int8")
    targets = sorted(name.rpartition(".")[2] for name in bench.llama.targets)
    config = LoraConfig(r=bench.rank, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    names = [f"a{index}" for index in range(bench.num_adapters)]
    wrapped: Any = get_peft_model(model, config, adapter_name=names[0], autocast_adapter_dtype=False)
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    wrapped = wrapped.to(bench.dtype).eval() if not bench.is_card else wrapped.eval()
    ids = torch.randint(3, bench.llama.vocab_size, (rows, work.num_prompt_tokens), device=bench.device)

    def generate(num_tokens: int) -> None:
        wrapped.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            adapter_names=[names[row % len(names)] for row in range(rows)],
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
        )

    with torch.inference_mode():
        generate(1)
        bench.wait()
        start = time.perf_counter()
        generate(work.num_output_tokens)
        bench.wait()
    theirs = round(rows * work.num_output_tokens / (time.perf_counter() - start), 1)
    what = f"{rows} requests, {len(names)} adapters"
    yield figure(f"ours / PEFT adapter_names on bitsandbytes int8, {what}, tokens/s", ours, theirs, ">= 20")


def training(bench: Bench) -> Iterator[dict[str, Any]]:
    """An int8 LoRA step of two rows by our loop's parts, and by PEFT with transformers' Trainer."""
    ours_s, ours_bytes = _our_training(bench)
    bench.free()
    theirs_s, theirs_bytes = _their_training(bench)
    bench.free()
    tokens = 2 * bench.train_tokens
    yield figure("training, tokens/s: ours / PEFT + Trainer", tokens / ours_s, tokens / theirs_s, ">= 1.2")
    yield figure("training, peak bytes: ours / PEFT + Trainer", ours_bytes, theirs_bytes, "<= 0.8")
    yield figure("training, peak bytes / 12 GB", ours_bytes, 12e9, "<= 1.0")


def _our_training(bench: Bench) -> tuple[float, int | None]:
    from loractl.adapters.training.examples import Example
    from loractl.adapters.training.loss import summed_loss
    from loractl.adapters.training.optimizers import make_optimizer
    from loractl.adapters.training.recipe import AdapterPart, Recipe, TrainPart
    from loractl.adapters.training.trunk import Trunk

    trunk = Trunk(bench.model(bench.llama, "int8"))
    recipe = Recipe(adapter=AdapterPart(rank=bench.rank), train=TrainPart(checkpoint_activations=True))
    trunk.attach("bench", recipe, revision=None, examples=[], fresh=True)
    trunk.ready(quantize="int8", expand_int8=False)
    trunk.activate("bench", recompute=True)
    tensors = [tensor for _, tensor in trunk.parameters("bench")]
    optimizer = make_optimizer(trunk.model, tensors, recipe.train, rate=1e-4)
    draw = random.Random(0)
    ids = [tuple(draw.randrange(3, bench.llama.vocab_size) for _ in range(bench.train_tokens)) for _ in range(2)]
    examples = [Example(row, (True,) * len(row)) for row in ids]

    def step() -> None:
        loss: Any = summed_loss(trunk.model, examples) / (2 * bench.train_tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tensors, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = bench.seconds(step, repeat=bench.num_runs + 2)
    return seconds, bench.peak_bytes()


def _their_training(bench: Bench) -> tuple[float, int | None]:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import Trainer, TrainerCallback, TrainingArguments

    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            bench.wait()
            times.append(-time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            bench.wait()
            times[-1] += time.perf_counter()

    model = prepare_model_for_kbit_training(
        bench.model(bench.llama, "int8"), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    targets = sorted(name.rpartition(".")[2] for name in bench.llama.targets)
    wrapped = get_peft_model(model, LoraConfig(r=bench.rank, target_modules=targets, task_type="CAUSAL_LM"))
    rows = torch.randint(3, bench.llama.vocab_size, (2 * (bench.num_runs + 3), bench.train_tokens)).tolist()
    arguments = TrainingArguments(
        output_dir=str(bench.folder / "trainer"),
        per_device_train_batch_size=2,
        max_steps=bench.num_runs + 3,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=bench.is_card,
        use_cpu=not bench.is_card,
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )
    dataset: Any = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model=wrapped, args=arguments, train_dataset=dataset, callbacks=[Clock()]).train()
    return statistics.median(times[1:]), bench.peak_bytes()
