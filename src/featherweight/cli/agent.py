"""`featherweight agent`: measure models on this device for others."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from featherweight.cli import _options as options
from featherweight.cli._run import until_stopped
from featherweight.cli._sections import Command, option
from featherweight.errors import FeatherweightError

TOKEN_VARIABLE = "FEATHERWEIGHT_AGENT_TOKEN"


@click.command(cls=Command, short_help="Measure models on this device for others (HTTP).")
@option("--host", default="127.0.0.1", show_default=True, section="Target", help="Address to listen on.")
@option(
    "--port", type=click.IntRange(0, 65535), default=8765, show_default=True, section="Target", help="0: a free one."
)
@option("--token-file", type=options.PATH, metavar="FILE", section="Target",
        help=f"The token clients must send. Default: {TOKEN_VARIABLE}, else a new one, printed once.")  # fmt: skip
@option("--tls-cert", type=options.PATH, metavar="FILE", section="Target", help="Certificate chain (PEM).")
@option("--tls-key", type=options.PATH, metavar="FILE", section="Target", help="Private key (PEM) of the certificate.")
@option("--name", section="Target", help="What reports call this device. Default: its host name.")
@option("--work", type=options.PATH, metavar="FOLDER", section="Data",
        help="Where files are kept. Default: featherweight-agent in the user's cache folder.")  # fmt: skip
@option("--quota", type=options.SIZE, default="8GB", show_default=True, section="Data", help="Of all kept files.")
@option("--max-file", type=options.SIZE, default="4GB", show_default=True, section="Data", help="Of one file.")
@option("--max-memory", type=options.SIZE, default="80%", show_default=True, section="Data",
        help="Of a running model, in bytes or of this device's memory.")  # fmt: skip
@option("--max-time", type=options.DURATION, default="30m", show_default=True, section="Search", help="Of one job.")
@option("--queue", type=click.IntRange(1, 10_000), default=16, show_default=True, section="Search",
        help="Jobs that may wait; more get 503.")  # fmt: skip
@option("--drain", type=options.DURATION, default="20s", show_default=True, section="Search",
        help="Time for the running job after SIGTERM.")  # fmt: skip
@option("--json", "as_json", is_flag=True, help="Say where it listens, and a new token, as one JSON document.")
@option("--access-log", is_flag=True, help="One line a request on stderr, without headers, queries and bodies.")
@option("--debug", is_flag=True, help="Show the traceback of an error.")
def command(*, debug: bool, as_json: bool, **asked: object) -> None:
    """Measure and run models on this device for others, who name it by --target http://HOST:PORT.

    \b
    featherweight agent
    featherweight agent --host 0.0.0.0 --token-file token --tls-cert cert.pem --tls-key key.pem
    """
    with until_stopped(debug=debug, as_json=as_json):
        _agent(as_json=as_json, **asked)  # type: ignore[arg-type]  # click has checked each option's type


def _agent(
    *, host: str, port: int, token_file: Path | None, tls_cert: Path | None, tls_key: Path | None, name: str | None,
    work: Path | None, quota: str, max_file: str, max_memory: str, max_time: str, queue: int, drain: str,
    access_log: bool, as_json: bool,
) -> None:  # fmt: skip
    import asyncio
    import dataclasses
    import json
    import logging

    from featherweight.edge import access, http
    from featherweight.edge.agent import app as agent
    from featherweight.edge.agent.lock import locked
    from featherweight.edge.agent.tasks import runtime_version
    from featherweight.quantities import parse_duration, parse_size
    from featherweight.runtime import targets
    from featherweight.runtime.sandbox import Worker

    if (tls_cert is None) != (tls_key is None):
        raise click.UsageError("--tls-cert and --tls-key belong together; give both")
    given = _given_token(token_file)
    tls = None if tls_cert is None or tls_key is None else access.server_tls(tls_cert, tls_key)
    for warning in access.check_bind(host, token=given, tls=tls is not None):
        click.echo(f"warning: {warning}", err=True)
    profile = targets.this_machine()
    if name:
        profile = dataclasses.replace(profile, name=name)
    folder = work or _cache_folder()
    with locked(folder):
        with Worker(timeout_s=120.0) as worker:  # shows, before anything is promised, that children can run here
            runtime = worker.call(runtime_version, doing="loading the runtime")
        service = agent.Service(
            agent.Settings(
                work=folder, profile=profile, runtime=runtime, quota_bytes=parse_size(quota),
                max_file_bytes=min(parse_size(max_file), parse_size(quota)), max_seconds=parse_duration(max_time),
                most_waiting=queue, memory_limit_bytes=parse_size(max_memory, profile.memory_bytes),
                patience_s=parse_duration(drain),
            )
        )  # fmt: skip
        token = given or _new_token()
        app = agent.make_app(service, token=token)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
        if access_log:
            http.log_access(app, logging.getLogger("featherweight.access"))

        def ready(real_port: int) -> None:
            shown = f"[{host}]" if ":" in host else host
            url = f"{'https' if tls else 'http'}://{shown}:{real_port}"
            if as_json:
                new = {} if given else {"token": token}
                click.echo(json.dumps({"schema": 1, "kind": "agent", "name": profile.name, "url": url, **new}))
                return
            click.echo(f"measuring on {profile.name}: {url}")
            if given is None:
                click.echo(f"token (shown once): {token}")

        drain_s = parse_duration(drain) + 5.0  # the streams of the last job are told how it ended
        asyncio.run(http.run_until_stopped(app, host, port, tls=tls, drain_s=drain_s, on_ready=ready))


def _given_token(token_file: Path | None) -> str | None:
    from featherweight.edge import access

    if token_file is not None:
        return access.read_token(token_file)
    text = os.environ.get(TOKEN_VARIABLE)
    if text is None:
        return None
    if len(text) < access.MIN_TOKEN_CHARACTERS or any(not 33 <= ord(c) <= 126 for c in text):
        raise FeatherweightError(
            f"{TOKEN_VARIABLE} must have at least {access.MIN_TOKEN_CHARACTERS} ASCII characters without spaces; "
            "make one with openssl rand -hex 32"
        )
    return text


def _new_token() -> str:
    import secrets

    return secrets.token_hex(32)


def _cache_folder() -> Path:
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
        return Path(base or Path.home()) / "featherweight-agent"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "featherweight-agent"
