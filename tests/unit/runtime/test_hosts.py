"""Models on their devices: what must follow a move, and who may use a device."""

import gc
import threading
import weakref
from dataclasses import replace

import pytest
import torch

from wanduet.accelerate.host_memory import HostMemory
from wanduet.kernels.vae.gpu import VAE_TRITON_KERNELS
from wanduet.kernels.vae.plain import VAE_TORCH_KERNELS
from wanduet.planning.hardware import detect
from wanduet.planning.plan import Plan
from wanduet.planning.planner import make_plan
from wanduet.request import GenerationRequest, ResolvedRequest
from wanduet.runtime import dit_host, vae_host
from wanduet.runtime.context import NO_JOB
from wanduet.runtime.loaded import SWAPPED_OUT
from wanduet.runtime.models import Models


def test_a_moved_vae_gets_the_kernels_of_where_it_is(config, monkeypatch) -> None:
    asked: list[str] = []
    kernels = vae_host.vae_kernels_for
    monkeypatch.setattr(
        vae_host, "vae_kernels_for", lambda d, *rest: asked.append(d.type) or kernels(torch.device("cpu"), *rest)
    )
    models = Models(config)
    for device in ("cpu", "cpu", "meta"):  # meta stands for a GPU
        models.vae.load(device, "float32")
    assert asked == ["cpu", "meta"]


@pytest.mark.parametrize(("kernels", "asked"), [(VAE_TRITON_KERNELS, 1), (VAE_TORCH_KERNELS, 0)])
def test_tiles_are_chosen_where_triton_convolves(config, monkeypatch, kernels, asked) -> None:
    chosen = []
    monkeypatch.setattr(vae_host, "vae_kernels_for", lambda *_: kernels)
    monkeypatch.setattr(vae_host, "choose_tiles", lambda *args: chosen.append(args))
    models = Models(config)
    models.vae.load("cpu", "float32")
    vae, folder = models.spec.vae, config.data_folder / "measurements"
    outputs = {vae.base_dim * factor for factor in vae.dim_mult}
    assert chosen == asked * [(torch.device("cpu"), torch.float32, outputs, folder, config.tf32, True)]


def test_a_device_in_use_is_not_idle(config) -> None:
    models = Models(config)
    seen: list[bool] = []

    def look() -> None:
        with models.locks.if_idle("cpu") as idle:
            seen.append(idle)

    for held in (True, False):
        with models.locks.take("cpu" if held else "another"):
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()
    assert seen == [False, True]


@pytest.fixture
def streaming(config, tmp_path) -> tuple[Models, Plan, ResolvedRequest]:
    """A job that keeps two of the transformer's blocks on its device, and takes turns with the VAE."""
    models = Models(config)
    request = GenerationRequest(prompt="a red circle", height=32, width=48, num_frames=5).resolve(models.spec)
    plan = make_plan(request, models.memory, config, detect())
    return models, replace(plan, transformer=replace(plan.transformer, resident_blocks=2), both_resident=False), request


def test_what_blocks_wait_in_lives_as_long_as_they_wait(streaming, monkeypatch) -> None:
    """It unlocks its pages when it goes: copies from there would not run beside the computation any more."""
    models, plan, request = streaming
    made: list[weakref.ref[HostMemory]] = []

    class Noted(HostMemory):
        def allocate(self, size: int, dtype: torch.dtype) -> torch.Tensor:
            made.append(weakref.ref(self))
            return super().allocate(size, dtype)

    monkeypatch.setattr(dit_host, "HostMemory", Noted)
    with models.transformer.use(plan, request, NO_JOB) as denoiser:
        gc.collect()
        assert len(made) == models.spec.transformer.num_layers - 2
        assert all(memory() is denoiser.memory for memory in made)
        assert denoiser.memory.retains_copies


def test_a_transformer_that_made_room_runs_again(streaming) -> None:
    models, plan, request = streaming
    embeds = torch.zeros(1, models.spec.text_len, models.spec.transformer.text_dim)
    shape = models.spec.latent_shape(32, 48, 5)
    given = torch.randn(1, *shape), torch.full((1,), 500.0), embeds
    with models.transformer.use(plan, request, NO_JOB) as denoiser, torch.no_grad():
        expected = denoiser.transformer(*given)
    denoiser.swap_out()
    assert denoiser.resident_blocks == SWAPPED_OUT
    with models.transformer.use(plan, request, NO_JOB) as again, torch.no_grad():
        assert again.resident_blocks == 2
        assert torch.equal(again.transformer(*given), expected)
