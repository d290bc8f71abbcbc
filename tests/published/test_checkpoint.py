"""The published Wan2.1-T2V-1.3B through everything that looks at a model before it computes with it."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoint import HASHES, MODEL, REVISION, SIZES, small_file, write_checkpoint

from wanduet.config import EngineConfig
from wanduet.doors.cli.commands import run_plan
from wanduet.doors.cli.fetch import run_download
from wanduet.engine import tools
from wanduet.errors import ModelNotFoundError, WeightsError
from wanduet.family.wan21 import WAN_1_3B
from wanduet.models.dit.model import WanTransformer
from wanduet.models.vae.model import WanVAE
from wanduet.request import GenerationRequest
from wanduet.runtime.models import Models
from wanduet.runtime.text_host import check_shapes
from wanduet.weights import hub as hub_models
from wanduet.weights import manifest
from wanduet.weights.hub import local_model, open_model, verify_manifest
from wanduet.weights.published import published_hashes, published_models

VERIFIED = {name: digest for name, digest in HASHES.items() if "/" in name and not name.startswith("scheduler/")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("published") / "Wan2.1-T2V-1.3B-Diffusers")


@pytest.fixture
def cached(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same as the hub's cache keeps it, with no network: a folder of links to files named by their hashes."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    root = tmp_path / "hub" / f"models--{MODEL.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(REVISION)
    (root / "blobs").mkdir()
    for name, digest in HASHES.items():
        link = root / "snapshots" / REVISION / name
        link.parent.mkdir(parents=True, exist_ok=True)
        (root / "blobs" / digest).hardlink_to(folder / name)
        link.symlink_to(root / "blobs" / digest)
    return root / "snapshots" / REVISION


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are hashed. Their holes are taken for what was published; 27 GiB are not read."""
    names: list[str] = []
    by_size = {size: HASHES[name] for name, size in SIZES.items()}

    def digest(path: Path, algorithm: str, start: bytes = b"", count=None) -> str:
        size = path.stat().st_size
        names.append(path.name)
        if count is not None:
            count(size)
        return by_size.get(size, "0" * 64)

    monkeypatch.setattr(manifest, "_hash", digest)
    return names


def test_what_wanduet_knows_by_heart_is_what_was_published() -> None:
    known = published_models()[MODEL]
    assert known.revision == REVISION
    assert {name: (file.num_bytes, file.sha256) for name, file in known.files.items()} == {
        name: (SIZES[name], HASHES[name]) for name in SIZES
    }


def test_shapes_and_defaults_are_the_built_in_ones(folder: Path) -> None:
    spec = local_model(str(folder)).spec
    assert (spec.transformer, spec.vae, spec.text_encoder) == (
        WAN_1_3B.transformer,
        WAN_1_3B.vae,
        WAN_1_3B.text_encoder,
    )
    assert spec.defaults == WAN_1_3B.defaults


def test_every_tensor_has_its_place_on_the_meta_device(folder: Path) -> None:
    model = local_model(str(folder))
    with torch.device("meta"):
        transformer, vae = WanTransformer(model.spec.transformer), WanVAE(model.spec.vae)
    for files, module in ((model.transformer, transformer), (model.vae, vae)):
        files.check({name: tuple(p.shape) for name, p in module.named_parameters()})
        assert {info.dtype for info in files.tensors.values()} == {"F32"}
    check_shapes(model)


def test_the_plan_is_that_of_the_true_shapes(folder: Path, tmp_path: Path) -> None:
    request = GenerationRequest.parse(prompt="a cat")
    plans = [
        run_plan(request, EngineConfig(model=model, data_dir=tmp_path), "1x24GiB")
        for model in (str(folder), "random:1.3b")
    ]
    assert plans[0]["fits"]
    assert plans[0]["devices"] == plans[1]["devices"]
    assert plans[0]["host_bytes"] >= plans[1]["host_bytes"]


def test_doctor_finds_it_whole_in_the_cache(cached: Path, hashed: list[str], tmp_path: Path) -> None:
    found = tools.doctor(EngineConfig(model=MODEL, data_dir=tmp_path))["model"]
    assert (found["found"], found["whole"], found["revision"]) == (True, True, REVISION)
    assert len(hashed) == len(HASHES)


def test_doctor_shows_how_far_the_hashing_is(folder: Path, hashed: list[str], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    tools.doctor(EngineConfig(model=str(folder), data_dir=tmp_path), lambda *at: seen.append(at))
    assert seen[-1] == (sum(SIZES[name] for name in VERIFIED),) * 2


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "tokenizer"])
def test_a_part_of_a_model_and_a_folder_of_models_are_answered_with_the_model(folder: Path, part: str) -> None:
    for name, words in ((folder / part, "It is a part of a model"), (folder.parent, "There is one in it")):
        with pytest.raises(ModelNotFoundError, match="is no model") as caught:
            local_model(str(name))
        assert caught.value.hint == f"{words}{'; give the whole' if name != folder.parent else ''}: --model {folder}"


