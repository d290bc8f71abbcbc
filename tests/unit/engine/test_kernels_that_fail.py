"""Kernels that pass their check and fail in the middle of a job: the plain form takes over, and the video is the same."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from wanduet.config import EngineConfig
from wanduet.engine.job import OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.errors import CancelledError
from wanduet.kernels import verdicts
from wanduet.kernels.dit.plain import TORCH_KERNELS
from wanduet.kernels.vae.plain import VAE_TORCH_KERNELS
from wanduet.media.read import frame_hashes, read_metadata
from wanduet.request import GenerationRequest
from wanduet.runtime import dit_host, vae_host

REQUEST = {"prompt": "a red circle", "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 3, "seed": 3}


class OutOfResourcesError(RuntimeError):
    """As Triton's."""


def failing(run: Callable, after: int, counts: list[int], also: Callable[[], object] = lambda: None) -> Callable:
    """`run`, which fails from its `after`-th call on."""

    def sometimes(*args, **options):
        counts[0] += 1
        if counts[0] > after:
            also()
            raise OutOfResourcesError(
                "out of resource: shared memory, Required: 122880, Hardware limit: 101376\nand more"
            )
        return run(*args, **options)

    return sometimes


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Make a video with sets of kernels; its hash and its metadata."""
    verdicts.forget()

    def run(name: str, transformer=TORCH_KERNELS, vae=VAE_TORCH_KERNELS, jobs: int = 1) -> list[tuple[str, dict]]:
        monkeypatch.setattr(dit_host, "kernels_for", lambda *rest: transformer)
        monkeypatch.setattr(vae_host, "vae_kernels_for", lambda *rest: vae)
        found = []
        with Engine(EngineConfig(model="miniature", devices="cpu", data_dir=tmp_path / "data")) as engine:
            for number in range(jobs):
                options = OutputOptions(tmp_path / f"{name}{number}.mkv", codec="ffv1")
                path = engine.submit(GenerationRequest(**REQUEST), options).result(120).videos[0].path
                found.append((frame_hashes(path).digest, read_metadata(path)))
        return found

    return run


@pytest.mark.parametrize(("operation", "after"), [("text_attention", 0), ("text_attention", 20), ("qk_norm_rope", 0)])
def test_a_kernel_of_the_transformer(made, operation: str, after: int) -> None:
    ((plain, _),) = made("plain")
    counts = [0]
    broken = replace(
        TORCH_KERNELS, name="triton", **{operation: failing(getattr(TORCH_KERNELS, operation), after, counts)}
    )
    (got, about), (second, later) = made("out", broken, jobs=2)
    assert got == second == plain
    (note,) = about["rungs"]
    assert note.startswith(
        f"denoise: plain {operation} (OutOfResourcesError: out of resource: shared memory, Required: 122880"
    )
    assert "and more" not in note
    assert later["rungs"] == []  # nor is it tried again
    assert counts == [after + 1]
    assert about["engine"]["kernels"] == f"triton without {operation}"


@pytest.mark.parametrize(("operation", "after"), [("causal_conv", 40), ("attend", 0), ("double_conv", 1)])
def test_a_kernel_of_the_vae(made, operation: str, after: int) -> None:
    ((plain, _),) = made("plain")
    run = failing(getattr(VAE_TORCH_KERNELS, operation), after, [0])
    (got, about), (second, _) = made("out", vae=replace(VAE_TORCH_KERNELS, name="triton", **{operation: run}), jobs=2)
    assert got == second == plain
    assert about["rungs"][0].startswith(f"decode: plain {operation} (OutOfResourcesError")
    assert about["engine"]["vae_kernels"] == f"triton without {operation}"


def test_two_kernels_one_after_the_other(made) -> None:
    ((plain, _),) = made("plain")
    forms = {name: failing(getattr(TORCH_KERNELS, name), 7, [0]) for name in ("qk_norm_rope", "residual_norm")}
    ((got, about),) = made("out", replace(TORCH_KERNELS, name="triton", **forms))
    assert got == plain
    assert {note.split()[2] for note in about["rungs"]} == {"qk_norm_rope", "residual_norm"}


def test_a_cancel_that_meets_a_kernel_that_fails(tmp_path, monkeypatch) -> None:
    verdicts.forget()
    jobs = []
    broken = failing(TORCH_KERNELS.text_attention, 20, [0], also=lambda: jobs[0].cancel())
    monkeypatch.setattr(
        dit_host, "kernels_for", lambda *rest: replace(TORCH_KERNELS, name="triton", text_attention=broken)
    )
    with Engine(EngineConfig(model="miniature", devices="cpu", data_dir=tmp_path / "data")) as engine:
        jobs.append(engine.submit(GenerationRequest(**REQUEST), OutputOptions(tmp_path / "out.mkv", codec="ffv1")))
        with pytest.raises(CancelledError):
            jobs[0].result(120)
