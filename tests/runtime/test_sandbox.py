"""Children that crash, hang, fill memory or outlive their parent."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import child_functions as cf
import numpy as np
import psutil
import pytest

from featherweight.errors import ChildCrashed, DataError, RunError
from featherweight.runtime.sandbox import NotShippableError, Worker, in_child

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")


@pytest.fixture(scope="module")
def worker():
    with Worker() as w:
        yield w


def gone(pid: int, seconds: float = 10.0) -> bool:
    """True once the process has ended (a zombie has)."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_a_call_runs_in_another_process_and_the_child_persists(worker):
    first = worker.call(os.getpid)
    assert first != os.getpid()
    assert worker.call(os.getpid) == first == worker.pid


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.zeros((0, 3), np.int8),
        np.float64(3.5).reshape(()),
        np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        np.arange(20)[::3],
        np.ones((1 << 20,), np.uint16),
    ],
)
def test_arrays_come_back_the_same_and_writable(worker, array):
    got = worker.call(cf.add_one, array)
    assert got.dtype == array.dtype
    np.testing.assert_array_equal(got, array + array.dtype.type(1))


@posix
def test_a_segfault_names_the_signal_and_the_work_and_the_next_call_works(worker):
    with pytest.raises(ChildCrashed, match=r"SIGSEGV \(a memory access error in native code\) while .*segfault"):
        worker.call(cf.segfault)
    assert worker.call(math.sqrt, 4.0) == 2.0


@posix
@pytest.mark.parametrize(
    ("func", "args", "text"),
    [
        (os.abort, (), "SIGABRT"),
        (os._exit, (3,), "exited with code 3"),
        (os.kill, (0, signal.SIGKILL), "SIGKILL .*out of memory"),
    ],
)
def test_other_deaths_are_named(worker, func, args, text):
    with pytest.raises(ChildCrashed, match=text):
        worker.call(func, *args, doing="trying the candidate")
    with pytest.raises(ChildCrashed, match="while trying the candidate"):
        worker.call(func, *args, doing="trying the candidate")


@posix
def test_a_child_killed_between_calls_is_replaced(worker):
    pid = worker.call(os.getpid)
    os.kill(pid, signal.SIGKILL)
    assert gone(pid)
    assert worker.call(os.getpid) != pid


