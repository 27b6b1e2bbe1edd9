"""The training loop: frozen base, float32 adapter, exact loss over each optimizer step. Knows no files.

The loss of a step is the sum over all its learned tokens divided by their number, however the rows are split into
micro-batches; the head is applied at learned positions only.
"""

import math
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from loractl.adapters.errors import Diverged
from loractl.adapters.training.events import Evaluated, Listener, Stepped
from loractl.adapters.training.examples import Example
from loractl.adapters.training.recipe import TrainPart

_EVAL_BATCH_ROWS = 16
_MICRO_BATCH_TOKENS = 1024


def num_steps(num_rows: int, train: TrainPart) -> int:
    """Count the optimizer steps of a run."""
    return max(1, math.ceil(num_rows * train.epochs / (train.batch_size * train.accumulation)))


def run_steps(
    model: Any, examples: Sequence[Example], train: TrainPart, *, listener: Listener
) -> list[tuple[int, float]]:
    """Train the adapter's parameters in place and return the loss curve; raises Diverged at a non-finite loss."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=train.learning_rate, weight_decay=train.weight_decay, betas=(0.9, 0.999)
    )
    total = num_steps(len(examples), train)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, total, train.warmup))
    curve: list[tuple[int, float]] = []
    model.train()
    for step, batch in enumerate(_step_batches(examples, train, total), 1):
        start = time.perf_counter()
        num_learned = sum(example.num_learned for example in batch)
        loss = 0.0
        for micro in _micro_batches(batch, train.batch_size):
            part = _summed_loss(model, micro) / num_learned
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.item()
        if not math.isfinite(loss):
            raise Diverged(
                f"the loss became {loss} at step {step}",
                hint=f"a lower rate: --set train.learning_rate={train.learning_rate / 4:g}",
            )
        torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)
        rate = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        curve.append((step, round(loss, 6)))
        num_tokens = sum(len(example.ids) for example in batch)
        listener(
            Stepped(
                step=step,
                num_steps=total,
                loss=loss,
                learning_rate=float(rate),
                tokens_per_s=num_tokens / (time.perf_counter() - start),
            )
        )
    return curve


def evaluate(model: Any, examples: Sequence[Example], *, step: int, listener: Listener) -> float:
    """Return the mean loss per learned token, in eval mode: the arithmetic that serves."""
    model.eval()
    total, num_learned = 0.0, 0
    ordered = sorted(examples, key=lambda example: len(example.ids))
    with torch.inference_mode():
        for start in range(0, len(ordered), _EVAL_BATCH_ROWS):
            batch = ordered[start : start + _EVAL_BATCH_ROWS]
            total += _summed_loss(model, batch).item()
            num_learned += sum(example.num_learned for example in batch)
    loss = total / max(1, num_learned)
    listener(Evaluated(step=step, loss=loss))
    return loss


def _step_batches(examples: Sequence[Example], train: TrainPart, total: int) -> Iterator[list[Example]]:
    """Yield the rows of each optimizer step: every epoch in an order of its own, drawn from the seed."""
    size = train.batch_size * train.accumulation
    order: list[int] = []
    generator = random.Random(train.seed)  # noqa: S311 - an order that can be repeated, not a secret
    for _ in range(total):
        while len(order) < size:
            epoch = list(range(len(examples)))
            generator.shuffle(epoch)
            order += epoch
        taken, order = order[:size], order[size:]
        yield [examples[index] for index in taken]


def _micro_batches(batch: Sequence[Example], num_rows: int) -> Iterator[list[Example]]:
    """Split a step's rows by length: at least `num_rows` together, more while they fit, so little is padded."""
    ordered = sorted(batch, key=lambda example: len(example.ids))
    micro: list[Example] = []
    for example in ordered:
        if len(micro) >= num_rows and (len(micro) + 1) * len(example.ids) > _MICRO_BATCH_TOKENS:
            yield micro
            micro = []
        micro.append(example)
    yield micro


def _summed_loss(model: Any, batch: Sequence[Example]) -> torch.Tensor:
    device = next(model.parameters()).device
    longest = max(len(example.ids) for example in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    attended = torch.zeros(len(batch), longest, dtype=torch.long)
    learned = torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, example in enumerate(batch):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        attended[row, :length] = 1
        learned[row, :length] = torch.tensor(example.learned)
    learned[:, 0] = False  # nothing comes before the first token, so nothing predicts it
    ids, attended, learned = ids.to(device), attended.to(device), learned.to(device)
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = causal_lm.base_model(input_ids=ids, attention_mask=attended, use_cache=False).last_hidden_state
    before = hidden[:, :-1][learned[:, 1:]]  # [learned, hidden]
    logits = causal_lm.get_output_embeddings()(before)
    return F.cross_entropy(logits.float(), ids[learned], reduction="sum")


def _rate(step: int, total: int, warmup: float) -> float:
    rising = max(1, round(total * warmup))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))
