"""Run the command line in tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from loss_core.cli import make_app

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("--backend", "torch:eager", "--dtype", "float32", "--case", "basic")


def run(*arguments, **options):
    """Run the command in this process."""
    return CliRunner().invoke(make_app(), [str(a) for a in arguments], **options)


def environment():
    """The environment of a user: without variables that force colours or widths."""
    env = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "TTY_COMPATIBLE")}
    return env | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "backends")])}


def command(*arguments, before=""):
    """Arguments that start the command in a new process, after the Python statement `before`."""
    # A shell starts its background jobs with SIGINT ignored, which they inherit: these tests may be one.
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {before}\n"
    code += "from loss_core.cli import main; main()"
    return [sys.executable, "-c", code, *map(str, arguments)]


def spawn(*arguments, before="", cwd=None):
    """Run the command in a new process."""
    return subprocess.run(
        command(*arguments, before=before), capture_output=True, text=True, env=environment(), cwd=cwd, timeout=240
    )


def interrupted(arguments, ready, cwd=None):
    """Interrupt a command with Ctrl-C.

    Args:
        ready: called with the process; the interrupt is sent when it returns.
    Returns:
        Exit code, stdout and stderr.
    """
    process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=environment(), cwd=cwd, start_new_session=True)  # fmt: skip
    try:
        ready(process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, out, err
