"""`quadratic`: find the minimum of a quadratic in one matrix from noisy gradients; every constant of it is known."""

import functools
import hashlib

import torch
from torch import Tensor, nn

from steepest.lab.tasks.held_out import Evaluation, Part
from steepest.lab.tasks.order import derive_seed
from steepest.lab.tasks.task import Batch, Budget, DataIdentity, PresetName

ROWS, COLUMNS = 8, 16
EXAMPLES = 65_536
TARGET_SCALE = 0.2  # of the entries of W*: f(W_0) is about 1
_GRID = 2.0**16  # noise is rounded to multiples of 1 / _GRID, which hides the last bits of a machine's logarithm

PRESETS: dict[PresetName, Budget] = {
    "demo": Budget(steps=500, batch_size=64, eval_every=5),
    "tiny": Budget(steps=2000, batch_size=64, eval_every=20),
    "small": Budget(steps=5000, batch_size=64, eval_every=50),
}


class QuadraticTask:
    """f(W) = 1/2 tr((W - W*)ᵀ H (W - W*)) for W of m x n = 8 x 16 and H = diag(0.1, ..., 1), with minimum 0.

    The loss of example i is f(W) + <ξ_i, W>: its gradient is that of f plus noise ξ_i, whose entries are independent
    N(0, 1). Examples i and i + 32,768 have opposite noise, so that over all examples it is exactly zero. The entries of
    W* are 0.2 N(0, 1). W* and the noise belong to the task, and W starts at zero: the seed of a run only orders the
    examples.

    Args:
        preset: One of the sizes; they differ in the length of a run only.
    """

    name = "quadratic"
    tokens_per_example = 1
    own_data = True

    def __init__(self, preset: PresetName) -> None:
        self.preset: PresetName = preset
        self.budget = PRESETS[preset]
        self.curvature = torch.linspace(0.1, 1, ROWS, device="cpu")[:, None]  # the diagonal of H, as a column
        self.target, self.noise_table, self._identity = _draw_once()

    @property
    def train_size(self) -> int:
        """Number of examples, each a draw of the noise."""
        return EXAMPLES

    @property
    def smoothness(self) -> float:
        """L with ‖∇f(X) - ∇f(Y)‖_nuclear <= L ‖X - Y‖_spectral: tr H, attained where X - Y is orthogonal."""
        return self.curvature.sum().item()

    @property
    def noise(self) -> float:
        """ν = tr(E[ξ ξᵀ]^(1/2)) = m √n, in units of the gradient; a batch of b has ν / √b."""
        return ROWS * COLUMNS**0.5

    @property
    def f0(self) -> float:
        """f at the start, W = 0."""
        return self.value(torch.zeros(ROWS, COLUMNS, device="cpu")).item()

    def data_identity(self) -> DataIdentity:
        """Name, SHA-256 and size of minimum and noise."""
        return self._identity

    def build_model(self, seed: int) -> nn.Module:
        """W = 0 as the weight of a linear layer, whatever the seed."""
        model = nn.utils.skip_init(nn.Linear, COLUMNS, ROWS, bias=False)  # draws nothing
        model.load_state_dict({"weight": torch.zeros(ROWS, COLUMNS, device="cpu")})
        return model

    def value(self, weight: Tensor) -> Tensor:
        """f(W) of W (m, n), 0-d."""
        return (self.curvature * (weight - self.target).square()).sum() / 2

    def batch(self, examples: Tensor) -> Batch:
        """Noise (B, m, n) of the examples (B,), and W* for each of them."""
        return self.noise_table[examples], self.target.expand(len(examples), -1, -1)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """f(W) + <mean noise of the batch, W>, 0-d; below zero where the noise happens to point there."""
        weight = _weight(model)
        return self.value(weight) + (batch[0].mean(0) * weight).sum()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: Part, *, whole: bool) -> Evaluation:
        """f(W), without noise, the same for every part; its minimum is 0."""
        del part, whole
        return Evaluation(self.value(_weight(model)).item())


def _weight(model: nn.Module) -> Tensor:
    """W (m, n), read by sending the unit vectors through the layer: so methods that look at its inputs see some."""
    return model(torch.eye(COLUMNS, device="cpu")).T


@functools.cache
def _draw_once() -> tuple[Tensor, Tensor, DataIdentity]:
    """W*, noise, and what they are."""
    target = TARGET_SCALE * _normal("quadratic target", 1)[0]
    half = _normal("quadratic noise", EXAMPLES // 2)
    noise = torch.cat([half, -half])
    content = target.numpy().tobytes() + noise.numpy().tobytes()
    identity = DataIdentity(f"quadratic {ROWS} x {COLUMNS}", hashlib.sha256(content).hexdigest(), len(content))
    return target, noise, identity


def _normal(purpose: str, count: int) -> Tensor:
    """Draws (count, m, n) from N(0, 1), in float32 but made in float64 and rounded: the same on every machine."""
    generator = torch.Generator(device="cpu").manual_seed(derive_seed(purpose))
    drawn = torch.randn(count, ROWS, COLUMNS, generator=generator, dtype=torch.float64, device="cpu")
    return drawn.mul_(_GRID).round_().div_(_GRID).float()
