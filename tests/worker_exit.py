"""How a process that used gloo ends: for the workers of tests."""

import os
import sys
import traceback


def leave_after(main):
    """Run `main`, then end the process with its status, without finalising the interpreter.

    A thread of gloo may still hold the last reference to a tensor of Python's. If it lets go while the interpreter
    shuts down, taking the GIL ends the thread inside a destructor, and that aborts the process (torch 2.13, one run
    in four).
    """
    try:
        status = main() or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
