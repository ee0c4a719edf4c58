"""The command line. No logic: every command gathers its arguments and calls one function."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import paceline
from paceline.errors import OptionError, PacelineError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train one model on many processors, and see where more of them stop paying.",
)

_INTERRUPTED = 130


JobFile = Annotated[Path, typer.Argument(metavar="FILE", help="Python file with a `job`.")]
Seed = Annotated[int, typer.Option(help="Of the model, the order of the data and dropout.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="One of the job's own options; repeatable."),
]
Transport = Annotated[
    str, typer.Option(help="Between workers on CPUs: gloo, or auto: shared memory within a host.")
]
Timeout = Annotated[float, typer.Option(help="Seconds that a worker waits for another before it gives up.")]
Budget = Annotated[
    float | None,
    typer.Option(
        min=0.1, help="Seconds that measuring may take, about, beside starting; some 15 by default."
    ),
]
Remeasure = Annotated[
    bool, typer.Option("--remeasure", help="Measure the job again, even if it was within the last week.")
]
Port = Annotated[int | None, typer.Option(help="Loopback port of the workers' store; by default a free one.")]


@app.command()
def train(
    job_file: JobFile,
    layout: Annotated[
        str, typer.Option(help="`auto`, or axis sizes: dp_replicate=2,micro=4,threads=1.")
    ] = "auto",
    steps: Annotated[int | None, typer.Option(help="Optimizer steps to train.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training data.")] = None,
    until: Annotated[
        str | None,
        typer.Option(metavar="METRIC=VALUE", help="Stop when a held-out metric reaches a value: loss=1.5."),
    ] = None,
    seed: Seed = 0,
    settings: Settings = None,
    out: Annotated[
        Path | None, typer.Option(help="The run's directory; by default a new one below runs/.")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="fp32, bf16, or auto: bf16 where the device measures faster.")
    ] = "auto",
    transport: Transport = "auto",
    timeout: Timeout = 300.0,
    port: Port = None,
    remeasure: Remeasure = False,
    replan: Annotated[
        bool,
        typer.Option("--replan", help="Change the layout while training, when steps part from the forecast."),
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            help="Before training in several workers, prove that they compute what one process does."
        ),
    ] = True,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but warnings and errors.")] = False,
) -> None:
    """Measure, choose a layout, train, and write a report."""
    console = Console()

    def run() -> None:
        from paceline.launch.spec import RunSpec
        from paceline.run import train as carry_out

        spec = RunSpec(
            job_file=str(job_file),
            settings=_read_settings(settings or []),
            layout=layout,
            out=str(out) if out else "",
            seed=seed,
            steps=steps,
            epochs=epochs,
            until=until,
            precision=precision,
            remeasure=remeasure,
            replan=replan,
            verify=verify,
            transport=transport,
            timeout_s=timeout,
            command=["paceline", *sys.argv[1:]],
        )
        carry_out(spec, console, quiet=quiet, port=port)

    _run_plainly(run)


@app.command()
def verify(
    job_file: JobFile,
    layout: Annotated[str, typer.Option(help="Axis sizes: dp_replicate=2,micro=4,threads=1.")],
    seed: Seed = 0,
    settings: Settings = None,
    transport: Transport = "auto",
    timeout: Timeout = 300.0,
    port: Port = None,
) -> None:
    """Prove that a layout computes what one process computes; exit status 1 where it does not."""
    console = Console()

    def run() -> None:
        from paceline.launch.spec import RunSpec
        from paceline.run import verify as carry_out

        spec = RunSpec(
            purpose="verify",
            job_file=str(job_file),
            settings=_read_settings(settings or []),
            layout=layout,
            out="",
            seed=seed,
            transport=transport,
            timeout_s=timeout,
            command=["paceline", *sys.argv[1:]],
        )
        if not carry_out(spec, console, port=port):
            raise SystemExit(1)

    _run_plainly(run)


@app.command()
def plan(
    job_file: JobFile,
    number: Annotated[int, typer.Option(min=1, help="How many layouts to print.")] = 10,
    memory: Annotated[
        float | None, typer.Option(help="GiB that a worker may use; by default its share of the host's.")
    ] = None,
    seed: Seed = 0,
    settings: Settings = None,
    out: Annotated[
        Path | None,
        typer.Option(help="A new directory for what was measured and forecast: JSON, pictures, a page."),
    ] = None,
    cluster: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Plan for the cluster that this TOML file describes."),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Measure nothing: take what `--out DIR` of an earlier plan has kept."
        ),
    ] = None,
    noise_scale: Annotated[
        float | None, typer.Option(help="Gradient noise scale in samples: which batch size is best, too.")
    ] = None,
    noise_from: Annotated[
        Path | None, typer.Option(metavar="RUN", help="The same, as a run of this job has measured it.")
    ] = None,
    price: Annotated[
        float | None, typer.Option(help="Of a worker for an hour, in any currency: what a target costs.")
    ] = None,
    remeasure: Remeasure = False,
    budget: Budget = None,
    transport: Transport = "auto",
    timeout: Timeout = 300.0,
    port: Port = None,
) -> None:
    """Measure a job here (under torchrun: on all hosts), and forecast its layouts and what more workers would bring."""
    console = Console()

    def run() -> None:
        from paceline.launch.spec import RunSpec
        from paceline.planner import plan as carry_out

        spec = RunSpec(
            purpose="plan",
            job_file=str(job_file),
            settings=_read_settings(settings or []),
            out=str(out) if out else "",
            seed=seed,
            remeasure=remeasure,
            budget_s=budget,
            transport=transport,
            timeout_s=timeout,
            command=["paceline", *sys.argv[1:]],
        )
        memory_bytes = None if memory is None else int(memory * 2**30)
        noise = _one_noise(noise_scale, noise_from, price)
        carry_out(
            spec,
            console,
            number=number,
            memory_bytes=memory_bytes,
            port=port,
            cluster_file=cluster,
            kept=profile,
            noise=noise,
            price=price,
        )

    _run_plainly(run)


@app.command()
def measure(
    job_file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="Python file with a `job`; none: measure the machine alone."),
    ] = None,
    seed: Seed = 0,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="A new directory for what was measured, as JSON.")] = None,
    precision: Annotated[str, typer.Option(help="Of the job, as in train: fp32, bf16, or auto.")] = "auto",
    budget: Budget = None,
    transport: Transport = "auto",
    timeout: Timeout = 300.0,
    port: Port = None,
) -> None:
    """Measure this machine (under torchrun: all hosts), or what a job costs on it, and print what was found."""
    console = Console()

    def run() -> None:
        from paceline.launch.spec import RunSpec
        from paceline.planner import measure as carry_out

        spec = RunSpec(
            purpose="measure",
            job_file=str(job_file) if job_file else "",
            settings=_read_settings(settings or []),
            out=str(out) if out else "",
            seed=seed,
            precision=precision,
            budget_s=budget,
            transport=transport,
            timeout_s=timeout,
            command=["paceline", *sys.argv[1:]],
        )
        carry_out(spec, console, port=port)

    _run_plainly(run)


@app.command()
def report(run_directory: Annotated[Path, typer.Argument(help="A run's directory.")]) -> None:
    """Write a run's report.html and figures again, from its events."""

    def run() -> None:
        from paceline.report import write_report

        Console().print(str(write_report(run_directory)))

    _run_plainly(run)


@app.command()
def version() -> None:
    """Print the version."""
    print(paceline.__version__)


def _one_noise(scale: float | None, run: Path | None, price: float | None) -> float | Path | None:
    if scale is not None and run is not None:
        raise OptionError("--noise-scale and --noise-from are both given", next_step="give one of them")
    for name, value in (("--noise-scale", scale), ("--price", price)):
        if value is not None and not 0 < value < float("inf"):
            raise OptionError(f"{name} is {value}", next_step="give a number above 0")
    return run if scale is None else scale


def _read_settings(texts: list[str]) -> dict[str, str]:
    settings = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise OptionError(f"--set {text!r} has no value", next_step="write it as --set key=value")
        settings[key.strip()] = value.strip()
    return settings


def _run_plainly(run: Callable[[], None]) -> None:
    """Print our own errors as plain text, and end with the right exit status."""
    try:
        run()
    except PacelineError as error:
        first, *rest = str(error).splitlines()
        print(f"paceline: {first}", *rest, sep="\n", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("paceline: interrupted", file=sys.stderr)
        raise SystemExit(_INTERRUPTED) from None


def main() -> None:
    app()
