"""Decides what runs next and who waits. Knows sequences, blocks and slots; nothing of text and tensors."""

from collections import Counter
from collections.abc import Iterable

from loractl.adapters.errors import DeadlinePassed, LoractlError, Overloaded, WillNotFit
from loractl.adapters.reference import Digest
from loractl.server.engine.fair_share import FairShare
from loractl.server.engine.kv_cache import BlockKey, BlockPool, child_key
from loractl.server.engine.messages import RequestId
from loractl.server.engine.sequence import Sequence
from loractl.server.engine.settings import EngineSettings
from loractl.server.engine.slots import AdapterSlots


class Scheduler:
    """Waiting and running sequences, and who holds which blocks and slots."""

    def __init__(self, settings: EngineSettings, *, blocks: BlockPool, slots: AdapterSlots) -> None:
        self._settings = settings
        self._blocks = blocks
        self._slots = slots
        self.distinct_bound = min(slots.num_slots, settings.max_distinct_adapters or slots.num_slots)
        """Adapters that one step may mix."""
        self._share = FairShare()
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.wait_reasons: Counter[str] = Counter()
        self.unread: set[Digest] = set()
        """Adapters that are not on the host yet, and that alone keep a sequence from starting."""
        self.num_preemptions = self.num_prefix_queries = self.num_prefix_hits = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence and begin to bring its adapters near."""
        for use in sequence.submit.adapters:
            self._slots.want(use.digest, use.folder)
        for key in _share_keys(sequence):
            self._share.enter(key)
        self.waiting.append(sequence)

    def find(self, request_id: RequestId) -> Sequence | None:
        return next((s for s in (*self.running, *self.waiting) if s.id == request_id), None)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence and give back all it holds."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._release(sequence)
        for key in _share_keys(sequence):
            self._share.leave(key)

    def distrust(self, sequence: Sequence) -> None:
        """Share none of a failed sequence's blocks with others."""
        self._blocks.withdraw(sequence.blocks)

    def admit(self, now: float) -> list[tuple[Sequence, LoractlError]]:
        """Start what can start, the least served first; return those that can never start and why.

        One that has been passed over too often holds back all others until what it needs is free.
        """
        failed: list[tuple[Sequence, LoractlError]] = []
        passed: list[Sequence] = []
        is_held_back = False
        self.wait_reasons.clear()
        self.unread.clear()
        for sequence in sorted(self.waiting, key=self._turn):
            error = self._hopeless(sequence, now)
            if error is not None:
                failed.append((sequence, error))
                continue
            reason = "turn" if is_held_back else self._why_wait(sequence)
            if reason is not None:
                self.wait_reasons[reason] += 1
                if reason == "adapter":
                    self.unread.update(digest for digest in sequence.digests if not self._slots.is_near(digest))
                passed.append(sequence)
                is_held_back = is_held_back or self._holds_back(sequence)
                continue
            self._start(sequence, now)
            for other in passed:
                other.overtaken += 1
        for sequence, _ in failed:
            self.remove(sequence)
        return failed

    def plan(self) -> list[tuple[Sequence, int]]:
        """Choose (sequence, number of its tokens) for one step: decoding rows first, then chunks of prompts."""
        chosen: list[tuple[Sequence, int]] = []
        budget = self._settings.max_batch_tokens
        for sequence in sorted(self.running, key=lambda s: s.num_pending > 1):
            if sequence not in self.running:
                continue  # preempted to make room for an earlier one
            num_tokens = min(sequence.num_pending, budget)
            if num_tokens and self._make_room(sequence, sequence.num_computed + num_tokens, {s.id for s, _ in chosen}):
                chosen.append((sequence, num_tokens))
                budget -= num_tokens
        return chosen

    def make_room_ahead(self, sequences: Iterable[Sequence]) -> bool:
        """Hold the blocks for one token more than each sequence is known to have, if enough are free; sends nobody
        back to the queue."""
        needed = {each: self._num_blocks(len(each.tokens) + 1) - len(each.blocks) for each in sequences}
        if sum(needed.values()) > self._blocks.num_free:
            return False
        for sequence, num_blocks in needed.items():
            sequence.blocks += self._blocks.take(num_blocks)
        return True

    def computed(self, sequence: Sequence, num_tokens: int) -> None:
        """Book that `num_tokens` more of a sequence have K and V, and let others find its full blocks."""
        sequence.num_computed += num_tokens
        for key in _share_keys(sequence):
            self._share.charge(key, num_tokens, weight=sequence.submit.weight)
        if self._settings.prefix_cache:
            size = self._settings.block_size
            keys = self._keys(sequence, sequence.num_computed // size)
            for index in range((sequence.num_computed - num_tokens) // size, len(keys)):
                self._blocks.publish(sequence.blocks[index], keys[index])

    def held(self) -> tuple[list[int], Counter[Digest]]:
        """Blocks and slots that sequences say they hold, for the books."""
        blocks = [block for sequence in self.running for block in sequence.blocks]
        digests = Counter(digest for sequence in self.running for digest in sequence.digests)
        return blocks, digests

    def _turn(self, sequence: Sequence) -> tuple[int, bool, float, float, float]:
        tenant, adapter = _share_keys(sequence)
        patient = sequence.overtaken < self._settings.max_overtakes
        return (
            -sequence.submit.priority,
            patient,
            self._share.served(tenant),
            self._share.served(adapter),
            sequence.arrived_at,
        )

    def _holds_back(self, sequence: Sequence) -> bool:
        """Whether a sequence was passed over too often, and running ones have what it needs; a load is not theirs."""
        return (
            sequence.overtaken >= self._settings.max_overtakes
            and all(self._slots.is_near(digest) for digest in sequence.digests)
            and self._slots.could_hold(sequence.digests)
        )

    def _hopeless(self, sequence: Sequence, now: float) -> LoractlError | None:
        deadline = sequence.submit.deadline_s
        if deadline is not None and now > deadline:
            return DeadlinePassed("the request's deadline passed before it could start", retry_after_s=1.0)
        for use in sequence.submit.adapters:
            if (error := self._slots.failure(use.digest)) is not None:
                return error
        if sequence.submit.adapters and now - sequence.arrived_at > self._settings.load_timeout_s + 60.0 * len(
            self.running
        ):
            return Overloaded("the adapter was not loaded in time", retry_after_s=5.0)
        if self._num_blocks(len(sequence.tokens) + 1) > self._blocks.num_blocks:
            return WillNotFit("the prompt is longer than all KV blocks together", hint="serve with more memory for KV")
        return None

    def _why_wait(self, sequence: Sequence) -> str | None:
        if len(self.running) >= self._settings.max_running:
            return "turn"
        active = {digest for other in self.running for digest in other.digests}
        if len(active | set(sequence.digests)) > self.distinct_bound:
            return "distinct"
        if self._num_blocks(len(sequence.tokens) + 1) > self._blocks.num_free:
            return "kv"
        for use in sequence.submit.adapters:
            self._slots.want(use.digest, use.folder)
        placed: list[Digest] = []
        ready = True
        # Held one by one while the rest is placed, so that two adapters of one request do not evict each other.
        for digest in sequence.digests:
            ready = ready and self._slots.place(digest)
            if ready:
                self._slots.hold(digest)
                placed.append(digest)
        for digest in placed:
            self._slots.let_go(digest)
        return None if ready else "adapter"

    def _start(self, sequence: Sequence, now: float) -> None:
        self.waiting.remove(sequence)
        for digest in sequence.digests:
            self._slots.hold(digest)
        sequence.holds_slots = True
        if sequence.started_at is None:
            sequence.started_at = now
        self._share_prefix(sequence)
        self.running.append(sequence)

    def _share_prefix(self, sequence: Sequence) -> None:
        # Cached blocks have no logits.
        if not self._settings.prefix_cache or sequence.wants_prompt_logprobs:
            return
        # The last token is always computed anew: its logits are what the next one is chosen from.
        keys = self._keys(sequence, (len(sequence.tokens) - 1) // self._settings.block_size)
        found = self._blocks.find(keys)
        self._blocks.share(found)
        sequence.blocks = list(found)
        sequence.num_computed = len(found) * self._settings.block_size
        if sequence.num_outputs == 0:
            sequence.num_cached = sequence.num_computed
            self.num_prefix_queries += sequence.num_prompt
            self.num_prefix_hits += sequence.num_cached

    def _keys(self, sequence: Sequence, num_blocks: int) -> list[BlockKey]:
        size = self._settings.block_size
        while len(sequence.keys) < num_blocks:
            start = len(sequence.keys) * size
            parent = sequence.keys[-1] if sequence.keys else sequence.root
            sequence.keys.append(child_key(parent, sequence.tokens[start : start + size]))
        return sequence.keys[:num_blocks]

    def _make_room(self, sequence: Sequence, length: int, chosen: set[RequestId]) -> bool:
        """Hold the blocks for `length` tokens, sending the latest others back to the queue when none are free."""
        needed = self._num_blocks(length) - len(sequence.blocks)
        while needed > self._blocks.num_free:
            victims: Iterable[Sequence] = reversed(self.running)
            victim = next((s for s in victims if s.id not in chosen), None)
            if victim is None:
                return False
            self._preempt(victim)
            if victim is sequence:
                return False
        if needed > 0:
            sequence.blocks += self._blocks.take(needed)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.num_computed = 0
        if sequence.wants_prompt_logprobs:
            sequence.prompt_logprobs.clear()
        self.waiting.insert(0, sequence)
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self._blocks.give_back(sequence.blocks)
        sequence.blocks = []
        if sequence.holds_slots:
            for digest in sequence.digests:
                self._slots.let_go(digest)
            sequence.holds_slots = False

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._settings.block_size)


def _share_keys(sequence: Sequence) -> tuple[tuple[str, str], tuple[str, str, object]]:
    tenant = sequence.submit.tenant
    return ("tenant", tenant), ("adapter", tenant, sequence.adapter_key)
