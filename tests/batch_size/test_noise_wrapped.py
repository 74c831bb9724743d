"""NoiseScale of optimizers that hosts have wrapped: the steps inside are counted."""

import warnings

import pytest
import torch

import steepest
from steepest.batch_size.noise import NoiseScale
from tests.batch_size.noisy_loops import ALL, PER, measured, network, sgd, train, values
from tests.cases import cases

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about torch.jit.script, which it uses
    from torch.distributed.optim import PostLocalSGDOptimizer


class Accelerated(torch.optim.Optimizer):
    """As accelerate's: everything is forwarded, nothing is initialised."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)
    defaults = property(lambda self: self.optimizer.defaults)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure=None):
        return self.optimizer.step(closure)


class Lightened:
    """As Lightning's and Fabric's: a class made on the fly, over the optimizer's, with its attributes."""

    def __init__(self, optimizer):
        self.__dict__ = {key: value for key, value in vars(optimizer).items() if key != "step"}
        self.__class__ = type(f"Lightning{type(optimizer).__name__}", (Lightened, type(optimizer)), {})
        self._optimizer = optimizer

    @property
    def optimizer(self):
        return self._optimizer

    def step(self, closure=None):
        return self._optimizer.step(closure)


class Forwarding:
    """As hosts' of their own, which are no optimizers."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __getattr__(self, name):
        return getattr(self.optimizer, name)


class NeverAverages:
    def average_parameters(self, params):
        pass


WRAPPERS = {
    "accelerate": Accelerated,
    "lightning": Lightened,
    "forwarding": Forwarding,
    "twice": lambda optimizer: Accelerated(Lightened(optimizer)),
    "torch": lambda optimizer: PostLocalSGDOptimizer(optimizer, NeverAverages()),
}


@cases("wrap", WRAPPERS)
def test_a_wrapped_optimizer_is_measured_like_the_one_inside(wrap):
    model = network()
    optimizer = WRAPPERS[wrap](sgd(model))
    noise = NoiseScale(model, optimizer, every=1, samples=PER, kinds=ALL)
    train(model, optimizer)
    torch.testing.assert_close(values(noise), values(measured()), rtol=0, atol=0)
    noise.close()
    train(model, optimizer, steps=1)


@pytest.mark.parametrize("wrap", ["accelerate", "lightning", "forwarding", "twice"])
def test_the_norm_is_that_of_the_optimizer_inside(wrap):
    model = network()
    plain, wrapped = (
        NoiseScale(model, make(steepest.Muon(model))) for make in (lambda optimizer: optimizer, WRAPPERS[wrap])
    )
    assert [str(layer.norm) for layer in plain._layers] == [str(layer.norm) for layer in wrapped._layers]


class Alone(torch.optim.Optimizer):
    def __init__(self, parameters):
        self.param_groups = [{"params": list(parameters), "lr": 0.1}]

    def step(self, closure=None):
        pass


def test_an_optimizer_that_calls_no_hooks_says_what_to_pass():
    model = network()
    message = (
        r"^NoiseScale takes the torch.optim.Optimizer .* got {}, which calls no hooks when it steps\. .*wrapper\.opt"
    )
    for optimizer in (Alone(model.parameters()), object(), None, model):
        with pytest.raises(TypeError, match=message.format(type(optimizer).__name__)):
            NoiseScale(model, optimizer, norm="frobenius")
