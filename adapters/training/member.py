"""One adapter's run over a base that it may share: rows, optimizer, schedule, randomness, early stop. Knows no files.

The loss of a step is the sum over all its learned tokens divided by their number, however the rows are split.
Everything that the next step depends on is in `state`, the weights, the optimizer and two random states.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import torch

from loractl.adapters.errors import Diverged, WillNotFit
from loractl.adapters.training.batches import MICRO_BATCH_TOKENS, micro_batches, num_steps, step_rows
from loractl.adapters.training.distributed import World
from loractl.adapters.training.evaluation import evaluate
from loractl.adapters.training.events import Evaluated, Listener, Shrunk, Stepped, Stopped
from loractl.adapters.training.examples import Example
from loractl.adapters.training.loss import summed_loss
from loractl.adapters.training.optimizers import make_optimizer, set_rate
from loractl.adapters.training.preference import Reference, evaluate_pairs, pair_sums
from loractl.adapters.training.rate import rate_at
from loractl.adapters.training.recipe import Recipe
from loractl.adapters.training.trunk import Trunk, random_state, set_random_state

_BLOW_UP_STEPS = 8
_BLOW_UP_FACTOR = 3.0
_BLOW_UP_NATS = 2.0


class State(msgspec.Struct, kw_only=True):
    """How far a run is; with the tensors of a checkpoint, all that the next step depends on."""

    step: int = 0
    num_micro: int = 0
    """Micro-batches of the next step whose gradients are already summed."""
    partial_loss: float = 0.0
    partial_rewards: float = 0.0
    partial_right: float = 0.0
    """The latter two of pairs alone."""
    max_rows: int | None = None
    """Most rows at a time, once memory ran out."""
    curve: list[tuple[int, float]] = []
    evals: list[tuple[int, float]] = []
    pair_evals: list[tuple[int, float, float]] = []
    """Step, reward margin and reward accuracy of each evaluation of pairs."""
    best_step: int | None = None
    num_worse: int = 0
    finished: bool = False
    seconds: float = 0.0


class Member:
    """One adapter in training; `step` until `state.finished`."""

    def __init__(
        self,
        name: str,
        recipe: Recipe,
        *,
        trunk: Trunk,
        train: Sequence[Example],
        held_out: Sequence[Example],
        rng: torch.Tensor,
        world: World,
        listener: Listener,
    ) -> None:
        self.name, self.recipe, self.trunk, self.world, self.listener = name, recipe, trunk, world, listener
        self.state = State()
        self.num_steps = num_steps(len(train), recipe.train)
        self.best: dict[str, torch.Tensor] = {}
        self._train, self._held_out = train, held_out
        self._rows = list(step_rows(len(train), recipe.train))
        self.rng = self.step_rng = rng
        if world.rank:
            torch.manual_seed(recipe.train.seed + world.rank)  # dropout of its own, weights as everybody's
            self.rng = self.step_rng = random_state(trunk.device)
        self.recompute = bool(recipe.train.checkpoint_activations)
        trunk.activate(name, recompute=self.recompute)
        self.parameters = trunk.parameters(name)
        self.tensors = [parameter for _, parameter in self.parameters]
        rate = recipe.train.learning_rate
        if not isinstance(rate, float | int):
            raise TypeError("the rate of a run is resolved before it starts")
        self.rate = float(rate)
        self.optimizer = make_optimizer(trunk.model, self.tensors, recipe.train, rate=self.rate)
        self.reference: Reference | None = None
        if train[0].rejected is not None:
            goes_on = recipe.adapter.start_from is not None
            self.reference = Reference(trunk, name, self.tensors, is_adapter=goes_on)

    @property
    def eval_every(self) -> int:
        """Steps between evaluations; 0 is at the end alone."""
        train = self.recipe.train
        if train.eval_every or not train.patience:
            return train.eval_every
        return max(1, len(self._train) // (train.batch_size * train.accumulation))

    def batch(self) -> list[Example]:
        """The rows of the next optimizer step, of all processes together."""
        return [self._train[index] for index in self._rows[self.state.step]]

    def step(self, should_stop: Callable[[], bool]) -> bool:
        """Do one optimizer step; False where a stop was asked for in its middle. Raises Diverged or WillNotFit."""
        start = time.perf_counter()
        self.trunk.activate(self.name, recompute=self.recompute)
        batch = self.batch()
        with self.own_randomness():
            if self.state.num_micro == 0:
                self.step_rng = random_state(self.trunk.device)
            while True:
                try:
                    whole = self._accumulate(batch, should_stop)
                    break
                except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                    if not _is_out_of_memory(error):
                        raise
                self._shrink(batch)
        if not whole:
            self.state.seconds += time.perf_counter() - start
            return False
        self.world.sum_gradients(self.tensors)
        (loss,) = self.world.sum([self.state.partial_loss])
        self.finish_step(loss, batch, start=start)
        return True

    def _accumulate(self, batch: Sequence[Example], should_stop: Callable[[], bool]) -> bool:
        rows = self.world.share(batch)
        limit = self.state.max_rows
        wanted = self.recipe.train.batch_size
        micros = list(micro_batches(rows, num_rows=wanted, num_tokens=MICRO_BATCH_TOKENS, max_rows=limit))
        for number, micro in enumerate(micros):
            if number < self.state.num_micro:
                continue
            part = self._loss(micro, batch)
            part.backward()  # type: ignore[no-untyped-call]
            self.state.partial_loss += part.item()
            self.state.num_micro = number + 1
            # Several processes stop together, between two steps.
            if self.world.size == 1 and number + 1 < len(micros) and should_stop():
                return False
        return True

    def _loss(self, micro: Sequence[Example], batch: Sequence[Example]) -> torch.Tensor:
        """The part of the step's loss that some of its rows make."""
        if self.reference is None:
            return summed_loss(self.trunk.model, micro) / learned_tokens(batch)
        part = self.recipe.preference
        sft_scale = part.sft_weight * len(batch) / learned_tokens(batch)
        sums = pair_sums(self.trunk, micro, self.reference, part, sft_scale=sft_scale)
        self.state.partial_rewards += sums.rewards
        self.state.partial_right += sums.num_right
        return sums.loss / len(batch)

    def finish_step(self, loss: float, batch: Sequence[Example], *, start: float) -> None:
        """Turn the summed gradients into an optimizer step; raises Diverged before it would spoil the weights."""
        state = self.state
        self._check_loss(loss)
        torch.nn.utils.clip_grad_norm_(self.tensors, self.recipe.train.max_grad_norm)
        share = rate_at(state.step, num_steps=self.num_steps, train=self.recipe.train)
        rate = set_rate(self.optimizer, share)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        margin, accuracy = self._pair_figures(len(batch))
        state.step, state.num_micro, state.partial_loss = state.step + 1, 0, 0.0
        state.partial_rewards = state.partial_right = 0.0
        state.curve.append((state.step, round(loss, 6)))
        seconds = time.perf_counter() - start
        state.seconds += seconds
        num_tokens = sum(example.num_tokens for example in batch)
        self.listener(
            Stepped(
                step=state.step,
                num_steps=self.num_steps,
                loss=loss,
                learning_rate=rate,
                tokens_per_s=num_tokens / seconds,
                reward_margin=margin,
                reward_accuracy=accuracy,
            )
        )
        state.finished = state.step >= self.num_steps
        if self._held_out and (state.finished or (self.eval_every and state.step % self.eval_every == 0)):
            self._evaluate()

    def _pair_figures(self, num_pairs: int) -> tuple[float, float] | tuple[None, None]:
        if self.reference is None:
            return None, None
        rewards, num_right = self.world.sum([self.state.partial_rewards, self.state.partial_right])
        return rewards / num_pairs, num_right / num_pairs

    def use_best(self) -> None:
        """Go back to the weights of the best evaluation, where they are not the last ones."""
        if self.recipe.train.keep_best and self.best and self.state.best_step != self.state.step:
            with torch.no_grad():
                for name, parameter in self.parameters:
                    parameter.copy_(self.best[name])

    @contextmanager
    def own_randomness(self) -> Iterator[None]:
        """Draw from this member's random numbers, wherever the others are in theirs."""
        set_random_state(self.rng, self.trunk.device)
        try:
            yield
        finally:
            self.rng = random_state(self.trunk.device)

    def _evaluate(self) -> None:
        state, patience = self.state, self.recipe.train.patience
        start = time.perf_counter()
        with self.trunk.as_served(self.name):
            margin: float | None = None
            accuracy: float | None = None
            if self.reference is None:
                loss = evaluate(self.trunk.model, self._held_out, world=self.world)
            else:
                part = self.recipe.preference
                loss, margin, accuracy = evaluate_pairs(self.trunk, self._held_out, self.reference, part, self.world)
                state.pair_evals.append((state.step, round(margin, 6), round(accuracy, 6)))
        self.trunk.activate(self.name, recompute=self.recompute)
        state.seconds += time.perf_counter() - start
        state.evals.append((state.step, round(loss, 6)))
        self.listener(Evaluated(step=state.step, loss=loss, reward_margin=margin, reward_accuracy=accuracy))
        if all(loss < other or step == state.step for step, other in state.evals):
            state.best_step, state.num_worse = state.step, 0
            if self.eval_every:
                self.best = {name: parameter.detach().clone() for name, parameter in self.parameters}
            return
        state.num_worse += 1
        if patience and state.num_worse >= patience and not state.finished:
            state.finished = True
            reason = f"no better held-out loss in {patience} evaluations; best at step {state.best_step}"
            self.listener(Stopped(step=state.step, reason=reason, failed=False))

    def _check_loss(self, loss: float) -> None:
        hint = f"a lower rate: --set train.learning_rate={self.rate / 4:g}"
        if not math.isfinite(loss):
            raise Diverged(f"the loss became {loss} at step {self.state.step + 1}", hint=hint)
        losses = [value for _, value in self.state.curve] + [loss]
        means = [
            sum(losses[end - _BLOW_UP_STEPS : end]) / _BLOW_UP_STEPS for end in range(_BLOW_UP_STEPS, len(losses) + 1)
        ]
        if means and means[-1] > max(_BLOW_UP_FACTOR * min(means), min(means) + _BLOW_UP_NATS):
            raise Diverged(
                f"the loss rose from {min(means):.3g} to {means[-1]:.3g} by step {self.state.step + 1}", hint=hint
            )

    def _shrink(self, batch: Sequence[Example]) -> None:
        """Begin the step again with half as many rows at a time; the step's rows stay the same."""
        tried = self.state.max_rows or self._most_rows(self.world.share(batch))
        if tried == 1:
            raise WillNotFit(
                f"one row of {max(example.longest for example in batch)} tokens does not fit in memory",
                hint="--set train.checkpoint_activations=true, a smaller data.max_tokens, or --quantize nf4",
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.state.num_micro, self.state.partial_loss, self.state.max_rows = 0, 0.0, tried // 2
        self.state.partial_rewards = self.state.partial_right = 0.0
        set_random_state(self.step_rng, self.trunk.device)
        if self.trunk.device.type == "cuda":
            torch.cuda.empty_cache()
        self.listener(Shrunk(step=self.state.step + 1, num_rows=tried // 2, rows_per_step=len(batch)))

    def _most_rows(self, rows: Sequence[Example]) -> int:
        wanted = self.recipe.train.batch_size
        return max(len(one) for one in micro_batches(rows, num_rows=wanted, num_tokens=MICRO_BATCH_TOKENS))


def learned_tokens(batch: Sequence[Example]) -> int:
    """Count the tokens that a step's loss is divided by."""
    return sum(sum(example.learned[1:]) for example in batch)


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def member_facts(member: Member) -> dict[str, Any]:
    """The figures of a run that go into its record."""
    state = member.state
    facts: dict[str, Any] = {"train_seconds": round(state.seconds, 3), "train_loss": state.curve[-1][1]}
    if state.evals:
        kept = state.best_step if member.recipe.train.keep_best and member.best else None
        step = kept if kept is not None else state.evals[-1][0]
        facts["eval_loss"] = dict(state.evals)[step]
        for at, margin, accuracy in state.pair_evals:
            if at == step:
                facts |= {"eval_reward_margin": margin, "eval_reward_accuracy": accuracy}
        if member.best and state.best_step is not None:
            facts["best_step"] = state.best_step
    return facts
