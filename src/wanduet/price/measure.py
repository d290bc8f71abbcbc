"""Measures the prices of a model: all variants over fixed prompts and seeds, each beside the exact job of its prompt.

What is measured is stored video by video, so that a second run of the same measurement goes on where the first stopped.
"""

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Self

import torch
from filelock import FileLock, Timeout

from wanduet.config import EngineConfig, Weights
from wanduet.engine.pipeline import Engine
from wanduet.engine.record import subject_of
from wanduet.errors import ConfigError, InvalidRequestError, OutputError
from wanduet.family.registry import RANDOM_SPECS
from wanduet.media.files import UnreadableFileError, check_writable
from wanduet.meta.prices import Prices, exact, find_prices, store_prices
from wanduet.planning.plan import require_fit
from wanduet.planning.prices import has_fast_8_bit_attention
from wanduet.price import prompts
from wanduet.price.compare import Made, Measures
from wanduet.price.replay import FOLLOWED, REPLAYED, Replay, Trajectory
from wanduet.price.runs import follow, kept, latents_path, make, make_with_other_kernels
from wanduet.price.variants import Measured, Variant, all_variants, possible
from wanduet.request import GenerationRequest
from wanduet.sampling.predictor import OnPredict
from wanduet.stages.predict import time_embedding
from wanduet.weights.names import BUNDLED

# Called with what is made, and the predicted seconds that are done and that there are in all.
Show = Callable[[str, float, float], None]
EXACT = Variant("rungs", "exact")


