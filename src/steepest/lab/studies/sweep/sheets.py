"""The numbers of a learning-rate sweep as tables for other programs."""

from __future__ import annotations

from steepest.lab.report.sheet import Cells, sheet
from steepest.lab.runs.records import Run
from steepest.lab.studies.sweep.basin import TOLERANCES
from steepest.lab.studies.sweep.results import MethodSweep, Sweep


def tables(sweep: Sweep) -> dict[str, str]:
    """The content of each file by its name.

    `rows.csv` has one row for each run asked for, `lr_sweep.csv` for each method and learning rate, `basins.csv` for
    each method. A run made under other conditions has the status "set aside", and is in `rows.csv` only.
    """
    points = [_point(method, i) for method in sweep.methods for i in range(len(method.points))]
    return {
        "rows.csv": sheet(_ROWS, _runs(sweep)),
        "lr_sweep.csv": sheet(("method", "lr", "mean_final_loss", "sd", "n", "diverged"), points),
        "basins.csv": sheet(_basin_head(), [_basin(method) for method in sweep.methods]),
    }


_ROWS = ("method", "lr", "other_lr", "seed", "final_loss", "status", "steps", "train_s", "run")


def _runs(sweep: Sweep) -> list[Cells]:
    aside = {one.run.name for one in sweep.set_aside}
    rows: list[Cells] = []
    for one in sweep.records.asked:
        run = sweep.records.found.get(one)
        found = (None, None, "missing", None, None, None) if run is None else _run(run, run.name in aside)
        rows.append((one.method, one.lr, found[0], one.seed, *found[1:]))
    return rows


def _run(run: Run, aside: bool) -> tuple[object, ...]:
    status, result = "set aside" if aside else run.status, run.result
    other = run.config.options.get("other_lr")
    if result is None:
        return other, None, status, None, None, run.name
    return other, result.final_loss, status, result.steps, result.train_s, run.name


def _point(method: MethodSweep, place: int) -> Cells:
    point = method.points[place]
    mean, sd = (point.loss.mean, point.loss.sd) if point.loss else (None, None)
    return method.name, point.lr, mean, sd, point.n, point.diverged


def _basin_head() -> tuple[str, ...]:
    around = [
        f"{reference}_{100 * x:g}pct_{what}"
        for reference in ("best_of_all", "own_best")
        for x in TOLERANCES
        for what in ("decades", "at_least", "pieces")
    ]
    best = ("method", "best_lr", "best_at_edge", "best_mean", "best_sd", "runs", "diverged")
    return (*best, *around, "expected_after_1", "expected_after_3", "expected_after_all")


def _basin(method: MethodSweep) -> Cells:
    best, expected = method.best, method.expected
    top = (best.lr, best.at_edge, best.loss.mean, best.loss.sd) if best else (None,) * 4
    around: list[object] = []
    for basins in (method.of_all, method.own):
        for tolerance in TOLERANCES:
            found = basins.get(tolerance)
            around += [found.width, found.open_ended, len(found.intervals)] if found else [None] * 3
    trials = [expected[k] if len(expected) > k else None for k in (0, 2)] + [expected[-1] if expected else None]
    return (method.name, *top, method.ended, method.diverged, *around, *trials)
