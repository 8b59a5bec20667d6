"""`offramp serve`: a bundle, or a folder of bundles, behind HTTP."""

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from offramp_server.settings import ServerSettings

from offramp_cli.settings_flags import with_flags

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@with_flags(ServerSettings)
def serve(
    bundles: Annotated[
        Path, typer.Argument(metavar="BUNDLE_OR_REPOSITORY", help="A bundle, or a folder whose entries are bundles.")
    ],
    **given: Any,
) -> None:
    """Serve bundles over HTTP until SIGTERM or Ctrl-C, then answer what was admitted and stop.

    Every setting is a flag, an environment variable and a key of the TOML file --config; the first given wins.
    """
    settings = ServerSettings.load(**given)
    logging.basicConfig(level=settings.log_level.upper(), format=LOG_FORMAT)
    run(settings, bundles)


def run(settings: ServerSettings, bundles: Path) -> None:
    """Put the server's parts together and serve until a signal says stop.

    Raises:
        BundleError: If a bundle that stands alone cannot be served.
        DeviceUnavailable: If the device cannot be used.
        OSError: If the port is taken.
        typer.Exit: If HTTP workers crash again and again.
    """
    from offramp_runtime import Acceleration, available_cores, open_device
    from offramp_server.app import create_app
    from offramp_server.engine import Engine
    from offramp_server.http_workers.serve import bind_for_workers, run_with_workers
    from offramp_server.metrics import Metrics
    from offramp_server.repository import Repository
    from offramp_server.serve import bind, run_server

    # A taken port is better known before the models are warmed up.
    listeners = [bind(settings)] if settings.http_workers == 1 else bind_for_workers(settings)
    with ExitStack() as opened:
        for listener in listeners:
            opened.enter_context(listener)
        metrics = Metrics()
        acceleration = Acceleration(settings.cuda_graphs, settings.tensorrt_cache, settings.tensorrt_fp16)
        threads = settings.threads_behind_a_stage(available_cores())
        device = open_device(settings.device, threads, acceleration)
        with Engine(device, settings.engine_settings(), metrics) as engine:
            repository = Repository(
                engine, bundles, settings.default_model, settings.body_timeout_s, settings.defaults_of
            )
            repository.load_all()
            app = create_app(settings, repository, engine, metrics)
            if settings.http_workers == 1:
                run_server(app, settings, engine, listeners[0])
            elif status := run_with_workers(
                app, settings, repository, engine, listeners=listeners, log_format=LOG_FORMAT
            ):
                raise typer.Exit(status)
