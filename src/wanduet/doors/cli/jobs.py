"""The command line of the server: `wanduet serve`, `ui`, `jobs list|show|cancel|rm|adopt`, `keys add|list|rm`."""

import sys
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Group, Parameter

from wanduet.config import EngineConfig, parse_bytes
from wanduet.doors.cli.cluster import ClusterFlags, cluster_app
from wanduet.doors.cli.help import SERVE
from wanduet.doors.cli.job_list import describe, for_people, show_jobs
from wanduet.doors.cli.options import EngineFlags, lora_folder
from wanduet.doors.cli.run import emit, extra
from wanduet.doors.cli.webhooks import WebhookFlags
from wanduet.errors import ConfigError

if TYPE_CHECKING:
    from wanduet.doors.http.context import ServerSettings
    from wanduet.doors.http.keys import KeyRing
    from wanduet.jobs.runner import RunnerSettings
    from wanduet.jobs.store import JobStore

Json = Annotated[bool, Parameter(name="--json", help="Print one JSON object on stdout.", negative="")]
DataDir = Annotated[Path | None, Parameter(help="Folder of jobs, videos and caches.")]
Database = Annotated[str | None, Parameter(help="Address of the job store. Default: SQLite in the data folder.")]
JobStatus = Literal["queued", "in_progress", "completed", "failed"]
SERVER = Group("Server", sort_key=0)
DAY = 86400.0

jobs_app = App(name="jobs", help="List and manage the jobs of this data folder.", group=SERVE)
keys_app = App(name="keys", help="Manage the API keys of the server.", group=SERVE)


@Parameter(name="*", group=SERVER)
@dataclass(frozen=True, slots=True)
class ServerFlags(WebhookFlags):
    """Flags of the server: its address, limits and storage."""

    host: Annotated[
        str, Parameter(help="Address to listen on. Any but this machine's own needs a key: wanduet keys add.")
    ] = "127.0.0.1"
    port: Annotated[int, Parameter(help="Port to listen on; 0 picks a free one.")] = 8000
    allowed_host: Annotated[
        tuple[str, ...], Parameter(help="A name by which others reach the server.", negative="")
    ] = ()
    allowed_origin: Annotated[tuple[str, ...], Parameter(help="A page that may write here.", negative="")] = ()
    page: Annotated[bool, Parameter(help="Serve the web page at /.")] = True
    parallel: Annotated[
        int, Parameter(help="Number of jobs that are worked on at the same time, each in another stage.")
    ] = 2
    checkpoint_seconds: Annotated[float, Parameter(help="How often denoising is saved, in seconds.")] = 15.0
    max_crashes: Annotated[int, Parameter(help="Give a job up after so many crashes at the same place.")] = 3
    hang_seconds: Annotated[
        float, Parameter(help="Replace a worker that makes no step for so many seconds; later where steps are long.")
    ] = 600.0
    max_queue: Annotated[int, Parameter(help="Most jobs that wait or run.")] = 1000
    max_queue_per_key: Annotated[int, Parameter(help="Most jobs of one key that wait or run.")] = 100
    max_pixels: Annotated[int, Parameter(help="Largest size of a video, height times width.")] = 1920 * 1088
    max_frames: Annotated[int, Parameter(help="Longest video.")] = 401
    max_steps: Annotated[int, Parameter(help="Most denoising steps.")] = 200
    max_input_video: Annotated[str, Parameter(help="Largest file of a video to start from, for example 1GiB.")] = (
        "256MiB"
    )
    lora_dir: Annotated[
        Path | None, Parameter(help="Folder of the LoRA that requests may name. Default: loras in the data folder.")
    ] = None
    retention_days: Annotated[float | None, Parameter(help="Delete finished videos after so many days.")] = None
    disk_limit: Annotated[
        str | None, Parameter(help="Delete the oldest videos when all take more than this, for example 50GiB.")
    ] = None
    log_prompts: Annotated[bool, Parameter(help="Write prompts to the log.")] = False
    database_url: Database = None

    def server(self) -> "ServerSettings":
        """Return the HTTP server's settings. Raises ConfigError."""
        from wanduet.doors.http.context import ServerSettings
        from wanduet.doors.http.schemas import RequestLimits
        from wanduet.jobs.records import Limits

        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port={self.port} is no port.", hint="0 to 65535.")
        return ServerSettings(
            host=self.host,
            port=self.port,
            allowed_hosts=self.allowed_host,
            allowed_origins=self.allowed_origin,
            queue=Limits(self.max_queue, self.max_queue_per_key),
            limits=RequestLimits(pixels=self.max_pixels, frames=self.max_frames, steps=self.max_steps),
            max_input_bytes=parse_bytes(self.max_input_video),
            webhooks=self.webhooks(),
        )

    def runner(self) -> "RunnerSettings":
        """Return the worker's settings. Raises ConfigError."""
        from wanduet.jobs.keeper import AttemptSettings
        from wanduet.jobs.runner import RunnerSettings
        from wanduet.jobs.watchdog import HangSettings

        if self.parallel < 1:
            raise ConfigError(f"parallel={self.parallel}: at least one job must run.")
        if self.max_crashes < 1:
            raise ConfigError(f"max_crashes={self.max_crashes}: one crash is the least.")
        if self.hang_seconds <= 0:
            raise ConfigError(f"hang_seconds={self.hang_seconds}: more than nothing.")
        return RunnerSettings(
            parallel=self.parallel,
            hangs=HangSettings(step_seconds=self.hang_seconds, phase_seconds=3 * self.hang_seconds),
            max_bytes=None if self.disk_limit is None else parse_bytes(self.disk_limit),
            attempt=AttemptSettings(max_crashes=self.max_crashes, log_prompts=self.log_prompts),
        )


