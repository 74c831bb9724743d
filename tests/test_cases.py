"""Many alike cases as one test: all run, alike, and one that fails is named and does not stop the others."""

import pytest
import torch

from tests.cases import cases

pytest_plugins = ["pytester"]
SEEN = []


@cases("first", ["a", "b"])
@cases("second, third", [(1, 2), pytest.param(3, 4, id="last")])
def test_all_cases_run_with_the_same_seeds_and_folders_of_their_own(first, second, third, rng, tmp_path, monkeypatch):
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    SEEN.append((first, second, third, torch.rand(()), torch.rand((), generator=rng)))
    if len(SEEN) == 4:
        assert [seen[:3] for seen in SEEN] == [("a", 1, 2), ("a", 3, 4), ("b", 1, 2), ("b", 3, 4)]
        assert len({seen[3].item() for seen in SEEN}) == len({seen[4].item() for seen in SEEN}) == 1


@pytest.mark.slow
def test_a_case_that_fails_is_named_and_does_not_stop_the_others(pytester):
    pytester.makepyfile("""
        from tests.cases import cases

        @cases("number", range(4))
        def test_odd(number):
            assert number % 2
    """)
    result = pytester.runpytest("-q")
    result.assert_outcomes(failed=3)
    result.stdout.fnmatch_lines(["*test_odd*number=0*", "*test_odd*number=2*"])
