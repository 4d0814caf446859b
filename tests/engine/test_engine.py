"""The engine as a whole: adapters that do not fit, aborts, preemption, bad adapters, explicit loads."""

from __future__ import annotations

import json
import random
import threading
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.engine.engine import Engine
from server.messages import (
    STEP_TOKEN_BOUNDS,
    AdapterRef,
    AdapterResult,
    ErrorCode,
    LoadAdapter,
    Request,
    UnloadAdapter,
)
from server.peft.format import judge
from tests.engine.harness import adapter_ref, assert_at_rest, busy, greedy, make_engine, run, tokens_of
from tests.model.tiny_models import VOCAB, add_adapter, targets_of

RANK = 4


pytestmark = pytest.mark.usefixtures("runs_beside_host")


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    return add_adapter(model, folder, seed=1, rank=RANK, target_modules=targets_of("llama"))


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    """Engines of a test, closed at its end."""
    made: list[Engine] = []
    yield made
    for engine in made:
        engine.close()


def variant(adapter: Path, out: Path, seed: int) -> AdapterRef:
    """Another adapter of the same shape."""
    out.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        tensors[name] = torch.randn(tensor.shape, generator=generator) * 0.15
    save_file(tensors, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    return adapter_ref(out)


def prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB) for _ in range(length)]


def load(engine: Engine, ref: AdapterRef) -> None:
    engine.load_adapter(LoadAdapter(0, ref))
    results(engine)


def packed_bytes(engine: Engine, ref: AdapterRef) -> int:
    load(engine, ref)
    return engine.stats().arena_bytes_used


def results(engine: Engine) -> list[AdapterResult]:
    """Step until every adapter call is answered."""
    answers: list[AdapterResult] = []
    while busy(engine):
        answers += engine.step()[1]
    return answers


def test_200_adapters_over_an_arena_for_8(
    model: Path, adapter: Path, tmp_path: Path, engines: list[Engine]
) -> None:
    refs = [variant(adapter, tmp_path / f"a{i}", seed=i) for i in range(200)]
    roomy = make_engine(model, arena_bytes=64 * 2**20)
    engines.append(roomy)
    each = packed_bytes(roomy, refs[0])
    small = make_engine(model, arena_bytes=8 * each, max_num_seqs=16)
    engines.append(small)
    for engine in (roomy, small):
        for i, ref in enumerate(refs):
            engine.add(greedy(str(i), prompt(6, seed=i), 4, [ref]))
    want, got = run(roomy), run(small)
    assert {i: tokens_of(outputs) for i, outputs in got.items()} == {
        i: tokens_of(outputs) for i, outputs in want.items()
    }
    assert len(got) == 200
    assert len({tuple(tokens_of(outputs)) for outputs in got.values()}) > 150, "adapters make no difference"
    assert len(small.stats().resident) <= 8
    assert small.stats().adapter_evictions >= 192
    assert_at_rest(small)


def test_preempted_sequences_lose_nothing(model: Path, adapter: Path, engines: list[Engine]) -> None:
    ref = adapter_ref(adapter)
    roomy = make_engine(model)
    tight = make_engine(model, block_size=4, kv_cache_bytes=24 * 4 * 2 * 2 * 2 * 8 * 4, prefix_caching=False)
    engines += [roomy, tight]
    for engine in (roomy, tight):
        load(engine, ref)  # so that all six run at once, and there is not room for them
        for i in range(6):
            engine.add(greedy(str(i), prompt(9, seed=i), 24, [ref] if i % 2 else []))
    want, got = run(roomy), run(tight)
    assert tight.stats().preemptions > 0
    assert {i: tokens_of(o) for i, o in got.items()} == {i: tokens_of(o) for i, o in want.items()}
    assert_at_rest(tight)


def test_seeded_sampling_does_not_depend_on_neighbours_or_preemption(
    model: Path, engines: list[Engine]
) -> None:
    def seeded(i: int) -> Request:
        return greedy(str(i), prompt(9, seed=i), 20, temperature=0.8, top_p=0.9, top_k=30, seed=100 + i)

    alone = {}
    for i in range(5):
        engine = make_engine(model)
        engines.append(engine)
        engine.add(seeded(i))
        alone |= run(engine)
    together = make_engine(model, block_size=4, kv_cache_bytes=20 * 4 * 2 * 2 * 2 * 8 * 4)
    engines.append(together)
    for i in range(5):
        together.add(seeded(i))
    got = run(together)
    assert together.stats().preemptions > 0
    assert {i: tokens_of(o) for i, o in got.items()} == {i: tokens_of(o) for i, o in alone.items()}


