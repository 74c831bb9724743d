"""The page of a learning-rate sweep: its table, its numbers for other programs, and all that is said around them."""

from __future__ import annotations

from pathlib import Path

from steepest.lab.methods import RATES
from steepest.lab.report import wording
from steepest.lab.report.page import Content, Settings
from steepest.lab.report.sheet import DOT, Cell, Cells, Column, sheet
from steepest.lab.report.wording import DASH, FIXED
from steepest.lab.runs.records import Run
from steepest.lab.studies.records import read_study
from steepest.lab.studies.sweep import sentences
from steepest.lab.studies.sweep.basin import TOLERANCES
from steepest.lab.studies.sweep.figures import KEYS, figures
from steepest.lab.studies.sweep.plan import SweepStudy, rate
from steepest.lab.studies.sweep.results import WIDE, Basins, MethodSweep, Sweep, read_results
from steepest.lab.studies.sweep.sentences import notices, width


def content(study_dir: Path) -> Content:
    """What the page says.

    Raises:
        RecordError: If `study.json` is damaged.
    """
    sweep = read_results(read_study(study_dir, SweepStudy))
    return Content(
        subject="Learning-rate sweep",
        study=sweep.study,
        headline=sentences.headline(sweep),
        facts=sentences.facts(sweep),
        notices=notices(sweep),
        verdicts=(),
        summary=sentences.summary(sweep),
        figures=figures(sweep),
        columns=columns(sweep),
        results=sweep.methods,
        methodology=sentences.methodology(sweep),
        settings=_settings,
        tables=tables(sweep),
        keys=KEYS,
        hidden=RATES,
    )


def _settings(method: MethodSweep) -> Settings:
    return Settings(f"{len(method.runs)} runs", [(_told(run), run) for run in method.runs])


def _told(run: Run) -> str:
    others = {name: run.config.counted_options.get(name) for name in RATES[1:]}
    also = "".join(f", {name} {other}" for name, other in others.items() if other is not None)
    return f"lr {wording.rate(rate(run))}{also}, seed {run.config.seed}"


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
