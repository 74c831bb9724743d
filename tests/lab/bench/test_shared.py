import pytest
import torch.distributed as dist

from steepest.lab.bench.shared import BESIDE, measure_shared
from steepest.lab.cli import main


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")
def test_every_way_takes_the_step_and_sends_what_the_formula_says():
    side, count = 16, 6
    rows, seconds = measure_shared([(side, side)] * count, ranks=2, rounds=3)
    by_way = {row.way: row for row in rows}
    assert by_way.keys() == BESIDE.keys()
    assert all(len(own) == 3 and min(own) > 0 for own in seconds.values())
    assert by_way["alone"].ratio.median == by_way["everything"].ratio.median == 1
    matrix = 4 * side**2
    # of each matrix, the other rank gets the direction; and of rows, the owner gets half and gives half
    assert by_way["ddp"].sent_bytes == count * matrix
    assert by_way["fsdp"].sent_bytes == count * matrix
    assert by_way["ddp"].imbalance == by_way["fsdp"].imbalance == 1


def test_a_single_round_is_refused(capsys):
    assert main(["bench", "ranks", "--rounds", "1"]) == 2
    assert "at least 2 rounds, got 1" in capsys.readouterr().err
