"""No decode step waits for the device: none of its operations gives the host a value that was computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from server.engine.engine import Engine
from tests.devices.cuda.interpreted import capture, make_interpreted
from tests.model.tiny_models import Job, add_adapter, build, serve, targets_of

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton compiles here: warm-ups of captures refuse waits", allow_module_level=True)

from tests.devices.cuda.host_waits import Waits, refusing  # noqa: E402  (after the skip)

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # as in test_graphs.py


class Watched:
    """A capture whose work, and its replays, may not wait."""

    def __init__(self) -> None:
        self.replays = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            self.replays += 1
            with refusing():
                work()

        with refusing():
            work()
        return replay


@pytest.fixture(params=["llama", "qwen3"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    engine = make_interpreted(build(request.param, tmp_path / "model"), max_model_len=64, max_num_seqs=2)
    yield engine
    engine.close()


def test_no_decode_step_waits(engine: Engine, tmp_path: Path) -> None:
    watched = Watched()
    capture(engine, watched, most=2)
    before = watched.replays
    targets = targets_of("llama")
    adapter = add_adapter(tmp_path / "model", tmp_path / "adapter", seed=1, rank=4, target_modules=targets)
    serve(engine, [Job([5, 6, 7], adapter, 3), Job([8, 9], None, 3)])
    assert watched.replays - before >= 2


PLANTED: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).any()),
    "tolist": lambda x: x.flatten().tolist(),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: (x > 0).nonzero(),
    "unique": lambda x: x.unique(),
    "repeats": lambda x: torch.repeat_interleave(x, torch.ones(len(x), dtype=torch.long), dim=0),
    "equal": lambda x: torch.equal(x, x),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_wait_in_the_forward_would_be_seen(planted: str) -> None:
    embed = torch.nn.Embedding(5, 3)
    ids = torch.tensor([1, 2])
    with refusing():
        embed(ids)
    embed.register_forward_hook(lambda module, args, out: (PLANTED[planted](out), out)[1])
    with pytest.raises(Waits), refusing():
        embed(ids)


@pytest.mark.parametrize("engine", ["llama"], indirect=True)
def test_a_wait_in_the_model_would_be_seen(engine: Engine) -> None:
    embed = engine._runner._model.get_input_embeddings()
    embed.register_forward_hook(lambda module, args, out: out * out.abs().max().item())
    with pytest.raises(Waits, match="item"):
        capture(engine, Watched(), most=2)
