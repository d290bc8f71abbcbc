import shutil
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest

from wanduet.errors import ModelNotFoundError, WeightsError
from wanduet.weights import published
from wanduet.weights.diffusers import ModelFolder
from wanduet.weights.hub import download, open_model, published_hashes, verify_manifest
from wanduet.weights.manifest import write_manifest
from wanduet.weights.published import PublishedFile, PublishedModel, unverified_weights

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
COMMIT, OLDER = "a" * 40, "b" * 40
NEEDED = 8


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    close_session()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_every_needed_file_is_fetched_checked_and_nothing_else(hub) -> None:
    done = download("some/model")
    assert done.folder.revision == COMMIT
    assert done.num_verified == NEEDED
    assert done.num_bytes == sum(len(data) for name, data in hub.files.items() if not name.endswith((".md", ".bin")))
    for name, data in hub.files.items():
        path = done.folder.path / name
        assert path.read_bytes() == data if not name.endswith((".md", ".bin")) else not path.exists()


def test_a_fetched_model_opens_without_a_request_also_offline(hub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = download("some/model").folder.path
    hub.requests.clear()
    assert open_model("some/model").path == path
    assert open_model("some/model", COMMIT).path == path
    assert hub.requests == []
    offline(monkeypatch)
    assert open_model("some/model").path == path
    again = download("some/model")
    assert (again.folder.path, again.num_verified) == (path, NEEDED)
    assert hub.requests == []


def test_offline_with_nothing_cached(hub, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch)
    for act in (open_model, download):
        with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE"):
            act("some/model")


def test_no_network_is_one_message(monkeypatch: pytest.MonkeyPatch, hub) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(ModelNotFoundError, match="cannot be fetched") as caught:
        open_model("foo/bar")
    assert "no folder foo/bar" in caught.value.message
    assert "miniature" in (caught.value.hint or "")


@pytest.mark.parametrize(("status", "words"), [(500, "refused"), (401, "refused"), (403, "refused")])
def test_a_hub_that_refuses(hub, status: int, words: str) -> None:
    hub.status = status
    with pytest.raises(ModelNotFoundError, match=words):
        download("some/model")


def test_a_model_or_a_revision_that_is_not_there(hub) -> None:
    with pytest.raises(ModelNotFoundError, match="no model 'some/gone'"):
        download("some/gone")
    with pytest.raises(ModelNotFoundError, match="no revision 'v9'"):
        download("some/model", "v9")


def test_the_revision_is_pinned(hub) -> None:
    assert download("some/model", OLDER).folder.revision == OLDER
    fetched = [request for request in hub.requests if "/resolve/" in request]
    assert fetched
    assert all(f"/resolve/{OLDER}/" in request for request in fetched)
    assert open_model("some/model", OLDER).path.name == OLDER
    assert open_model("some/model", COMMIT, fetch=True).path.name == COMMIT


def test_a_dropped_connection_goes_on_where_it_stopped(hub) -> None:
    hub.cut, hub.cuts = {WEIGHTS: 5000}, 2
    done = download("some/model")
    assert (done.folder.path / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    assert hub.sent[WEIGHTS] == len(hub.files[WEIGHTS])  # no byte was sent twice


def test_half_a_download_is_never_used(hub) -> None:
    hub.cut, hub.cuts = {WEIGHTS: 1000}, 1
    hub.status_after_cut = 503  # the hub goes away
    with pytest.raises(ModelNotFoundError):
        download("some/model")
    with pytest.raises(ModelNotFoundError, match="not in the cache"):
        open_model("some/model", fetch=False)
    hub.status = 200
    hub.status_after_cut = None
    folder = download("some/model").folder
    assert verify_manifest(folder, None) == NEEDED


def test_a_length_that_is_a_lie(hub) -> None:
    hub.length[WEIGHTS] = len(hub.files[WEIGHTS]) - 100  # the response ends early, and well formed
    with pytest.raises(ModelNotFoundError, match="cannot be fetched"):
        download("some/model")
    with pytest.raises(ModelNotFoundError):
        open_model("some/model", fetch=False)
    hub.length.clear()
    assert (download("some/model").folder.path / WEIGHTS).read_bytes() == hub.files[WEIGHTS]


@pytest.mark.parametrize("name", [WEIGHTS, "vae/config.json"])
def test_wrong_content_is_named_and_never_used(hub, name: str) -> None:
    data = bytearray(hub.files[name])
    data[-3] ^= 1
    hub.wrong[name] = bytes(data)
    with pytest.raises(WeightsError, match=name):
        download("some/model")
    with pytest.raises(ModelNotFoundError):
        open_model("some/model", fetch=False)


def test_wrong_content_once_is_fetched_again(hub, caplog: pytest.LogCaptureFixture) -> None:
    hub.wrong[WEIGHTS], hub.wrong_times = bytes(len(hub.files[WEIGHTS])), 1
    done = download("some/model")
    assert (done.folder.path / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    assert WEIGHTS in caplog.text


def test_a_file_damaged_in_the_cache_is_found_and_download_heals_it(hub) -> None:
    folder = download("some/model").folder
    blob = (folder.path / WEIGHTS).resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 128
    blob.write_bytes(data)
    with pytest.raises(WeightsError, match=WEIGHTS):
        verify_manifest(open_model("some/model"), None)
    assert verify_manifest(download("some/model").folder, None) == NEEDED


def test_a_file_cut_off_in_the_cache_is_fetched_again(hub) -> None:
    blob = (download("some/model").folder.path / WEIGHTS).resolve()
    blob.write_bytes(blob.read_bytes()[:-7])
    with pytest.raises(WeightsError, match="damaged"):
        open_model("some/model", fetch=False)
    assert (open_model("some/model").path / WEIGHTS).read_bytes() == hub.files[WEIGHTS]


@pytest.fixture
def without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows without its developer mode."""
    from huggingface_hub import file_download

    monkeypatch.setattr(file_download, "are_symlinks_supported", lambda *_: False)


def test_a_cache_of_copies_keeps_the_hashes_in_a_manifest(hub, without_links: None) -> None:
    folder = download("some/model").folder
    assert len(published_hashes(folder.path)) == NEEDED
    (folder.path / WEIGHTS).write_bytes(hub.files[WEIGHTS][:-1] + b"x")
    with pytest.raises(WeightsError, match=WEIGHTS):
        verify_manifest(folder, None)


def test_a_cache_of_copies_of_which_a_part_is_known_is_verified_whole(
    hub, without_links: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of somebody's own, with the published VAE beside it."""
    vae = {name: data for name, data in hub.files.items() if name.startswith("vae/")}
    files = {name: PublishedFile(len(data), sha256(data).hexdigest()) for name, data in vae.items()}
    known = PublishedModel("some/published", COMMIT, files)
    monkeypatch.setattr(published, "published_models", lambda: {known.model: known})
    folder = download("some/model").folder
    (folder.path / WEIGHTS).write_bytes(hub.files[WEIGHTS][:-1] + b"x")
    with pytest.raises(WeightsError, match=WEIGHTS):
        verify_manifest(folder, None)


def test_weights_of_which_nothing_is_known_are_told_until_they_are_checked(
    hub, without_links: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Another program has fetched them, into a cache of copies."""
    from huggingface_hub import snapshot_download

    snapshot_download("some/model")
    caplog.clear()
    folder = open_model("some/model")
    assert "The cache of some/model has no hashes of text_encoder/model.safetensors and 2 more" in caplog.text
    assert "wanduet download --model some/model" in caplog.text
    assert WEIGHTS in unverified_weights(folder.path)
    download("some/model")
    assert unverified_weights(folder.path) == []
    caplog.clear()
    open_model("some/model")
    assert caplog.text == ""


@pytest.mark.parametrize(
    "model", ["no-such-folder", "/no/such/folder", "a/b/c", "../x/y", "x" * 5000, "nul\0", "~nobody-here/x"]
)
def test_what_can_be_no_model_is_refused_without_a_network(model: str) -> None:
    with pytest.raises(ModelNotFoundError):
        open_model(model)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match="is no safetensors file, or damaged"):
        open_model(str(tmp_path / "model.safetensors"))


def test_a_disk_without_room_is_told_before_anything_is_fetched(hub, monkeypatch: pytest.MonkeyPatch) -> None:
    total = sum(len(data) for name, data in hub.files.items() if not name.endswith((".md", ".bin")))
    free = SimpleNamespace(total=0, used=0, free=total - 1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: free)
        with pytest.raises(ModelNotFoundError, match=r"needs 4[89] KiB more") as refused:
            download("some/model")
    assert "HF_HOME" in str(refused.value)
    assert set(hub.sent) <= {"model_index.json"}  # the few bytes that say which pipeline it is
    download("some/model")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=0, used=0, free=0))
    assert download("some/model").num_verified == NEEDED  # nothing is missing


def test_what_is_fetched_is_told_once(hub, caplog: pytest.LogCaptureFixture) -> None:
    open_model("some/model")
    assert "some/model is not here yet: fetching 4" in caplog.text
    caplog.clear()
    open_model("some/model")
    download("some/model")
    assert caplog.text == ""


def test_weights_that_belong_to_no_component_stay_on_the_hub(hub) -> None:
    hub.files |= {"wan_single_file.safetensors": b"x" * 999, "transformer_2/model.safetensors": b"x"}
    folder = download("some/model").folder.path
    assert not (folder / "wan_single_file.safetensors").exists()
    assert not (folder / "transformer_2").exists()


def test_parts_of_another_model_are_read_and_verified_there(folder: Path, tmp_path: Path) -> None:
    """A model of a transformer alone, with all else from `folder`."""
    own = tmp_path / "own"
    shutil.copytree(folder / "transformer", own / "transformer")
    for path in (folder, own):
        write_manifest(path)
    parts = {name: folder / name for name in ("vae", "text_encoder", "tokenizer")}
    model = ModelFolder(own, "own", parts=parts)
    model.check_complete()
    whole = ModelFolder(folder, "whole")
    assert (model.spec.vae, model.fingerprint, model.text_fingerprint) == (
        whole.spec.vae, whole.fingerprint, whole.text_fingerprint,
    )  # fmt: skip
    files = [name.split("/")[0] for name in published_hashes(folder)]
    assert verify_manifest(model, None) == sum(map(files.count, ("transformer", *parts)))
    assert verify_manifest(ModelFolder(own, "own", parts=parts), None, ("vae",)) == files.count("vae")
    with (folder / "vae" / "config.json").open("a") as file:
        file.write(" ")
    (folder / "transformer" / "config.json").write_text("{}")  # not a part of it
    for checked in ((), ("vae",)):
        with pytest.raises(WeightsError, match="vae"):
            verify_manifest(ModelFolder(own, "own", parts=parts), None, checked)
    verify_manifest(ModelFolder(own, "own", parts=parts), None, ("transformer", "tokenizer"))
    with pytest.raises(ModelNotFoundError, match="vae"):
        ModelFolder(own, "own", parts=parts | {"vae": tmp_path / "vae"})