@posix
def test_kill_9_during_a_call_is_reported(tmp_path):
    note = tmp_path / "pid"
    with Worker() as w:

        def kill():
            while not note.exists() or not note.read_text():
                time.sleep(0.01)
            os.kill(int(note.read_text()), signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(ChildCrashed, match="SIGKILL"):
            w.call(cf.sleep_forever, str(note))
        killer.join()


def test_a_timeout_stops_the_child(tmp_path, worker):
    with pytest.raises(ChildCrashed, match=r"finish within 0\.3 s, but was still running .*sleep_forever.* on 'pid'"):
        worker.call(cf.sleep_forever, str(tmp_path / "pid"), timeout_s=0.3)
    if (tmp_path / "pid").exists():
        assert gone(int((tmp_path / "pid").read_text()))


def test_our_errors_keep_their_type_and_carry_the_childs_traceback(worker):
    with pytest.raises(DataError, match="three rows") as e:
        worker.call(cf.data_error, "three rows")
    assert "child_functions" in "".join(e.value.__notes__)
    with pytest.raises(ValueError, match="the law, the value"):
        worker.call(cf.value_error)


def test_foreign_errors_become_a_runtime_error_with_their_name(worker):
    with pytest.raises(RuntimeError, match=r"OddError: 1 2"):
        worker.call(cf.odd_error)


def test_what_cannot_be_sent_is_said_and_the_child_stays(worker):
    pid = worker.call(os.getpid)
    with pytest.raises(NotShippableError, match="plain data or functions of a module"):
        worker.call(lambda: 1)
    with pytest.raises(Exception, match="lambda"):
        worker.call(cf.unpicklable)
    assert worker.call(os.getpid) == pid


def test_progress_reaches_the_parent(worker):
    seen = []
    assert worker.call(cf.count_to, 3, progress=lambda d, t: seen.append((d, t))) == 3
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert worker.call(cf.report_directly, progress=lambda d, t: seen.append((d, t))) is True
    assert seen[-1] == (3, 4)
    assert not in_child()


def test_an_error_in_the_progress_callback_ends_the_child(worker):
    def stop(done, total):
        raise KeyboardInterrupt

    pid = worker.call(os.getpid)
    with pytest.raises(KeyboardInterrupt):
        worker.call(cf.count_to, 3, progress=stop)
    assert gone(pid)


def test_prints_of_the_child_stay_off_the_terminal_and_explain_a_death(capfd, worker):
    assert worker.call(cf.noisy) == 1
    with pytest.raises(ChildCrashed, match=r"exited with code 7 while .*: the allocator is unhappy"):
        worker.call(cf.noisy_exit)
    out, err = capfd.readouterr()
    assert out == ""
    assert err == ""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is the kernel's on Linux")
def test_the_memory_limit_holds():
    with Worker(memory_limit_bytes=400 << 20) as w:
        assert w.call(cf.fill_memory, 64 << 20) == 4
        with pytest.raises(ChildCrashed, match="out of memory"):
            w.call(cf.fill_memory, 2 << 30)
        assert w.call(math.sqrt, 9.0) == 3.0
    with pytest.raises(RunError, match="must be > 0, but got -1"):
        Worker(memory_limit_bytes=-1)


def test_close_ends_the_child_and_the_worker_can_start_again():
    w = Worker()
    pid = w.call(os.getpid)
    w.close()
    assert gone(pid)
    assert w.pid is None
    assert w.call(os.getpid) != pid
    w.close()


def test_a_worker_started_in_a_thread_outlives_the_thread():
    w = Worker()
    thread = threading.Thread(target=lambda: w.call(os.getpid))
    thread.start()
    thread.join()
    time.sleep(0.1)
    assert w.call(math.sqrt, 16.0) == 4.0
    w.close()


PARENT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background inherits that it is ignored
sys.path.insert(0, {folder!r})
import child_functions as cf
from featherweight.runtime.sandbox import Worker
print("started", flush=True)
w = Worker()
w.call(cf.sleep_forever, {note!r})
"""


def start_parent(tmp_path: Path) -> tuple[subprocess.Popen, int]:
    """A script without a main guard whose child sleeps; returns both once the child is at work."""
    note = tmp_path / "pid"
    script = tmp_path / "script.py"
    script.write_text(PARENT.format(folder=str(Path(__file__).parent), note=str(note)))
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    end = time.monotonic() + 30
    while not (note.exists() and note.read_text()):
        assert time.monotonic() < end, "the child did not start"
        assert parent.poll() is None, parent.communicate()[1].decode()
        time.sleep(0.02)
    return parent, int(note.read_text())


@posix
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_no_child_survives_its_parent(tmp_path, how):
    parent, child = start_parent(tmp_path)
    assert child != parent.pid
    os.kill(parent.pid, how)
    out, err = parent.communicate(timeout=20)
    assert gone(child)
    assert out.decode().count("started") == 1, "the user's script must not run again in the child"
    if how == signal.SIGINT:
        assert b"KeyboardInterrupt" in err


@posix
def test_ctrl_c_of_a_terminal_reaches_only_the_parent(tmp_path):
    parent, child = start_parent(tmp_path)
    os.killpg(parent.pid, signal.SIGINT)  # what a terminal does
    _, err = parent.communicate(timeout=20)
    assert gone(child)
    assert b"KeyboardInterrupt" in err
    assert b"ChildCrashed" not in err


@pytest.mark.skipif(sys.platform != "linux", reason="pinning")
def test_a_child_can_be_pinned():
    cpu = min(os.sched_getaffinity(0))
    with Worker(cpus=(cpu,)) as w:
        assert w.call(os.sched_getaffinity, 0) == {cpu}
