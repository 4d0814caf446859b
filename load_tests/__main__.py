"""`python -m load_tests COMMAND`: traces, adapters, runs, reports, and measurements of Chorus itself."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import track

from load_tests import benchmarks
from load_tests.adapters import write_adapters
from load_tests.options import DTypeOption, counts, judged, parsed, token_range
from load_tests.trace import (
    Lengths,
    TraceRequest,
    TraceSpec,
    adapter_names,
    generate,
    read_trace,
    write_trace,
)

if TYPE_CHECKING:
    from load_tests.drills.case import Case
    from load_tests.runner import RunResult

# `run`, `report` and those of benchmarks.py import aiohttp, matplotlib and torch themselves: `trace` and
# `adapters` work without the load-tests extra.

app = typer.Typer(
    help="Load tests for OpenAI-style completion servers.", no_args_is_help=True, add_completion=False
)


@app.command()
def trace(
    out: Annotated[Path, typer.Option(help="JSONL file to write, one request a line.")],
    requests: Annotated[int, typer.Option(min=1, help="Number of requests.")] = 200,
    adapters: Annotated[
        int, typer.Option(min=0, help="Number of adapters, named as `adapters` names them.")
    ] = 100,
    adapters_dir: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Take the names from the folders here instead."),
    ] = None,
    alpha: Annotated[
        float, typer.Option(min=0, help="Zipf exponent of adapter popularity; 0: all alike.")
    ] = 1.0,
    base_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of requests that name no adapter.")
    ] = 0.0,
    rate: Annotated[
        float | None, typer.Option(help="Mean arrivals, requests/s. Without it: for closed-loop runs.")
    ] = None,
    burstiness: Annotated[
        float,
        typer.Option(
            min=0, help="Coefficient of variation of (gamma) inter-arrival times. 0: even, 1: Poisson."
        ),
    ] = 1.0,
    prompt_tokens: Annotated[
        str, typer.Option(help="Prompt length, tokens: N, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA:CAP.")
    ] = "uniform:32:128",
    output_tokens: Annotated[
        str, typer.Option(help="Output length, tokens, written in the same way.")
    ] = "uniform:16:64",
    token_ids: Annotated[
        str, typer.Option(help="Prompts are random token ids in LOW:HIGH (both included).")
    ] = "100:1000",
    prompts: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Draw text prompts from the lines of this file instead."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds and options give equal traces.")] = 0,
) -> None:
    """Write a trace: which adapter is asked what, when, for how many tokens."""
    names = adapter_names(adapters) if adapters_dir is None else _names_in(adapters_dir)
    with judged():
        spec = TraceSpec(
            requests=requests,
            adapters=names,
            alpha=alpha,
            base_share=base_share if names else 1.0,
            rate=rate,
            burstiness=burstiness,
            prompt_tokens=parsed(Lengths.parse, prompt_tokens),
            output_tokens=parsed(Lengths.parse, output_tokens),
            token_ids=parsed(token_range, token_ids),
            prompts=tuple(line for line in prompts.read_text().splitlines() if line) if prompts else (),
            seed=seed,
        )
    write_trace(out, generate(spec))


def _names_in(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.parent.name for path in folder.glob("*/adapter_config.json")))


@app.command()
def adapters(
    model: Annotated[
        Path,
        typer.Option(exists=True, file_okay=False, help="Base model folder; only its config.json is read."),
    ],
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder to write the adapter folders into.")],
    count: Annotated[int, typer.Option(min=1, help="Number of adapters.")] = 100,
    ranks: Annotated[str, typer.Option(help="Ranks, taken in turns.")] = "8,16,32",
    dtype: Annotated[DTypeOption, typer.Option(help="Type of the weights.")] = DTypeOption.BFLOAT16,
    strength: Annotated[
        float, typer.Option(min=0, help="Size of an adapter's delta relative to its module's input (RMS).")
    ] = 0.5,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal adapters.")] = 0,
) -> None:
    """Write random adapters in PEFT layout, all seven projections of a llama-like model."""
    written = write_adapters(
        model,
        out,
        adapter_names(count),
        parsed(counts, ranks),
        dtype=dtype.value,
        strength=strength,
        seed=seed,
    )
    for _ in track(written, "adapters", total=count, console=Console(stderr=True)):
        pass


@app.command()
def run(
    trace: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Trace to replay.")],
    out: Annotated[Path, typer.Option(help="Result file to write (JSON).")],
    url: Annotated[str, typer.Option(help="Server, with or without /v1.")] = "http://127.0.0.1:8000",
    concurrency: Annotated[
        int | None,
        typer.Option(
            min=1, help="Closed loop with this many workers. Without it: by the trace's arrival times."
        ),
    ] = None,
    base_model: Annotated[str, typer.Option(help="`model` of requests that name no adapter.")] = "base",
    label: Annotated[
        str | None, typer.Option(help="Name of the run in reports. Default: OUT's stem.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Ask for exactly max_tokens tokens.")] = True,
    return_token_ids: Annotated[
        bool, typer.Option(help="Ask for token ids (exact counts and checks).")
    ] = True,
    usage: Annotated[bool, typer.Option(help="Ask for a usage chunk.")] = True,
    check: Annotated[
        bool, typer.Option("--check", help="Then ask each request again, alone, and count other answers.")
    ] = False,
    record: Annotated[
        Path | None, typer.Option(help="Write the answers here for --expect; runs one request at a time.")
    ] = None,
    expect: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Count answers that differ from these.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Limit of a whole request, seconds.")] = 600.0,
    api_key: Annotated[str | None, typer.Option(help="Sent as a bearer token.")] = None,
) -> None:
    """Replay a trace against a server.

    ^C stops sending and keeps what came so far. Exit status: 130 after ^C; with --check, --expect or
    --record, 1 unless every request was answered and no answer was wrong.
    """
    from load_tests import report as reports
    from load_tests import runner
    from load_tests.client import Target

    requests = parsed(read_trace, trace)
    checks = check or expect is not None
    concurrency = _workers(requests, concurrency, records=record is not None, checks=checks)
    target = Target(url, base_model, ignore_eos, return_token_ids, usage, timeout, api_key)
    console = Console(stderr=True)
    load = runner.run_load(
        requests,
        target,
        label=label or out.stem,
        concurrency=concurrency,
        check=check,
        expected=parsed(runner.read_answers, expect) if expect else None,
        console=console,
    )
    result = asyncio.run(load)
    runner.write_result(out, result)
    if record is not None:
        runner.write_answers(record, runner.answers_of(requests, result.records))
    console.print(reports.rich_table([reports.summarise(result)]))
    raise typer.Exit(_status(result, judged=checks or record is not None))


def _workers(
    requests: Sequence[TraceRequest], concurrency: int | None, *, records: bool, checks: bool
) -> int | None:
    """How many send requests; None: they come by their arrival times. Raises BadParameter."""
    if records and (concurrency not in (None, 1) or checks):
        raise typer.BadParameter("--record runs one request at a time and checks nothing")
    if records:
        return 1
    if concurrency is None and not any(request.arrival_s for request in requests[1:]):
        raise typer.BadParameter("this trace has no arrival times; give --concurrency")
    return concurrency


def _status(result: RunResult, *, judged: bool) -> int:
    if result.interrupted:
        return 130
    return 1 if judged and not result.flawless else 0


@app.command()
def report(
    results: Annotated[
        list[Path], typer.Argument(exists=True, dir_okay=False, help="Result files; several are compared.")
    ],
    out: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for report.json, report.md and PNG plots.")
    ],
) -> None:
    """Figures, a table and plots of one run, or of several side by side."""
    from load_tests.report import rich_table, write_report
    from load_tests.runner import read_result

    loaded = [parsed(read_result, path) for path in results]
    Console().print(rich_table(write_report(out, loaded)))


app.add_typer(benchmarks.scaling, name="scaling")
app.command("engine-overhead")(benchmarks.engine_overhead)
app.command("face")(benchmarks.face)
app.command("dashboard")(benchmarks.dashboard)
app.command("fairness")(benchmarks.fairness)
app.command("kills")(benchmarks.kills)


@app.command()
def drills(
    out: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for drills.json, drills.md, server logs.")
    ],
    only: Annotated[str, typer.Option(help="Numbers of cases, as 1,7,40. Default: all.")] = "",
    fuzz: Annotated[
        int, typer.Option(min=1, help="Random bodies of case 101; a tenth as many files of case 102.")
    ] = 10_000,
    minutes: Annotated[float, typer.Option(min=0, help="Of the soak, case 103. 0: none.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of cases 101 to 103.")] = 0,
    model: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Base model folder.")] = Path(
        "models/chorus-tiny"
    ),
    adapters: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="Folder of adapters to serve.")
    ] = Path("adapters"),
) -> None:
    """Play faults and abuse on a real server; exit status 1 when a promise was broken."""
    from load_tests.drills.play import play_all, write

    cases = _cases(only, fuzz, minutes, seed)
    console = Console(stderr=True)
    results = []
    for result in play_all(cases, model, adapters, out):
        results.append(result)
        write(results, out)
        seen = "; ".join([result.seen, *result.leaks])
        console.print(f"{result.number:3} {result.verdict}: {result.title} ({result.hold} ms) {seen}")
    raise typer.Exit(int(any(result.verdict == "broken" for result in results)))


def _cases(only: str, fuzz: int, minutes: float, seed: int) -> list[Case]:
    """Of these numbers, or all."""
    from load_tests.drills import cases as _  # noqa: F401  (makes them known)
    from load_tests.drills.case import CASES
    from load_tests.drills.fuzz import fuzz_cases
    from load_tests.drills.soak import soak_case

    more = fuzz_cases(fuzz, max(fuzz // 10, 1), seed) + ([soak_case(minutes, seed)] if minutes else [])
    known = CASES | {case.number: case for case in more}
    numbers = parsed(counts, only) if only else sorted(known)
    with judged():
        if unknown := [number for number in numbers if number not in known]:
            raise ValueError(f"no case {unknown[0]}; there are {sorted(known)}")
    return [known[number] for number in numbers]


if __name__ == "__main__":
    app()