class Measurement:
    """One measurement. As a context manager, it excludes others of this data folder, which would slow it down."""

    def __init__(self, config: EngineConfig, request: GenerationRequest, count: int) -> None:
        """`request`: its size, steps and other settings; its prompt is not used, its seed is the first prompt's (default
        0), its approximations are one more row. `count`: of prompts.

        Plans, and loads nothing. Raises InvalidRequestError, ModelNotFoundError, DoesNotFitError, OutputError.
        """
        if not 1 <= count <= prompts.MOST:
            raise InvalidRequestError("prompts", count, f"1 to {prompts.MOST}", min(max(count, 1), prompts.MOST))
        if request.input_video is not None:
            raise InvalidRequestError(
                "input_video", request.input_video, "nothing: prices are of videos made from noise"
            )
        self.config, self._engine = config, Engine(config)
        self.spec = self._engine.models.spec
        self.is_miniature = config.model in BUNDLED
        self._prompts = prompts.prompts_for(self.is_miniature, count)
        asked = request.resolve(self.spec).approximations
        self._base = exact(request).model_copy(update={"num_videos_per_prompt": 1})
        self.request = self._exact(0).resolve(self.spec)
        plan = self._engine.plan(self._exact(0))
        require_fit(plan, self.request)
        with_attention = has_fast_8_bit_attention(config, self._engine.hardware)
        variants = all_variants(self.request.num_inference_steps, asked, plan.transformer.weights, with_attention)
        self._sees_velocities = plan.strategy != "parallel"  # ranks do not report them
        self._trajectory: Trajectory | None = None
        self.measured, self.refused = possible([EXACT, *variants], self._exact(0), self.spec, self._engine.plan)
        self.subject = subject_of(self._engine.models, plan, self.request)
        self.folder = self._engine.models.checkpoint.measurements
        self._videos = config.data_folder / "prices" / self.subject.key
        self._seconds = {one.key: self._predicted(one) for one in self.measured}
        self._measures = Measures(torch.device(plan.vae.device))
        self._lock = FileLock(self.folder / "price.lock")
        self.prices = find_prices(self.folder, self.subject) or Prices(self._about())

    def __enter__(self) -> Self:
        try:
            check_writable(latents_path(self._videos / "exact"), (len(self._prompts) + 1) * self._latents_bytes())
            check_writable(self.folder / "prices")
        except OutputError as error:
            error.hint = "Choose another data folder with --data-dir, or free some space."
            raise
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                "Another `wanduet price` is running on this machine.",
                hint="Two at once would slow each other down: wait until it ends.",
            ) from None
        self.prices = find_prices(self.folder, self.subject) or self.prices  # what the other has measured meanwhile
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._engine.close()
        finally:
            self._lock.release()

    @property
    def videos_left(self) -> int:
        """How many videos remain to be made, those that follow an exact one included."""
        return sum(len(self._left(one)) + self._is_to_follow(one) for one in self._by_key().values())

    @property
    def seconds_left(self) -> float:
        """The predicted seconds of the videos that remain to be made."""
        return sum(
            (len(self._left(one)) + self._is_to_follow(one)) * self._seconds[one.key] for one in self._by_key().values()
        )

    def run(self, show: Show) -> None:
        """Make and measure what remains. Raises CancelledError, OutputError, and the errors of a job."""
        total = self.seconds_left
        for weights in dict.fromkeys(one.variant.weights for one in self.measured):
            some = [one for one in self._by_key().values() if one.variant.weights == weights]
            follows = any(map(self._is_to_follow, some if weights is not None else self.measured))
            if not follows and not any(map(self._left, some)):
                continue
            if weights is not None:
                self._load(weights)
            self._warm_up(show, total)
            for number in range(len(self._prompts)):
                self._run_prompt(number, some, show, total)
            if follows:
                self._follow(some, show, total)
        if not self.videos_left:
            shutil.rmtree(self._videos, ignore_errors=True)

    def _warm_up(self, show: Show, total: float) -> None:
        """Make a video that is not measured: with it, the models are loaded and kernels chosen."""
        done = total - self.seconds_left
        self._make(of_few_steps(self._exact(0)), "warm-up", lambda _: show("warming up", done, total))

    def _run_prompt(self, number: int, some: list[Measured], show: Show, total: float) -> None:
        left = [one for one in some if number in self._left(one)]
        if not left:
            return
        name = f"prompt {number + 1} of {len(self._prompts)}"

        def progress(one: Measured) -> Callable[[float], None]:
            done, seconds = total - self.seconds_left, self._seconds[one.key]
            return lambda share: show(f"{name}: {one.variant.name}", done + share * seconds, total)

        reference = self._exact_video(number, progress(self._by_key()["{}"]))
        for one in left:
            if number in self._left(one):  # the exact one is not
                made = self._variant(one, number, progress(one))
                self._store(one.key, number, made, reference)

    def _follow(self, some: list[Measured], show: Show, total: float) -> None:
        """Measure errors along the first prompt's exact trajectory that take forwards."""
        done, name = total - self.seconds_left, "along the exact video"
        request, path = self._exact(0), self._videos / "variant"
        if self._trajectory is None:  # an earlier run has made it, and was stopped
            self._trajectory = Trajectory(request.resolve(self.spec))
            make(self._engine, request, path, lambda _: show(name, done, total), self._trajectory)
            latents_path(path).unlink(missing_ok=True)
        for one in filter(self._is_to_follow, some):
            done, seconds = total - self.seconds_left, self._seconds[one.key]
            show_one = partial(self._show_share, show, f"{name}: {one.variant.name}", (done, seconds, total))
            followed = self._trajectory.follow()
            follow(self._engine, one.variant.request(request), path, show_one, followed)
            self._keep_errors({one.key: {"0": followed.errors}})
            self._write()

    @staticmethod
    def _show_share(show: Show, name: str, seconds: tuple[float, float, float], share: float) -> None:
        done, of_one, total = seconds
        show(name, done + share * of_one, total)

    def _exact_video(self, number: int, progress: Callable[[float], None]) -> Made:
        """Return the exact video of a prompt; make it, unless its latents were kept."""
        request, path, key = self._exact(number), self._videos / f"exact-{number}", "{}"
        if str(number) in self.prices.rows.get(key, {}):
            with suppress(UnreadableFileError):
                return kept(self._engine, request, path)
        replayed = {
            one.key: one.variant.request(request).resolve(self.spec)
            for one in self.measured
            if one.settings and set(one.settings) <= set(REPLAYED)
        }
        replay = Replay(replayed, self.spec, self._time_embedder)
        observers: list[OnPredict] = [replay]
        if number == 0 and any(map(self._is_to_follow, self.measured)):
            self._trajectory = Trajectory(request.resolve(self.spec))
            observers.append(self._trajectory)

        def observe(*predicted: Any) -> None:
            for observer in observers:
                observer(*predicted)

        made = make(self._engine, request, path, progress, observe)
        self._keep_errors({name: {str(number): one} for name, one in replay.errors().items() if one})
        self._store(key, number, made, made)
        return made

    def _variant(self, one: Measured, number: int, progress: Callable[[float], None]) -> Made | None:
        request, path = one.variant.request(self._exact(number)), self._videos / "variant"
        if one.variant.uses_other_kernels:
            made = make_with_other_kernels(self._engine, request, path, progress)
            latents_path(path).unlink(missing_ok=True)
            return made
        return self._make(request, path.name, progress)

    def _make(self, request: GenerationRequest, name: str, progress: Callable[[float], None]) -> Made:
        path = self._videos / name
        made = make(self._engine, request, path, progress)
        latents_path(path).unlink(missing_ok=True)
        return made

    def _load(self, weights: Weights) -> None:
        self._engine.close()
        self._engine = Engine(replace(self.config, weights=weights))

    def _time_embedder(self) -> Callable[[torch.Tensor], torch.Tensor]:
        loaded = self._engine.models.transformer.loaded
        assert loaded is not None, "called during a denoise"
        return time_embedding(loaded)

    def _store(self, key: str, number: int, made: Made | None, reference: Made) -> None:
        row: dict[str, Any] = {}
        if made is not None:
            row = {"forwards": made.forwards, "seconds": made.seconds}
            row |= self._measures(made, reference, self.request.fps)
        rows = dict(self.prices.rows)
        rows[key] = {**rows.get(key, {}), str(number): row}
        self.prices = replace(self.prices, rows=rows)
        self._write()

    def _keep_errors(self, errors: Mapping[str, Mapping[str, list[float]]]) -> None:
        before = self.prices.velocity_errors
        self.prices = replace(
            self.prices, velocity_errors=dict(before) | {k: {**before.get(k, {}), **v} for k, v in errors.items()}
        )

    def _write(self) -> None:
        try:
            store_prices(self.folder, self.subject, self.prices)
        except OSError as error:
            raise OutputError(
                f"What was measured cannot be kept in {self.folder}: {error.strerror or error}."
            ) from error

    # What is measured.

    def _exact(self, number: int) -> GenerationRequest:
        seed = (self._base.seed or 0) + number
        return self._base.model_copy(update={"prompt": self._prompts[number], "seed": seed})

    def _by_key(self) -> dict[str, Measured]:
        """Return the different variants; a named speed may be an accelerator alone."""
        found: dict[str, Measured] = {}
        for one in self.measured:
            found.setdefault(one.key, one)
        return found

    def _left(self, one: Measured) -> list[int]:
        rows: Mapping[str, Any] = self.prices.rows.get(one.key, {})
        return [number for number in range(len(self._prompts)) if str(number) not in rows]

    def _is_to_follow(self, one: Measured) -> bool:
        """Whether a variant's velocity errors take forwards of their own that remain to be made."""
        takes_forwards = bool(one.settings) and set(one.settings) <= set(FOLLOWED)
        return takes_forwards and self._sees_velocities and one.key not in self.prices.velocity_errors

    def _predicted(self, one: Measured) -> float:
        return self._engine.plan(one.variant.request(self._exact(0))).prediction.seconds.total

    def _latents_bytes(self) -> int:
        size = (self.request.generated_height, self.request.generated_width, self.request.num_frames)
        return 4 * int(torch.Size(self.spec.latent_shape(*size)).numel())

    def _about(self) -> dict[str, Any]:
        subject = asdict(self.subject)
        about = {name: dict(subject[name]) for name in ("engine", "request", "versions")}
        named = {"name": self._engine.models.about["name"], "spec": self.spec.name}
        return named | {"model": subject["model"], "card": subject["card"]} | about

    @property
    def made_of(self) -> dict[str, Any]:
        """The prompts, and the seed of the first; each further prompt has the next seed."""
        return {"prompts": list(self._prompts), "seed": self.request.seed}

    @property
    def has_random_weights(self) -> bool:
        """Whether the losses mean nothing."""
        return self.config.model in RANDOM_SPECS


def of_few_steps(request: GenerationRequest) -> GenerationRequest:
    """Return a request of one step, for a run that is not measured; given timesteps stay."""
    if request.timesteps is not None:
        return request
    return request.model_copy(update={"num_inference_steps": 1})
