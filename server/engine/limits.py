"""What an engine can hold and what it refuses at the door. Knows sizes and requests, runs nothing."""

import os

import torch

from loractl.adapters.errors import BadRequest, WillNotFit
from loractl.server.engine.base_model import BaseModel
from loractl.server.engine.messages import Submit
from loractl.server.engine.model_shape import kv_shape
from loractl.server.engine.settings import EngineSettings

# Automatic sizing shares out no more: blocks that no batch fills only cost memory.
_AUTO_HOST_LIMIT_BYTES = 4 << 30


def choose_num_blocks(base: BaseModel, settings: EngineSettings) -> int:
    """Size the KV cache: what was asked for, else a share of the free memory, never more than all rows could use."""
    heads, dim = kv_shape(base.model)
    layers = base.model.config.get_text_config().num_hidden_layers
    dtype = next(p.dtype for p in base.model.parameters() if p.dtype.is_floating_point)
    block_bytes = settings.block_size * layers * heads * dim * 2 * dtype.itemsize
    longest = min(base.max_model_len, settings.max_model_len or base.max_model_len)
    most = settings.max_running * (-(-longest // settings.block_size) + 1)
    if settings.kv_bytes is not None:
        size_bytes = settings.kv_bytes
    else:
        size_bytes = int(_free_bytes(base) * settings.memory_fraction)
    num_blocks = int(min(size_bytes // block_bytes, most))
    if num_blocks < 2:
        raise WillNotFit(f"{size_bytes} bytes hold no KV block of {block_bytes} bytes", hint="give the KV cache more")
    return num_blocks


def _free_bytes(base: BaseModel) -> int:
    """Memory that automatic sizing shares out: all that is free on a card, of a host's no more than batches fill."""
    device = next(base.model.parameters()).device
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(min(free, _AUTO_HOST_LIMIT_BYTES))


def check_request(request: Submit, *, max_model_len: int, vocab_size: int, max_adapters: int) -> None:
    """Raise BadRequest, naming the field, for what can never run."""
    sampling = request.sampling
    if not request.prompt:
        raise BadRequest("the prompt holds no token", field="prompt")
    if len(request.prompt) >= max_model_len:
        raise BadRequest(
            f"the prompt has {len(request.prompt)} tokens, this model takes {max_model_len} with the answer",
            field="prompt",
        )
    if not all(0 <= token < vocab_size for token in request.prompt):
        raise BadRequest(f"the prompt holds token ids outside 0 to {vocab_size - 1}", field="prompt")
    if not all(0 <= token < vocab_size for token in sampling.logit_bias):
        raise BadRequest(f"logit_bias names token ids outside 0 to {vocab_size - 1}", field="logit_bias")
    num_adapters = len({use.digest for use in request.adapters})
    if num_adapters > max_adapters:
        raise BadRequest(
            f"{num_adapters} adapters are to be summed, and {max_adapters} can run together here", field="adapters"
        )
