"""The agent under schemathesis: requests made from its description, right and wrong ones, and chains of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("aiohttp")

from agent_helpers import TOKEN, feeds, model, running

# A description cannot say that a body must hash to what its address says.
CONFIGURATION = """
[[operations]]
include-method = "PUT"
checks.positive_data_acceptance.enabled = false
"""
pytestmark = pytest.mark.slow


def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    program = shutil.which("schemathesis", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("schemathesis is not installed")
    with running(
        tmp_path / "work", max_file_bytes=1 << 20, quota_bytes=4 << 20, max_seconds=5.0, most_waiting=9999
    ) as agent:
        files = [agent.put(model()), agent.put(feeds())]
        agent.service.store.pin(files)
        (tmp_path / "schemathesis.toml").write_text(CONFIGURATION)
        done = subprocess.run(
            [
                program, "run", f"{agent.url}/openapi.json", "--url", agent.url,
                "--header", f"Authorization: Bearer {TOKEN}", "--max-examples", "30",
                "--seed", "1", "--suppress-health-check", "all", "--request-timeout", "20", "--no-color",
            ],
            env={
                **os.environ, "SCHEMATHESIS_HOOKS": "agent_fuzz_hooks", "AGENT_FUZZ_FILES": ",".join(files),
                "PYTHONPATH": str(Path(__file__).parent),
            },
            capture_output=True, text=True, timeout=900, check=False, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert agent.alive()
        ended = [job["state"] for job in agent.ask("GET", "/v1/jobs")[1]["jobs"]]
        assert {"done", "failed"} & set(ended), "no job of those made ran"
        said = agent.log.getvalue()
        assert TOKEN not in said
        assert str(tmp_path) not in said
        assert "Traceback" not in said
