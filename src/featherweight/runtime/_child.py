"""The child process's side of `sandbox.Worker`: a loop that receives calls, runs them and answers.

Started as `python -c ... _child.main()` and not through `multiprocessing`'s spawn, which imports the user's main
script again in the child: a script without an `if __name__ == "__main__"` guard would start itself anew.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from featherweight.runtime import _wire

_reply_to: Any = None


def report_progress(done: int, total: int) -> None:
    """Tell the parent how far the current call is; does nothing outside a child."""
    if _reply_to is not None:
        _wire.send(_reply_to, ("progress", done, total))


def in_child() -> bool:
    """True inside a `Worker`'s child process."""
    return _reply_to is not None


def main(handle: int, parent_pid: int, die_with_thread: bool, memory_limit_bytes: int, cpus: list[int]) -> None:
    """Serve calls from the connection `handle` until the parent closes it or dies.

    `cpus` pins the process before any thread of the runtime exists; empty leaves it to the system.
    """
    global _reply_to
    _die_with_parent(parent_pid, die_with_thread)
    if sys.platform == "win32":
        from multiprocessing.connection import PipeConnection

        conn: Any = PipeConnection(handle)
    else:
        os.set_inheritable(handle, False)
        conn = Connection(handle)
    if cpus:
        _pin(cpus)
    if memory_limit_bytes:
        _limit_memory(memory_limit_bytes)
    _reply_to = conn
    while True:
        try:
            message = _wire.receive(conn)
        except (EOFError, OSError):
            return
        except Exception as e:  # the call could not be unpacked here, e.g. a function of the user's __main__
            _answer(conn, ("unpackable", str(e)))
            continue
        _answer(conn, ("begun",))  # before it nothing of the call has run, and the parent may ask another child
        _answer(conn, _run(message))


def _run(message: Any) -> tuple[Any, ...]:
    func, args, kwargs = message
    try:
        if "progress" not in kwargs and _takes_progress(func):
            kwargs = {**kwargs, "progress": report_progress}
        return ("result", func(*args, **kwargs))
    except BaseException as e:  # everything travels to the parent, which raises it there
        return _failure(e)


def _takes_progress(func: Callable[..., Any]) -> bool:
    try:
        return "progress" in inspect.signature(func).parameters
    except (TypeError, ValueError):
        return False


def _failure(error: BaseException) -> tuple[Any, ...]:
    import traceback

    text = "".join(traceback.format_exception(error))
    kinds = [(kind.__module__, kind.__qualname__) for kind in type(error).__mro__]
    return ("error", kinds, str(error), text)


def _answer(conn: Any, answer: tuple[Any, ...]) -> None:
    try:
        _wire.send(conn, answer)
    except (BrokenPipeError, ConnectionResetError):
        os._exit(1)
    except Exception as e:  # a result that cannot be packed is the caller's error, said in words
        _wire.send(conn, _failure(e))


def _die_with_parent(parent_pid: int, die_with_thread: bool) -> None:
    """Two guards against orphans: the kernel's (Linux) and a thread that waits for the end of standard input.

    The parent holds the other end of standard input and never writes. PR_SET_PDEATHSIG fires when the *thread* that
    started the child ends, so it is set only where that was the parent's main thread.
    """
    if sys.platform == "linux" and die_with_thread:
        import ctypes
        import signal

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent_pid:
            os._exit(1)
    lifeline = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(lifeline, 1):
                pass
        os._exit(1)

    threading.Thread(target=watch, name="featherweight-lifeline", daemon=True).start()


def _pin(cpus: list[int]) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a wish: macOS has no pinning, containers forbid it
        if sys.platform == "linux":
            os.sched_setaffinity(0, cpus)
        else:
            import psutil

            psutil.Process().cpu_affinity(cpus)


def _limit_memory(limit_bytes: int) -> None:
    """Private memory (heap, stacks) on Linux, address space elsewhere on POSIX; the parent watches on Windows."""
    if sys.platform == "win32":
        return
    import resource

    kind = resource.RLIMIT_DATA if sys.platform == "linux" else resource.RLIMIT_AS
    _, hard = resource.getrlimit(kind)
    capped = limit_bytes if hard == resource.RLIM_INFINITY else min(limit_bytes, hard)
    resource.setrlimit(kind, (capped, hard))
