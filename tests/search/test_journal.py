"""The journal: nothing measured is lost, and a different request is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from featherweight.core import Action, Attempt, Decision, Effect, Interval, Measurement, Plan
from featherweight.errors import OutputError
from featherweight.search.journal import Journal, measurement_from, plan_key

ASKED = {"model": "abc", "max_size_bytes": 100}


def plan(bits: int, loss: float = 0.0) -> Plan:
    return Plan((Decision("w", (Action.of("weight_nbit", bits=bits),)), Decision("v")), Effect(-10, 0.0, 0, loss))


def test_attempts_come_back_as_they_were(tmp_path):
    m = Measurement(size_bytes=9, drop=0.1, drop_interval=Interval(-0.1, 0.2), metric=0.5, metric_name="accuracy")
    done = [Attempt(1, plan(4), m, seconds=1.5), Attempt(2, plan(3), None, error="the child process died")]
    journal = Journal(tmp_path / "journal.sqlite", ASKED, resume=False)
    for attempt in done:
        journal.record(attempt)
    journal.close()
    again = Journal(tmp_path / "journal.sqlite", ASKED, resume=True)
    assert again.attempts() == done
    assert again.find(plan(4, loss=0.7)) == done[0]
    assert again.find(plan(5)) is None


def test_a_finished_phase_is_read_back_not_computed_again(tmp_path):
    journal = Journal(tmp_path / "j.sqlite", ASKED, resume=False)
    assert journal.phase("gains", lambda: {"w": 2.0}) == {"w": 2.0}
    assert journal.phase("gains", lambda: pytest.fail("computed twice")) == {"w": 2.0}
    assert journal.finished("gains")
    assert not journal.finished("effects")


def test_plans_with_equal_decisions_share_a_key_whatever_was_predicted():
    assert plan_key(plan(4, 0.1)) == plan_key(plan(4, 0.2))
    assert plan_key(plan(4)) != plan_key(plan(3))


def test_an_existing_run_needs_resume(tmp_path):
    Journal(tmp_path / "j.sqlite", ASKED, resume=False).close()
    with pytest.raises(OutputError, match="already holds a run; continue it with --resume"):
        Journal(tmp_path / "j.sqlite", ASKED, resume=False)


def test_resume_with_another_request_names_what_changed(tmp_path):
    Journal(tmp_path / "j.sqlite", ASKED, resume=False).close()
    with pytest.raises(OutputError, match="max_size_bytes: was 100, now 200"):
        Journal(tmp_path / "j.sqlite", {**ASKED, "max_size_bytes": 200}, resume=True)


def test_a_file_that_is_no_journal_is_a_clear_error(tmp_path):
    (tmp_path / "j.sqlite").write_bytes(b"not a database, but long enough to be looked at" * 50)
    with pytest.raises(OutputError, match="cannot be used"):
        Journal(tmp_path / "j.sqlite", ASKED, resume=True)


def test_a_measurement_with_unknown_fields_is_refused():
    with pytest.raises(Exception, match="malformed"):
        measurement_from({"size_bytes": 1, "surprise": 2})


def test_attempts_survive_kill_9(tmp_path):
    code = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from featherweight.core import Action, Attempt, Decision, Measurement, Plan
        from featherweight.search.journal import Journal
        j = Journal(Path(sys.argv[1]), {"model": "abc"}, resume=False)
        for i in range(1, 10**6):
            plan = Plan((Decision("w", (Action.of("t", bits=i),)),))
            j.record(Attempt(i, plan, Measurement(size_bytes=i)))
            print(i, flush=True)
        """
    )
    path = tmp_path / "j.sqlite"
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    said = 0
    for line in child.stdout:
        said = int(line)
        if said >= 5:
            os.kill(child.pid, signal.SIGKILL)
            break
    child.wait()
    journal = Journal(path, {"model": "abc"}, resume=True)
    found = [a.index for a in journal.attempts()]
    assert found[:said] == list(range(1, said + 1))
