"""Softmax attention backends with one signature: q, k, v `[B, L, H, D]` and an `AttentionCall` in, `[B, L, H, D]` out.

The number of keys and values may differ from that of queries. Inputs may be strided views with contiguous channels of a
head. `attend_with_lse` also returns the natural logarithm of each query's sum of exponentials, `[B, H, L]` float32, by
which partial results over parts of the keys are merged.

The backends call their kernels directly, because PyTorch's `sdpa_kernel` switch is global to the process, and another
thread (the VAE's) may compute attention at the same time. `wanduet.kernels.attention.choose` chooses a backend by
measurement.
"""

import importlib.util
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from wanduet.kernels.attention import flash4
from wanduet.kernels.attention.call import AttentionCall

AttentionFn: TypeAlias = Callable[[Tensor, Tensor, Tensor, AttentionCall], Tensor]
AttentionLseFn: TypeAlias = Callable[[Tensor, Tensor, Tensor, AttentionCall], tuple[Tensor, Tensor]]

# Queries in a chunk of the plain form: its float32 scores stay below 64 MB with 4096 keys and 4 heads.
PLAIN_CHUNK = 1024


@dataclass(frozen=True, slots=True)
class Backend:
    """One implementation of attention. `exact`: its result differs from the definition by rounding only."""

    name: str
    attend: AttentionFn
    attend_with_lse: AttentionLseFn | None
    exact: bool = True
    package: str | None = None  # the distribution that contains it; None: torch
    capability: tuple[int, int] | None = None  # of supported GPUs; None: all
    triton_from: tuple[int, int] | None = None  # written in Triton, for GPUs of at least this capability

    @property
    def version(self) -> str:
        """Version of its package; part of the key of a stored measurement."""
        return torch.__version__ if self.package is None else version(self.package)


def sdpa(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall | None = None) -> Tensor:
    """Attention by PyTorch's choice of kernel, on any device, in any dtype; the reference for all other backends."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def plain_with_lse(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall | None = None) -> tuple[Tensor, Tensor]:
    """Return attention by its definition in float32, and its log-sum-exp; computes a chunk of queries at a time."""
    k_BHDL, v_BHLD = k.permute(0, 2, 3, 1).float(), v.transpose(1, 2).float()
    outs, lses = [], []
    for q_chunk in q.split(PLAIN_CHUNK, dim=1):
        scores = q_chunk.transpose(1, 2).float() @ k_BHDL * q.shape[-1] ** -0.5
        lses.append(scores.logsumexp(dim=-1))
        outs.append((scores.softmax(dim=-1) @ v_BHLD).to(q.dtype).transpose(1, 2))
    return torch.cat(outs, dim=1), torch.cat(lses, dim=2)


def _sdpa_cudnn(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, lse: bool = True) -> tuple[Tensor, Tensor]:
    out, sums, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, lse
    )
    return out.transpose(1, 2), sums.flatten(2) if lse else sums  # [B, H, L, 1]


def _sdpa_flash(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
    out, sums, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    )
    return out.transpose(1, 2), sums


def _sdpa_efficient(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, lse: bool = True) -> tuple[Tensor, Tensor]:
    out, sums, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, lse
    )
    return out.transpose(1, 2), sums[..., : q.shape[1]]  # padded to a multiple of 32


def _sage(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    from sageattention import sageattn

    with torch.cuda.device(q.device):
        out: Tensor = sageattn(q, k, v, tensor_layout="NHD")
    return out


def coded_channels(name: str, head_dim: int) -> int:
    """Return how many of a head's channels the backend `name` writes as 8-bit codes of queries and keys; often 0."""
    return {"int8": max(32, head_dim // 2), "int8-fast": head_dim}.get(name, 0)


def _int8(name: str) -> Backend:
    """Return a backend with 8-bit scores."""

    def attend(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
        from wanduet.kernels.attention import int8

        return int8.attend(q, k, v, coded_channels(name, q.shape[-1]))

    return Backend(name, lambda *given: attend(*given)[0], attend, exact=False, triton_from=(8, 0))


def _flash4(name: str, attend: AttentionLseFn, capability: tuple[int, int] | None = None) -> Backend:
    """Return a backend of flash-attn-4.

    One kernel serves with and without log-sum-exps: these cost nothing, while another kernel takes seconds to compile.
    """
    return Backend(
        name, lambda q, k, v, call: attend(q, k, v, call)[0], attend, package="flash-attn-4", capability=capability
    )


SDPA = Backend("sdpa", sdpa, plain_with_lse)
BACKENDS: tuple[Backend, ...] = (
    SDPA,
    Backend("sdpa_cudnn", lambda q, k, v, call: _sdpa_cudnn(q, k, v, call, lse=False)[0], _sdpa_cudnn),
    Backend("sdpa_flash", lambda q, k, v, call: _sdpa_flash(q, k, v, call)[0], _sdpa_flash),
    Backend("sdpa_efficient", lambda q, k, v, call: _sdpa_efficient(q, k, v, call, lse=False)[0], _sdpa_efficient),
    _flash4("flash-attn-4", flash4.attend),
    _flash4("flash-attn-4-steady", flash4.attend_steady, capability=(9, 0)),
    _int8("int8"),  # half of a head's channels
    _int8("int8-fast"),  # all of them: a larger error
    Backend("sageattention", _sage, None, exact=False, package="sageattention"),
)


MODULES = {"flash-attn-4": "flash_attn.cute", "sageattention": "sageattention"}


def import_backends(device: torch.device, prefer: str, kernels_folder: Path) -> None:
    """Import the libraries that `choose_attention` will try. Some take ten seconds, which can overlap with other work.

    `kernels_folder`: where the libraries cache compiled kernels. Import errors are ignored here; the check reports
    them.
    """
    if device.type != "cuda":
        return
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(kernels_folder))
    os.environ.setdefault("QUACK_CACHE_DIR", str(kernels_folder / "quack"))  # flash-attn-4 uses quack
    for backend in available_backends(device).values():
        tried = backend.exact if prefer == "auto" else backend.name == prefer
        if tried and backend.package is not None:
            with suppress(Exception):
                importlib.import_module(MODULES[backend.package])


def available_backends(device: torch.device) -> dict[str, Backend]:
    """Return the backends that could run on `device`, by name. A listed backend may still fail there."""
    if device.type != "cuda":
        return {SDPA.name: SDPA}
    capability = torch.cuda.get_device_capability(device)
    has_triton = importlib.util.find_spec("triton") is not None
    return {
        b.name: b
        for b in BACKENDS
        if (b.package is None or _importable(MODULES[b.package], b.package))
        and (b.name != "sdpa_flash" or torch.backends.cuda.is_flash_attention_available())  # not built in on Windows
        and (b.capability is None or b.capability == capability)
        and (b.triton_from is None or (has_triton and b.triton_from <= capability))
    }


def caution_for(backend: Backend) -> str | None:
    """Return a known problem of a backend's installed release that its check cannot detect; None if there is none."""
    if backend.package != "sageattention" or not version(backend.package).startswith("1."):
        return None
    return (
        f"sageattention {version(backend.package)} adds up in 16 bits: with Wan models black videos were reported, which a "
        "check on random numbers does not show. Look at the first video; release 2.2 from its own repository is better."
    )


def _importable(module: str, package: str) -> bool:
    try:
        version(package)
        return importlib.util.find_spec(module) is not None
    except (PackageNotFoundError, ImportError):
        return False
