"""Moments of what heads and tables read: Adam on the multiplied gradient, and all that may be wrong with asking so."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.functional import embedding
from torch.utils.checkpoint import checkpoint

from steepest import InputMoment, Momo, Muon, MuonMax, NewtonMuon, RowNorm, Sign, SteepestDescent, route
from steepest.stages import MissingInputsError
from tests.cases import cases
from tests.optim.training import powers_of
from tests.reference.input_moment_adam import Preconditioned

TOKENS, WIDTH, EVERY = 11, 5, 4
BOTH = ("head", "embedding")


class Net(nn.Module):
    """A table and a head, which the plan finds."""

    def __init__(self, padding=None):
        super().__init__()
        self.table = nn.Embedding(TOKENS, WIDTH, padding_idx=padding)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)

    def forward(self, tokens):
        return self.head(torch.tanh(self.table(tokens)))


def net(padding=None, dtype=torch.float64):
    torch.manual_seed(2)
    return Net(padding).to(dtype)


def tokens(step, size=12):
    """Some are seen far more often than others, and not all in each step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(TOKENS, (size, 3), generator=generator).minimum(
        torch.randint(TOKENS, (size, 3), generator=generator)
    )


def loss_of(model, seen):
    return nn.functional.cross_entropy(model(seen).transpose(1, 2), (3 * seen + 1) % TOKENS)


def options(roles=BOTH, **others):
    return InputMoment(**{"roles": roles, "on": "gradient", "every": EVERY, **others})


def train(model, optimizer, steps, parts=1):
    for step in steps:
        optimizer.zero_grad()
        for part in tokens(step).chunk(parts):
            (loss_of(model, part) / parts).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.slow
@cases("roles, exponent, blend, padding", [(("head",), 1, 1, None), (("embedding",), 1, 1, 0), (BOTH, 0.5, 0.75, 0)])
def test_fifty_steps_are_those_of_the_reference(roles, exponent, blend, padding):
    model, settings = net(padding), {"every": EVERY, "decay": 0.8, "ridge": 0.05, "blend": blend}
    given = options(roles, exponents=(exponent, 0.0), **settings)
    optimizer = Muon(model, adam_lr=0.01, betas=(0.9, 0.95), eps=1e-8, precondition=given)
    layers = {
        "embedding": (model.table, {"table": True, "padding": padding}),
        "head": (model.head, {"table": False}),
    }
    references = {
        role: Preconditioned(layer.weight, exponent=exponent if role in roles else 0.0, **settings, **own)
        for role, (layer, own) in layers.items()
    }
    for step in range(50):
        seen = tokens(step)
        read = {"embedding": seen.flatten(), "head": torch.tanh(model.table(seen)).detach().reshape(-1, WIDTH)}
        optimizer.zero_grad()
        loss_of(model, seen).backward()
        gradients = {role: layer.weight.grad.clone() for role, (layer, _) in layers.items()}
        optimizer.step()
        for role, (layer, _) in layers.items():
            references[role].step(gradients[role], read[role], lr=0.01, betas=(0.9, 0.95), eps=1e-8)
            torch.testing.assert_close(layer.weight.detach(), references[role].w, rtol=0, atol=1e-10)
    assert {role for role, (layer, _) in layers.items() if powers_of(optimizer, layer.weight) is not None} == {*roles}


def frequencies(model, optimizer):
    """Of the last refresh, where moments do not remember."""
    return optimizer.state[model.table.weight]["input_moment"][0]


NOW = {"every": 1, "first": 0, "decay": 0.0}


def counted(numbers, weights=None):
    counts = torch.bincount(numbers.flatten(), None if weights is None else weights.flatten(), TOKENS).double()
    return counts / counts.sum()


@cases("reentrant", [None, True, False])
@cases("parts", [1, 3])
def test_each_token_counts_once_in_any_micro_batches_and_checkpoints(parts, reentrant):
    model = net()
    optimizer = Muon(model, precondition=options(("embedding",), **NOW))
    plain = copy.deepcopy(model)  # without hooks
    for part in tokens(0).chunk(parts):
        x = embedding(part, plain.table.weight).requires_grad_()
        h = model.table(part) if reentrant is None else checkpoint(read, model, part, x, use_reentrant=reentrant)
        model.head(h).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(frequencies(model, optimizer), counted(tokens(0)), rtol=0, atol=1e-15)


