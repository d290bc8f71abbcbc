"""The trainer of both stages: a step captured as a CUDA graph, Muon, a schedule by wall clock.

Muon: the update of a weight matrix is its momentum made orthogonal by five Newton-Schulz iterations, so that
all directions learn at the same speed. Source: K. Jordan, https://kellerjordan.github.io/posts/muon/ (iteration
and coefficients); J. Liu et al., arXiv 2502.16982 (the scale that lets it share AdamW's learning rate).
"""

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
MATRIX_DECAY = 0.02
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Muon:
    """The Muon optimizer for weight matrices (a convolution's is `[out, in * kernel]`), batched by shape."""

    def __init__(self, parameters: Sequence[nn.Parameter], lr: Tensor) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in parameters:
            by_shape.setdefault(parameter.flatten(1).shape, []).append(parameter)
        self.groups = list(by_shape.values())
        self.momenta = [torch.zeros(len(g), *shape, device=g[0].device) for shape, g in by_shape.items()]
        self.lr = lr

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters from their gradients."""
        for group, momentum in zip(self.groups, self.momenta, strict=True):
            gradient = torch.stack([p.grad.flatten(1) for p in group if p.grad is not None])
            momentum.lerp_(gradient, 1 - MOMENTUM)
            update = orthogonal(gradient.lerp(momentum, MOMENTUM))
            update = update * (self.lr * 0.2 * math.sqrt(max(update.shape[-2:])))
            values = [p.data for p in group]
            torch._foreach_mul_(values, 1 - self.lr * MATRIX_DECAY)
            torch._foreach_sub_(values, [u.view_as(p) for u, p in zip(update, group, strict=True)])


def orthogonal(matrices: Tensor) -> Tensor:
    """Approximate the nearest matrices to `[N, a, b]` whose singular values are all one."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(torch.bfloat16 if x.is_cuda else x.dtype)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.to(matrices.dtype)
    return x.mT if tall else x


class Trainer:
    """Runs `loss()` → backward → Muon and AdamW → moving average, on a GPU as one CUDA graph.

    The time of a small model is that of its kernel launches, which a graph avoids. `loss` must read its batch from
    tensors that keep their addresses, and return a scalar tensor. Parameters in `matrices` get Muon, all
    others AdamW. The learning rate warms up over `warmup` steps and falls as a cosine over the `seconds`.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        loss: Callable[[], Tensor],
        *,
        lr: float,
        seconds: float,
        decay: float,
        matrices: Sequence[nn.Parameter] = (),
        warmup: int = 100,
    ) -> None:
        self.parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
        device = self.parameters[0].device
        self.cuda = device.type == "cuda"
        self.lr, self.keep = torch.zeros((), device=device), torch.zeros((), device=device)
        chosen = {id(p) for p in matrices}
        others = [p for p in self.parameters if id(p) not in chosen]
        self.adamw = torch.optim.AdamW(
            others, lr=self.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=self.cuda, capturable=self.cuda
        )
        self.muon = Muon(matrices, self.lr)
        self.averages = [p.detach().clone() for p in self.parameters]
        self.loss, self.peak, self.decay, self.seconds, self.warmup = loss, lr, decay, seconds, warmup
        self.steps = 0
        self.began = time.perf_counter()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._value = torch.zeros((), device=device)

    @property
    def progress(self) -> float:
        """Share of the wall-clock budget that is spent. The clock starts when the step is compiled."""
        if self.cuda and self._graph is None:
            return 0.0
        return (time.perf_counter() - self.began) / self.seconds

    def step(self) -> None:
        """One update. The first two run eagerly; then the step is captured."""
        falling = 0.5 * (1 + math.cos(math.pi * min(1.0, self.progress)))
        self.lr.fill_(self.peak * min(1.0, (self.steps + 1) / self.warmup) * (0.01 + 0.99 * falling))
        self.keep.fill_(min(self.decay, (1 + self.steps) / (10 + self.steps)))
        if not self.cuda:
            self._update()
        elif self._graph is not None:
            self._graph.replay()
        elif self.steps < 2:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._update()
            torch.cuda.current_stream().wait_stream(stream)
        else:
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._update()
            self._graph.replay()
            torch.cuda.synchronize()
            self.began = time.perf_counter()
        self.steps += 1
        if self.cuda and self.steps % 25 == 0:
            torch.cuda.synchronize()  # or the clock would run ahead of the device

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
        torch._foreach_mul_(grads, (1.0 / norm.clamp(min=1e-6)).clamp(max=1.0))
        self.adamw.step()
        self.muon.step()
        torch._foreach_mul_(self.averages, self.keep)
        torch._foreach_add_(self.averages, torch._foreach_mul([p.detach() for p in self.parameters], 1 - self.keep))
        self._value.copy_(loss.detach())
