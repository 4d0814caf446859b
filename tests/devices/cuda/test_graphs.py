"""Steps through captured graphs: padded sizes, split segments, what no graph fits.

A CPU has no graphs: here a replay runs the captured work again, on the memory that it was captured with, and
the kernels run in Triton's interpreter. tests/gpu/test_engine.py has the real ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from server.devices.cuda import graph_inputs
from server.devices.cuda.attention import PagedTritonAttention
from server.devices.cuda.capture import Capture, Work
from server.devices.cuda.graphs import (
    CapturedSteps,
    kinds_of,
    prompt_kinds_of,
    prompt_sizes_up_to,
    sizes_up_to,
)
from server.engine.engine import Engine
from server.lora.kernels.interface import ArenaView
from server.lora.segments import Segments
from server.model import loader, proof
from server.model.attention.interface import AttentionPlan, LayerCacheSpec
from server.model.batch import Batch
from server.model.device import NotCapturable
from server.model.loader import load
from server.model.runner import Runner
from server.model.sampling import Sampling
from tests.devices.cuda import interpreted
from tests.devices.cuda.interpreted import cuda_operators, make_interpreted
from tests.engine.harness import adapter_ref, assert_at_rest, greedy, run, settings_for, tokens_of
from tests.engine.prompt_scores import assert_right, prompt, scores_of, scoring
from tests.lora.kernels import random_arena
from tests.model.tiny_models import VOCAB, Job, add_adapter, build, expected, serve, targets_of

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs these kernels compiled"),
    # In rows without a sequence stands what memory held before; numpy computes with that too.
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]


class FakeCapture:
    """Replays by running the work again."""

    def __init__(self) -> None:
        self.captures = 0
        self.replays = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        work()

        def replay() -> None:
            self.replays += 1
            work()

        return replay


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base model, and adapters of different ranks on it."""
    root = tmp_path_factory.mktemp("graphs")
    model = build("llama", root / "model")
    targets = targets_of("llama")
    adapters = [
        add_adapter(model, root / f"a{rank}", seed=rank, rank=rank, target_modules=targets)
        for rank in (6, 3, 4)
    ]
    return model, adapters


@pytest.fixture
def triton_engine(folders: tuple[Path, list[Path]]) -> Iterator[Callable[..., Engine]]:
    pytest.importorskip("triton")
    made: list[Engine] = []

    def make(**overrides: object) -> Engine:
        made.append(make_interpreted(folders[0], **({"max_model_len": 64, "max_num_seqs": 8} | overrides)))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def capture(
    engine: Engine, how: Callable[[Callable[[], None]], Callable[[], None]], most: int = 1, tokens: int = 1
) -> None:
    interpreted.capture(engine, how, most, tokens)


def test_captured_steps_give_the_tokens_of_the_model(
    folders: tuple[Path, list[Path]], triton_engine: Callable[..., Engine]
) -> None:
    """Alone, shared and no adapters in one batch, whose size changes as the shorter ones end."""
    model, (a, b, _) = folders
    rng = random.Random(3)
    jobs = [
        Job([rng.randrange(3, VOCAB) for _ in range(length)], adapter, tokens)
        for length, adapter, tokens in ((9, a, 2), (3, None, 3), (5, b, 2), (2, a, 4), (4, a, 3))
    ]
    engine, fake = triton_engine(max_num_batched_tokens=12), FakeCapture()
    assert engine._runner.fused
    capture(engine, fake, most=5, tokens=12)
    captures = fake.captures
    assert captures == sum(len(kinds_of(size)) for size in sizes_up_to(5)) + len(prompt_kinds_of(12, 5))
    before = fake.replays
    assert serve(engine, jobs) == expected(model, jobs)
    assert fake.captures == captures, "captured while it served"
    assert fake.replays - before == engine._steps, "a step did not go through the graphs"
    assert_at_rest(engine)


