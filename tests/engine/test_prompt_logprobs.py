"""Log probabilities of a prompt equal PEFT's at every position, in chunks, beside others, and with a warm cache."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine_drive import Drive, adapter_use
from loractl.server.engine.base_model import load_base
from loractl.server.engine.engine import Engine
from loractl.server.engine.messages import AdapterUse, RequestId, Sampling, Submit
from loractl.server.engine.settings import EngineSettings
from peft_oracle import alone
from tiny_models import make_adapter, make_tiny_base

PROMPT = tuple(range(60, 83))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture
def drive(base: Path) -> Iterator[Drive]:
    settings = EngineSettings(
        num_slots=2, max_rank=8, max_batch_tokens=8, max_running=4, block_size=4, kv_bytes=20 * 4 * 2 * 2 * 2 * 8 * 4
    )
    drive = Drive(Engine(load_base(base, quantization="none", dtype="float32"), settings))
    yield drive
    drive.engine.close()


def _submit(name: str, use: AdapterUse, num: int | None, *, prompt: tuple[int, ...] = PROMPT) -> Submit:
    sampling = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True, num_prompt_logprobs=num)
    return Submit(id=RequestId(name), prompt=prompt, adapters=(use,), sampling=sampling)


def test_prompt_logprobs_equal_peft_when_chunked_preempted_and_cached(base: Path, drive: Drive, tmp_path: Path) -> None:
    folder = make_adapter(base, tmp_path / "adapter")
    use = adapter_use(folder)
    drive.submit([_submit("warm", use, None)])
    drive.until_ended()
    names = ["one", "two", "three"]
    drive.submit(_submit(name, use, 3) for name in names)
    drive.until_ended()
    assert drive.engine.stats().counters.num_preemptions > 0
    ids, _, logits = alone(base, folder, PROMPT, 12)
    expected = torch.log_softmax(logits, -1)
    for name in names:
        assert drive.outcomes[RequestId(name)].ids == ids
        found = drive.outcomes[RequestId(name)].finished.prompt_logprobs
        assert found is not None
        assert len(found) == len(PROMPT) - 1
        for position, tokens in enumerate(found):
            top = expected[position].topk(3)
            assert [t.token_id for t in tokens] == [PROMPT[position + 1], *top.indices.tolist()]
            values = [float(expected[position, PROMPT[position + 1]]), *top.values.tolist()]
            assert [t.logprob for t in tokens] == pytest.approx(values, abs=1e-4)


def test_prompt_logprobs_are_empty_when_the_prompt_is_one_token_and_none_when_unasked(
    base: Path, drive: Drive, tmp_path: Path
) -> None:
    folder = make_adapter(base, tmp_path / "adapter")
    use = adapter_use(folder)
    drive.submit([_submit("short", use, 0, prompt=(7,)), _submit("unasked", use, None)])
    drive.until_ended()
    assert drive.outcomes[RequestId("short")].finished.prompt_logprobs == ()
    assert drive.outcomes[RequestId("unasked")].finished.prompt_logprobs is None