OURS, ENGINE, ALONE = ServerFlags(), EngineFlags(), ClusterFlags()


def serve(*, server: ServerFlags = OURS, engine: EngineFlags = ENGINE, cluster: ClusterFlags = ALONE) -> None:
    """Serve the OpenAI videos protocol, and the web page at /, until it is stopped.

    ```sh
    wanduet serve --model miniature
    wanduet serve --host 0.0.0.0 --allowed-host videos.example.org
    ```
    """
    _run(server, engine.config(), cluster, browser=None)


def ui(
    *,
    server: ServerFlags = OURS,
    engine: EngineFlags = ENGINE,
    browser: Annotated[bool, Parameter(help="Open the page.")] = True,
) -> None:
    """Open the web page: the same server, with a browser.

    ```sh
    wanduet ui --model miniature
    ```
    """
    if not server.page:
        raise ConfigError("`wanduet ui --no-page` leaves nothing to open.", hint="Use `wanduet serve --no-page`.")
    _run(server, engine.config(), ALONE, browser=browser)


def _run(flags: ServerFlags, config: EngineConfig, cluster: ClusterFlags, *, browser: bool | None) -> None:
    """Run the server. `browser`: open the page; None: nobody waits for it, so a model that is missing is fetched at once."""
    with extra("server"):
        from wanduet.doors.http import server as http_server
    from wanduet.doors.http.security import check_bind
    from wanduet.family.registry import RANDOM_SPECS
    from wanduet.jobs.worker import WorkerSettings
    from wanduet.weights.hub import open_model

    settings, runner = flags.server(), flags.runner()
    loras = lora_folder(flags.lora_dir, config)
    config = replace(config, checkpoint_seconds=max(0.0, flags.checkpoint_seconds), lora_dir=loras)
    database_url = flags.database_url
    check_bind(settings.host, bool(_keys(config.data_folder).records()))
    if cluster == ALONE:  # refuse another folder's database before slow downloads and imports
        with _store(config.data_folder, database_url):
            pass
    page = None
    if flags.page:
        from wanduet.doors.page.first_run import is_missing, wait_for_model
        from wanduet.doors.page.routes import mount_page

        page = mount_page
    if config.model in RANDOM_SPECS:
        spec = RANDOM_SPECS[config.model]
    else:
        if page is not None and cluster == ALONE and is_missing(config):
            offer = "Fetch it, or try the miniature, at" if browser is not None else "It is fetched now; how far it is:"
            text = f"{config.model} is not on this machine yet. {offer}"
            ask = partial(_announce, text, " (page)", browser=browser)
            waited = wait_for_model(config, settings, database_url, ask, fetch=browser is None)
            if waited is None:
                return
            (config, settings), browser = waited, False  # the browser has the page already
        folder = open_model(config.model, config.revision, files=config.files)
        spec, settings = folder.spec, replace(settings, model_hash=folder.fingerprint)
    # A single worker that takes its devices and attention by default, as `wanduet price` does.
    usual = cluster == ALONE and config.attention == "auto" and config.devices is None
    settings = replace(settings, chooses_attention=usual)

    announce = partial(
        _announce, f"wanduet serves {spec.name} at", " (page and API)" if page else "/v1", browser=browser
    )
    retention = None if flags.retention_days is None else flags.retention_days * DAY
    on_cluster = cluster.settings(config, runner, retention, database_url)
    http_server.serve(
        on_cluster or WorkerSettings(config, runner, retention),
        spec,
        settings,
        database_url=database_url,
        page=page,
        announce=announce,
    )


def _announce(before: str, after: str, url: str, *, browser: bool | None) -> None:
    print(f"{before} {url}{after}", flush=True)
    if sys.stderr.isatty():  # if not a terminal, standard error is a log of JSON lines
        print("Ctrl-C ends it: running jobs are kept and go on at the next start.", file=sys.stderr, flush=True)
    if browser:
        import webbrowser

        webbrowser.open(url)


@jobs_app.command(name="list")
def list_jobs(
    *,
    status: Annotated[JobStatus | None, Parameter(help="Only these.")] = None,
    limit: Annotated[int, Parameter(help="At most so many, 100 at most.")] = 20,
    after: Annotated[str | None, Parameter(help="The last id of the page before.")] = None,
    data_dir: DataDir = None,
    database_url: Database = None,
    json_: Json = False,
) -> None:
    """Jobs, newest first."""
    if not 1 <= limit <= 100:
        raise ConfigError(f"limit={limit}: from 1 to 100.", hint="--after goes on from the last id.")
    with _store(data_dir, database_url) as store:
        page = store.list(limit=limit, after=after, status=status)
    if json_:
        emit({"jobs": [describe(job) for job in page.jobs], "has_more": page.has_more}, as_json=True)
    else:
        show_jobs(page)