def test_prompts_whose_log_probabilities_are_wanted(
    folders: tuple[Path, list[Path]], triton_engine: Callable[..., Engine]
) -> None:
    """As many rows as a graph has room for are replayed; more run as they are."""
    model, (adapter, *_) = folders
    engine, fake = triton_engine(max_num_batched_tokens=12), FakeCapture()
    runner = engine._runner
    runner._graphs = interpreted.captured_steps(
        runner, fake, most=5, tokens=12
    )  # captured at their first use
    before = fake.replays
    few = scoring("few", prompt(4, 1), adapter, tokens=1)
    many = scoring("many", prompt(11, 2), tokens=1)
    for request, who, replays in ((few, adapter, 1), (many, None, 1)):
        engine.add(request)
        assert_right(model, request, scores_of(run(engine)[request.request_id]), who)
        assert fake.replays - before == replays


@pytest.mark.long
def test_a_mix_with_too_many_adapters_runs_as_it_is(
    folders: tuple[Path, list[Path]], triton_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_inputs, "ENTRIES_PER_SEQUENCE", 1)
    mix = [adapter_ref(folder) for folder in folders[1]]
    usual, captured, fake = triton_engine(), triton_engine(), FakeCapture()
    capture(captured, fake)
    before = fake.replays
    outputs = []
    for engine in (usual, captured):
        engine.add(greedy("mix", [5, 6, 7], 4, mix))
        outputs.append(tokens_of(run(engine)["mix"]))
    assert outputs[0] == outputs[1]
    assert fake.replays == before


