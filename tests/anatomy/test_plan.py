"""The plan as a table, as numbers and as JSON."""

import json
import re
from dataclasses import replace

import pytest
from torch import nn

from steepest.anatomy import Plan, View, route


@pytest.fixture
def plan():
    blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4, bias=False)) for _ in range(3)])
    model = nn.ModuleDict({"tokens": nn.Embedding(10, 4), "blocks": blocks, "head": nn.Linear(4, 10)})
    model["blocks"].requires_grad_(False)
    return route(model)


def test_the_table_is_aligned_and_folds_repeated_layers(plan):
    assert str(plan) == (
        "parameter          shape  role       view        norm      numbers  tensors  reason\n"
        "tokens.weight      10x4   embedding  transposed  adam           40        1  lookup table of Embedding\n"
        "blocks.*.0.weight  4      vector     -           adam           12        3  frozen; gain of LayerNorm\n"
        "blocks.*.0.bias    4      vector     -           adam           12        3  frozen; bias of LayerNorm\n"
        "blocks.*.1.weight  4x4    matrix     linear      spectral       48        3  frozen; weight of Linear\n"
        "head.weight        10x4   head       linear      adam           40        1"
        "  output head: one row per row of the token table, 10\n"
        "head.bias          10     vector     -           adam           10        1  bias of Linear\n"
        "\n"
        "total      tensors  numbers      share\n"
        "matrix           3       48      29.6%\n"
        "embedding        1       40      24.7%\n"
        "head             1       40      24.7%\n"
        "vector           7       34      21.0%\n"
        "all             12      162  0 unknown"
    )


def test_the_full_table_has_a_line_per_parameter(plan):
    lines = plan.table(collapse=False).splitlines()
    assert [line.split()[0] for line in lines[1 : len(plan) + 1]] == [row.name for row in plan]


def test_learning_rates_are_a_column_once_there_are_some(plan):
    with_rate = Plan(tuple(replace(row, lr=0.02 if row.role == "matrix" else None) for row in plan))
    lines = str(with_rate).splitlines()
    assert lines[0].split() == ["parameter", "shape", "role", "view", "norm", "lr", "numbers", "tensors", "reason"]
    assert lines[1].split()[5] == "-"
    assert lines[4].split()[5] == "0.02"


def test_a_model_without_parameters_has_an_empty_plan():
    plan = route(nn.ReLU())
    assert len(plan) == 0
    assert str(plan).splitlines()[-1].split() == ["all", "0", "0", "0", "unknown"]


def test_counts_and_parameters(plan):
    assert plan.counts() == {"matrix": 3, "embedding": 1, "head": 1, "vector": 7}
    plan.assert_counts(matrix=3, embedding=1, head=1, vector=7)
    assert plan.parameters("head") == [plan.row("head.weight").parameter]
    assert plan.parameters("matrix") == []
    assert plan[0].name == "tokens.weight"
    assert [row.name for row in plan[-2:]] == ["head.weight", "head.bias"]


def test_other_counts_than_expected_are_listed(plan):
    message = (
        "The plan has other counts than expected.\n"
        "embedding: expected 3, found 1 (-2): tokens.weight\n"
        "head: expected 0, found 1 (+1): head.weight"
    )
    with pytest.raises(AssertionError, match=re.escape(message)):
        plan.assert_counts(matrix=3, embedding=3, head=0)
    with pytest.raises(AssertionError, match=r"embedding: expected 1, found 0 \(-1\): none"):
        route(nn.Linear(2, 3)).assert_counts(embedding=1)


def test_an_unknown_role_or_name_is_corrected(plan):
    with pytest.raises(ValueError, match=r"'matrices' is not a role. Roles are matrix, embedding, head, vector"):
        plan.assert_counts(matrices=3)
    with pytest.raises(KeyError, match=r"The plan has no parameter 'haed.weight'. Did you mean 'head.weight'\?"):
        plan.row("haed.weight")


def test_rows_compare_without_their_tensors(plan):
    other = route(nn.ModuleDict({"tokens": nn.Embedding(10, 4)}))
    assert other[0] == plan[0]
    assert "Parameter" not in repr(plan[0])
    assert hash(other[0]) == hash(plan[0])


def test_json_holds_every_row_and_its_view_can_be_read_back(plan):
    records = json.loads(plan.to_json())
    assert records[0] == {
        "name": "tokens.weight",
        "shape": [10, 4],
        "role": "embedding",
        "view": "transposed",
        "norm": "adam",
        "numel": 40,
        "trainable": True,
        "reason": "lookup table of Embedding",
        "lr": None,
        "owner": None,
        "inputs": None,
        "moment_bytes": 0,
        "inverse_bytes": 0,
        "state_bytes": 0,
        "averages": None,
    }
    views = [View.parse(record["view"]) if record["view"] else None for record in records]
    assert views == [row.view for row in plan]
