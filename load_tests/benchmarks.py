"""The commands that measure Chorus itself: scaling, engine-overhead, face, fairness."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from load_tests.options import DTypeOption, counts, parsed, token_range

if TYPE_CHECKING:
    from load_tests.curve import Sample

scaling = typer.Typer(
    help="Output tokens/s of `chorus serve` against a number of adapters; starts the server itself.",
    no_args_is_help=True,
)

Model = Annotated[
    Path, typer.Option(exists=True, file_okay=False, help="Base model folder, with its weights.")
]
Out = Annotated[
    Path, typer.Option(file_okay=False, help="Folder for curve.json, curve.md, PNG plots and server logs.")
]
Points = Annotated[str, typer.Option(help="Numbers of adapters to measure at.")]
Ranks = Annotated[str, typer.Option(help="Ranks of the random adapters, taken in turns.")]
DType = Annotated[DTypeOption, typer.Option(help="Type of the weights and of the adapters.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests at a time; the server's --max-num-seqs too.")]
Requests = Annotated[
    int, typer.Option(min=1, help="Requests a point and round; best a multiple of the concurrency.")
]
PromptTokens = Annotated[int, typer.Option(min=1, help="Prompt length, tokens.")]
OutputTokens = Annotated[int, typer.Option(min=2, help="Output length, tokens.")]
TokenIds = Annotated[str, typer.Option(help="Prompts are random token ids in LOW:HIGH (both included).")]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds; every other one takes the points backwards.")]
ServeFlags = Annotated[str, typer.Option(help="More flags for `chorus serve`, as one string.")]


@scaling.command()
def distinct(
    model: Model,
    out: Out,
    points: Points = "1,2,4,8,16,32,64",
    ranks: Ranks = "8,16,32,64",
    dtype: DType = DTypeOption.BFLOAT16,
    concurrency: Concurrency = 64,
    requests: Requests = 128,
    prompt_tokens: PromptTokens = 32,
    output_tokens: OutputTokens = 64,
    token_ids: TokenIds = "100:1000",
    rounds: Rounds = 3,
    serve_flags: ServeFlags = "",
) -> None:
    """Against the number of distinct adapters in a full batch, beside what memory and arithmetic allow.

    All adapters are resident before the clock runs: give the arena room for them (--serve-flags
    "--arena-bytes 2GiB") where the table shows copies into it. Exit status 1 when a request failed.
    """
    settings = dict(locals())
    from load_tests import floor
    from load_tests import scaling as experiment

    numbers = sorted(parsed(counts, points))
    if numbers[-1] > concurrency:
        raise typer.BadParameter(f"{concurrency} requests at a time cannot use {numbers[-1]} adapters")
    subject = experiment.Subject(model, parsed(counts, ranks), dtype.value, shlex.split(serve_flags))
    load = experiment.Load(
        concurrency, requests, prompt_tokens, output_tokens, parsed(token_range, token_ids), rounds
    )
    console = Console(stderr=True)
    machine = floor.measure(dtype.value)
    _draw(
        out,
        experiment.distinct(subject, load, numbers, out, console),
        title=f"{model.resolve().name}, {concurrency} at a time: distinct adapters in the batch",
        x_label="distinct adapters",
        settings=settings,
        machine=machine,
        floors=experiment.floors(subject, load, numbers, machine),
    )


@scaling.command()
def registered(
    model: Model,
    out: Out,
    points: Points = "10,100,1000,10000",
    ranks: Ranks = "1",
    dtype: DType = DTypeOption.BFLOAT16,
    concurrency: Concurrency = 64,
    requests: Requests = 128,
    prompt_tokens: PromptTokens = 32,
    output_tokens: OutputTokens = 64,
    token_ids: TokenIds = "100:1000",
    rounds: Rounds = 3,
    serve_flags: ServeFlags = "",
    working_set: Annotated[
        int, typer.Option(min=0, help="So many of the registered adapters are asked for; 0: any, by --alpha.")
    ] = 10,
    alpha: Annotated[
        float, typer.Option(min=0, help="Zipf exponent of popularity over all that are registered.")
    ] = 1.0,
) -> None:
    """Against the number of adapters registered, most of them on disk. The curve should be flat.

    Takes disk space for twice the adapters in the temporary folder (TMPDIR). Exit status 1 when a request
    failed.
    """
    settings = dict(locals())
    from load_tests import scaling as experiment

    numbers = sorted(parsed(counts, points))
    subject = experiment.Subject(model, parsed(counts, ranks), dtype.value, shlex.split(serve_flags))
    load = experiment.Load(
        concurrency, requests, prompt_tokens, output_tokens, parsed(token_range, token_ids), rounds
    )
    asked = f"{working_set} in use" if working_set else f"popularity by Zipf, alpha {alpha:g}"
    samples = experiment.registered(
        subject, load, numbers, out, Console(stderr=True), working_set=working_set or None, alpha=alpha
    )
    _draw(
        out,
        samples,
        title=f"{model.resolve().name}, {concurrency} at a time: registered adapters, {asked}",
        x_label="registered adapters",
        settings=settings,
    )


def _draw(out: Path, samples: Iterator[Sample], *, settings: dict[str, Any], **fields: Any) -> None:
    """Collects the samples and writes the curve, also of what there is when something ends it early."""
    from load_tests.curve import Curve, rows, write_curve
    from load_tests.rendering import as_rich

    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    asked = {name: str(value) for name, value in settings.items()}
    curve = Curve(started_at=started_at, settings=asked, samples=[], **fields)
    try:
        for sample in samples:
            curve.samples.append(sample)
    finally:
        if curve.samples:
            write_curve(out, curve)
            Console().print(as_rich(rows(curve)))
    if curve.failed:
        raise typer.Exit(1)


def engine_overhead(
    sequences: Annotated[int, typer.Option(min=1, help="Sequences that decode in each step.")] = 256,
    adapters: Annotated[
        str, typer.Option(help="Numbers of distinct adapters among them; 0: base only.")
    ] = "0,1,256",
    steps: Annotated[int, typer.Option(min=2, help="Steps to time.")] = 500,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="JSON file to write too.")] = None,
) -> None:
    """Host time of one engine step without its model, by part, in microseconds."""
    import torch

    from load_tests.engine_overhead import PARTS, measure
    from load_tests.rendering import as_rich, write_json

    torch.set_num_threads(1)  # these tensors are tiny
    numbers = [int(number) for number in adapters.split(",")]
    results = [measure(sequences, number, steps) for number in numbers]
    rows = [[f"{sequences} sequences: median / p99, us", *(f"{number} adapters" for number in numbers)]]
    for part in (*PARTS, "step"):
        times = [result.parts[part] for result in results]
        rows.append([part, *(f"{time.median:.0f} / {time.p99:.0f}" for time in times)])
    Console().print(as_rich(rows))
    if out is not None:
        write_json(out, results)


def face(
    model: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="Model folder; only its tokenizer is used.")
    ] = Path("models/chorus-tiny"),
    clients: Annotated[int, typer.Option(min=1, help="Streams at a time.")] = 64,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each stream.")] = 1000,
    step_ms: Annotated[
        float, typer.Option(min=0, help="The fake engine gives every stream a token this often; 0: at once.")
    ] = 5.0,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    log: Annotated[Path, typer.Option(dir_okay=False, help="Where the server's output goes.")] = Path(
        "build/face.log"
    ),
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="JSON file to write too.")] = None,
) -> None:
    """Streamed tokens/s that the HTTP face carries on one core, with a fake engine behind it.

    Exit status 1 when a stream was cut off or had another number of tokens than asked.
    """
    from load_tests.face import measure
    from load_tests.rendering import as_rich, write_json

    result = measure(model, clients, tokens, step_ms, rounds, log)
    rows = [["round", "offered tokens/s", "tokens/s", "tokens per CPU-second", "face's CPU", "tokens a read"]]
    for number, run in enumerate(result.runs, 1):
        offered = f"{run.offered_tokens_per_s:.0f}" if run.offered_tokens_per_s else "all at once"
        speeds = [f"{run.tokens_per_s:.0f}", f"{run.tokens_per_cpu_s:.0f}"]
        share = f"{run.cpu_s / run.wall_s:.0%}"
        rows.append([str(number), offered, *speeds, share, f"{run.tokens / max(run.reads, 1):.2f}"])
    rows.append(["median", "", f"{result.tokens_per_s:.0f}", f"{result.tokens_per_cpu_s:.0f}", "", ""])
    Console().print(as_rich(rows))
    if out is not None:
        write_json(out, result)
    if result.failed:
        raise typer.Exit(1)


def dashboard(
    board: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="A dashboard of deploy/grafana.")
    ],
    out: Annotated[Path, typer.Option(dir_okay=False, help="PNG to write.")],
    prometheus: Annotated[str, typer.Option(help="URL of a Prometheus.")] = "http://127.0.0.1:9090",
    minutes: Annotated[float, typer.Option(min=0.1, help="How much of the past to draw.")] = 10.0,
) -> None:
    """A Grafana dashboard as a picture, drawn from its queries without Grafana.

    Exit status 1 when a panel has no data.
    """
    from load_tests.dashboard import draw

    empty = draw(board, prometheus, minutes, out)
    if empty:
        typer.echo(f"without data: {', '.join(empty)}", err=True)
        raise typer.Exit(1)


def fairness(
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for JSON, tables and PNG plots.")],
    model: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Base model; without it, the scheduler alone."),
    ] = None,
    loads: Annotated[
        str, typer.Option(help="Loads of the loud tenant, times that of the steady one.")
    ] = "1,2,5,10",
    places: Annotated[int, typer.Option(min=4, help="Sequences at once (--max-num-seqs).")] = 16,
    seconds: Annotated[float, typer.Option(min=1, help="Of a run; the first fifth does not count.")] = 60.0,
    utilisation: Annotated[
        float, typer.Option(min=0.1, max=1, help="Of the engine, by both tenants at load 1.")
    ] = 0.9,
) -> None:
    """Time to first token of a tenant while another asks for many times as much, fair and by arrival."""
    import asyncio

    from load_tests import fairness as measuring
    from load_tests.rendering import as_markdown, as_rich, write_json

    points = parsed(counts, loads)
    options = {"places": places, "seconds": seconds, "utilisation": utilisation}
    results = [measuring.simulate(points, **options)]
    if model is not None:
        results.append(asyncio.run(measuring.serve(model, points, **options)))
    for result in results:
        name = result.kind.replace(" ", "-")
        write_json(out / f"{name}.json", result)
        (out / f"{name}.md").write_text(as_markdown(measuring.rows(result)), encoding="utf-8")
        measuring.plot(result, out / f"{name}.png")
        Console().print(f"{result.kind}, {result.capacity:.1f} requests/s", as_rich(measuring.rows(result)))
        for policy in measuring.POLICIES:
            Console().print(f"{policy}: p99 moved by {result.moved(policy):.2f}x")


def kills(
    model: Model,
    adapters: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Folder of adapters.")],
    out: Annotated[
        Path, typer.Option(file_okay=False, help="New folder for kills.json and the server's log.")
    ],
    count: Annotated[int, typer.Option(min=1, help="How many times the engine is killed.")] = 200,
    clients: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 8,
    pause: Annotated[
        float, typer.Option(min=0, help="Longest time from ready to the next kill, seconds.")
    ] = 3.0,
    prompt: Annotated[str, typer.Option(help="What is asked.")] = "Anna saw two red apples =>\n",
    seed: Annotated[int, typer.Option(min=0, help="Of the moments of the kills.")] = 0,
    serve_flags: ServeFlags = "",
) -> None:
    """SIGKILL the engine at random moments under traffic; starts the server itself.

    Exit status 1 where an answer was wrong, an open request had no end within a second, or something leaked.
    """
    import asyncio

    from load_tests.kills import Kills, as_json, serving, table

    with serving(model, adapters, out, shlex.split(serve_flags)) as server:
        run = Kills(server, out / "tmp", prompt, seed).run(count, clients, pause)
        result = asyncio.run(run)
    (out / "kills.json").write_text(as_json(result))
    Console(width=140).print(table(result))
    for wrong in result.wrong[:10]:
        Console(stderr=True).print(wrong, markup=False)
    raise typer.Exit(1 if result.wrong or result.late or result.leaked else 0)
