"""Newton-Muon in float64 numpy, straight from Algorithm 1 of arXiv:2604.01472 with an exact polar factor."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def msgn(m: Array) -> Array:
    u, s, vh = np.linalg.svd(m, full_matrices=False)
    kept = s > 1e-13 * s.max()
    return u[:, kept] @ vh[kept]


class NewtonMuon:
    """One layer y = W z; `blocks` diagonal blocks of K, each inverted with a ridge of its own."""

    def __init__(self, w: Array, *, blocks: int, every: int, decay: float, ridge: float, floor: float) -> None:
        size = w.shape[1] // blocks
        self.w, self.buffer = w.copy(), np.zeros_like(w)
        self.k = [1e-3 * np.eye(size) for _ in range(blocks)]
        self.inverse = [np.eye(size) for _ in range(blocks)]
        self.every, self.decay, self.ridge, self.floor = every, decay, ridge, floor
        self.t = 0

    def step(
        self, g: Array, z: Array, *, lr: float, mu: float, form: Literal["heavy-ball", "ema"], nesterov: bool, wd: float
    ) -> None:
        """One step with the gradient g (m, n) and inputs z (n, N), a token per column."""
        if (self.t + 1) % self.every == 0:
            for i, part in enumerate(np.split(z, len(self.k))):
                self.k[i] = self.decay * self.k[i] + (1 - self.decay) * part @ part.T / part.shape[1]
                size = len(part)
                gamma = self.ridge * np.trace(self.k[i]) / size + self.floor
                self.inverse[i] = np.linalg.inv(self.k[i] + gamma * np.eye(size))
        parts = zip(np.split(g, len(self.k), axis=1), self.inverse, strict=True)
        g = np.concatenate([part @ inverse for part, inverse in parts], axis=1)
        new = 1.0 if form == "heavy-ball" else 1 - mu
        self.buffer = mu * self.buffer + new * g
        direction = msgn(new * g + mu * self.buffer if nesterov else self.buffer)
        scale = max(1.0, self.w.shape[0] / self.w.shape[1]) ** 0.5
        self.w = (1 - lr * wd) * self.w - lr * scale * direction
        self.t += 1
