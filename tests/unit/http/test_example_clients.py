"""The clients in `examples` against a server at a socket."""

import runpy
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from api import CONTENT
from listening import WAIT, listening

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
@pytest.mark.parametrize("name", ["client", "openai_client"])
def test_an_example_submits_waits_and_downloads(
    name: str, make_api: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = make_api()

    submitted = threading.Event()
    submit = api.store.submit

    def noted(*given: Any) -> Any:
        done = submit(*given)
        submitted.set()
        return done

    def work() -> None:
        assert submitted.wait(WAIT)
        api.finish()

    monkeypatch.setattr(api.store, "submit", noted)

    monkeypatch.chdir(tmp_path)
    with listening(api) as server:
        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        monkeypatch.setattr("sys.argv", [name, f"http://127.0.0.1:{server.port}"])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        worker.join()
    assert (tmp_path / "client.mp4").read_bytes() == CONTENT
    (job,) = api.store.list().jobs
    assert job.request["seed"] == 7


def test_a_refusal_is_shown_in_the_servers_words(
    make_api: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = make_api()
    api.context.draining.set()
    monkeypatch.chdir(tmp_path)
    with listening(api) as server:
        monkeypatch.setattr("sys.argv", ["client", f"http://127.0.0.1:{server.port}"])
        with pytest.raises(SystemExit, match="shutting down"):
            runpy.run_path(str(EXAMPLES / "client.py"), run_name="__main__")


def test_an_address_without_a_server_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:  # bound, but not listening
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setattr("sys.argv", ["client", address])
        with pytest.raises(SystemExit, match=f"No server answers at {address}"):
            runpy.run_path(str(EXAMPLES / "client.py"), run_name="__main__")