def test_prefix_reuse_gives_the_same_tokens_and_never_crosses_adapters(
    model: Path, adapter: Path, tmp_path: Path, engines: list[Engine]
) -> None:
    one, two = adapter_ref(adapter), variant(adapter, tmp_path / "two", seed=5)
    cold = make_engine(model, prefix_caching=False)
    warm = make_engine(model)
    engines += [cold, warm]
    shared = prompt(40, seed=1)
    asks = [
        ("a", [one]),
        ("b", [one]),
        ("c", [two]),
        ("d", []),
        ("e", [AdapterRef(one.digest, one.path, 0.5)]),
    ]
    want, got = {}, {}
    for name, refs in asks:  # one after the other, so that each could use what the one before left
        cold.add(greedy(name, shared, 6, refs))
        want |= run(cold)
        warm.add(greedy(name, shared, 6, refs))
        got |= run(warm)
    assert {i: tokens_of(o) for i, o in got.items()} == {i: tokens_of(o) for i, o in want.items()}
    assert {name: got[name][0].cached_tokens for name, _ in asks} == {"a": 0, "b": 32, "c": 0, "d": 0, "e": 0}


def test_composition_is_the_weighted_sum_of_deltas(
    model: Path, adapter: Path, tmp_path: Path, engines: list[Engine]
) -> None:
    """A mix of one adapter with itself at weights w and 1 - w is the adapter."""
    engine = make_engine(model)
    engines.append(engine)
    ref, other = adapter_ref(adapter), variant(adapter, tmp_path / "other", seed=9)
    ids = prompt(12, seed=3)
    halves = [AdapterRef(ref.digest, ref.path, 0.25), AdapterRef(ref.digest, ref.path, 0.75)]
    both = [ref, AdapterRef(other.digest, other.path, 0.0)]
    for name, refs in (("whole", [ref]), ("halves", halves), ("with zero", both), ("other", [other])):
        engine.add(greedy(name, ids, 12, refs))
    got = {name: tokens_of(outputs) for name, outputs in run(engine).items()}
    assert got["whole"] == got["halves"] == got["with zero"]
    assert got["whole"] != got["other"]


def test_abort_at_any_moment_frees_everything(
    model: Path, adapter: Path, tmp_path: Path, engines: list[Engine]
) -> None:
    refs = [variant(adapter, tmp_path / f"a{i}", seed=i) for i in range(6)]
    roomy = make_engine(model)
    engines.append(roomy)
    engine = make_engine(model, arena_bytes=2 * packed_bytes(roomy, refs[0]), max_num_batched_tokens=16)
    engines.append(engine)
    rng = random.Random(0)
    live: list[str] = []
    ended: set[str] = set()
    for turn in range(300):
        if turn < 200 and rng.random() < 0.4:
            live.append(str(turn))
            engine.add(greedy(str(turn), prompt(rng.randrange(1, 60), turn), 10, [rng.choice(refs)]))
        if live and rng.random() < 0.3:
            victim = live.pop(rng.randrange(len(live)))
            ended.add(victim)
            engine.abort([victim, "never heard of"])
        for output in engine.step()[0]:
            assert output.request_id not in ended
            if output.finish_reason is not None:
                ended.add(output.request_id)
                live.remove(output.request_id)
    run(engine)
    assert_at_rest(engine)
    for ref in refs:  # nothing is in use any more, so all of it can leave
        engine.unload_adapter(UnloadAdapter(1, ref.digest, forget=True))
    assert [result.residency for result in results(engine)] == ["disk"] * 6
    assert engine.stats().arena_bytes_used == 0
    assert engine.stats().host_bytes_used == 0


