"""Wrong uses of the optimizers, each with what the message must say: who, what came, what was expected, what to do."""

import re

import pytest
import torch
from torch import nn

from steepest import AdaInf, Adam, Muon, MuonAdam, Sign, Spectral, SteepestDescent, View
from tests.cases import cases


def weight(*shape, dtype=torch.float32):
    return nn.Parameter(torch.zeros(shape, dtype=dtype))


def linear():
    return nn.Linear(3, 2)


BUILD = {
    "negative tensor lr": (
        lambda: Muon(linear(), lr=torch.tensor(-1.0)),
        ValueError,
        "lr must be finite and at least 0, got -1.0",
    ),
    "momentum tensor": (
        lambda: Muon(linear(), momentum=torch.tensor(0.9)),
        TypeError,
        "momentum must be a number, got tensor(0.9000)",
    ),
    "dtype text": (
        lambda: Muon(linear(), dtype="bfloat16"),
        TypeError,
        "Spectral: dtype must be one of torch.float16, torch.bfloat16, torch.float32",
    ),
    "betas for a norm that does not adapt": (
        lambda: Muon([{"params": [weight(2, 2)], "betas": (0.9, 0.95)}]),
        ValueError,
        "betas are for norms that adapt, and spectral does not; give momentum instead",
    ),
    "a module in a group": (
        lambda: Muon([{"params": linear()}]),
        TypeError,
        "parameter group 0 has a module as 'params'; write module.parameters()",
    ),
    "view of a number": (lambda: View(split=4), TypeError, "View split must be a tuple of fan-outs"),
    "view of a fraction": (lambda: View(heads=2.0), TypeError, "View heads must hold whole numbers, got 2.0"),
    "a view that does not fit, for a norm that does not look": (
        lambda: Muon([{"params": [("t", weight(6, 2))], "role": "embedding", "view": View(split=(2, 2))}]),
        ValueError,
        "does not fit shape (6, 2): split adds up to 4",
    ),
    "negative lr": (lambda: Muon(linear(), lr=-1), ValueError, "lr must be finite and at least 0, got -1"),
    "lr nan": (lambda: Muon(linear(), lr=float("nan")), ValueError, "lr must be finite and at least 0, got nan"),
    "lr inf": (lambda: Adam(linear(), lr=float("inf")), ValueError, "lr must be finite and at least 0, got inf"),
    "lr text": (lambda: Adam(linear(), lr="0.1"), TypeError, "Adam: lr must be a number, got '0.1'. Write lr=0.1,"),
    "lr tensor of two": (
        lambda: Adam(linear(), lr=torch.ones(2)),
        TypeError,
        "lr as a tensor must be a 0-d real number, got shape (2,)",
    ),
    "lr bool": (lambda: Adam(linear(), lr=True), TypeError, "lr must be a number, got True"),
    "lr misses a role": (
        lambda: SteepestDescent(linear(), lr={"matrix": 0.1}),
        ValueError,
        "lr={'matrix': 0.1} has no entry for the role 'vector', which this model has; add one.",
    ),
    "lr for a wrong role": (
        lambda: SteepestDescent(linear(), lr={"matrx": 0.1}),
        ValueError,
        "lr: Unknown role 'matrx': did you mean 'matrix'? Valid: embedding, head, matrix, vector.",
    ),
    "momentum one": (lambda: Muon(linear(), momentum=1.0), ValueError, "momentum must be in [0, 1), got 1.0"),
    "negative momentum": (lambda: Muon(linear(), momentum=-0.1), ValueError, "momentum must be in [0, 1), got -0.1"),
    "negative decay": (
        lambda: Muon(linear(), weight_decay=-1e-4),
        ValueError,
        "weight_decay must be finite and at least 0, got -0.0001",
    ),
    "betas of one": (
        lambda: Adam(linear(), betas=(0.9, 1.0)),
        ValueError,
        "betas must be two numbers in [0, 1), got (0.9, 1.0)",
    ),
    "one beta": (lambda: Adam(linear(), betas=0.9), TypeError, "betas must be two numbers in [0, 1), got 0.9"),
    "nesterov number": (lambda: Muon(linear(), nesterov=1), TypeError, "nesterov must be True or False, got 1"),
    "negative eps": (
        lambda: Adam(linear(), eps=-1e-8),
        ValueError,
        "Adam: eps must be finite and at least 0, got -1e-08.",
    ),
    "unknown scale": (
        lambda: Muon(linear(), scale="match_rms"),
        ValueError,
        "Unknown scale 'match_rms': did you mean 'match_rms_adamw'? Valid: match_rms_adamw, none, original, spectral.",
    ),
    "unknown polar": (lambda: Muon(linear(), polar="newton_schulz"), ValueError, "did you mean 'newton-schulz'?"),
    "unknown coefficients": (lambda: Muon(linear(), coefficients="jordan5"), ValueError, "did you mean 'jordan'?"),
    "coefficients that climb": (
        lambda: Muon(linear(), coefficients=[(4.0098, -7.0585, 2.4635)]),
        ValueError,
        "Coefficients 'custom' are unsafe on the singular values (0, 1.01]",
    ),
    "unknown norm": (
        lambda: SteepestDescent(linear(), norms={"matrix": "spectrl"}),
        ValueError,
        "Unknown norm 'spectrl': did you mean 'spectral'? Valid: ada_2, ada_inf, col, frobenius, nuclear, ",
    ),
    "norm class": (
        lambda: SteepestDescent(linear(), norms={"matrix": Spectral}),
        TypeError,
        "norms['matrix']: norm must be a name or an object such as Spectral()",
    ),
    "norm for a wrong role": (
        lambda: SteepestDescent(linear(), norms={"heads": Sign()}),
        ValueError,
        "norms: Unknown role 'heads': did you mean 'head'?",
    ),
    "unknown on_nonfinite": (
        lambda: Muon(linear(), on_nonfinite="ignore"),
        ValueError,
        "Unknown on_nonfinite 'ignore'. Valid: raise, skip.",
    ),
    "no parameters": (lambda: Muon([]), ValueError, "optimizer got an empty parameter list"),
    "module without parameters": (lambda: Muon(nn.ReLU()), ValueError, "The model has no parameters to optimise"),
    "one tensor": (lambda: Muon(weight(2, 2)), TypeError, "got one tensor; write [tensor]"),
    "a number": (lambda: Muon([weight(2, 2), 3]), TypeError, "'params[1]' must be a tensor, got int"),
    "integers": (
        lambda: Muon([torch.zeros(2, 2, dtype=torch.int64)]),
        TypeError,
        "'params[0]' must be of real floating point, got torch.int64. Leave it out of the optimizer.",
    ),
    "complex": (
        lambda: Muon([("w", weight(2, 2, dtype=torch.complex64))]),
        TypeError,
        "'w' must be of real floating point, got torch.complex64. Optimise torch.view_as_real of it.",
    ),
    "sparse": (
        lambda: Adam([torch.zeros(2, 2).to_sparse()]),
        ValueError,
        "'params[0]' must be dense, got layout torch.sparse_coo",
    ),
    "non-leaf": (lambda: Adam([weight(2, 2) * 2]), ValueError, "'params[0]' is the result of an operation"),
    "lazy": (lambda: Adam(nn.LazyLinear(2).parameters()), ValueError, "'params[0]' has no shape yet; run one batch"),
    "duplicate": (
        lambda: Muon([w := weight(2, 2), w]),
        ValueError,
        "'params[1]' appears twice, first as 'params[0]'; list each parameter once",
    ),
    "duplicate over groups": (
        lambda: Muon([{"params": [w := weight(2, 2)]}, {"params": [w]}]),
        ValueError,
        "appears twice",
    ),
    "groups and tensors": (
        lambda: Muon([{"params": [weight(2, 2)]}, weight(2, 2)]),
        TypeError,
        "params mixes parameters and groups; put every parameter into a group",
    ),
    "group without params": (lambda: Muon([{"lr": 0.1}]), ValueError, "parameter group 0 has no 'params'; it has 'lr'"),
    "group key": (
        lambda: Muon([{"params": [weight(2, 2)], "momentun": 0.9}]),
        ValueError,
        "parameter group 0: Unknown option 'momentun': did you mean 'momentum'?",
    ),
    "group role": (
        lambda: Muon([{"params": [weight(2, 2)], "role": "matrices"}]),
        ValueError,
        "parameter group 0: Unknown role 'matrices': did you mean 'matrix'?",
    ),
    "group view": (
        lambda: Muon([{"params": [weight(2, 2)], "view": "linear"}]),
        TypeError,
        "view must be a View, such as View(groups=4), or None, got 'linear'",
    ),
    "view that does not fit": (
        lambda: Muon([{"params": [("qkv", weight(6, 2))], "view": View(split=(2, 2))}]),
        ValueError,
        "does not fit shape (6, 2): split adds up to 4, the fan-out is 6",
    ),
    "a vector as matrix": (
        lambda: Muon([{"params": [("b", weight(3))], "role": "matrix"}]),
        ValueError,
        "'b' of shape (3,) has no view as matrices, which the group's norm needs. Give the group a view=",
    ),
    "a scalar as matrix": (
        lambda: Muon([{"params": [("s", weight())], "role": "matrix"}]),
        ValueError,
        "'s' of shape () has no view as matrices",
    ),
    "three dimensions": (
        lambda: Muon([("e", weight(4, 3, 2))]),
        ValueError,
        "'e' of shape (4, 3, 2) may be a stack of matrices or a convolution over one dimension",
    ),
    "keyword that is none": (lambda: MuonAdam(linear(), lr=0.1, nesterov=True), TypeError, "'nesterov'"),
    "v is missing": (lambda: AdaInf().dual(torch.ones(1, 1)), ValueError, "AdaInf needs the second moment v"),
}


