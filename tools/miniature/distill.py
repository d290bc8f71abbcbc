"""Distil the miniature to few steps: `python -m tools.miniature.distill --out FOLDER`. Four minutes on one H200.

The teacher is the bundled miniature with guidance. For each step of a fixed list of noise levels the student learns the
mean velocity of the teacher's path from the step's level to the next one, so that one Euler step without guidance ends
where several guided steps of the teacher end. That is progressive distillation (Salimans and Ho, arXiv 2202.00512) in one
stage, with guidance distilled too (Meng et al., arXiv 2210.03142). Later paths contain steps of the student, so that it
learns what follows its own errors (DAgger, arXiv 1011.0686).

Prompts are those of training: held-out combinations stay unseen. `--install FOLDER` makes the result the bundled
`miniature-fast`.
"""

import argparse
import copy
import itertools
import json
import random
import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.miniature import folder as files
from tools.miniature.prompts import describe, prompts_of
from tools.miniature.sample import Parts, decode, default_sigmas, denoise, evaluate_model, read_model, read_transformer
from tools.miniature.train import is_matrix, tokenizer_of
from tools.miniature.training import Trainer
from tools.miniature.velocity import embed_text, run_block, velocity
from tools.miniature.world import held_out_combinations, sample_clips
from wanduet.family.distilled import FAST_MINIATURE as FAST
from wanduet.models.dit.model import WanTransformer
from wanduet.weights.manifest import write_manifest

Velocity = Callable[[Tensor, float], Tensor]  # of latents [B, 16, T, h, w] at a noise level
SUBSTEPS = 3  # midpoint steps of the teacher for each step of the student: 24 guided evaluations for 4 steps
SHARE = 0.4  # of the time, spent on new paths
FIRST = 12  # batches of paths before the first update
OWN = 0.5  # share of the steps within a path that are the student's, once it has learnt something
PROMPTS = 24000


def shifted(even: float, shift: float) -> float:
    """The noise level of an even one; both run from 1 (noise) to 0."""
    return shift * even / (1 + (shift - 1) * even)


def unshifted(level: float, shift: float) -> float:
    """The inverse of `shifted`."""
    return level / (shift - (shift - 1) * level)


def solve(x: Tensor, level: float, after: float, teacher: Velocity, substeps: int) -> Tensor:
    """Follow the teacher's path from one noise level to another by the midpoint rule, on evenly spaced shifted levels."""
    shift = files.DEFAULTS.flow_shift
    ends = [unshifted(value, shift) for value in (level, after)]
    even = [ends[0] + (ends[1] - ends[0]) * i / (2 * substeps) for i in range(2 * substeps + 1)]
    levels = [shifted(value, shift) for value in even]
    for start, middle, end in zip(levels[:-2:2], levels[1::2], levels[2::2], strict=True):
        half = x + (middle - start) * teacher(x, start)
        x = x + (end - start) * teacher(half, middle)
    return x


@torch.no_grad()
def make_paths(
    noise: Tensor, levels: Sequence[float], teacher: Velocity, student: Velocity, own: float, substeps: int = SUBSTEPS
) -> tuple[Tensor, Tensor]:
    """Points `[B, S, ...]` from which the student's S steps start, and the mean velocity to learn at each.

    `levels`: S + 1 noise levels, 1 to 0. `own`: share of the points that the student's step leads to; the others, and
    all targets, are the teacher's.
    """
    points, targets = [], []
    x = noise
    for level, after in itertools.pairwise(levels):
        end = solve(x, level, after, teacher, substeps)
        points.append(x)
        targets.append((end - x) / (after - level))
        if own > 0 and after > 0:
            chosen = torch.rand(len(x), 1, 1, 1, 1, device=x.device) < own
            end = torch.where(chosen, x + (after - level) * student(x, level), end)
        x = end
    return torch.stack(points, dim=1), torch.stack(targets, dim=1)


