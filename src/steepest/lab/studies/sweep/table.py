"""The table of a learning-rate sweep: one line for each method."""

from __future__ import annotations

from steepest.lab.report import wording
from steepest.lab.report.table import DOT, Cell, Column
from steepest.lab.report.wording import DASH, FIXED
from steepest.lab.studies.sweep.results import WIDE, Basins, MethodSweep, Sweep
from steepest.lab.studies.sweep.sentences import width


def columns(sweep: Sweep) -> tuple[Column[MethodSweep], ...]:
    """The columns for which the study has data."""
    chosen = [Column("Best final loss", _best), Column("Best lr", _rate)]
    if sweep.measurable and sweep.best is not None:
        chosen.append(Column("Basin, best of all", _of_all, "decades within 5%"))
        chosen.append(Column("Basin, own best", _own, "decades within 5%"))
    chosen.append(Column("Diverged", _diverged, "runs"))
    if sweep.untrained is not None:
        chosen.append(Column("Expected best", _expected, "after one random learning rate"))
    return tuple(chosen)


def _best(method: MethodSweep) -> Cell:
    if method.best is None:
        return Cell(DASH, ("diverged at every learning rate",) if method.ended else ("no run has ended",))
    losses = method.finals(method.best.lr).values()
    seeds = DOT.join(wording.loss(loss) for loss in losses if loss is not None)
    return Cell(wording.spread(method.best.loss), (f"n{FIXED}={FIXED}{method.best.loss.n}: {seeds}",))


def _rate(method: MethodSweep) -> Cell:
    if method.best is None:
        return Cell(DASH)
    return Cell(wording.rate(method.best.lr), ("edge of its grid",) if method.best.at_edge else ())


def _of_all(method: MethodSweep) -> Cell:
    cell = _basins(method.of_all)
    if len(method.by_seed) < 2:
        return cell
    seeds = f"seeds{FIXED}{DOT.join(wording.decades(width) for width in method.by_seed.values())}"
    return Cell(cell.text, (*cell.details, seeds))


def _own(method: MethodSweep) -> Cell:
    return _basins(method.own)


def _basins(basins: Basins) -> Cell:
    if not basins:
        return Cell(DASH)
    wide = basins[WIDE]
    if not wide.intervals:
        return Cell(width(wide), ("never as good",))
    narrower = [f"{100 * x:g}%{FIXED}{width(found)}" for x, found in basins.items() if x < WIDE]
    ranges = [f"{low:.2g} to {high:.2g}" if low < high else f"{low:.2g}" for low, high in wide.intervals]
    pieces = (f"in {len(ranges)} pieces",) if len(ranges) > 1 else ()
    return Cell(width(wide), (DOT.join(reversed(narrower)), f"lr {', '.join(ranges)}", *pieces))


def _diverged(method: MethodSweep) -> Cell:
    lrs = [wording.rate(point.lr) for point in method.points if point.diverged]
    return Cell(f"{method.diverged} of {method.ended}", (f"at lr {', '.join(lrs)}",) if lrs else ())


def _expected(method: MethodSweep) -> Cell:
    if not method.expected:
        return Cell(DASH)
    most = len(method.expected)
    three = (f"after 3: {wording.loss(method.expected[2])}",) if most > 3 else ()
    return Cell(wording.loss(method.expected[0]), (*three, f"after all {most}: {wording.loss(method.expected[-1])}"))
