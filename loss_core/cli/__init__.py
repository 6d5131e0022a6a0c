"""The command `loss-core`. Running it needs the extra `cli`; importing this module does not."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loss_core.dispatch.flags import install_line

if TYPE_CHECKING:
    import typer

__all__ = ["main", "make_app"]

_LIBRARIES = ("typer", "rich", "yaml")
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit the process with its exit code.

    Args:
        argv: arguments after the program's name; None for those of the process.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    # torch and JAX run alternately, and torch's idle threads would otherwise spin on the cores that JAX needs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        make_app()(args=arguments, prog_name="loss-core", obj=shlex.join(["loss-core", *arguments]))
    except ImportError as error:
        library = (error.name or "").partition(".")[0]
        if library not in _LIBRARIES:
            raise
        print(f"loss-core: the command line needs {library} ({error}): {install_line('cli')}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("loss-core: stopped.", file=sys.stderr)
        _exit_at_once(_INTERRUPTED)
    except SystemExit as exit_:
        if exit_.code == _INTERRUPTED:
            _exit_at_once(_INTERRUPTED)
        raise


def make_app() -> typer.Typer:
    """The typer application.

    Raises:
        ImportError: typer, rich or PyYAML is missing.
    """
    import yaml  # noqa: F401  (needed by --config; a missing library is reported at once)

    from loss_core.cli.app import app

    return app


def _exit_at_once(code: int) -> None:
    # A kernel may still be running in a thread; sys.exit would wait for it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
