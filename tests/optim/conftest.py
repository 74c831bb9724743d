"""Each test of this folder that asks for `recipe` runs with every one of them."""

import pytest

from tests.optim.training import RECIPES


@pytest.fixture(params=RECIPES, ids=str)
def recipe(request):
    return RECIPES[request.param]
