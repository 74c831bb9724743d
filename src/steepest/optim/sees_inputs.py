"""What an optimizer offers for layers whose inputs hooks cannot see, and for tokens that should not count."""

from collections.abc import Generator
from contextlib import contextmanager

from torch import Tensor
from torch.optim.optimizer import Optimizer

from steepest.optim.precondition import Preconditioner


class SeesInputs(Optimizer):
    """An optimizer that may look at layer inputs."""

    _preconditioner: Preconditioner | None = None

    def record_input(self, parameter: Tensor, x: Tensor, weight: Tensor | None = None) -> None:
        """Show inputs of a layer that hooks do not see, in each micro-batch; ignored in steps that look at none.

        Inside an activation checkpoint it counts once; one with use_reentrant=True runs first without gradients, and
        hides the call.

        Args:
            parameter: Of the layer.
            x: (*tokens, n), what the layer multiplies with; (S, *tokens, n) for a stack of S matrices.
            weight: Of each token, (*tokens) or (S, *tokens), at least 0; None: 1.

        Raises:
            ValueError: If the parameter is not preconditioned, or a shape does not fit.
            RuntimeError: If the optimizer was built without `precondition`.
        """
        self._known_preconditioner("record_input").record(parameter, x, weight)

    @contextmanager
    def input_mask(self, mask: Tensor) -> Generator[None]:
        """Within it, tokens count by their mask where layer inputs are looked at: 0 for padding.

        Keep it around the backward pass too: that is where inputs of compiled and checkpointed layers are seen.

        Args:
            mask: (batch, time) or (batch,), at least 0; fits every layer whose inputs begin with these dimensions, and
                those that have all tokens in one dimension.

        Raises:
            RuntimeError: If the optimizer was built without `precondition`; from backward() outside of it.
        """
        watch = self._known_preconditioner("input_mask").watch
        before, watch.weights = watch.weights, mask.detach()
        try:
            yield
        finally:
            watch.weights = before

    def _known_preconditioner(self, caller: str) -> Preconditioner:
        if self._preconditioner is None:
            raise RuntimeError(
                f"{caller}: this optimizer looks at no inputs; build it with precondition=InputMoment()."
            )
        return self._preconditioner
