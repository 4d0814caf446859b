"""Decode steps through captured graphs: padded sizes, split segments, what no graph fits.

A CPU has no graphs: here a replay runs the captured work again, on the memory that it was captured with, and
the kernels run in Triton's interpreter. tests/gpu/test_engine.py has the real ones.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from server.devices.cuda import graphs
from server.devices.cuda.attention import PagedTritonAttention
from server.devices.cuda.graphs import Capture, DecodeGraphs, NotCapturable, Work, kinds_of, sizes_up_to
from server.engine.engine import Engine
from server.lora.kernels.interface import ArenaView
from server.lora.segments import Segments
from server.model.attention.interface import AttentionPlan, LayerCacheSpec
from server.model.batch import Batch
from server.model.sampling import Sampling
from tests.devices.cuda import interpreted
from tests.devices.cuda.interpreted import make_interpreted
from tests.engine.harness import adapter_ref, assert_at_rest, greedy, run, tokens_of
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


def capture(engine: Engine, how: Callable[[Callable[[], None]], Callable[[], None]], most: int = 1) -> None:
    interpreted.capture(engine, how, most)


def test_captured_steps_give_the_tokens_of_the_model(
    folders: tuple[Path, list[Path]], triton_engine: Callable[..., Engine]
) -> None:
    """Alone, shared and no adapters in one batch, whose size changes as the shorter ones end."""
    model, (a, b, _) = folders
    rng = random.Random(3)
    jobs = [
        Job([rng.randrange(3, VOCAB) for _ in range(length)], adapter, tokens)
        for length, adapter, tokens in ((9, a, 4), (3, None, 5), (5, b, 3), (2, a, 6), (4, a, 5))
    ]
    engine, fake = triton_engine(), FakeCapture()
    assert engine._runner.fused
    capture(engine, fake, most=5)
    captures = fake.captures
    assert captures == sum(len(kinds_of(size)) for size in sizes_up_to(5))
    before = fake.replays
    assert serve(engine, jobs) == expected(model, jobs)
    assert fake.captures == captures, "captured while it served"
    assert fake.replays - before >= 4, "the steps did not go through the graphs"
    assert_at_rest(engine)


def test_a_mix_with_too_many_adapters_runs_as_it_is(
    folders: tuple[Path, list[Path]], triton_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "_ENTRIES_PER_SEQUENCE", 1)
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
        return batch.token_ids[:, None].float().expand(-1, 7)


def graphs_of(
    forward: Recorder, fake: Capture, prepare: Callable[[AttentionPlan], AttentionPlan] = lambda plan: plan
) -> DecodeGraphs:
    return DecodeGraphs(
        forward,
        prepare,
        lambda: fake,
        max_num_seqs=64,
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
    assert segments is not None
    assert segments.token_starts.tolist() == [0, 2]
    assert segments.entry_starts.tolist() == [0, 1]
    assert (segments.slots[0], segments.weights[0]) == (1, 2.0)


def test_long_segments_are_cut_into_shorter_ones_of_the_same_adapters() -> None:
    forward = Recorder()
    graphs = graphs_of(forward, FakeCapture())
    mixes = [(((3, 1.0),), 1), (((1, 0.5), (2, 2.0)), 35), (((4, 1.0),), 16)]
    graphs.logits(decode_batch(Segments.build(mixes), sequences=60), tables(5))
    segments = forward.batches[-1].segments
    assert segments is not None
    assert segments.max_tokens == 16
    assert segments.token_starts.tolist() == [0, 1, 17, 33, 36] + 12 * [52]
    assert segments.entry_starts.tolist() == [0, 1, 3, 5, 7] + 12 * [8]
    assert segments.slots[:8].tolist() == [3, 1, 2, 1, 2, 1, 2, 4]
    assert segments.weights[:8].tolist() == [1.0, 0.5, 2.0, 0.5, 2.0, 0.5, 2.0, 1.0]


@pytest.mark.parametrize("size", [1, 2, 16, 64, 256])
def test_few_kinds_for_each_size(size: int) -> None:
    kinds = kinds_of(size)
    assert len(kinds) == len(set(kinds)) <= 5
    assert max(kind.segments for kind in kinds) == size, "each sequence may have an adapter of its own"


@pytest.mark.parametrize("sequences", [16, 64, 256])
def test_an_adapter_that_all_share_keeps_the_kernels_busy(sequences: int) -> None:
    """Of the programs that shrink launches, at least half have a segment to work on."""
    launch_of = pytest.importorskip("server.devices.cuda.lora").Tiling.choose
    forward = Recorder()
    graphs = DecodeGraphs(
        forward,
        lambda plan: plan,
        FakeCapture,
        max_num_seqs=256,
        max_model_len=32,
        block_size=4,
        device=torch.device("cpu"),
    )
    graphs.logits(decode_batch(Segments.build([(((0, 1.0),), sequences)]), sequences), tables(1))
    segments = forward.batches[-1].segments
    assert segments is not None
    launch = launch_of(segments, 4096, 4096, element_size=2, programs=528)
    live = int((segments.token_starts.diff() > 0).sum())
    assert live / launch.tiles >= 0.5


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


def test_prompts_and_larger_batches_are_left_alone() -> None:
    forward = Recorder()
    graphs = graphs_of(forward, FakeCapture())
    assert graphs.logits(decode_batch(None, sequences=65), tables(1)) is None
    batch = decode_batch(None, sequences=3)
    prompt = replace(batch.attention, max_query_len=9)
    assert graphs.logits(replace(batch, attention=prompt), tables(1)) is None
    unsampled = replace(batch, sample_rows=torch.arange(2))
    assert graphs.logits(unsampled, tables(1)) is None
    assert not forward.batches
