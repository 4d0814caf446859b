from __future__ import annotations

import copy

import torch
from torch import nn

from server.lora.kernels.interface import ArenaView, Begun, Modules, Part
from server.lora.kernels.reference import ReferenceKernels
from server.lora.linear import CurrentLora, LoraLinear, LoraStep, wrap_linears
from server.lora.segments import Segments


class SpyKernels(ReferenceKernels):
    """Counts calls."""

    def __init__(self) -> None:
        super().__init__()
        self.modules: list[int] = []

    def begin(self, x_TI: torch.Tensor, modules: Modules, segments: Segments, arena: ArenaView) -> Begun:
        self.modules.append(modules.first)
        return super().begin(x_TI, modules, segments, arena)


class Tiny(nn.Module):
    """An embedding tied to the output head, as many models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.inner(self.embed(ids)))[:, rows])


def rank_one_arena(modules: list[tuple[int, int]]) -> ArenaView:
    """One adapter of rank 1 on every module, all ones."""
    offsets = torch.zeros(1, len(modules), len(Part), dtype=torch.int64)
    end = 16
    for m, (n_in, n_out) in enumerate(modules):
        offsets[0, m, : Part.GAIN] = torch.tensor([end, end + 16])
        end += 32
        assert max(n_in, n_out) <= 16
    return ArenaView(torch.ones(end), offsets, torch.ones(1, len(modules), dtype=torch.int32))


@torch.no_grad()
def test_a_base_only_step_runs_no_kernel_and_a_tied_head_leaves_the_embedding_alone() -> None:
    torch.manual_seed(0)
    model = Tiny()
    plain = copy.deepcopy(model)
    kernels = SpyKernels()
    current = CurrentLora()
    layers = wrap_linears(model, kernels, current, model.head)
    assert [(name, layer.module, layer.is_output_head) for name, layer in layers] == [
        ("inner", 0, False),
        ("head", 1, True),
    ]
    ids, rows = torch.tensor([[1, 2, 3]]), torch.tensor([0, 2])
    assert torch.equal(model(ids, rows), plain(ids, rows))
    assert kernels.modules == []

    tokens = Segments.build([(((0, 1.0),), 2)])  # the first two tokens
    samples = Segments.build([(((0, 1.0),), 1)])  # of which the first is sampled
    assert tokens is not None
    current.step = LoraStep(rank_one_arena([(8, 8), (8, 11)]), tokens, samples)
    got = model(ids, rows)
    assert kernels.modules == [0, 1]
    x = plain.embed(ids)
    inner = plain.inner(x)
    inner[:, :2] += x[:, :2].sum(-1, keepdim=True)
    hidden = torch.tanh(inner)[:, rows]
    want = plain.head(hidden)
    want[:, :1] += hidden[:, :1].sum(-1, keepdim=True)
    torch.testing.assert_close(got, want)
    assert torch.equal(model.embed.weight, plain.embed.weight)


def test_the_base_weight_is_visible() -> None:
    linear = nn.Linear(3, 4)
    layer = LoraLinear(linear, 0, ReferenceKernels(), CurrentLora(), is_output_head=False)
    assert layer.weight is linear.weight
    assert (layer.in_features, layer.out_features) == (3, 4)
