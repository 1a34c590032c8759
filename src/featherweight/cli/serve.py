"""`featherweight serve`: models over HTTP, for any client of the Open Inference Protocol."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import click

from featherweight.cli import _options as options
from featherweight.cli._run import until_stopped
from featherweight.cli._sections import Command, option


@click.command(cls=Command, short_help="Serve models over HTTP (Open Inference Protocol v2).")
@click.argument("models", nargs=-1, required=True, metavar="[NAME=]MODEL...")
@option("--host", default="127.0.0.1", show_default=True, section="Target", help="Address to listen on.")
@option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, section="Target", help="0: a free one."
)
@option("--token-file", type=options.PATH, section="Target", help="File with the token clients must send as bearer.")
@option("--tls-cert", type=options.PATH, section="Target", help="Certificate chain (PEM); with --tls-key serves HTTPS.")
@option("--tls-key", type=options.PATH, section="Target", help="Private key (PEM) of the certificate.")
@option("--threads", type=click.IntRange(1, 1024), section="Target", help="Threads of one run. [default: all cores]")
@option("--workers", type=click.IntRange(1, 256), default=1, show_default=True, section="Target",
        help="Runs of a model at the same time.")  # fmt: skip
@option("--max-batch", type=click.IntRange(1, 4096), default=32, show_default=True, section="Budget",
        help="Most rows of one run; 1: requests are never joined.")  # fmt: skip
@option("--max-delay", type=options.LATENCY, default="5ms", show_default=True, section="Budget",
        help="Longest time a request is held back for company.")  # fmt: skip
@option("--queue", type=click.IntRange(1, 1_000_000), default=256, show_default=True, section="Budget",
        help="Requests that may wait for a model; more get 503.")  # fmt: skip
@option("--max-body", type=options.SIZE, default="64MB", show_default=True, section="Budget", help="Of one request.")
@option("--max-axis", type=click.IntRange(1), default=4096, show_default=True, section="Budget",
        help="Longest open axis of an input.")  # fmt: skip
@option("--drain", type=options.DURATION, default="30s", show_default=True, section="Target",
        help="Time for requests in progress after SIGTERM.")  # fmt: skip
@option("--access-log", is_flag=True, help="One line a request on stderr, without headers, queries and bodies.")
@option("--json", "as_json", is_flag=True, help="Say where it serves as one JSON document on stdout.")
@option("--debug", is_flag=True, help="Show the traceback of an error.")
def command(models: tuple[str, ...], *, debug: bool, as_json: bool, **asked: object) -> None:
    """Serve models over HTTP: health, metadata, inference (JSON and binary tensors), metrics for Prometheus.

    \b
    featherweight serve lite0.onnx
    featherweight serve tail=run/tail.onnx whole=lite0.onnx --port 8001 --max-delay 2ms
    featherweight serve lite0.onnx --host 0.0.0.0 --token-file token --tls-cert cert.pem --tls-key key.pem
    """
    with until_stopped(debug=debug, as_json=as_json):
        _serve(models, as_json=as_json, **asked)  # type: ignore[arg-type]  # click has checked each option's type


def _serve(
    arguments: tuple[str, ...], *, host: str, port: int, token_file: Path | None, tls_cert: Path | None,
    tls_key: Path | None, threads: int | None, workers: int, max_batch: int, max_delay: str, queue: int, max_body: str,
    max_axis: int, drain: str, access_log: bool, as_json: bool,
) -> None:  # fmt: skip
    import asyncio
    import logging
    from importlib.metadata import version

    from featherweight.edge import access, http
    from featherweight.edge.serve.app import Options, build
    from featherweight.edge.serve.models import load_all
    from featherweight.errors import BudgetError
    from featherweight.quantities import parse_duration, parse_latency, parse_size

    if (tls_cert is None) != (tls_key is None):
        raise click.UsageError("--tls-cert and --tls-key belong together; give both")
    token = None if token_file is None else access.read_token(token_file)
    tls = None if tls_cert is None or tls_key is None else access.server_tls(tls_cert, tls_key)
    for warning in access.check_bind(host, token=token, tls=tls is not None):
        click.echo(f"warning: {warning}", err=True)
    delay_ms, _ = parse_latency(max_delay)
    if delay_ms is None:
        raise BudgetError(f"--max-delay must be a time such as 5ms, but got {max_delay!r}")
    served = load_all(arguments, threads=threads, batching=max_batch > 1, max_axis=max_axis)
    for model in served:
        click.echo(f"{model.name}: {model.why}", err=True)
    chosen = Options(
        workers=workers, max_batch=max_batch, max_delay_s=delay_ms / 1e3, queue=queue, version=version("featherweight")
    )  # fmt: skip
    app = build(served, token=token, limits=http.Limits(body_bytes=parse_size(max_body)), options=chosen)
    if access_log:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
        http.log_access(app, logging.getLogger("featherweight.access"))

    def ready(real_port: int) -> None:
        url = f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{real_port}"
        if not as_json:
            click.echo(f"serving {', '.join(m.name for m in served)} on {url}")
            return
        from featherweight.report.json import document

        about = [{"name": m.name, "batched": m.batched, "why": m.why} for m in served]
        click.echo(document("serve", {"url": url, "models": about}))

    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(http.run_until_stopped(app, host, port, tls=tls, drain_s=parse_duration(drain), on_ready=ready))
