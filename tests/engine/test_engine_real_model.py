"""A real base in 8 bits: a row's answer is the same alone and beside other adapters."""

from pathlib import Path

import pytest

from demo_assets import demo_base
from engine_drive import Drive, adapter_use
from loractl.server.engine.base_model import load_base
from loractl.server.engine.engine import Engine
from loractl.server.engine.messages import AdapterUse, RequestId, Sampling, Submit
from loractl.server.engine.settings import EngineSettings
from tiny_models import make_adapter


@pytest.mark.slow
@pytest.mark.real_model
def test_engine_answers_alike_alone_and_mixed_when_the_base_is_int8(tmp_path: Path) -> None:
    folder = demo_base()
    adapters = [make_adapter(folder, tmp_path / f"a{seed}", seed=seed, std=0.02) for seed in range(2)]
    engine = Engine(load_base(folder, quantization="int8"), EngineSettings(num_slots=2, kv_bytes=1 << 28))
    prompt = tuple(engine.base.tokenizer.encode("The capital of France is"))
    greedy = Sampling(max_tokens=8, temperature=0.0, ignore_eos=True)
    uses: list[tuple[AdapterUse, ...]] = [
        (),
        *((adapter_use(each),) for each in adapters),
    ]
    drive = Drive(engine)
    for i, use in enumerate(uses):  # alone first, so that both adapters are resident when they are to meet in a step
        drive.submit([Submit(id=RequestId(f"alone{i}"), prompt=prompt, sampling=greedy, adapters=use)])
        drive.until_ended()
    drive.submit(
        Submit(id=RequestId(f"mixed{i}"), prompt=prompt, sampling=greedy, adapters=use) for i, use in enumerate(uses)
    )
    drive.until_ended()
    for i in range(len(uses)):
        assert drive.outcomes[RequestId(f"mixed{i}")].ids == drive.outcomes[RequestId(f"alone{i}")].ids
    assert "Paris" in drive.outcomes[RequestId("mixed0")].text
    assert max(record.num_distinct_adapters for record in drive.records) == 2
    engine.close()
