"""Small models, and what routing says of them."""

from torch import nn

from steepest.anatomy import route


def summary(model, **options):
    """name -> (role, view) of everything that is no plain vector."""
    plan = route(model, **options)
    return {row.name: (row.role, str(row.view)) for row in plan if row.role != "vector"}


def role_of(model, name):
    return route(model).row(name).role


class Block(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 2 * dim)
        self.down = nn.Linear(2 * dim, dim)


class LanguageModel(nn.Module):
    """vocab 16; as many positions as features, so that a block's width looks like a table's rows."""

    def __init__(self, *, tied=False, blocks=2):
        super().__init__()
        self.tokens = nn.Embedding(16, 8)
        self.positions = nn.Embedding(8, 8)
        self.blocks = nn.ModuleList([Block() for _ in range(blocks)])
        self.head = nn.Linear(8, 16, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
