"""What both training stages share: a step captured as a CUDA graph, a learning-rate schedule by wall clock."""

import math
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


class Trainer:
    """Runs `loss()` → backward → AdamW → moving average, as one CUDA graph where there is a GPU.

    A small model is bound by launches; replaying a graph removes them. `loss` must read its batch from
    tensors that keep their addresses, and return a scalar tensor.
    """

    def __init__(
        self, modules: Iterable[nn.Module], loss: Callable[[], Tensor], *, peak_lr: float, decay: float, seconds: float
    ) -> None:
        self.modules = list(modules)
        self.parameters = [p for m in self.modules for p in m.parameters() if p.requires_grad]
        device = self.parameters[0].device
        self.cuda = device.type == "cuda"
        self.lr = torch.zeros((), device=device)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=self.cuda, capturable=self.cuda
        )
        self.averages = [p.detach().clone() for p in self.parameters]
        self.loss, self.peak_lr, self.decay, self.seconds = loss, peak_lr, decay, seconds
        self.began = time.perf_counter()
        self.steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._value = torch.zeros((), device=device)

    @property
    def progress(self) -> float:
        """Share of the wall-clock budget that is spent."""
        return (time.perf_counter() - self.began) / self.seconds

    def step(self) -> None:
        """One update. The first three run eagerly; then the step is captured."""
        warm = min(1.0, (self.steps + 1) / 200)
        self.lr.fill_(self.peak_lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, self.progress)))))
        if not self.cuda:
            self._update()
        elif self._graph is not None:
            self._graph.replay()
        elif self.steps < 3:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._update()
            torch.cuda.current_stream().wait_stream(stream)
        else:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._update()
        self.steps += 1

    def loss_value(self) -> float:
        """The last step's loss (waits for the device)."""
        return float(self._value)

    def use_averages(self) -> None:
        """Replace the parameters by their moving averages."""
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            parameter.data.copy_(average)

    def _update(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        loss = self.loss()
        loss.backward()
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        torch._foreach_mul_(grads, (1.0 / norm.clamp(min=1.0)).clamp(max=1.0))
        self.optimizer.step()
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 1 - self.decay)
        self._value.copy_(loss.detach())
