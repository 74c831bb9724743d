"""Peak memory of functions whose peak is known."""

import pytest
import torch

from steepest.lab.bench.memory import highest, peak_extra_bytes


def test_the_peak_is_what_is_held_at_once():
    def work():
        first, second = torch.empty(10_000), torch.empty(20_000)
        del first
        third = torch.empty(5_000)
        return second, third

    assert peak_extra_bytes(work) == 4 * 30_000


def test_what_is_kept_from_the_first_time_does_not_count_again():
    kept: list[torch.Tensor] = []

    def work():
        if not kept:
            kept.append(torch.empty(50_000))
        return torch.empty(1_000)

    assert peak_extra_bytes(work) == 4_000


def test_what_replaces_something_counts_only_while_both_are_held():
    kept = [torch.empty(8_000)]

    def release_first():
        kept.clear()
        kept.append(torch.empty(8_000))

    def release_last():
        kept.append(torch.empty(8_000))
        del kept[0]

    assert peak_extra_bytes(release_first) == 0
    assert peak_extra_bytes(release_last) == 32_000


@pytest.mark.parametrize(("changes", "top"), [([], 0), ([-5, 3], 0), ([4, -4, 3, 2, -5], 5)])
def test_the_highest_level(changes, top):
    assert highest(changes) == top
