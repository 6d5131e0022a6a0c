"""The command `loss-core`: check, bench, backends, losses. Needs the extra `cli`.

Options are declared here with typer; what they do is in cli_check, cli_bench, cli_configs, captured_call, tables,
report_html and bench_html.
"""

# No `from __future__ import annotations`: typer reads the annotations, and they name what `make_app`
# imports inside, so that importing this file needs none of the command line's libraries.

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from loss_core import __version__
from loss_core.backend import all_flags, flag_status, install_line
from loss_core.bench_peers import PEERS
from loss_core.cli_bench import BenchOptions, run_bench
from loss_core.cli_check import CheckOptions, run_check
from loss_core.cli_configs import UsageProblem
from loss_core.cli_parts import import_modules
from loss_core.tables import print_backends, print_losses
from loss_core.workloads import WORKLOADS

_LIBRARIES = ("typer", "rich", "yaml")
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code.

    Args:
        argv: arguments after the program's name; None for those of the process.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    # torch and JAX take turns here, and torch's idle threads would spin on the cores that JAX needs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app = make_app()
        app(args=arguments, prog_name="loss-core", obj=shlex.join(["loss-core", *arguments]))
    except ImportError as error:
        library = (error.name or "").partition(".")[0]
        if library not in _LIBRARIES:
            raise
        print(f"loss-core: the command line needs {library} ({error}): {install_line('cli')}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("loss-core: stopped.", file=sys.stderr)
        _leave_at_once(_INTERRUPTED)
    except SystemExit as exit_:
        if exit_.code == _INTERRUPTED:
            _leave_at_once(_INTERRUPTED)
        raise


def _leave_at_once(code: int) -> None:
    # A kernel may still be running in a thread; an ordinary exit would wait for it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _exit_code(action: Callable[[], int]) -> int:
    """Run a command; what a user can mend, and Ctrl-C, are one line instead of a traceback."""
    try:
        return action()
    except UsageProblem as problem:
        print(f"loss-core: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("loss-core: stopped.", file=sys.stderr)
        return _INTERRUPTED


def make_app() -> Any:
    """The typer application.

    Raises:
        ImportError: typer, rich or PyYAML is missing.
    """
    import typer
    import yaml  # noqa: F401  (needed by --config; told missing at once, not in the middle)
    from rich.console import Console

    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        help="LLM training losses with one typed config each, on PyTorch and JAX; and the proof that they agree.",
    )
    Modules = Annotated[
        list[str] | None,
        typer.Option("--import", metavar="MODULE", help="Python module that registers losses of your own."),
    ]

    def show_version(wanted: bool) -> None:
        if wanted:
            print(f"loss-core {__version__}")
            raise typer.Exit

    @app.callback()
    def root(
        version: Annotated[
            bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and leave.")
        ] = False,
    ) -> None:
        pass

    @app.command("check")
    def check_command(
        ctx: typer.Context,
        config: Annotated[
            list[str] | None,
            typer.Option(
                metavar="CONFIG",
                help="Loss name, YAML file, or a mapping like '{name: KDLoss, temperature: 2.0}'. Default: all losses.",
            ),
        ] = None,
        backend: Annotated[
            list[str] | None,
            typer.Option(
                metavar="FLAG", help="Such as torch:eager or jax. Default: every flag usable here but torch:compile."
            ),
        ] = None,
        against: Annotated[
            str | None,
            typer.Option(
                metavar="FLAG", help="Compare with this flag alone, besides float64. Default: torch with jax."
            ),
        ] = None,
        dtype: Annotated[
            list[str] | None,
            typer.Option(metavar="DTYPE", help="float32, bfloat16, float16 or float64. Default: all four."),
        ] = None,
        shape: Annotated[
            str | None, typer.Option(metavar="T,V[,H]", help="Tokens, vocabulary and hidden size of the cases.")
        ] = None,
        case: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Run this named case only.")] = None,
        cases: Annotated[int, typer.Option(metavar="N", min=0, help="Random cases on top of the named ones.")] = 0,
        seed: Annotated[int, typer.Option(metavar="S", min=0, help="Seed of the random cases.")] = 0,
        inputs: Annotated[
            Path | None,
            typer.Option(metavar="FILE", help="A captured call, .npz or .safetensors with the forward's arguments."),
        ] = None,
        device: Annotated[str | None, typer.Option(metavar="DEVICE", help="Such as cpu or cuda.")] = None,
        tp: Annotated[
            str | None,
            typer.Option(metavar="N[,N]", help="Share the vocabulary over N ranks, started here, and check these."),
        ] = None,
        json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as JSON.")] = None,
        report: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as an HTML page.")] = None,
        modules: Modules = None,
    ) -> None:
        """Check losses and gradients against float64, and backends against each other.

        Without options: every loss, flag, dtype and named case; torch:compile only where --backend names it, since it
        compiles for about a minute.

        May be repeated: --config, --backend, --dtype, --case, --import.

        Exit code: 0 all agree, 1 something does not, 2 wrong usage, 130 Ctrl-C.
        """
        options = CheckOptions(
            configs=config or (),
            backends=backend or (),
            against=against,
            dtypes=dtype or (),
            shape=shape,
            cases=case or (),
            num_random=cases,
            seed=seed,
            inputs=inputs,
            device=device,
            tp=tp,
            json=json,
            report=report,
            modules=modules or (),
            command=ctx.obj or "loss-core check",
        )
        raise typer.Exit(_exit_code(lambda: run_check(options, Console(), Console(stderr=True))))

    @app.command("bench")
    def bench_command(
        ctx: typer.Context,
        config: Annotated[
            list[str] | None,
            typer.Option(metavar="CONFIG", help="As for check; a bare name has reduction mean. Default: all losses."),
        ] = None,
        backend: Annotated[
            list[str] | None,
            typer.Option(metavar="FLAG", help="Such as torch:eager or jax; all. Default: every flag usable here."),
        ] = None,
        shape: Annotated[
            list[str] | None, typer.Option(metavar="T,V[,H]", help="Tokens, vocabulary and hidden size.")
        ] = None,
        workload: Annotated[
            list[str] | None, typer.Option(metavar="NAME", help=f"The output layer of {', '.join(WORKLOADS)}.")
        ] = None,
        tokens: Annotated[int | None, typer.Option(metavar="T", min=1, help="Tokens of each --workload.")] = None,
        dtype: Annotated[
            list[str] | None,
            typer.Option(metavar="DTYPE", help="float32, bfloat16, float16 or float64. Default: float32."),
        ] = None,
        device: Annotated[str, typer.Option(metavar="DEVICE", help="Such as cpu or cuda.")] = "cpu",
        ignored: Annotated[
            list[float] | None,
            typer.Option(metavar="SHARE", help="Share of labels that are ignored. Default: 0."),
        ] = None,
        peers: Annotated[
            list[str] | None, typer.Option(metavar="NAME", help=f"{', '.join(PEERS)}; all or none. Default: all.")
        ] = None,
        tp: Annotated[
            int, typer.Option(metavar="N", min=1, help="Ranks that share the vocabulary, started and ended by bench.")
        ] = 1,
        count_known: Annotated[
            bool, typer.Option("--count-known", help="Tell the fused loss how many labels count: num_valid_tokens.")
        ] = False,
        forward_only: Annotated[bool, typer.Option("--forward-only", help="The loss alone, no gradients.")] = False,
        rounds: Annotated[int, typer.Option(metavar="N", min=1, help="How often each is asked.")] = 7,
        threads: Annotated[int | None, typer.Option(metavar="N", min=1, help="Threads of each process.")] = None,
        seed: Annotated[int, typer.Option(metavar="S", min=0, help="Seed of inputs and orders.")] = 0,
        timeout: Annotated[
            float, typer.Option(metavar="SECONDS", min=1, help="After which one implementation is given up.")
        ] = 300.0,
        time_limit: Annotated[
            float | None, typer.Option(metavar="SECONDS", min=1, help="After which nothing new is begun.")
        ] = None,
        tune: Annotated[
            bool, typer.Option("--tune", help="Keep the fastest flags for this machine, for auto to read.")
        ] = False,
        json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as JSON.")] = None,
        report: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as an HTML page.")] = None,
        modules: Modules = None,
    ) -> None:
        """Measure losses beside the peers that are installed: time, memory, error.

        Without options: every loss and flag, 2,048 tokens, vocabulary 32,000, hidden size 512.

        May be repeated: --config, --backend, --shape, --workload, --dtype, --ignored, --peers, --import.

        Exit code: 0, or 1 when no flag ran, one failed or was wrong, 2 wrong usage, 130 Ctrl-C.
        """
        options = BenchOptions(
            configs=config or (),
            backends=backend or (),
            shapes=shape or (),
            workloads=workload or (),
            tokens=tokens,
            dtypes=dtype or (),
            device=device,
            ignored=ignored or (),
            peers=peers or (),
            tp=tp,
            count_known=count_known,
            forward_only=forward_only,
            rounds=rounds,
            threads=threads,
            seed=seed,
            timeout=timeout,
            time_limit=time_limit,
            tune=tune,
            json=json,
            report=report,
            modules=modules or (),
            command=ctx.obj or "loss-core bench",
        )
        raise typer.Exit(_exit_code(lambda: run_bench(options, Console(), Console(stderr=True))))

    @app.command("backends")
    def backends_command() -> None:
        """List every backend flag: usable here, version, and if not, why and what to install."""

        def run() -> int:
            print_backends(Console(), [flag_status(flag) for flag in all_flags()])
            return 0

        raise typer.Exit(_exit_code(run))

    @app.command("losses")
    def losses_command(modules: Modules = None) -> None:
        """List every loss config: fields, types, defaults and meaning."""

        def run() -> int:
            import_modules(modules or ())
            print_losses(Console())
            return 0

        raise typer.Exit(_exit_code(run))

    return app


if __name__ == "__main__":
    main()
