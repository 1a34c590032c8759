"""The least one can write by hand: aiohttp, one model, one run a request, raw tensors in and out, no checks."""

from __future__ import annotations

import asyncio
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnxruntime
from aiohttp import web


def main(path: str, threads: int) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    pool = ThreadPoolExecutor(1)
    kinds = {"FP32": np.float32, "INT64": np.int64}

    async def infer(request: web.Request) -> web.Response:
        body = await request.read()
        end = int(request.headers["Inference-Header-Content-Length"])
        feeds: dict[str, Any] = {}
        at = end
        for entry in json.loads(body[:end])["inputs"]:
            size = entry["parameters"]["binary_data_size"]
            feeds[entry["name"]] = np.frombuffer(body[at : at + size], kinds[entry["datatype"]]).reshape(entry["shape"])
            at += size
        values = await asyncio.get_running_loop().run_in_executor(pool, session.run, None, feeds)
        return web.Response(body=values[0].tobytes())

    app = web.Application(client_max_size=1 << 30)
    app.router.add_post("/v2/models/m/infer", infer)

    async def run() -> None:
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        print(f"serving on http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
        await asyncio.Event().wait()

    asyncio.run(run())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
