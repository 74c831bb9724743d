"""The order in which a run sees its examples: fixed by the seed alone, whatever the batch size."""

import contextlib
import hashlib
from collections.abc import Generator, Mapping

import torch
from torch import Tensor


def derive_seed(*parts: str | int) -> int:
    """A seed below 2^63 for one purpose, so that streams with different `parts` are unrelated.

    Args:
        parts: What the stream is for, e.g. ("order", run_seed, epoch).
    """
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


@contextlib.contextmanager
def seeded(*parts: str | int) -> Generator[None]:
    """Let torch draw by `derive_seed` for a while; its global generator is then what it was.

    Args:
        parts: What the numbers are for.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(*parts))
        yield


class ExampleOrder:
    """An endless walk over `size` examples: a new permutation each epoch, batches run on across the boundary.

    `take(2)` twice gives what `take(4)` gives once, so runs of all batch sizes read one and the same sequence.
    """

    def __init__(self, size: int, *, seed: int) -> None:
        if size < 1:
            raise ValueError(f"An order needs at least one example, got size={size}.")
        self.size = size
        self.seed = seed
        self.epoch = 0
        self.position = 0
        self._permutation = self._draw()

    def take(self, count: int) -> Tensor:
        """The next `count` examples, as int64 indices (count,)."""
        parts: list[Tensor] = []
        while count > 0:
            part = self._permutation[self.position : self.position + count]
            parts.append(part)
            count -= len(part)
            self.position += len(part)
            if self.position == self.size:
                self.epoch, self.position = self.epoch + 1, 0
                self._permutation = self._draw()
        return torch.cat(parts)

    def state_dict(self) -> dict[str, int]:
        """Where the walk stands; all that is needed to go on exactly."""
        return {"size": self.size, "seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from `state`.

        Raises:
            ValueError: If the state is of another walk (size or seed), or no position in this one.
        """
        walk = {"size": self.size, "seed": self.seed}
        if {key: state.get(key) for key in walk} != walk or set(state) != {*walk, "epoch", "position"}:
            raise ValueError(f"The stored order {dict(state)} does not belong to the walk {walk}.")
        if state["epoch"] < 0 or not 0 <= state["position"] < self.size:
            raise ValueError(f"The stored order {dict(state)} is outside of its {self.size} examples.")
        self.epoch, self.position = state["epoch"], state["position"]
        self._permutation = self._draw()

    def _draw(self) -> Tensor:
        generator = torch.Generator(device="cpu").manual_seed(derive_seed("order", self.seed, self.epoch))
        return torch.randperm(self.size, generator=generator, device="cpu")
