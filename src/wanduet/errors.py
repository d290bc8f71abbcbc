"""The exceptions that users see. Each message says what happened and, if known, what to do.

`exit_code` is the exit status of the command line: 1 the job failed, 2 bad usage, 130 interrupted.
"""

from typing import ClassVar


class WanduetError(Exception):
    """Base class of all errors that wanduet raises on purpose. `code` is the stable machine-readable name."""

    exit_code: ClassVar[int] = 1
    code: ClassVar[str] = "failed"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class InvalidRequestError(WanduetError):
    """A field of a request has a value that is not allowed; nothing was loaded."""

    exit_code = 2
    code = "invalid_request"

    def __init__(self, field: str, given: object, allowed: str, nearest: object | None = None) -> None:
        hint = f"Nearest allowed: {nearest}." if nearest is not None else None
        super().__init__(f"{field}={given!r} is not allowed: {allowed}.", hint=hint)
        self.field = field
        self.given = given
        self.allowed = allowed
        self.nearest = nearest


class ConfigError(WanduetError):
    """An engine setting (devices, strategy, limits, model name) is invalid, in general or on this machine."""

    exit_code = 2
    code = "invalid_config"


class ModelNotFoundError(WanduetError):
    """The model folder or hub id does not exist, or is not a supported model in the Diffusers layout."""

    code = "model_not_found"


class WeightsError(WanduetError):
    """A weights file is damaged, or its tensors do not match the model."""

    code = "bad_weights"


class DoesNotFitError(WanduetError):
    """The plan predicts that the job does not fit in memory; nothing was loaded."""

    code = "does_not_fit"


class OutOfMemoryError(WanduetError):
    """Memory ran out at run time, even in the smallest form of the work."""

    code = "out_of_memory"


class NonFiniteLatentsError(WanduetError):
    """The latents contain NaN or infinity; their video would be black."""

    code = "non_finite_latents"

    def __init__(self, step: int) -> None:
        super().__init__(
            f"The latents became NaN or infinite at denoising step {step + 1}.",
            hint="Try --transformer-dtype float32, or check the weights with `wanduet doctor`.",
        )
        self.step = step


class NonFiniteFramesError(WanduetError):
    """The VAE gave NaN or infinity: decoded frames would be black in places, an encoded video's latents useless."""

    code = "non_finite_frames"


class KernelFailedError(WanduetError):
    """A fused kernel failed during a job although its check had passed. Its PyTorch implementation replaces it."""

    code = "kernel_failed"

    def __init__(self, operation: str, reason: str) -> None:
        super().__init__(f"The kernel for {operation} failed ({reason}).")
        self.operation, self.reason = operation, reason


class OutputError(WanduetError):
    """The output cannot be written (missing or read-only folder, disk full)."""

    code = "output_error"


class CancelledError(WanduetError):
    """The job was cancelled, by the user or by Ctrl-C."""

    exit_code = 130
    code = "cancelled"