def test_an_adapter_that_overflows_fails_alone(
    model: Path, adapter: Path, tmp_path: Path, engines: list[Engine]
) -> None:
    engine = make_engine(model)
    engines.append(engine)
    huge = tmp_path / "huge"
    huge.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({k: torch.full_like(v, 1e30) for k, v in tensors.items()}, huge / "adapter_model.safetensors")
    (huge / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())

    def add_neighbours(batch: str) -> None:
        engine.add(greedy(f"good {batch}", prompt(10, 1), 8, [adapter_ref(adapter)]))
        engine.add(greedy(f"base {batch}", prompt(10, 2), 8))

    add_neighbours("alone")
    outputs = run(engine)
    add_neighbours("together")
    engine.add(greedy("bad", prompt(10, 3), 8, [adapter_ref(huge)]))
    outputs |= run(engine)
    assert [o.error for o in outputs["bad"]] == [ErrorCode.NON_FINITE]
    for kind in ("good", "base"):
        assert tokens_of(outputs[f"{kind} together"]) == tokens_of(outputs[f"{kind} alone"])
    assert_at_rest(engine)


def test_an_adapter_that_cannot_be_loaded_fails_its_requests_only(
    model: Path, adapter: Path, tmp_path: Path, engines: list[Engine]
) -> None:
    engine = make_engine(model)
    engines.append(engine)
    gone = AdapterRef("0" * 64, str(tmp_path / "gone"))
    engine.add(greedy("lost", prompt(5, 1), 4, [gone]))
    engine.add(greedy("fine", prompt(5, 1), 4, [adapter_ref(adapter)]))
    outputs = run(engine)
    assert [o.error for o in outputs["lost"]] == [ErrorCode.ADAPTER_LOAD_FAILED]
    assert str(tmp_path) not in outputs["lost"][0].message
    assert len(tokens_of(outputs["fine"])) == 4


def test_flipped_bits_on_disk_fail_the_adapters_requests_only(
    model: Path, adapter: Path, tmp_path: Path, engines: list[Engine]
) -> None:
    engine = make_engine(model)
    engines.append(engine)
    damaged = variant(adapter, tmp_path / "damaged", seed=4)
    file = tmp_path / "damaged" / "adapter_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-2] ^= 1  # a last bit of the last weight: as finite as before
    file.write_bytes(raw)
    engine.add(greedy("lost", prompt(5, 1), 4, [damaged]))
    engine.add(greedy("fine", prompt(5, 1), 4, [adapter_ref(adapter)]))
    outputs = run(engine)
    assert [o.error for o in outputs["lost"]] == [ErrorCode.ADAPTER_DAMAGED]
    assert "damaged" in outputs["lost"][0].message
    assert len(tokens_of(outputs["fine"])) == 4
    raw[-2] ^= 1
    file.write_bytes(raw)
    engine.add(greedy("mended", prompt(5, 1), 4, [damaged]))
    assert len(tokens_of(run(engine)["mended"])) == 4


def test_files_are_compared_with_their_content_where_the_digest_is_a_tenants_own(
    model: Path, adapter: Path, engines: list[Engine]
) -> None:
    engine = make_engine(model)
    engines.append(engine)
    ref = adapter_ref(adapter)
    engine.add(greedy("theirs", prompt(5, 1), 4, [AdapterRef("1" * 64, ref.path, content=ref.digest)]))
    engine.add(greedy("wrong", prompt(5, 1), 4, [AdapterRef("2" * 64, ref.path, content="3" * 64)]))
    outputs = run(engine)
    assert len(tokens_of(outputs["theirs"])) == 4
    assert [o.error for o in outputs["wrong"]] == [ErrorCode.ADAPTER_DAMAGED]


def test_a_rank_above_the_limit_is_refused_where_it_was_registered_before(
    model: Path, adapter: Path, engines: list[Engine]
) -> None:
    engine = make_engine(model, max_lora_rank=2)
    engines.append(engine)
    assert engine.info.max_mix_rank == 2
    engine.add(greedy("wide", prompt(5, 1), 4, [adapter_ref(adapter)]))
    (output,) = run(engine)["wide"]
    assert output.error == ErrorCode.ADAPTER_LOAD_FAILED
    assert "the limit of this server is 2" in output.message