@jobs_app.command
def show(job: str, *, data_dir: DataDir = None, database_url: Database = None, json_: Json = False) -> None:
    """Everything about a job."""
    with _store(data_dir, database_url) as store:
        found = store.get(job)
        paths = [str(path) for file in found.files if (path := store.files.path(file.name)) is not None]
    about = {**describe(found), "files": paths, "report": found.report}
    emit(about if json_ else for_people(about), json_)


@jobs_app.command
def cancel(job: str, *, data_dir: DataDir = None, database_url: Database = None, json_: Json = False) -> None:
    """Stop a job that waits or runs; a finished one stays as it is."""
    with _store(data_dir, database_url) as store:
        about = describe(store.cancel(job))
    emit(about if json_ else for_people(about), json_)


@jobs_app.command(name="rm")
def remove_job(*jobs: str, data_dir: DataDir = None, database_url: Database = None, json_: Json = False) -> None:
    """Delete jobs with their videos, in any state; none if one of them is not known."""
    if not jobs:
        raise ConfigError("Which jobs?", hint="wanduet jobs rm VIDEO_ID ...")
    with _store(data_dir, database_url) as store:
        found = dict.fromkeys(store.get(job).id for job in jobs)
        emit({"deleted": [store.delete(job).id for job in found]}, json_)


@jobs_app.command
def adopt(
    *,
    data_dir: DataDir = None,
    database_url: Database = None,
    storage: Annotated[
        str | None, Parameter(help="A cluster's --storage, which is given to the database, too.")
    ] = None,
    json_: Json = False,
) -> None:
    """Give the data folder to this database, whatever it belonged to. Videos of jobs that the database does not know
    go to the folder's trash, for seven days.
    """
    with extra("server"):
        from wanduet.cluster.files import open_files
        from wanduet.jobs.identity import take_over
        from wanduet.jobs.logs import configure_logs
        from wanduet.jobs.store import JobStore
    configure_logs()  # not on stdout
    files = open_files(_folder(data_dir), storage)
    url = database_url or files.default_url
    take_over(files, url)
    moved = 0
    with closing(JobStore(files, url)) as store:
        while (found := store.sweep(unknown_too=True)) or store.sweeping:
            moved += found
    emit({"data_folder": str(files.folder), "moved_to_trash": moved, "trash": str(files.folder / "trash")}, json_)


@keys_app.command
def add(
    name: str,
    *,
    operator: Annotated[bool, Parameter(help="Its /metrics are those of the whole server.", negative="")] = False,
    data_dir: DataDir = None,
    json_: Json = False,
) -> None:
    """Make a key. It is shown once; only its hash is kept."""
    keys = _keys(_folder(data_dir))
    key = keys.add(name, operator=operator)
    key_id = keys.owner(key)  # by the key: another process may have added one since
    if json_:
        emit({"id": key_id, "name": name, "key": key}, as_json=True)
    else:
        print(key)
        print(f"The key of {name!r} (id {key_id}). It cannot be shown again.", file=sys.stderr)


@keys_app.command(name="list")
def list_keys(*, data_dir: DataDir = None, json_: Json = False) -> None:
    """The keys' ids and names."""
    from wanduet.untrusted import printable

    records = _keys(_folder(data_dir)).records()
    if json_:
        emit({"keys": [{"id": record.id, "name": record.name} for record in records]}, as_json=True)
    for record in () if json_ else records:
        print(f"{record.id}  {printable(record.name)}")


@keys_app.command(name="rm")
def remove_key(key_id: str, *, data_dir: DataDir = None, json_: Json = False) -> None:
    """Revoke a key by its id, at once. Its jobs stay."""
    if not _keys(_folder(data_dir)).remove(key_id):
        raise ConfigError(f"There is no key {key_id!r}.", hint="`wanduet keys list` shows the ids.")
    emit({"removed": key_id}, json_)


def register(app: App) -> None:
    """Add these commands to `wanduet`."""
    app.command(serve, group=SERVE)
    app.command(ui, group=SERVE)
    app.command(jobs_app)
    app.command(keys_app)
    app.command(cluster_app)


def _store(data_dir: Path | None, url: str | None) -> "AbstractContextManager[JobStore]":
    with extra("server"):
        from wanduet.jobs.files import JobFiles
        from wanduet.jobs.store import JobStore
    return closing(JobStore(JobFiles(_folder(data_dir)), url))


def _keys(folder: Path) -> "KeyRing":
    from wanduet.doors.http.keys import KEYS_FILE, KeyRing

    return KeyRing(folder / KEYS_FILE)


def _folder(data_dir: Path | None) -> Path:
    return EngineConfig(data_dir=data_dir).data_folder
