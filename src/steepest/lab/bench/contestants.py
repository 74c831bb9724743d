"""Who steps in a benchmark: Muon of this library in three precisions, and of others as they come."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any, Literal

import torch
from torch import Tensor

import steepest
from steepest.names import unknown_name

Products = Literal["parameters", "float32", "bfloat16"]
Step = Callable[[], object]
BASELINE = "steepest"
JORDAN = (3.4445, -4.7750, 2.0315)
HEAVYBALL_COMPILE = "max-autotune-no-cudagraphs"  # heavyball's own default


@dataclass(frozen=True)
class Settings:
    """What all contestants are given; Nesterov's momentum everywhere."""

    lr: float = 1e-3
    momentum: float = 0.95
    weight_decay: float = 0.1


@dataclass(frozen=True)
class Contestant:
    """An optimizer to be measured.

    Args:
        name: What one types and reads.
        package: What must be installed for it, by the name it is installed by.
        build: From parameters and settings to a function that takes one step.
        products: Dtype of its matrix products where there is no CUDA; "parameters" is theirs.
        matrices_only: Whether convolutions must be flattened for it.
        ours: Whether it is this library's.
        coefficients: Of its polar factors, where it is ours.
        examined_as: Of compiled code, who does the same uncompiled: there, products are counted and directions read.
        note: What else a reader should know.
    """

    name: str
    package: str
    build: Callable[[list[Tensor], Settings], Step]
    products: Products
    matrices_only: bool = False
    ours: bool = False
    coefficients: str = "auto"
    examined_as: str | None = None
    note: str = ""

    def products_dtype(self, parameters: torch.dtype, device: str) -> torch.dtype:
        """Dtype of the matrix products."""
        if self.products == "parameters":
            return parameters
        on_cuda = (self.examined_as or self.name) == BASELINE and device.startswith("cuda")
        return torch.bfloat16 if on_cuda or self.products == "bfloat16" else torch.float32

    def examined(self) -> Contestant:
        """Itself, or who is looked at in its place."""
        return self if self.examined_as is None else CONTESTANTS[self.examined_as]

    def version(self) -> str | None:
        """Of its package; None if it is not installed."""
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return None


def choose(names: Sequence[str]) -> list[Contestant]:
    """The contestants with these names, `steepest` always among them and first.

    Args:
        names: Of `CONTESTANTS`, or "all" alone.

    Raises:
        ValueError: If a name is not known.
    """
    for name in names:
        if name not in CONTESTANTS and name != "all":
            raise ValueError(unknown_name("contestant", name, [*CONTESTANTS, "all"]))
    wanted = set(CONTESTANTS) if "all" in names else {BASELINE, *names}
    return [contestant for name, contestant in CONTESTANTS.items() if name in wanted]


def _steepest(**options: Any) -> Callable[[list[Tensor], Settings], Step]:
    def build(params: list[Tensor], settings: Settings) -> Step:
        return steepest.Muon(params, **asdict(settings), **options).step

    return build


def _torch(params: list[Tensor], settings: Settings) -> Step:
    return torch.optim.Muon(params, **asdict(settings), nesterov=True).step


def _plain(params: list[Tensor], settings: Settings) -> Step:
    """The update of `torch.optim.Muon` with products in the parameters' own dtype, one matrix after the other.

    Source:
        Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/
    """
    lr, beta, decay = settings.lr, settings.momentum, settings.weight_decay
    momenta = [torch.zeros_like(param) for param in params]

    @torch.no_grad()
    def step() -> None:
        for param, momentum in zip(params, momenta, strict=True):
            if param.grad is not None:
                momentum.lerp_(param.grad, 1 - beta)
                direction = _five_quintics(param.grad.lerp(momentum, beta))
                param.mul_(1 - lr * decay)
                param.add_(direction, alpha=-lr * math.sqrt(max(1.0, param.size(0) / param.size(1))))

    return step


def _five_quintics(g: Tensor) -> Tensor:
    """Applied to the singular values of g / ‖g‖_F; (m, n) -> (m, n)."""
    a, b, c = JORDAN
    tall = g.size(0) > g.size(1)
    x = g.T if tall else g
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _pytorch_optimizer(params: list[Tensor], settings: Settings) -> Step:
    group = {"params": params, "use_muon": True}
    return _import("pytorch_optimizer").Muon([group], **asdict(settings), nesterov=True).step


def _heavyball(mode: str | None) -> Callable[[list[Tensor], Settings], Step]:
    def build(params: list[Tensor], settings: Settings) -> Step:
        library = _import("heavyball")
        if mode is not None:
            torch.compiler.reset()  # compiled code of other shapes counts against a limit
        optimizer = library.Muon(
            params, lr=settings.lr, betas=(settings.momentum, 0.99), weight_decay=settings.weight_decay, nesterov=True
        )
        switches = sys.modules["heavyball.utils"]

        def step() -> object:
            vars(switches)["compile_mode"] = mode  # one switch for all its optimizers, read at each step
            return optimizer.step()

        return step

    return build


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            f"{missing.name} is not installed. Peers come with: pip install 'steepest[bench]'.", name=missing.name
        ) from missing


_ALL = (
    Contestant(BASELINE, "steepest", _steepest(), "float32", ours=True, note="defaults"),
    Contestant(
        "steepest-jordan",
        "steepest",
        _steepest(coefficients="jordan", dtype=torch.float32),
        "float32",
        ours=True,
        coefficients="jordan",
    ),
    Contestant("steepest-bf16", "steepest", _steepest(dtype=torch.bfloat16), "bfloat16", ours=True),
    Contestant("torch", "torch", _torch, "bfloat16", matrices_only=True, note="torch.optim.Muon"),
    Contestant(
        "torch-fp32",
        "torch",
        _plain,
        "parameters",
        matrices_only=True,
        note="torch.optim.Muon's update, written plainly",
    ),
    Contestant("pytorch-optimizer", "pytorch_optimizer", _pytorch_optimizer, "bfloat16"),
    Contestant(
        "heavyball",
        "heavyball",
        _heavyball(HEAVYBALL_COMPILE),
        "bfloat16",
        examined_as="heavyball-eager",
        note="compiled",
    ),
    Contestant("heavyball-eager", "heavyball", _heavyball(None), "bfloat16", note="not compiled"),
)
CONTESTANTS: dict[str, Contestant] = {contestant.name: contestant for contestant in _ALL}
