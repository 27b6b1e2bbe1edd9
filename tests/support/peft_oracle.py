"""What PEFT and transformers answer for one request alone, in float32: the oracle of the engine's tests."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loractl.adapters.base_loading import teach_layout


def alone(
    base: Path, adapter: Path | None, prompt: tuple[int, ...], num_tokens: int
) -> tuple[list[int], list[float], torch.Tensor]:
    """Greedy tokens, their log probabilities, and the logits [positions, vocabulary] of the prompt."""
    teach_layout(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    ids, logprobs = list(prompt), []
    of_prompt = torch.empty(0)
    for step in range(num_tokens):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        of_prompt = of_prompt if step else logits
        scores = torch.log_softmax(logits[-1], -1)
        ids.append(int(scores.argmax()))
        logprobs.append(float(scores.max()))
    return ids[len(prompt) :], logprobs, of_prompt