class Distillation:
    """The models, a pool of paths and the prompts, all on one device."""

    def __init__(self, folder: Path, device: str, batch: int, pool: int, eager: bool) -> None:
        torch.manual_seed(3)
        self.device, self.batch = device, batch
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.block = torch.compile(run_block) if device == "cuda" and not eager else run_block
        parts = read_model(folder, device)
        assert parts.transformer is not None
        assert parts.encoder is not None
        self.parts, self.encoder = parts, parts.encoder.requires_grad_(False)
        self.teacher = parts.transformer.requires_grad_(False)
        self.student = copy.deepcopy(self.teacher).train().requires_grad_(True)
        self.average = copy.deepcopy(self.teacher)  # the student's moving average, which makes its steps in paths
        self.levels = [step / 1000 for step in FAST.timesteps] + [0.0]
        self.ids, self.empty = self._prompts(folder)
        d = files.DEFAULTS
        shape = (16, (d.num_frames - 1) // 4 + 1, d.height // 8, d.width // 8)
        self.rope = self.teacher.prepare_rope((batch, *shape), torch.device(device))
        steps = len(self.levels) - 1
        self.points = torch.empty(pool, steps, *shape, device=device)
        self.targets = torch.empty(pool, steps, *shape, device=device)
        self.texts = torch.empty(pool, *self.empty.shape[1:], device=device)
        self.made = 0  # paths so far; the pool keeps the last ones
        self.x, self.wanted = (torch.zeros(batch, *shape, device=device) for _ in range(2))
        self.text = torch.zeros(batch, *self.empty.shape[1:], device=device)
        self.timestep, self.weight = (torch.ones(batch, device=device) for _ in range(2))
        lengths = torch.tensor([a - b for a, b in itertools.pairwise(self.levels)], device=device)
        self.times = 1000 * torch.tensor(self.levels[:-1], device=device)
        self.weights = lengths / lengths.mean()  # a longer step's error matters more

    @torch.no_grad()
    def _prompts(self, folder: Path) -> tuple[Tensor, Tensor]:
        """Token ids `[N, n]` of training prompts, half of them canonical; the embedding `[1, n, D]` of the empty one."""
        count = PROMPTS if self.device == "cuda" else 64
        clips = sample_clips(count, torch.Generator().manual_seed(33))
        rng = random.Random(33)
        half = count // 2
        texts = prompts_of(clips.select(slice(half)), rng, canonical=True)
        texts += prompts_of(clips.select(slice(half, count)), rng)
        tokens = [e.ids for e in tokenizer_of(folder).encode_batch([*texts, ""])]
        ids = torch.tensor(tokens, device=self.device)
        return ids[:-1], embed_text(self.encoder, ids[-1:]).float()

    def run(self, model: WanTransformer, x: Tensor, level: float, text: Tensor) -> Tensor:
        """A model's velocity for `[B, 16, T, h, w]`."""
        timestep = torch.full((len(x),), 1000 * level, device=self.device)
        return velocity(model, x, timestep, text, self.rope, self.block, self.dtype)

    @torch.no_grad()
    def refresh(self, own: float) -> None:
        """Make a batch of paths, in the place of the pool's oldest."""
        chosen = torch.randint(len(self.ids), (self.batch,), device=self.device)
        text = embed_text(self.encoder, self.ids[chosen]).float()
        empty = self.empty.expand_as(text)
        scale = files.DEFAULTS.guidance_scale

        def teacher(x: Tensor, level: float) -> Tensor:
            conditional, unconditional = (self.run(self.teacher, x, level, t) for t in (text, empty))
            return unconditional + scale * (conditional - unconditional)

        def student(x: Tensor, level: float) -> Tensor:
            return self.run(self.average, x, level, text)

        noise = torch.randn_like(self.x)
        points, targets = make_paths(noise, self.levels, teacher, student, own)
        where = (self.made + torch.arange(self.batch, device=self.device)) % len(self.points)
        self.points[where], self.targets[where], self.texts[where] = points, targets, text
        self.made += self.batch

    def choose(self) -> None:
        """Copy random steps of random paths to where `loss` reads them."""
        count = min(self.made, len(self.points))
        path = torch.randint(count, (self.batch,), device=self.device)
        step = torch.randint(len(self.times), (self.batch,), device=self.device)
        self.x.copy_(self.points[path, step])
        self.wanted.copy_(self.targets[path, step])
        self.text.copy_(self.texts[path])
        self.timestep.copy_(self.times[step])
        self.weight.copy_(self.weights[step])

    def loss(self) -> Tensor:
        """Weighted squared error of the mean velocity."""
        got = velocity(self.student, self.x, self.timestep, self.text, self.rope, self.block, self.dtype)
        return ((got - self.wanted).square().mean(dim=(1, 2, 3, 4)) * self.weight).mean()

    @torch.no_grad()
    def errors(self) -> list[float]:
        """The averaged student's error at each step, relative to the targets, over the newest paths."""
        where = (self.made - self.batch + torch.arange(self.batch, device=self.device)) % len(self.points)
        found = []
        for step, level in enumerate(self.levels[:-1]):
            wanted = self.targets[where, step]
            got = self.run(self.average, self.points[where, step], level, self.texts[where])
            found.append(round(float((got - wanted).norm() / wanted.norm()), 4))
        return found


def distill(folder: Path, out: Path, device: str, minutes: float, options: argparse.Namespace) -> dict[str, Any]:
    """Train for `minutes` of wall time in all, the compilation included; write transformer/ and training.json."""
    began = time.perf_counter()
    work = Distillation(folder, device, options.batch, options.pool, options.eager)
    try:
        work.refresh(own=0.0)
    except Exception:  # a machine without a C compiler, for example
        traceback.print_exc()
        work.block = run_block
        _log(began, "the block is not compiled")
    for _ in range(FIRST - 1 if device == "cuda" else 1):
        work.refresh(own=0.0)
    _log(began, f"{work.made} paths; errors of the teacher without guidance {work.errors()}")
    trainer = Trainer(
        [work.student], work.loss, lr=options.lr, decay=0.999, seconds=60 * minutes,
        matrices=[p for p in work.student.blocks.parameters() if is_matrix(p)],
    )  # fmt: skip
    for _ in range(3):  # compiled and captured
        work.choose()
        trainer.step()
    _log(began, "the training step is ready")
    trainer.seconds = max(1.0, began + 60 * minutes - trainer.began)
    spent, saved = 0.0, 1
    while trainer.progress < 1:
        if spent < SHARE * (time.perf_counter() - trainer.began):
            _synchronize(device)
            start = time.perf_counter()
            _copy_averages(trainer, work.average)
            work.refresh(own=OWN if trainer.progress > 0.15 else 0.0)
            _synchronize(device)
            spent += time.perf_counter() - start
        else:
            work.choose()
            trainer.step()
            if trainer.steps % (250 if device == "cuda" else 5) == 0:
                shown = f"{trainer.progress:4.0%} loss {trainer.loss_value():.4f} errors {work.errors()}"
                _log(began, f"step {trainer.steps} {shown} paths {work.made}")
        if time.perf_counter() - began > 60 * saved:
            _copy_averages(trainer, work.average)
            files.write_transformer(out / f"minute_{saved}", work.average)
            saved += 1
    trainer.use_averages()
    files.write_transformer(out, work.student)
    report = {
        "teacher": "miniature", "guidance": files.DEFAULTS.guidance_scale, "timesteps": list(FAST.timesteps),
        "teacher_evaluations": 2 * SUBSTEPS * len(FAST.timesteps), "paths": work.made, "steps": trainer.steps,
        "batch": options.batch, "lr": options.lr, "minutes": minutes, "device": _device_name(device),
    }  # fmt: skip
    files.write_json(out / "training.json", report)
    _copy_averages(trainer, work.average)
    work.refresh(own=1.0)
    _log(began, f"written; errors on paths of its own {work.errors()}")
    return report


def evaluate(folder: Path, out: Path, device: str, count: int) -> None:
    """Print what the detector sees at 4 steps, and at fewer of the same noise levels; write it to evaluation.json."""
    began = time.perf_counter()
    parts = read_model(folder, device)
    fast = replace(parts, transformer=read_transformer(out, device))
    levels = [step / 1000 for step in FAST.timesteps]
    found: dict[str, Any] = {}
    for kept in ((0, 1, 2, 3), (0, 1, 3), (0, 2), (0,)):
        part = count if len(kept) == len(levels) else min(count, 70)
        sheet = out / f"sheet_{len(kept)}.png" if find_spec("PIL") else None
        sigmas = [*(levels[i] for i in kept), 0.0]
        report = evaluate_model(fast, part, sheet, sigmas, guidance=1.0)
        found[f"{len(kept)} steps"] = report | {"mistakes": report["mistakes"][:20]}
        _log(began, f"{len(kept)} steps: {json.dumps(found[f'{len(kept)} steps'])}")
        files.write_json(out / "evaluation.json", found)
    compare(parts, fast, began)


@torch.no_grad()
def compare(parts: Parts, fast: Parts, began: float) -> None:
    """Print how far the student's latents and videos are from the teacher's for the same noise, on unseen prompts."""
    texts = [describe(c).prompt for c in held_out_combinations()[: 32 if parts.device == "cuda" else 1].tolist()]
    sigmas = [step / 1000 for step in FAST.timesteps] + [0.0]
    ours = denoise(fast, texts, 7, sigmas, guidance=1.0)
    theirs = denoise(parts, texts, 7, default_sigmas())
    error = (ours - theirs).flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1)
    psnr = -10 * ((decode(parts, ours) - decode(parts, theirs)) / 2).flatten(1).square().mean(dim=1).log10()
    _log(began, f"latents' error, median and worst: {float(error.median()):.4f} {float(error.max()):.4f}")
    _log(began, f"PSNR in dB, median and worst: {float(psnr.median()):.2f} {float(psnr.min()):.2f}")


