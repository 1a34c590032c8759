"""A persistent child process that runs what may crash: user models, native kernels, user code.

A crash, a hang or an out-of-memory kill in the child is a `ChildCrashed` in the parent, naming the signal and what was
being done. Ctrl-C in the parent kills the child at once; a parent that dies by any means takes its children along.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from multiprocessing.connection import Pipe
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeVar

from featherweight import errors
from featherweight.errors import ChildCrashed, RunError
from featherweight.runtime import _wire
from featherweight.runtime._child import in_child, report_progress

__all__ = ["NotShippableError", "Worker", "in_child", "report_progress"]

T = TypeVar("T")
ProgressCallback = Callable[[int, int], None]

_BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from featherweight.runtime._child import main; main(**json.loads(sys.argv[2]))"
)
_POLL_S = 0.25  # how often a waiting parent looks at the child's memory (only where the system has no limit for it)


class NotShippableError(RunError):
    """A function or argument cannot be found by the child (defined in `__main__`, a lambda, an open file)."""


class Worker:
    """A child process with one call at a time. Starts at the first call, and again after a crash.

    Args:
        memory_limit_bytes: of the child's private memory; over it the call fails with `ChildCrashed` or `RunError`.
        cpus: pin the child to these cores, where the system can.
        timeout_s: default limit of a call; None waits for ever.

    Whatever the child prints (the runtime's native warnings too) is captured, and quoted only when it dies.
    """

    def __init__(
        self,
        *,
        memory_limit_bytes: int | None = None,
        cpus: Sequence[int] = (),
        timeout_s: float | None = None,
    ) -> None:
        if memory_limit_bytes is not None and memory_limit_bytes <= 0:
            raise RunError(f"memory_limit_bytes must be > 0, but got {memory_limit_bytes}")
        self._memory_limit_bytes = memory_limit_bytes or 0
        self._cpus = tuple(cpus)
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._conn: Any = None
        self._log: IO[bytes] | None = None
        self._finalizer: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Process id of the child, None if there is none now."""
        return self._process.pid if self._process is not None else None

    def call(
        self,
        func: Callable[..., T],
        *args: Any,
        timeout_s: float | None = None,
        progress: ProgressCallback | None = None,
        doing: str = "",
        **kwargs: Any,
    ) -> T:
        """Run `func(*args, **kwargs)` in the child and return its result.

        Args:
            func: a function of a module. If it has a parameter `progress`, it gets one to call as (done, total).
            *args: sent to the child, arrays as raw buffers.
            timeout_s: kill the child after this long.
            progress: called in the parent for every report of the child.
            doing: what an error says was being done; made from `func` and its first argument if empty.
            **kwargs: as `args`.

        Raises:
            ChildCrashed: the child died or overran its time; the next call starts a new one.
            NotShippableError: `func` or an argument cannot be sent.
            Exception: what `func` raised, of the same type if it is ours or built in, with the child's traceback
                as a note.
        """
        limit = self._timeout_s if timeout_s is None else timeout_s
        what = doing or _describe(func, args)
        with self._lock:
            try:
                answer = self._ask((func, args, kwargs), limit, progress, what)
                if answer is None:  # the child had died while idle, so nothing of this call has run yet
                    self._kill()
                    answer = self._ask((func, args, kwargs), limit, progress, what)
                if answer is None:
                    raise self._crashed(what)
            except NotShippableError:
                raise
            except BaseException:  # Ctrl-C above all: nobody will read this child's answer any more
                self._kill()
                raise
        if answer[0] == "result":
            result: T = answer[1]
            return result
        raise _rebuilt(answer, what)

    def interrupt(self) -> None:
        """Kill the child from another thread: the call under way there ends with ChildCrashed."""
        process = self._process
        if process is not None and process.poll() is None:
            _kill_group(process)

    def close(self) -> None:
        """End the child. The worker can be used again."""
        self._kill()

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self._kill()
        ours, theirs = Pipe(duplex=True)
        log = tempfile.TemporaryFile(mode="wb+", buffering=0)  # noqa: SIM115  (lives as long as the child)
        handle = theirs.fileno()
        boot = {
            "handle": handle,
            "parent_pid": os.getpid(),
            "die_with_thread": threading.current_thread() is threading.main_thread(),
            "memory_limit_bytes": self._memory_limit_bytes,
            "cpus": list(self._cpus),
        }
        path = [os.path.abspath(p) if p else os.getcwd() for p in sys.path]
        command = [sys.executable, "-P", "-X", "faulthandler", "-c", _BOOT, json.dumps(path), json.dumps(boot)]
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, **_spawn_options(handle))
        except OSError as e:
            raise RunError(f"a child process must start, but '{sys.executable}' failed: {e}") from e
        finally:
            theirs.close()
        self._process, self._conn, self._log = process, ours, log
        self._finalizer = weakref.finalize(self, _end, process, ours, log)

    def _send(self, message: tuple[Any, ...]) -> bool:
        """False if the child is gone."""
        assert self._log is not None
        with contextlib.suppress(OSError):
            self._log.seek(0)  # parent and child share one position in the file
            self._log.truncate()
        try:
            _wire.send(self._conn, message)
        except (BrokenPipeError, ConnectionResetError):
            return False
        except Exception as e:
            raise NotShippableError(
                f"what goes to the child process must be plain data or functions of a module: {e}"
            ) from e
        return True

    def _ask(
        self, message: tuple[Any, ...], limit: float | None, progress: ProgressCallback | None, what: str
    ) -> tuple[Any, ...] | None:
        """The child's answer; None if it was gone before it began."""
        self._start()
        return self._wait(limit, progress, what) if self._send(message) else None

    def _wait(self, limit: float | None, progress: ProgressCallback | None, what: str) -> tuple[Any, ...] | None:
        begun = False
        deadline = None if limit is None else time.monotonic() + limit
        watch = self._memory_limit_bytes > 0 and sys.platform == "win32"
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                if not self._conn.poll(min(left or 3600.0, _POLL_S) if watch else left):
                    if left is not None and time.monotonic() >= (deadline or 0.0):
                        raise ChildCrashed(
                            f"the child process must finish within {limit:g} s, but was still {what}; it was stopped"
                        )
                    if watch:
                        self._check_memory(what)
                    continue
                message: tuple[Any, ...] = _wire.receive(self._conn)
            except (EOFError, ConnectionResetError, BrokenPipeError):
                if not begun:
                    return None
                raise self._crashed(what) from None
            if message[0] == "begun":
                begun = True
                continue
            if message[0] != "progress":
                return message
            if progress is not None:
                progress(message[1], message[2])

    def _check_memory(self, what: str) -> None:
        import psutil

        with contextlib.suppress(psutil.Error):
            used = psutil.Process(self.pid).memory_info().rss
            if used > self._memory_limit_bytes:
                raise ChildCrashed(
                    f"the child process may use {self._memory_limit_bytes} B, but used {used} B while {what}; "
                    "it was stopped"
                )

    def _crashed(self, what: str) -> ChildCrashed:
        assert self._process is not None
        assert self._log is not None
        try:
            code = self._process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:  # it closed its end but lives on
            code = None
        with contextlib.suppress(OSError):
            self._log.seek(0)
        said = self._log.read().decode("utf-8", "replace").strip()
        error = ChildCrashed(f"the child process {_death(code)} while {what}{_quoted(said)}")
        if said:
            error.add_note(f"The child's last words:\n{said[-4000:]}")
        return error

    def _kill(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._process, self._conn, self._log, self._finalizer = None, None, None, None


def _spawn_options(handle: int) -> dict[str, Any]:
    if sys.platform == "win32":
        os.set_handle_inheritable(handle, True)
        info = subprocess.STARTUPINFO()
        info.lpAttributeList = {"handle_list": [handle]}
        return {"startupinfo": info, "creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    # A group of its own: the terminal's Ctrl-C goes to the parent alone, which then ends the whole group.
    return {"pass_fds": (handle,), "process_group": 0}


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)


def _end(process: subprocess.Popen[bytes], conn: Any, log: IO[bytes]) -> None:
    _kill_group(process)
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
    process.wait()
    conn.close()
    log.close()


def _describe(func: Callable[..., Any], args: tuple[Any, ...]) -> str:
    name = f"{getattr(func, '__module__', '?').rsplit('.', 1)[-1]}.{getattr(func, '__qualname__', repr(func))}"
    on = f" on '{Path(args[0]).name}'" if args and isinstance(args[0], str | Path) else ""
    return f"running {name}{on}"


def _death(code: int | None) -> str:
    if code is None:
        return "closed its connection"
    if code >= 0 and sys.platform != "win32":
        return f"exited with code {code}"
    if sys.platform == "win32":
        return f"ended with code 0x{code & 0xFFFFFFFF:08X}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        return f"died from signal {-code}"
    meaning = {
        "SIGSEGV": "a memory access error in native code",
        "SIGABRT": "an abort in native code",
        "SIGKILL": "killed from outside; most often the system was out of memory",
        "SIGILL": "an instruction this CPU does not have",
        "SIGFPE": "an arithmetic error in native code",
        "SIGBUS": "a file that shrank or a memory error",
    }.get(name)
    return f"died from {name}" + (f" ({meaning})" if meaning else "")


def _quoted(said: str) -> str:
    lines = [line.strip() for line in said.splitlines()]
    skip = ("File ", "Thread ", "Current thread", "Extension modules", "Fatal Python error", "<", "Current thread's")
    lines = [line for line in lines if line and not line.startswith(skip)]
    return f": {' | '.join(lines[-3:])[-400:]}" if lines else ""


def _rebuilt(answer: tuple[Any, ...], what: str) -> BaseException:
    """The exception of the child as one of the parent: ours and built-in ones keep their type."""
    if answer[0] == "unpackable":
        return NotShippableError(
            f"the child process must be able to import what it is given, but {answer[1]}; "
            "put the function into a module of its own"
        )
    _, kinds, message, trace = answer
    if ("builtins", "MemoryError") in kinds:
        return ChildCrashed(f"the child process ran out of memory while {what}")
    module, name = kinds[0]
    kind = getattr(builtins, name, None) if module == "builtins" else None
    for base_module, base_name in kinds:
        if base_module == errors.__name__:
            kind = getattr(errors, base_name)
            break
    error: BaseException = RuntimeError(f"{module}.{name}: {message}")
    if isinstance(kind, type) and issubclass(kind, Exception):
        with contextlib.suppress(TypeError):  # UnicodeDecodeError and the like take more than a text
            error = kind(message)
    error.add_note(f"In the child process, while {what}:\n{trace}")
    return error
