"""All that the golden files need from inside the package: what no command, no `Engine` and no `WanPipeline` can show."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wanduet.accelerate.host_memory import HostMemory
from wanduet.accelerate.offload import stream_blocks
from wanduet.accelerate.packing import allocate_packed
from wanduet.doors.http.context import ServerSettings
from wanduet.doors.http.server import create_app
from wanduet.family.wan21 import WAN_1_3B
from wanduet.jobs.files import JobFiles
from wanduet.jobs.store import JobStore
from wanduet.kernels.attention.call import Step
from wanduet.models.dit.model import WanTransformer
from wanduet.models.vae.model import WanVAE
from wanduet.models.vae.rows import Tiling
from wanduet.models.vae.stream import decode_stream
from wanduet.sampling.denoise import denoise
from wanduet.sampling.guidance import Combination, SequentialGuidance
from wanduet.sampling.noise import initial_noise
from wanduet.sampling.samplers import Schedule, make_sampler
from wanduet.weights.hub import open_model
from wanduet.weights.names import MINIATURE

CPU = torch.device("cpu")


def openapi(folder: Path) -> dict[str, Any]:
    """The schema that a server of the 1.3B model publishes."""
    store = JobStore(JobFiles(folder))
    try:
        return create_app(store, WAN_1_3B, ServerSettings()).openapi()
    finally:
        store.close()


def load_transformer() -> WanTransformer:
    """The miniature's, float32 on the CPU."""
    model = open_model(MINIATURE)
    transformer = WanTransformer(model.spec.transformer).eval().requires_grad_(False)
    allocate_packed(transformer, CPU, torch.float32)
    model.transformer.load_into(dict(transformer.named_parameters()))
    return transformer


def load_vae() -> WanVAE:
    """The miniature's, float32 on the CPU."""
    model = open_model(MINIATURE)
    vae = WanVAE(model.spec.vae).eval().requires_grad_(False)
    model.vae.load_into(dict(vae.named_parameters()))
    return vae


def denoise_streamed(transformer: WanTransformer, num_resident: int) -> Tensor:
    """Three guided steps with that many resident blocks, the others copied in as on a small GPU. Latents `[1, 16, 2, 4, 6]`."""
    shape = (1, 16, 2, 4, 6)
    stream = stream_blocks(transformer, CPU, num_resident, HostMemory("plain"))
    try:
        rope = transformer.prepare_rope(shape, CPU)
        draw = torch.Generator().manual_seed(11)
        texts = [transformer.prepare_text(torch.randn(1, 12, 128, generator=draw)) for _ in range(2)]

        def predict(latents: Tensor, step: Step, texts: Any) -> list[Tensor]:
            with torch.no_grad():
                return transformer.forward_cfg(latents, torch.tensor([step.timestep]), texts, rope)

        sampler = make_sampler(Schedule("unipc", 3.0, 3), 0, CPU)
        return denoise(SequentialGuidance(predict, *texts, Combination(3.0)), initial_noise(shape, 11), sampler)
    finally:
        stream.close()


def decode_in_parts(vae: WanVAE, order: str, num_tiles: int) -> np.ndarray:
    """Frames `[9, 48, 24, 3]` uint8 of random latents, decoded frame by frame or strip by strip, in so many strips of rows."""
    latents = torch.randn(16, 3, 6, 3, generator=torch.Generator().manual_seed(12))
    plan = Tiling(order, num_tiles)  # type: ignore[arg-type]
    return np.concatenate([chunk.copy() for chunk in decode_stream(vae, latents, plan)])