@cases("case", BUILD)
def test_building(case):
    call, error, message = BUILD[case]
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_a_sparse_gradient_names_its_parameter():
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = Adam(table)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"gradient of 'weight' has layout torch\.sparse_coo.*sparse=False"):
        optimizer.step()


def test_a_checkpoint_of_another_model_is_refused():
    saved = Muon([weight(2, 3)])
    saved.param_groups[0]["params"][0].grad = torch.ones(2, 3)
    saved.step()
    with pytest.raises(
        ValueError, match=r"'momentum_buffer' of 'params\[0\]' has shape \(2, 3\), but \(3, 2\) is needed"
    ):
        Muon([weight(3, 2)]).load_state_dict(saved.state_dict())


def test_a_refused_checkpoint_changes_nothing():
    saved = Muon([weight(2, 3)], lr=0.7)
    saved.param_groups[0]["params"][0].grad = torch.ones(2, 3)
    saved.step()
    other = Muon([weight(3, 2)], lr=0.1)
    with pytest.raises(ValueError, match="has shape"):
        other.load_state_dict(saved.state_dict())
    assert other.param_groups[0]["lr"] == 0.1
    assert not other.state


def test_a_checkpoint_of_another_optimizer_is_refused():
    parameter = weight(2, 3)
    peer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(2, 3)
    peer.step()
    with pytest.raises(ValueError, match=r"has the entry 'exp_avg', which is of another optimizer"):
        Adam([parameter]).load_state_dict(peer.state_dict())


