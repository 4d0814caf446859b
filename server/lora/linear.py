"""The LoRA layer: a base Linear, and what the adapters that the step's tokens ask for make of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from server.lora.kernels.interface import ArenaView, Begun, LoraKernels, Modules
from server.lora.segments import Segments


@dataclass(frozen=True, eq=False)
class LoraStep:
    """The adapters of one step; without any there is no LoraStep, and no kernel runs."""

    arena: ArenaView
    tokens: Segments  # of the step's tokens
    samples: Segments | None  # of the rows that the output head computes, which are fewer


@dataclass
class CurrentLora:
    """The step being run, for LoRA layers that are called by code which does not know of it."""

    step: LoraStep | None = None


class LoraLinear(nn.Module):
    """y = base(x), with the step's adapters (Hu et al. 2021). `base` is only called: it may be quantised."""

    base: nn.Module

    def __init__(
        self,
        base: nn.Linear,
        module: int,
        kernels: LoraKernels,
        current: CurrentLora,
        *,
        is_output_head: bool,
    ) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.module = module
        self.is_output_head = is_output_head
        self._kernels, self._current = kernels, current

    @property
    def weight(self) -> torch.Tensor:
        """The base weight, for model code that looks at it (a tied embedding, a dtype check)."""
        weight = self.base.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in_features] -> [..., out_features], in the step being run."""
        return self.adapted(x, self._current.step)

    def adapted(self, x: torch.Tensor, step: LoraStep | None) -> torch.Tensor:
        """x: [..., in_features] -> [..., out_features], in that step."""
        begun = self.begin(x, step)
        y: torch.Tensor = self.base(x)
        if begun is not None:
            begun.finish(y.view(-1, self.out_features))
        return y

    def begin(
        self, x: torch.Tensor, step: LoraStep | None, widths: tuple[int, ...] | None = None
    ) -> Begun | None:
        """What the step's adapters make of x: [..., in_features], to be finished over base(x). None: nothing.

        `widths`: outputs of this layer and of those after it that read the same x, if it is for them too.
        """
        if step is None:
            return None
        segments = step.samples if self.is_output_head else step.tokens
        if segments is None:
            return None
        x_TI = x.reshape(-1, x.shape[-1])
        if x_TI.stride(-1) != 1:
            x_TI = x_TI.contiguous()
        modules = Modules(self.module, widths or (self.out_features,))
        return self._kernels.begin(x_TI, modules, segments, step.arena)


def wrap_linears(
    model: nn.Module, kernels: LoraKernels, current: CurrentLora, head: nn.Module | None
) -> list[tuple[str, LoraLinear]]:
    """Replace every nn.Linear of `model` by a LoraLinear; returns (name, layer) in the tables' column order.

    `head` is the output head, whose rows are the step's samples.
    """
    linears = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    wrapped = []
    for module, (name, layer) in enumerate(linears):
        lora = LoraLinear(layer, module, kernels, current, is_output_head=layer is head)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, lora)
        wrapped.append((name, lora))
    return wrapped
