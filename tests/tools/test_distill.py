"""Distillation: paths lead where the teacher's many steps lead, and training writes a transformer that learns them."""

import argparse
import itertools
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tools.miniature import distill
from tools.miniature import folder as files
from tools.miniature.sample import denoise, read_model
from wanduet.family.distilled import FAST_MINIATURE
from wanduet.models.dit.model import WanTransformer
from wanduet.weights.diffusers import ModelFolder
from wanduet.weights.hub import verify_manifest

LEVELS = [*(timestep / 1000 for timestep in FAST_MINIATURE.timesteps), 0.0]


def curved(x: Tensor, level: float) -> Tensor:
    """A velocity whose paths are known: from x at level 1 to x * exp(level^2 - 1)."""
    return 2 * level * x


def test_the_teachers_path_is_followed() -> None:
    x = torch.randn(2, 1, 1, 2, 2, dtype=torch.float64)
    end = x
    for level, after in itertools.pairwise(LEVELS):
        end = distill.solve(end, level, after, curved, substeps=20)
    torch.testing.assert_close(end, x / math.e, rtol=2e-3, atol=0)


def test_mean_velocities_lead_from_point_to_point() -> None:
    noise = torch.randn(3, 1, 1, 2, 2)
    points, targets = distill.make_paths(noise, LEVELS, curved, curved, own=0.0)
    assert points.shape == targets.shape == (3, 4, 1, 1, 2, 2)
    assert torch.equal(points[:, 0], noise)
    for step in range(3):
        reached = points[:, step] + (LEVELS[step + 1] - LEVELS[step]) * targets[:, step]
        torch.testing.assert_close(reached, points[:, step + 1])


def test_points_of_the_students_own_get_the_teachers_targets() -> None:
    noise = torch.randn(3, 1, 1, 2, 2)
    points, targets = distill.make_paths(noise, LEVELS, curved, lambda x, _: torch.ones_like(x), own=1.0)
    torch.testing.assert_close(points[:, 1], noise + (LEVELS[1] - LEVELS[0]))
    end = distill.solve(points[:, 1], LEVELS[1], LEVELS[2], curved, distill.SUBSTEPS)
    torch.testing.assert_close(targets[:, 1], (end - points[:, 1]) / (LEVELS[2] - LEVELS[1]))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A small transformer with the miniature's other parts, for clips of 5 frames of 16x16 pixels."""
    monkeypatch.setattr(files, "DEFAULTS", replace(files.DEFAULTS, height=16, width=16, num_frames=5))
    spec = replace(
        files.TRANSFORMER_SPEC, num_attention_heads=2, attention_head_dim=24, freq_dim=32, ffn_dim=64, num_layers=1
    )
    monkeypatch.setattr(files, "TRANSFORMER_SPEC", spec)
    torch.manual_seed(0)
    files.write_transformer(tmp_path / "model", WanTransformer(spec))
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(files.FOLDER / part, tmp_path / "model" / part)
    return tmp_path / "model"


def test_what_is_trained_can_be_installed_as_a_model(small: Path, tmp_path: Path) -> None:
    options = argparse.Namespace(batch=4, pool=8, lr=1e-3, eager=True)
    report = distill.distill(small, tmp_path / "out", "cpu", 0.01, options)
    assert report["steps"] >= 3
    assert report["paths"] >= 8
    distill.install(tmp_path / "out", tmp_path / "fast")
    parts = {part: small / part for part in ("vae", "text_encoder", "tokenizer")}
    model = ModelFolder(tmp_path / "fast", "miniature-fast", parts=parts)
    model.check_complete()
    verify_manifest(model, None)
    assert model.spec.defaults.timesteps == FAST_MINIATURE.timesteps
    assert (model.spec.defaults.height, model.spec.defaults.guidance_scale) == (16, 1.0)
    teacher = read_model(small, "cpu")
    student = distill.read_transformer(tmp_path / "fast", "cpu")
    assert teacher.transformer is not None
    assert not torch.equal(student.proj_out.weight, teacher.transformer.proj_out.weight)
    latents = denoise(replace(teacher, transformer=student), ["a red circle"], 1, LEVELS, guidance=1.0)
    assert latents.shape == (1, 16, 2, 2, 2)
    assert latents.isfinite().all()