def test_a_checkpoint_of_another_norm_is_refused():
    with pytest.raises(ValueError, match="group 0 was saved with the norm 'Spectral' but has 'AdaInf' here"):
        Adam([weight(2, 3)]).load_state_dict(Muon([weight(2, 3)]).state_dict())


def test_norms_and_types_cannot_change_under_way():
    parameter = weight(2, 3)
    optimizer = Muon([parameter])
    parameter.grad = torch.ones(2, 3)
    optimizer.step()
    optimizer.param_groups[0].update(norm=AdaInf(), beta2=0.9)
    with pytest.raises(ValueError, match="A norm that adapts cannot replace another one after a step"):
        optimizer.step()
    parameter.data = parameter.data.double()
    parameter.grad = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"became torch\.float64 after its state was made"):
        optimizer.step()


def test_a_checkpoint_with_other_roles_is_refused():
    saved = SteepestDescent([{"params": [weight(2, 3)], "role": "head"}]).state_dict()
    with pytest.raises(ValueError, match="group 0 was saved with the role 'head' but has 'matrix' here"):
        Muon([weight(2, 3)]).load_state_dict(saved)


def test_a_checkpoint_with_fewer_groups_is_refused():
    with pytest.raises(ValueError, match="different number of parameter groups"):
        Muon(linear()).load_state_dict(Muon([weight(2, 3)]).state_dict())
