"""Who works on which parameters."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from steepest.ranks.boxes import Layout, is_sharded
from steepest.ranks.exchange import Route
from steepest.ranks.team import Team


@dataclass
class Duties:
    """Who keeps, and who works on, what.

    Args:
        team: The ranks.
        layouts: Of each parameter.
        routes: Of each parameter that is worked on as whole matrices; several where parts of it are such.
        copies: Plain parameters of which each rank has a copy.
    """

    team: Team
    layouts: Mapping[Tensor, Layout] = field(default_factory=dict[Tensor, Layout])
    routes: Mapping[Tensor, tuple[Route, ...]] = field(default_factory=dict[Tensor, tuple[Route, ...]])
    copies: frozenset[Tensor] = frozenset()

    def own_route(self, parameter: Tensor) -> Route | None:
        """What this rank works on of a parameter; None: nothing.

        Args:
            parameter: Plain or sharded.
        """
        own = self.team.own
        return next((route for route in self.routes.get(parameter, ()) if route.owner == own), None)

    def owner(self, parameter: Tensor) -> int:
        """Who works on a parameter that is worked on as one; this rank, if nobody shares it.

        Args:
            parameter: Plain or sharded.
        """
        routes = self.routes.get(parameter, ())
        return routes[0].owner if routes else self.team.own

    def shares(self, parameter: Tensor) -> bool:
        """Whether other ranks keep parts or copies of a parameter.

        Args:
            parameter: Plain or sharded.
        """
        return self.team.size > 1 and (is_sharded(parameter) or parameter in self.copies)

    def weight(self, parameter: Tensor) -> float:
        """With which this rank's part counts in sums over ranks: copies of a part count as one.

        Args:
            parameter: Plain or sharded.
        """
        if not self.shares(parameter):
            return 1 / self.team.size
        layout = self.layouts[parameter]
        mine = layout.boxes[self.team.own]
        first = mine is not None and layout.boxes.index(mine) == self.team.own
        return float(first) * self.part(parameter)

    def part(self, parameter: Tensor) -> float:
        """The share of the team that works on this parameter together; the others have parameters like it.

        Args:
            parameter: Shared.
        """
        return len(self.layouts[parameter].members) / self.team.size

    def everyone(self, parameter: Tensor) -> bool:
        """Whether the whole team keeps parts or copies of a parameter.

        Args:
            parameter: Plain or sharded.
        """
        return self.shares(parameter) and len(self.layouts[parameter].members) == self.team.size