@pytest.fixture
def loads_held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No adapter comes in until this is set."""
    go_on = threading.Event()

    def held(*args: object, **kwargs: object) -> object:
        assert go_on.wait(timeout=30)
        return judge(*args, **kwargs)

    monkeypatch.setattr("server.lora.loader.judge", held)
    yield go_on
    go_on.set()


def test_a_load_under_way_costs_no_steps(
    model: Path, adapter: Path, engines: list[Engine], loads_held: threading.Event
) -> None:
    """Nor does one that landed wait for the next look: it wakes the engine."""
    engine = make_engine(model)
    engines.append(engine)
    engine.add(greedy("r", prompt(5, 1), 4, [adapter_ref(adapter)]))
    engine.load_adapter(LoadAdapter(1, adapter_ref(adapter)))
    steps = 0
    while engine.idle_ms() == 0:
        engine.step()
        steps += 1
    assert steps <= 2
    assert engine.idle_ms() is not None
    assert not engine.wait(0)
    loads_held.set()
    while (idle_ms := engine.idle_ms()) is not None:
        assert idle_ms == 0 or engine.wait(30)  # nothing else wakes it
        engine.step()
        steps += 1
    assert engine.stats().generated_tokens == 4
    assert steps <= 12
    assert not engine.wait(0)  # steps take notice of it


def test_what_leaves_room_behind_is_followed_by_a_step(
    model: Path, adapter: Path, tmp_path: Path, engines: list[Engine]
) -> None:
    """The next in line is asked when the last one that ran has ended, though nothing landed meanwhile."""
    refs = [adapter_ref(adapter), variant(adapter, tmp_path / "other", seed=3)]
    roomy = make_engine(model)
    engines.append(roomy)
    engine = make_engine(model, arena_bytes=packed_bytes(roomy, refs[0]))
    engines.append(engine)
    for ref in refs:  # both are on the host
        load(engine, ref)
    engine.add(greedy("running", prompt(5, 1), 4, [refs[1]]))
    engine.add(greedy("waiting", prompt(5, 1), 4, [refs[0]]))
    while not (stats := engine.stats()).waiting_for_adapter or stats.running:
        assert engine.idle_ms() == 0
        engine.step()
    assert engine.idle_ms() == 0
    engine.step()
    assert engine.wait(30)  # its copy is under way
    assert len(tokens_of(run(engine)["waiting"])) == 4


def test_what_can_never_fit_is_refused(model: Path, engines: list[Engine]) -> None:
    engine = make_engine(model, block_size=4, kv_cache_bytes=8 * 4 * 2 * 2 * 2 * 8 * 4)
    engines.append(engine)
    engine.add(greedy("long", prompt(20, 1), 40))
    outputs = run(engine)
    assert [o.error for o in outputs["long"]] == [ErrorCode.NEVER_FITS]


def test_load_pin_unload(model: Path, adapter: Path, tmp_path: Path, engines: list[Engine]) -> None:
    refs = [variant(adapter, tmp_path / f"a{i}", seed=i) for i in range(4)]
    roomy = make_engine(model)
    engines.append(roomy)
    engine = make_engine(model, arena_bytes=2 * packed_bytes(roomy, refs[0]), max_pinned_share=1.0)
    engines.append(engine)
    engine.load_adapter(LoadAdapter(1, refs[0], pin=True))
    engine.load_adapter(LoadAdapter(2, refs[1], pin=True))
    answers = results(engine)
    assert [(a.call_id, a.residency, a.error) for a in answers] == [(1, "arena", None), (2, "arena", None)]
    assert all(a.milliseconds > 0 for a in answers)
    engine.load_adapter(LoadAdapter(3, refs[2]))
    (full,) = results(engine)
    assert full.error is ErrorCode.OUT_OF_MEMORY
    engine.unload_adapter(UnloadAdapter(4, refs[0].digest))
    engine.load_adapter(LoadAdapter(5, refs[2]))
    answers = results(engine)
    assert {a.call_id: (a.residency, a.error) for a in answers} == {4: ("host", None), 5: ("arena", None)}
    stats = engine.stats()
    assert set(stats.resident) == {refs[1].digest, refs[2].digest}
    assert set(stats.on_host) >= {refs[0].digest}


def test_what_pins_make_impossible_is_refused_and_not_left_to_wait(
    model: Path, adapter: Path, tmp_path: Path, engines: list[Engine]
) -> None:
    refs = [variant(adapter, tmp_path / f"a{i}", seed=i) for i in range(3)]
    roomy = make_engine(model)
    engines.append(roomy)
    engine = make_engine(model, arena_bytes=int(2.5 * packed_bytes(roomy, refs[0])))  # pins: one of them
    engines.append(engine)
    for at, ref in enumerate(refs[:2]):
        engine.load_adapter(LoadAdapter(at, ref, pin=True))
    assert {answer.call_id: answer.error for answer in results(engine)} == {0: None, 1: ErrorCode.PIN_LIMIT}
    engine.add(greedy("fits", prompt(5, 1), 3, [refs[1]]))
    engine.add(greedy("mix", prompt(5, 1), 3, refs))  # two beside the pinned one
    got = run(engine)
    assert got["fits"][-1].finish_reason == "length"
    assert got["mix"][-1].error in (ErrorCode.OUT_OF_MEMORY, ErrorCode.NEVER_FITS)
    assert_at_rest(engine)


def test_unload_waits_for_the_last_use(model: Path, adapter: Path, engines: list[Engine]) -> None:
    engine = make_engine(model)
    engines.append(engine)
    ref = adapter_ref(adapter)
    engine.add(greedy("r", prompt(5, 1), 6, [ref]))
    outputs = []
    while busy(engine) and not engine.stats().running:
        outputs += engine.step()[0]
    engine.unload_adapter(UnloadAdapter(1, ref.digest))
    more, answers = engine.step()
    assert [a.residency for a in answers] == ["arena"], "unloaded under a running request"
    assert len(tokens_of([*outputs, *more, *run(engine)["r"]])) == 6
    engine.unload_adapter(UnloadAdapter(2, ref.digest))
    assert [a.residency for a in results(engine)] == ["host"]


def test_stop_tokens_eos_and_minimum_length(model: Path, engines: list[Engine]) -> None:
    engine = make_engine(model)
    engines.append(engine)
    ids = prompt(8, 2)
    engine.add(greedy("free", ids, 12))
    free = tokens_of(run(engine)["free"])
    stop = next(token for token in free[3:] if token not in free[:3])
    at = free.index(stop)
    engine.add(greedy("stopped", ids, 12, stop_token_ids=(stop,)))
    engine.add(greedy("held", ids, 12, stop_token_ids=(stop,), min_tokens=at + 3))
    engine.add(greedy("biased", ids, 5, ignore_eos=False, logit_bias={2: 1e4}))
    outputs = run(engine)
    assert tokens_of(outputs["stopped"]) == free[: at + 1]
    assert (outputs["stopped"][-1].finish_reason, outputs["stopped"][-1].stop_token) == ("stop", stop)
    assert len(tokens_of(outputs["held"])) >= at + 3
    assert tokens_of(outputs["biased"]) == [2]
    assert outputs["biased"][-1].finish_reason == "stop"


def test_info_names_the_targets(model: Path, engines: list[Engine]) -> None:
    engine = make_engine(model)
    engines.append(engine)
    config = json.loads((model / "config.json").read_text())
    names = {t.name: (t.in_features, t.out_features) for t in engine.info.lora_targets}
    assert names["model.layers.1.mlp.down_proj"] == (config["intermediate_size"], config["hidden_size"])
    assert names["lm_head"] == (config["hidden_size"], config["vocab_size"])
    assert engine.info.kv_blocks * engine.info.block_size > 0


def test_stats_count_steps_by_their_tokens(model: Path, engines: list[Engine]) -> None:
    engine = make_engine(model)
    engines.append(engine)
    engine.add(greedy("a", prompt(20, seed=1), 4))
    run(engine)
    stats = engine.stats()
    assert sum(stats.step_tokens) == stats.steps
    assert stats.step_tokens[bisect_left(STEP_TOKEN_BOUNDS, 20)] == 1
    assert stats.step_tokens[0] == 3  # a step for each token but the first
    assert (stats.step_tokens_sum, stats.prefix_query_tokens) == (23, 20)
