"""What an engine refuses at the door. Knows requests, runs nothing."""

from loractl.adapters.errors import BadRequest
from loractl.server.engine.messages import Submit


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