def read(model, numbers, x):
    """What a reentrant checkpoint needs: an argument with a gradient."""
    return model.table(numbers) + 0 * x


def test_masked_tokens_and_rows_of_padding_do_not_count():
    model, seen = net(padding=2), tokens(1)
    optimizer = Muon(model, precondition=options(("embedding",), **NOW))
    mask = torch.arange(3).expand(12, 3).double()
    with optimizer.input_mask(mask):
        loss_of(model, seen).backward()
    optimizer.step()
    expected = counted(seen, mask * (seen != 2))
    torch.testing.assert_close(frequencies(model, optimizer), expected, rtol=0, atol=1e-15)
    assert frequencies(model, optimizer)[2] == 0


def test_micro_batches_and_other_passes_change_nothing():
    whole, parts = net(), net()
    expected = train(whole, Muon(whole, precondition=options(structure="full")), range(6))
    optimizer = Muon(parts, precondition=options(structure="full"))
    with torch.no_grad():
        parts(tokens(100))
    parts(tokens(101))
    for one, other in zip(train(parts, optimizer, range(6), parts=3), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_run_that_is_saved_between_micro_batches_goes_on_exactly():
    runs = []
    for resumed in (False, True):
        model = net(dtype=torch.float32)
        optimizer = Muon(model, precondition=options(stagger=True))
        train(model, optimizer, range(2 * EVERY - 1))
        optimizer.zero_grad()
        first, second = tokens(2 * EVERY - 1).chunk(2)
        loss_of(model, first).backward()
        if resumed:
            saved, gradients = copy.deepcopy((model.state_dict(), optimizer.state_dict())), model
            model = net(dtype=torch.float32)
            optimizer = Muon(model, precondition=options(stagger=True))
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
            for p, q in zip(model.parameters(), gradients.parameters(), strict=True):
                p.grad = q.grad
        loss_of(model, second).backward()
        optimizer.step()
        runs.append(train(model, optimizer, range(2 * EVERY, 3 * EVERY + 1)))
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def test_tables_of_one_sequence_share_frequencies_and_layers_may_come_later():
    model = net()
    optimizer = Muon(model, precondition=options(**NOW))
    model.values = nn.Embedding(TOKENS, 3).double()
    optimizer.add_module(model.values)
    seen = tokens(0)
    loss_of(model, seen).backward()
    model.values(seen).square().sum().backward()
    optimizer.step()
    assert powers_of(optimizer, model.values.weight) is powers_of(optimizer, model.table.weight)
    assert optimizer.plan.row("values.weight").inputs == "as table.weight"


def test_the_plan_says_what_is_kept_of_whom():
    model = net(dtype=torch.float32)
    rows = {row.name: row for row in Muon(model, precondition=options()).plan}
    assert (rows["table.weight"].inputs, rows["head.weight"].inputs) == ("frequencies of 11", "full 5")
    assert (rows["table.weight"].moment_bytes, rows["table.weight"].inverse_bytes) == (4 * (11 + 1), 4 * 11)
    assert (rows["head.weight"].moment_bytes, rows["head.weight"].inverse_bytes) == (4 * (25 + 1), 4 * 25)
    only = Muon(model, precondition=options(structure={"head*": "diagonal", "table*": "none"}))
    assert [row.inputs for row in only.plan] == [None, "diagonal 5"]


def test_matrices_are_preconditioned_beside_them_as_without_them():
    def wide():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 3), nn.Linear(3, 9)).double()

    found = []
    for roles in (("matrix",), ("matrix", *BOTH)):
        model = wide()
        optimizer = NewtonMuon(model, precondition=InputMoment(roles=roles, on="gradient", first=0, every=1))
        nn.functional.cross_entropy(model(torch.arange(9)), torch.arange(9)).backward()
        optimizer.step()
        found.append([p.detach().clone() for p in model.parameters()])
    table, matrix, _, head, bias = range(5)
    assert torch.equal(found[0][matrix], found[1][matrix])
    assert torch.equal(found[0][bias], found[1][bias])
    torch.testing.assert_close(found[0][table], found[1][table])  # Adam's first step is a sign, and all are as frequent
    assert not torch.allclose(found[0][head], found[1][head])


