"""The LoRA layer: a base Linear, and the deltas of whatever adapters the step's tokens ask for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from server.lora.kernels.interface import ArenaView, LoraKernels
from server.lora.segments import Segments


@dataclass
class LoraStep:
    """What the LoRA layers of a model share: the kernels, and the adapters of the step being run.

    The runner sets the three fields before a forward. `samples` are the segments of the rows that the
    output head computes, which are fewer than the step's tokens. None means base model only: no kernel runs.
    """

    kernels: LoraKernels
    arena: ArenaView | None = None
    segments: Segments | None = None
    samples: Segments | None = None


class LoraLinear(nn.Module):
    """y = base(x) + sum of adapters' deltas (Hu et al. 2021). `base` is only called: it may be quantised."""

    base: nn.Module

    def __init__(self, base: nn.Linear, module: int, step: LoraStep, *, is_output_head: bool) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.module = module
        self.is_output_head = is_output_head
        self._step = step

    @property
    def weight(self) -> torch.Tensor:
        """The base weight, for model code that looks at it (a tied embedding, a dtype check)."""
        weight = self.base.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in_features] -> [..., out_features]."""
        y: torch.Tensor = self.base(x)
        self.add_deltas(y, x)
        return y

    def add_deltas(self, y: torch.Tensor, x: torch.Tensor, widths: tuple[int, ...] | None = None) -> None:
        """Add to y what the step's adapters make of x; for code that computes base(x) by itself.

        x: [..., in_features]; y: [..., out_features]. `widths`: y holds the outputs of the layers after this
        one too, see `LoraKernels.apply`.
        """
        segments = self._step.samples if self.is_output_head else self._step.segments
        if segments is not None and self._step.arena is not None:
            x_TI = x.reshape(-1, x.shape[-1])
            if x_TI.stride(-1) != 1:
                x_TI = x_TI.contiguous()
            y_TO = y.view(-1, y.shape[-1])
            self._step.kernels.apply(y_TO, x_TI, self.module, segments, self._step.arena, widths)


def wrap_linears(model: nn.Module, step: LoraStep, head: nn.Module | None) -> list[tuple[str, LoraLinear]]:
    """Replace every nn.Linear of `model` by a LoraLinear; returns (name, layer) in the tables' column order.

    `head` is the output head, whose rows are the step's samples.
    """
    linears = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    wrapped = []
    for module, (name, layer) in enumerate(linears):
        lora = LoraLinear(layer, module, step, is_output_head=layer is head)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, lora)
        wrapped.append((name, lora))
    return wrapped