def test_a_model_that_cannot_be_captured_is_served_without(
    triton_engine: Callable[..., Engine], caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(work: Callable[[], None]) -> Callable[[], None]:
        raise NotCapturable("operation not permitted when stream is capturing")

    engine = triton_engine()
    capture(engine, refuse)
    assert "they could not be captured: operation not permitted" in caplog.text
    engine.add(greedy("r", [5, 6, 7], 3))
    assert len(tokens_of(run(engine)["r"])) == 3


def test_graphs_that_give_other_logits_are_not_used(
    triton_engine: Callable[..., Engine], caplog: pytest.LogCaptureFixture
) -> None:
    engine = triton_engine()
    capture(engine, lambda work: work() or (lambda: None))  # a replay that does nothing
    assert "the logits differ" in caplog.text
    usual = triton_engine()
    for each in (engine, usual):
        each.add(greedy("r", [5, 6, 7], 4))
    assert tokens_of(run(engine)["r"]) == tokens_of(run(usual)["r"])


@pytest.mark.parametrize("most", [1, 3, 8, 64, 300])
def test_sizes(most: int) -> None:
    sizes = sizes_up_to(most)
    assert sizes == sorted(set(sizes))
    assert (sizes[0], sizes[-1]) == (1, most)


def decode_batch(segments: Segments | None, sequences: int, context: int = 5) -> Batch:
    return Batch(
        token_ids=torch.arange(sequences) + 100,
        positions=torch.full((sequences,), context - 1),
        sample_rows=torch.arange(sequences),
        attention=AttentionPlan(
            query_starts=torch.arange(sequences + 1, dtype=torch.int32),
            context_lens=torch.full((sequences,), context, dtype=torch.int32),
            block_tables=torch.arange(2 * sequences, dtype=torch.int32).view(sequences, 2),
            slot_mapping=torch.arange(sequences) * 8 + 4,
            num_seqs=sequences,
            max_query_len=1,
            max_context_len=context,
        ),
        segments=segments,
        sample_segments=segments,
        sampling=Sampling([]),
        rows=[],
    )


def tables(slots: int) -> ArenaView:
    empty = torch.zeros(slots, 1, 2, dtype=torch.int64)
    return ArenaView(torch.zeros(64), empty, empty[..., 0].int())


class Recorder:
    """A forward that keeps what it was given."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def __call__(self, batch: Batch, arena: ArenaView) -> torch.Tensor:
        self.batches.append(batch)
        return batch.token_ids[batch.sample_rows, None].float().expand(-1, 7)


def graphs_of(
    forward: Recorder, fake: Capture, prepare: Callable[[AttentionPlan], AttentionPlan] = lambda plan: plan
) -> CapturedSteps:
    return CapturedSteps(
        forward,
        prepare,
        lambda: fake,
        max_num_seqs=64,
        max_tokens=200,
        max_model_len=8192,
        block_size=4,
        device=torch.device("cpu"),
    )


def test_rows_beyond_the_batch_hold_nothing() -> None:
    forward = Recorder()
    graphs = graphs_of(forward, FakeCapture())
    graphs.logits(decode_batch(Segments.build([(((2, 0.5),), 20)]), sequences=30), tables(4))
    forward.batches.clear()
    logits = graphs.logits(decode_batch(Segments.build([(((1, 2.0),), 2)]), sequences=5), tables(4))
    assert logits is not None
    assert logits.tolist() == [[float(i)] * 7 for i in range(100, 105)]
    captured = forward.batches[-1]
    plan, segments = captured.attention, captured.segments
    assert plan.num_seqs == captured.token_ids.numel() == 8
    assert plan.query_starts.tolist() == [0, 1, 2, 3, 4, 5, 5, 5, 5]
    assert plan.slot_mapping.tolist() == [4, 12, 20, 28, 36, -1, -1, -1]
    assert plan.block_tables[:5, :2].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert items_of(segments) == [(0, 2, ((1, 2.0),))]


def items_of(segments: Segments | None) -> list[tuple[int, int, Mix]]:
    """First token, tokens, and the mix of each item."""
    assert segments is not None
    assert segments.work is not None
    live, rows = int(segments.work.items[0, 0]), segments.work.items[1:]
    found = []
    for first, tokens, slot, bits, begin, end, *_ in rows[:live].tolist():
        mix = tuple(
            zip(segments.slots[begin:end].tolist(), segments.weights[begin:end].tolist(), strict=True)
        )
        assert mix[0] == (slot, float(np.array(bits, dtype=np.int32).view(np.float32)))
        found.append((first, tokens, mix))
    return found


def test_long_segments_are_cut_into_items_of_the_same_adapters() -> None:
    forward = Recorder()
    graphs = graphs_of(forward, FakeCapture())
    one, two, three = ((3, 1.0),), ((1, 0.5), (2, 2.0)), ((4, 1.0),)
    segments = Segments.build([(one, 1), (two, 35), ((), 3), (three, 16)])
    graphs.logits(decode_batch(segments, sequences=60), tables(5))
    got = forward.batches[-1].segments
    assert items_of(got) == [(0, 1, one), (1, 16, two), (17, 16, two), (33, 3, two), (39, 16, three)]


def test_few_graphs() -> None:
    """Each takes some tenths of a second of a start."""
    kinds = [kind for size in sizes_up_to(256) for kind in kinds_of(size)]
    kinds += [kind for tokens in prompt_sizes_up_to(8192) for kind in prompt_kinds_of(tokens, 256)]
    assert len(kinds) == len(set(kinds)) <= 64


def test_attention_gets_the_items_of_the_step() -> None:
    """As many rows as the size may need, with none beyond the live ones; a long context has several."""
    forward = Recorder()
    backend = PagedTritonAttention([LayerCacheSpec(8, 128, 128, 32)], torch.bfloat16, programs=264)
    graphs = graphs_of(forward, FakeCapture(), backend.prepare)
    for contexts in ([8000, *[60] * 39], [60] * 35):
        batch = decode_batch(None, sequences=len(contexts))
        plan = replace(batch.attention, context_lens=torch.tensor(contexts, dtype=torch.int32))
        graphs.logits(replace(batch, attention=plan), tables(1))
        want, got = backend.prepare(plan).work, forward.batches[-1].attention.work
        assert want is not None
        assert got is not None
        assert (len(got.items), len(got.cuts), got.parts) == (48 + 33, 33, 2 * 33)
        for live, rows in ((want.items, got.items), (want.cuts, got.cuts)):
            assert torch.equal(rows[: len(live)], live)
            assert not rows[len(live) :].any()
    assert len(want.cuts) == 0


def test_a_graph_that_cannot_be_captured_later_ends_the_use_of_graphs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    forward, fake = Recorder(), FakeCapture()
    refused: list[Work] = []

    def refuse_the_second(work: Work) -> Work:
        if fake.captures:
            refused.append(work)
            raise NotCapturable("out of memory")
        return fake(work)

    graphs = graphs_of(forward, refuse_the_second)
    assert graphs.logits(decode_batch(None, sequences=3), tables(1)) is not None
    for _ in range(2):
        assert graphs.logits(decode_batch(None, sequences=30), tables(1)) is None
    assert graphs.logits(decode_batch(None, sequences=3), tables(1)) is None
    assert len(refused) == 1, "tried again"
    assert "out of memory" in caplog.text


def test_a_grown_arena_is_captured_anew() -> None:
    forward, fake = Recorder(), FakeCapture()
    graphs = graphs_of(forward, fake)
    small, large = tables(4), tables(8)
    for arena, captures in ((small, 1), (small, 1), (large, 2), (large, 2)):
        graphs.logits(decode_batch(None, sequences=3), arena)
        assert fake.captures == captures


Mix = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class RunOf:
    """Tokens of one sequence, of which the last `rows` are wanted."""

    tokens: int
    rows: int = 1
    mix: Mix = ()


def mixed_batch(runs: list[RunOf], before: list[int] | None = None) -> Batch:
    """A step of these runs; `before`: tokens of each sequence that the steps before computed."""
    starts = before or [0] * len(runs)
    ends = list(accumulate(run.tokens for run in runs))
    wanted = [torch.arange(end - run.rows, end) for run, end in zip(runs, ends, strict=True)]
    positions = [torch.arange(run.tokens) + start for run, start in zip(runs, starts, strict=True)]
    segments, samples = (
        Segments.build([(run.mix, count) for run, count in counted if run.mix and count])
        for counted in ([(run, run.tokens) for run in runs], [(run, run.rows) for run in runs])
    )
    contexts = [start + run.tokens for run, start in zip(runs, starts, strict=True)]
    return Batch(
        token_ids=torch.arange(ends[-1]) + 100,
        positions=torch.cat(positions),
        sample_rows=torch.cat(wanted),
        attention=AttentionPlan(
            query_starts=torch.tensor([0, *ends], dtype=torch.int32),
            context_lens=torch.tensor(contexts, dtype=torch.int32),
            block_tables=torch.arange(4 * len(runs), dtype=torch.int32).view(-1, 4),
            slot_mapping=torch.cat([64 * s + at for s, at in enumerate(positions)]),
            num_seqs=len(runs),
            max_query_len=max(run.tokens for run in runs),
            max_context_len=max(contexts),
        ),
        segments=segments,
        sample_segments=samples,
        sampling=Sampling([]),
        rows=[run.rows for run in runs],
    )


def test_a_step_with_prompts_is_padded_by_tokens() -> None:
    """The rows that are wanted have segments of their own; a prompt whose end is not reached has no row."""
    forward = Recorder()
    graphs = graphs_of(forward, FakeCapture())
    one, two = ((1, 0.5),), ((2, 1.0), (3, 2.0))
    batch = mixed_batch([RunOf(1, 1, one), RunOf(40, 0, one), RunOf(30, 1, two), RunOf(1)])
    logits = graphs.logits(batch, tables(4))
    assert logits is not None
    assert logits.tolist() == [[float(i)] * 7 for i in (100, 170, 171)]
    captured = forward.batches[-1]
    plan, segments, samples = captured.attention, captured.segments, captured.sample_segments
    assert (captured.token_ids.numel(), plan.num_seqs, plan.max_query_len) == (128, 64, 128)
    assert plan.query_starts.tolist() == [0, 1, 41, 71, 72] + 60 * [72]
    assert plan.context_lens.tolist() == [1, 40, 30, 1] + 60 * [0]
    assert plan.slot_mapping.tolist() == batch.attention.slot_mapping.tolist() + 56 * [-1]
    assert captured.sample_rows.tolist() == [0, 70, 71] + 61 * [0]
    assert items_of(segments) == [(0, 1, one), (1, 40, one), (41, 30, two)]
    assert items_of(samples) == [(0, 1, one), (1, 1, two)]


def test_a_step_whose_prompts_are_not_at_an_end_gives_no_logits() -> None:
    forward = Recorder()
    logits = graphs_of(forward, FakeCapture()).logits(mixed_batch([RunOf(40, 0, ((1, 1.0),))]), tables(2))
    assert logits is not None
    assert logits.shape == (0, 7)


def test_every_logit_of_a_prompt_is_given_where_there_is_room() -> None:
    forward = Recorder()
    graphs = graphs_of(forward, FakeCapture())
    logits = graphs.logits(mixed_batch([RunOf(50, 50)]), tables(2))
    assert logits is not None
    assert logits[:, 0].tolist() == list(range(100, 150))
    forward.batches.clear()
    assert graphs.logits(mixed_batch([RunOf(70, 70)]), tables(2)) is None
    assert not forward.batches


def test_larger_steps_are_left_alone() -> None:
    forward = Recorder()
    graphs = graphs_of(forward, FakeCapture())
    assert graphs.logits(decode_batch(None, sequences=65), tables(1)) is None
    assert graphs.logits(mixed_batch([RunOf(201)]), tables(1)) is None
    assert graphs.logits(mixed_batch([RunOf(2), *64 * [RunOf(1)]]), tables(1)) is None
    assert not forward.batches


@pytest.mark.parametrize("most", [1, 24, 300, 1024, 8192])
def test_prompt_sizes(most: int) -> None:
    """Few, and where tokens cost time (from 256 on) padding adds at most a quarter."""
    sizes = prompt_sizes_up_to(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == min(most, 1024)
    assert len(sizes) <= 12
    assert all(upper <= 1.25 * (lower + 1) for lower, upper in pairwise(sizes) if lower >= 256)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss"])  # the others' layers are these
def test_padded_steps_with_prompts_give_the_logits_of_unpadded_ones(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that holds a decode, a prompt's middle and ends of prompts, with an adapter, a mix and without."""
    pytest.importorskip("triton")
    for module in (proof, loader):
        monkeypatch.setattr(module, "LENGTHS", (2, 1))  # the interpreter takes its time
    loaded = load(settings_for(build(architecture, tmp_path / "model"), max_model_len=64))
    runner = Runner(loaded, cuda_operators(loaded), num_blocks=16, block_size=16)
    ranks = [[3 + module % 2 for module in range(len(runner.targets))], [4 for _ in runner.targets]]
    shapes = [(target.in_features, target.out_features) for target in runner.targets]
    arena = random_arena(ranks, shapes, torch.float32, seed=1)
    mixes: list[Mix] = [((0, 1.0),), ((1, 0.7),), ((0, 0.5), (1, -1.5)), ()]
    before = [1, 3, 2, 1]
    runner.logits(mixed_batch([RunOf(*run) for run in zip(before, (1, 0, 0, 1), mixes, strict=True)]), arena)
    runs = [RunOf(*run) for run in zip((1, 4, 3, 1), (1, 0, 2, 1), mixes, strict=True)]
    batch = mixed_batch(runs, before)
    want = runner.logits(batch, arena)
    got = interpreted.captured_steps(runner, lambda work: work, most=5, tokens=12).logits(batch, arena)
    assert got is not None
    assert got.shape == want.shape == (4, VOCAB)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
