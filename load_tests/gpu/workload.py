"""How much the parts measure: of a real model, or of a tiny one, which only shows that they run."""

from __future__ import annotations

from dataclasses import dataclass

# Tokens, and the distinct adapters among them: of decode, then of prefill.
_KERNEL_BATCHES = (
    *((1, 1), (16, 1), (16, 16), (64, 1), (64, 16), (64, 64), (256, 1), (256, 16), (256, 64), (256, 256)),
    *((2048, 1), (2048, 16), (8192, 1), (8192, 64)),
)


@dataclass(frozen=True)
class Workload:
    """The sizes of all parts. Lengths are tokens."""

    shape: str = "llama-3.1-8b"
    small_shape: str = "qwen2.5-0.5b"  # of the parts whose adapters must be small, or many
    rank: int = 16
    rounds: int = 3
    sequences: int = 64  # that decode at once where a part has one batch; as many distinct adapters
    batches: tuple[int, ...] = (64, 1, 16)  # of decode, in this order
    large_batch: int = 256  # of decode, after prefill; without a target
    prompt: int = 128  # of decode, and of the one that comes into a mixed step
    output: int = 32
    prefill: tuple[int, int] = (16, 512)  # sequences, and the prompt of each
    mixed_rank_adapters: int = 16
    copies: int = 15  # rounds
    storms: int = 5  # rounds
    storm_steps: int = 150  # of a round
    sweep_points: tuple[int, ...] = (1, 8, 64, 512, 2000)  # adapters
    sweep_window_s: float = 4.0  # of a round at a point, at most
    sweep_output: tuple[int, int] = (32, 96)  # fewest and most
    sweep_host_bytes: int = 8 * 2**30
    kernel_batches: tuple[tuple[int, int], ...] = _KERNEL_BATCHES
    kernel_width: int = 4096  # features in and out
    kernel_calls: int = 512  # at most, of one measurement
    copy_bytes: int = 4 * 2**30  # several times any cache
    product_size: int = 8192
    profiled_steps: int = 3

    @property
    def most_sequences(self) -> int:
        """That are ever in the engine at once."""
        return max(*self.batches, self.large_batch, self.prefill[0], self.sequences + 1)

    @property
    def longest(self) -> int:
        """Tokens of a sequence of decode or prefill, prompt and output together."""
        return max(self.prompt + self.output, self.prefill[1] + 1)


WORKLOADS = {
    "llama-3.1-8b": Workload(),
    "qwen2.5-0.5b": Workload(shape="qwen2.5-0.5b"),
    "tiny": Workload(
        shape="tiny",
        small_shape="tiny",
        rounds=1,
        sequences=4,
        batches=(4, 1),
        large_batch=6,
        prompt=8,
        output=3,
        prefill=(2, 16),
        mixed_rank_adapters=4,
        copies=2,
        storms=1,
        storm_steps=40,
        sweep_points=(1, 4),
        sweep_window_s=0.5,
        sweep_output=(2, 4),
        sweep_host_bytes=2**28,
        kernel_batches=((2, 1), (4, 2)),
        kernel_width=64,
        kernel_calls=2,
        copy_bytes=2**20,
        product_size=64,
        profiled_steps=2,
    ),
}
