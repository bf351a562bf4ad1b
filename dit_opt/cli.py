"""The `ditopt` command.

It exists so that a fresh machine can show what ditopt does in one line.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import dit_opt

if TYPE_CHECKING:
    from dit_opt.demo.run import DemoResult
    from dit_opt.demo.side_by_side import Notify

PROMPT = "a red disk moving left and a blue ring moving up"

app = typer.Typer(
    help="A compiler backend that makes diffusion transformers generate faster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"ditopt {dit_opt.__version__}")
        raise typer.Exit


# With a callback Typer keeps a lone command as a subcommand.
@app.callback()
def _take_global_options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None: ...


@app.command()
def demo(
    prompt: Annotated[str, typer.Option(help="Colour, shape and direction of 1 or 2 objects.")] = (
        PROMPT
    ),
    steps: Annotated[int, typer.Option(min=2, help="Denoising steps.")] = 20,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; all cores by default.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for pictures and report.json.")] = Path("demo"),
    json: Annotated[Path | None, typer.Option(help="Write the report here too.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights; by default those of the package.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Of the backend, as density=0.125; repeatable."),
    ] = None,
) -> None:
    """Generate one clip with eager PyTorch, Inductor and ditopt, timed.

    Exit code 0: ditopt's clip is as good; 1: it is not; 2: bad input.
    """
    # torch takes seconds to import, which `--help` need not
    torch = importlib.import_module("torch")
    from dit_opt.demo import run
    from dit_opt.demo.model import CHECKPOINT, CheckpointError
    from dit_opt.demo.side_by_side import Task, load_contestants
    from dit_opt.options import OptionError, read_options

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        run.check_outputs(out, json)
        task = Task(run.read_prompt(prompt), seed, steps, device=run.check_device(device))
        options = read_options(option or [])
        contestants = load_contestants(checkpoint or CHECKPOINT, steps, device, options)
    except (run.DemoError, CheckpointError, OptionError) as error:
        raise _refuse(error) from error
    console = Console()
    columns = (
        TextColumn("{task.description:>20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    try:
        with Progress(*columns, console=console) as progress:
            result = run.run_demo(contestants, task, _show_steps(progress))
    except run.DemoError as error:
        raise _refuse(error) from error
    written = run.write_outputs(result, out, json)
    _print_result(console, result)
    console.print("Wrote " + ", ".join(map(str, written)), soft_wrap=True)
    if not result.accurate:
        typer.echo(
            f"ditopt demo: the clip differs too much from the dense one (PSNR "
            f"{result.likeness.psnr_db:.1f} dB, at least {run.MIN_PSNR_DB:.0f} wanted), so its "
            "speedup does not count.",
            err=True,
        )
        raise typer.Exit(1)


@app.command()
def tune(
    dim: Annotated[
        list[int] | None, typer.Option(min=16, max=256, help="Head dimension; repeatable.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1024, help="Length of the sequence.")] = 32760,
    heads: Annotated[int, typer.Option(min=1, help="Number of heads.")] = 24,
    density: Annotated[float, typer.Option(min=0.01, max=1.0, help="Kept share.")] = 0.25,
    variants: Annotated[
        bool, typer.Option("--variants", help="Try kernels that were never run on a GPU, too.")
    ] = False,
) -> None:
    """Measure tile sizes of the attention kernel on this GPU, and use the fastest from now on.

    Exit code 2: there is no GPU with anything to measure.
    """
    torch = importlib.import_module("torch")
    if importlib.util.find_spec("triton") is None:
        raise _refuse("Tilings are measured with Triton, which is not installed here.", "tune")
    from dit_opt.tuning.tune import NothingToTune, Workload, tune_kernel

    try:
        workload = Workload(tokens, heads, density)
        trials, file = tune_kernel(dim or [64, 128], workload, torch.device("cuda"), variants)
    except NothingToTune as error:
        raise _refuse(error, "tune") from error
    console = Console()
    for key, found in trials.items():
        table = Table(title=key)
        for heading in ("kernel", "tile", "warps", "stages", "ms"):
            table.add_column(heading, justify="right")
        for trial in found:
            tiling = trial.tiling
            table.add_row(
                tiling.variant,
                f"{tiling.tile_q}x{tiling.tile_k}",
                str(tiling.num_warps),
                str(tiling.num_stages),
                trial.refused if trial.milliseconds is None else f"{trial.milliseconds:.3f}",
            )
        console.print(table)
    console.print(f"Wrote {file}", soft_wrap=True)


def _refuse(error: Exception | str, command: str = "demo") -> typer.Exit:
    """Says what is wrong with the input."""
    typer.echo(f"ditopt {command}: {error}", err=True)
    return typer.Exit(2)


def _show_steps(progress: Progress) -> Notify:
    """A bar for each run, shown from its first step on."""
    bars = {}

    def notify(name: str, done: int, steps: int) -> None:
        if name not in bars:
            bars[name] = progress.add_task(name, total=steps)
        progress.update(bars[name], completed=done)

    return notify


def _print_result(console: Console, result: DemoResult) -> None:
    figures = result.to_json()
    table = Table(title="Seconds per step")
    for heading in ("", "cold, compiling", "warm, mean", "median", "quartiles apart", "prompt"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, row in figures["seconds_per_step"].items():
        seconds = [row[k] for k in ("cold", "warm_mean", "warm_median", "warm_iqr")]
        score = result.prompt_score.get(name)
        table.add_row(
            name,
            *("-" if s is None else f"{s:.3f}" for s in seconds),
            "-" if score is None else f"{score:.2f}",
        )
    console.print(table)
    summary = Table(show_header=False)
    later = result.speedup_sparse_steps
    rows = [
        ("speedup over Inductor, whole trajectory", f"{result.speedup:.2f}x", result.accurate),
        (
            f"the same after the {result.dense_steps} dense steps",
            "-" if later is None else f"{later:.2f}x",
            result.accurate,
        ),
        ("PSNR against Inductor", f"{result.likeness.psnr_db:.1f} dB", result.accurate),
        ("SSIM against Inductor", f"{result.likeness.ssim:.4f}", result.accurate),
        ("attention's share of an eager step", f"{result.attention_share:.0%}", True),
        (
            "realised density of sparse steps",
            "nothing was replaced" if result.density is None else f"{result.density:.3f}",
            result.density is not None,
        ),
    ]
    for label, value, good in rows:
        summary.add_row(label, value, style=None if good else "yellow")
    console.print(summary)


def main() -> None:
    """The entry point of the `ditopt` command."""
    app(prog_name="ditopt")
