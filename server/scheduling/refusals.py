"""The outputs that end a sequence with an error, and what they say."""

from __future__ import annotations

from server.messages import ErrorCode, TokenOutput
from server.scheduling.block_pool import BlockPool
from server.scheduling.sequence import Sequence, State

TOO_LARGE = "The accelerator's memory was too small for a step with this request, twice."


def refusal(seq: Sequence, code: ErrorCode, message: str) -> TokenOutput:
    return TokenOutput(seq.request_id, [], finish_reason="error", error=code, message=message)


def late(seq: Sequence) -> str:
    """Why it ends when its deadline has passed."""
    doing = "ran" if seq.state is State.RUNNING else "waited"
    return f"The request's time of {seq.timeout_s:g} s was over while it {doing}."


def never_fits(seq: Sequence, pool: BlockPool, max_model_len: int) -> str:
    """Why it can never run here; nothing where it can."""
    if seq.num_prompt_tokens == 0:
        return "The prompt has no tokens."
    if seq.num_prompt_tokens + int(not seq.is_prompt_alone) > max_model_len:
        return (
            f"The prompt has {seq.num_prompt_tokens} tokens; with one to generate that is more than the "
            f"{max_model_len} that this server allows."
        )
    # The last token is given out, never computed, unless it is the prompt's.
    if pool.blocks_for(max(seq.max_length - 1, seq.num_prompt_tokens)) > pool.num_blocks:
        return (
            f"Prompt and output of {seq.max_length} tokens can never fit into the KV cache of "
            f"{pool.num_blocks * pool.block_size} tokens."
        )
    return ""