def install(source: Path, target: Path = files.FAST_FOLDER) -> None:
    """Copy a distilled transformer to the bundled `miniature-fast`, and write what belongs to it and its manifest."""
    files.write_fast_static(target)
    shutil.copytree(source / "transformer", target / "transformer", dirs_exist_ok=True)
    found = [source / name for name in ("training.json", "evaluation.json")]
    training, evaluation = (json.loads(path.read_text()) if path.exists() else {} for path in found)
    files.write_json(target / "training.json", training | {"evaluation": evaluation})
    write_manifest(target)


def _copy_averages(trainer: Trainer, model: WanTransformer) -> None:
    for parameter, average in zip(model.parameters(), trainer.averages, strict=True):
        parameter.data.copy_(average)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def _log(began: float, text: str) -> None:
    print(f"{time.perf_counter() - began:6.1f} s  {text}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the result")
    parser.add_argument("--model", type=Path, default=files.FOLDER, help="the teacher's folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=4.0, help="wall time in all but the evaluation")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--pool", type=int, default=16384, help="paths kept on the device, 0.7 MB each")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--evaluate", type=int, default=210, help="unseen prompts to evaluate at the end")
    parser.add_argument("--eager", action="store_true", help="do not compile the transformer's block")
    parser.add_argument("--install", type=Path, help="only copy the result in this folder to the bundled model")
    options = parser.parse_args()
    if options.install is not None:
        install(options.install)
        return
    if options.out is None:
        parser.error("--out is needed")
    torch.backends.cuda.matmul.allow_tf32 = True
    distill(options.model, options.out, options.device, options.minutes, options)
    if options.evaluate:
        try:
            evaluate(options.model, options.out, options.device, options.evaluate)
        except Exception:  # the weights are written already
            traceback.print_exc()


if __name__ == "__main__":
    main()
