import math
import re
import warnings

import pytest
import torch

from steepest.optim.guard import Guard, NonFiniteError


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_entry_anywhere_is_found_and_named(dtype, bad):
    guard = Guard("skip")
    largest = torch.finfo(dtype).max / (1 if dtype == torch.float16 else 8)  # room for differences in the average
    gradients = [torch.full((3, 4), largest, dtype=dtype), torch.zeros(5, dtype=dtype)]
    assert guard.admit(lambda: ["a", "b"], gradients, None) is True
    gradients[1][2] = bad
    with pytest.warns(RuntimeWarning, match="the gradient of 'b' is not finite"):
        assert guard.admit(lambda: ["a", "b"], gradients, None) is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        assert guard.admit(lambda: ["a", "b"], gradients, None) is False
    assert guard.skipped_steps() == 2


@pytest.mark.parametrize("loss", [math.nan, torch.tensor(math.inf), torch.tensor([1.0, math.nan])])
def test_a_bad_loss_is_found(loss):
    guard = Guard("skip")
    with pytest.warns(RuntimeWarning, match="the loss is not finite"):
        assert guard.admit(lambda: ["a"], [torch.zeros(2)], loss) is False


def test_raising_says_what_to_do():
    message = "the gradient of 'a' is not finite; nothing was changed. Look for an overflow"
    with pytest.raises(NonFiniteError, match=re.escape(message)):
        Guard("raise").admit(lambda: ["a"], [torch.tensor([math.nan])], None)


def test_unknown_policies_are_refused():
    with pytest.raises(ValueError, match=r"Unknown on_nonfinite 'skp': did you mean 'skip'\? Valid: raise, skip"):
        Guard("skp")