def test_any_norm_that_looks_at_entries_will_do():
    model = net()
    optimizer = SteepestDescent(model, norms={"head": Sign()}, precondition=options(("head",), **NOW))
    loss_of(model, tokens(0)).backward()
    gradient, before = model.head.weight.grad.clone(), model.head.weight.detach().clone()
    optimizer.step()
    (power,) = powers_of(optimizer, model.head.weight)
    assert torch.equal(model.head.weight.detach() - before < 0, gradient @ power[0] > 0)


def test_norms_that_look_at_whole_rows_are_refused():
    text = "it works on the role 'head', whose norm is row here; .* Give the role such a norm, or leave it out of roles"
    with pytest.raises(ValueError, match=text):
        SteepestDescent(net(), norms={"head": RowNorm()}, precondition=options())


def test_momo_and_steps_by_dual_norms_are_refused_as_for_matrices():
    for build in (lambda m, **o: Muon(m, step_size=Momo(), **o), MuonMax):
        with pytest.raises(ValueError, match=r"on='gradient'\) averages preconditioned gradients"):
            build(net(), precondition=options())


def tied():
    model = net()
    model.head.weight = model.table.weight
    return model


@pytest.mark.parametrize("role", BOTH)
def test_a_table_that_is_the_head_too_is_refused_by_name_or_left_alone(role):
    plan = route(tied(), overrides={"table.weight": role})
    text = r"'table.weight' is a table and a head \(table.weight, head.weight\).*structure={'table.weight': 'none'}"
    with pytest.raises(ValueError, match=text):
        Muon(plan, precondition=options((role,)))
    alone = {"structure": {"table.weight": "none"}}
    with pytest.raises(ValueError, match=f"no {role} is left to precondition"):
        Muon(plan, precondition=options((role,), **alone))


class Positions(nn.Module):
    """Adds a table of positions whole."""

    def __init__(self):
        super().__init__()
        self.tokens, self.pos_embed = nn.Embedding(7, 4), nn.Parameter(torch.zeros(3, 4))
        self.head = nn.Linear(4, 7)

    def forward(self, seen):
        return self.head(self.tokens(seen) + self.pos_embed)


def test_tables_that_nobody_looks_up_by_number_and_biases_are_left_alone():
    model = Positions()
    optimizer = Muon(model, precondition=options(**NOW))
    model(torch.arange(3)).square().sum().backward()
    optimizer.step()
    kept = {row.name: row.inputs for row in optimizer.plan}
    assert kept == {"pos_embed": None, "tokens.weight": "frequencies of 7", "head.weight": "full 4", "head.bias": None}
    groups = [{"params": model.head.parameters(), "role": "head"}]
    (stage,) = SteepestDescent(groups, precondition=options(hooks=False)).stages
    assert [reader.row.shape for reader in stage.readers] == [(7, 4)]


def test_numbers_that_no_hook_sees_are_missed_by_name_and_may_be_shown():
    model, seen = net(), tokens(3)
    optimizer = Muon(model, precondition=options(("embedding",), **NOW))
    model.head(embedding(seen, model.table.weight)).square().sum().backward()
    with pytest.raises(MissingInputsError, match=r"^'table\.weight' has a gradient, but its inputs"):
        optimizer.step()
    optimizer.record_input(model.table.weight, seen)
    optimizer.step()
    assert torch.equal(frequencies(model, optimizer), counted(seen))
    for wrong, told in ((seen.double(), "torch.float64 (12, 3)"), (seen + 5, f"from 5 to {int(seen.max()) + 5}")):
        text = re.escape("record_input: 'table.weight' takes numbers of its 11 rows, got ")
        with pytest.raises(ValueError, match=f"^{text}.*{re.escape(told)}"):
            optimizer.record_input(model.table.weight, wrong)


class Scaled(nn.Embedding):
    """May change the numbers first."""

    def forward(self, input):
        return super().forward(input // 2)


def test_tables_that_hooks_cannot_see_are_told_of_when_the_optimizer_is_built():
    model = net()
    model.table = Scaled(TOKENS, WIDTH).double()
    with pytest.warns(UserWarning, match="table.weight: Scaled has a forward.*leave them as they are with InputMoment"):
        Muon(model, precondition=options())