def test_what_was_verified_once_is_not_hashed_again(cached: Path, hashed: list[str], tmp_path: Path) -> None:
    config = EngineConfig(model=MODEL, data_dir=tmp_path)
    done = run_download(config)  # offline: the cache is checked
    assert (done["files_verified"], done["bytes"], done["revision"]) == (len(HASHES), sum(SIZES.values()), REVISION)
    assert sorted(hashed) == sorted(Path(name).name for name in HASHES)
    hashed.clear()
    models = Models(config)
    assert models.folder is not None
    assert verify_manifest(models.folder, tmp_path / "verified.json") == 0
    run_download(config)
    assert hashed == []


def test_hashing_shows_how_far_it_is(folder: Path, hashed: list[str]) -> None:
    seen: list[tuple[int, int]] = []
    verify_manifest(local_model(str(folder)), None, (), lambda done, total: seen.append((done, total)))
    assert {total for _, total in seen} == {sum(SIZES[name] for name in VERIFIED)}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]


def test_a_folder_that_was_copied_is_verified_against_what_was_published(folder: Path) -> None:
    assert published_hashes(folder) == VERIFIED


def test_weights_of_ones_own_beside_published_ones_are_not_compared(folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(folder, mine, copy_function=lambda source, target: Path(target).hardlink_to(source))
    config = mine / "transformer" / "config.json"
    saved = json.loads(config.read_text()) | {"_diffusers_version": "0.42.1"}
    config.unlink()
    config.write_text(json.dumps(saved))
    assert {name.partition("/")[0] for name in published_hashes(mine)} == {"vae", "text_encoder", "tokenizer"}


def test_a_copied_folder_with_a_damaged_file_never_runs(folder: Path, hashed: list[str], tmp_path: Path) -> None:
    damaged = "vae/diffusion_pytorch_model.safetensors"
    by_size = manifest._hash
    manifest._hash = lambda path, *rest: "0" * 64 if path.match(damaged) else by_size(path, *rest)  # undone by `hashed`
    with pytest.raises(WeightsError, match=r"vae.diffusion_pytorch_model\.safetensors is damaged") as caught:
        verify_manifest(local_model(str(folder)), tmp_path / "verified.json")
    assert "--trust" in (caught.value.hint or "")


def test_a_missing_shard_is_named_also_offline(cached: Path) -> None:
    shard = "model-00003-of-00005.safetensors"
    (cached / "text_encoder" / shard).unlink()
    for act in (lambda: open_model(MODEL, fetch=False), lambda: open_model(MODEL), lambda: hub_models.download(MODEL)):
        with pytest.raises(ModelNotFoundError, match=f"Not all of .*{shard}") as caught:
            act()
        assert f"wanduet download --model {MODEL}" in (caught.value.hint or "")


def test_what_git_leaves_without_lfs_is_named(folder: Path, tmp_path: Path) -> None:
    for name in ("transformer/diffusion_pytorch_model-00001-of-00002.safetensors", "tokenizer/tokenizer.json"):
        clone = tmp_path / name.partition("/")[0] / "clone"
        shutil.copytree(folder, clone, copy_function=lambda source, target: Path(target).hardlink_to(source))
        (clone / name).unlink()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{HASHES[name]}\nsize {SIZES[name]}\n"
        (clone / name).write_text(pointer)
        with pytest.raises(WeightsError, match=f"{Path(name).name} is a Git LFS pointer") as caught:
            open_model(str(clone))
        assert "git lfs pull" in (caught.value.hint or "")


def test_a_text_encoder_that_is_a_pickle_is_refused_before_anything_is_loaded(folder: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(folder, clone, copy_function=lambda source, target: Path(target).hardlink_to(source))
    for path in (clone / "text_encoder").glob("model*"):
        path.unlink()
    (clone / "text_encoder" / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(ModelNotFoundError, match=r"text_encoder lacks .*pytorch_model\.bin is a pickle"):
        open_model(str(clone))


def test_a_missing_tokenizer_is_told_before_gigabytes_are_hashed(folder: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(folder, clone, copy_function=lambda source, target: Path(target).hardlink_to(source))
    (clone / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ModelNotFoundError, match=r"tokenizer lacks tokenizer\.json"):
        open_model(str(clone))


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("model_index.json", {"_class_name": "WanVACEPipeline"}, "is a WanVACEPipeline"),
        ("transformer/config.json", {"_class_name": "WanVACETransformer3DModel"}, "is a WanVACETransformer3DModel"),
        ("vae/config.json", {"_class_name": "AutoencoderKL"}, "is a AutoencoderKL"),
        ("text_encoder/config.json", {"architectures": ["T5EncoderModel"]}, "is a T5EncoderModel"),
    ],
)
def test_another_member_of_the_family_is_called_by_its_name(
    folder: Path, tmp_path: Path, file: str, values: dict[str, object], words: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other, copy_function=lambda source, target: Path(target).hardlink_to(source))
    config = json.loads((other / file).read_text()) | values
    (other / file).unlink()
    (other / file).write_text(json.dumps(config))
    with pytest.raises(ModelNotFoundError, match=words):
        open_model(str(other))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        (f"https://huggingface.co/{MODEL}", f"--model {MODEL}"),
        (f"https://huggingface.co/{MODEL}/tree/main", f"--model {MODEL}"),
        (f"huggingface.co/{MODEL}", f"--model {MODEL}"),
        ("Wan2.1-T2V-1.3B-Diffusers", f"--model {MODEL}"),
        ("Wan2.1-T2V-1.3B", f"--model {MODEL}"),
        ("wan2.1-t2v-1.3b", f"--model {MODEL}"),
        ("miniatur", "--model miniature"),
        ("random:1.3", "--model random:1.3b"),
    ],
)
def test_a_name_that_is_nearly_right_is_answered_with_the_right_one(name: str, hint: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        local_model(name)
    assert (caught.value.hint or "").endswith((hint, f"{hint}?"))


def test_a_folder_of_the_hubs_cache_is_answered_with_its_id(cached: Path) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        local_model(str(cached.parent.parent))
    assert (caught.value.hint or "").endswith(f"--model {MODEL}")


def test_the_official_layout_on_disk_is_named(tmp_path: Path) -> None:
    official = tmp_path / "Wan2.1-T2V-1.3B"
    official.mkdir()
    for name in ("Wan2.1_VAE.pth", "diffusion_pytorch_model.safetensors", "config.json"):
        (official / name).write_bytes(b"{}")
    with pytest.raises(ModelNotFoundError) as caught:
        local_model(str(official))
    assert MODEL in (caught.value.hint or "")


def test_the_official_id_is_looked_up_in_the_cache(cached: Path) -> None:
    official = MODEL.removesuffix("-Diffusers")
    found = open_model(official, fetch=False)  # the same weights are there in another form
    assert (found.path, found.name, found.revision) == (cached, official, None)
    with pytest.raises(ModelNotFoundError, match=f"{official} is not in the cache"):
        hub_models.download(official)


class _Api:
    """The hub's answers about two repositories: the published one, and Wan's own with .pth files."""

    def model_info(self, model: str, **_: object) -> SimpleNamespace:
        names = SIZES if model == MODEL else {"config.json": 250, "Wan2.1_VAE.pth": 507609880, "README.md": 9}
        siblings = [SimpleNamespace(rfilename=n, size=s, lfs=None, blob_id=None) for n, s in names.items()]
        return SimpleNamespace(siblings=siblings, sha=REVISION)


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A hub that tells its lists; the names of the files that were fetched from it."""
    import huggingface_hub
    from huggingface_hub import constants

    fetched: list[str] = []

    def fetch(model: str, name: str, **_: object) -> str:
        fetched.append(name)
        (tmp_path / name).write_bytes(small_file(name))
        return str(tmp_path / name)

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub, "HfApi", _Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: fetched.append("everything"))
    return fetched


def test_of_the_official_repository_only_the_needed_files_count(
    listed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=0, used=0, free=1))
    with pytest.raises(ModelNotFoundError, match=r"Wan2\.1-T2V-1\.3B needs 484 MiB more"):
        hub_models.download(MODEL.removesuffix("-Diffusers"))
    assert listed == []


def test_another_official_repository_is_refused_by_the_hubs_list_alone(listed: list[str]) -> None:
    with pytest.raises(ModelNotFoundError, match=r"official layout, of which wanduet reads Wan-AI/Wan2\.1-T2V-1\.3B"):
        hub_models.download("Wan-AI/Wan2.1-I2V-14B-480P")
    assert listed == []


def test_a_disk_that_is_too_small_is_refused_by_the_hubs_list_alone(
    listed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=0, used=0, free=20 * 2**30))
    with pytest.raises(ModelNotFoundError, match=r"needs 26\.94 GiB more in .*, which has 20\.00 GiB free"):
        hub_models.download(MODEL)
    assert listed == ["model_index.json"]


def test_a_first_job_shows_the_hashing_and_a_cancel_ends_it(cached: Path, hashed: list[str], tmp_path: Path) -> None:
    from wanduet.engine.job import Job, OutputOptions
    from wanduet.errors import CancelledError

    models = Models(EngineConfig(model=MODEL, data_dir=tmp_path))
    plan = SimpleNamespace(strategy="single")
    job = Job(GenerationRequest.parse(prompt="a cat").resolve(models.spec), plan, OutputOptions(tmp_path / "a.mp4"))
    models.checkpoint.verify(job.context)
    job.fail(CancelledError("over"))
    events = [event for event in job.events() if event.phase == "verify"]
    assert (events[-1].done, events[-1].total) == (sum(SIZES.values()) // 2**20,) * 2
    again = Models(EngineConfig(model=MODEL, data_dir=tmp_path / "other"))
    job = Job(GenerationRequest.parse(prompt="a cat").resolve(models.spec), plan, OutputOptions(tmp_path / "a.mp4"))
    job.cancel()
    with pytest.raises(CancelledError):
        again.checkpoint.verify(job.context)
