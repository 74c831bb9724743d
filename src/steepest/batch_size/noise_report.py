"""Noise scales as they are read: averages over measurements, with intervals, as a table or for JSON."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.batch_size.estimators import Duals, nested_sizes
from steepest.batch_size.noise_layers import Kind
from steepest.batch_size.ratio import Ratio, batch_for, ratio_of_means
from steepest.names import unknown_name

TOTAL = "total"
RISE = 0.05  # of the noise, from half of the micro-batches to all, from which on it is not believed to be all of it


@dataclass(frozen=True)
class Record:
    """One measured step.

    Args:
        step: Steps of the optimizer before it.
        count: R, micro-batches.
        samples: B, samples of all of them.
        values: (layers, columns) float64.
        weights: (layers,): learning rates over the largest of them.
    """

    step: int
    count: int
    samples: float
    values: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Scale:
    """A noise scale of a layer, or of all.

    Args:
        kind: "euclidean", "l1" or "nuclear".
        layer: Name of the parameter, or "total".
        ratio: The scale in samples, with its interval; of the crossed signal where there are two.
        plug_in: Likewise of the plug-in signal, biased down; None for "euclidean", which needs none.
        noise: Mean of the noise part of one sample: tr Σ, or a dual norm.
        signal: Mean of the signal part: ‖∇L‖², or a dual norm.
    """

    kind: Kind
    layer: str
    ratio: Ratio
    plug_in: Ratio | None
    noise: float
    signal: float


@dataclass(frozen=True)
class Curve:
    """How much of the gradient steps of several batch sizes go along.

    Args:
        layer: Name of the parameter, or "total".
        batches: Batch sizes in samples.
        values: A(b) at each: first-order decrease of the loss per unit of step length.
        kappa: κ.
        ratio: b_κ with A(b_κ) = κ A(largest of `batches`), with its interval.
    """

    layer: str
    batches: tuple[float, ...]
    values: tuple[float, ...]
    kappa: float
    ratio: Ratio


@dataclass(frozen=True)
class NoiseReport:
    """What `NoiseScale.read` returns; `str` of it is a table.

    Args:
        scales: Totals first, then layers, kind by kind.
        curves: Likewise, if the alignment is measured.
        measurements: How many were averaged.
        curve_measurements: How many of them have as many micro-batches and samples as the last one, as curves need.
        steps: The first and the last measured step.
        batch: Samples in a step's whole batch, on average.
        discarded: Measurements so far that had a gradient that is not finite.
        skipped: Measurements so far for which there were too few micro-batches.
        unit: Of samples.
        level: Of the intervals.
    """

    scales: tuple[Scale, ...]
    curves: tuple[Curve, ...]
    measurements: int
    curve_measurements: int
    steps: tuple[int, int]
    batch: float
    discarded: int
    skipped: int
    unit: str
    level: float

    def scale(self, kind: Kind, layer: str = TOTAL) -> Scale:
        """One noise scale.

        Args:
            kind: "euclidean", "l1" or "nuclear".
            layer: Name of the parameter, or "total".

        Raises:
            ValueError: If it was not measured.
        """
        found = {f"{scale.kind} of {scale.layer}": scale for scale in self.scales}
        if f"{kind} of {layer}" not in found:
            raise ValueError(unknown_name("noise scale", f"{kind} of {layer}", found))
        return found[f"{kind} of {layer}"]

    def curve(self, layer: str = TOTAL) -> Curve:
        """The alignment of a layer.

        Args:
            layer: Name of the parameter, or "total".

        Raises:
            ValueError: If it was not measured.
        """
        found = {curve.layer: curve for curve in self.curves}
        if layer not in found:
            raise ValueError(unknown_name("alignment of layer", layer, found))
        return found[layer]

    def to_dict(self) -> dict[str, object]:
        """Everything, ready for `json.dumps`: numbers that are infinite or none are null."""
        return {
            "unit": self.unit,
            "level": self.level,
            "measurements": self.measurements,
            "curve_measurements": self.curve_measurements,
            "steps": list(self.steps),
            "batch": self.batch,
            "discarded": self.discarded,
            "skipped": self.skipped,
            "scales": [
                {
                    "kind": scale.kind,
                    "layer": scale.layer,
                    "noise": scale.noise,
                    "signal": scale.signal,
                    **_ratio_dict(scale.ratio),
                    "plug_in": _ratio_dict(scale.plug_in) if scale.plug_in else None,
                }
                for scale in self.scales
            ],
            "alignment": [
                {
                    "layer": curve.layer,
                    "batches": list(curve.batches),
                    "values": list(curve.values),
                    "kappa": curve.kappa,
                    **_ratio_dict(curve.ratio),
                }
                for curve in self.curves
            ],
        }

    def __str__(self) -> str:
        first, last = self.steps
        lines = [
            f"Noise scales in {self.unit}, {self.level:.0%} intervals; {self.measurements} measurements of steps "
            f"{first} to {last}, {self.batch:g} {self.unit} per step"
            + f", {self.discarded} not finite" * bool(self.discarded)
            + f", {self.skipped} with too few micro-batches" * bool(self.skipped)
        ]
        table = [("kind", "layer", "scale", "interval", "plug-in", "remark")]
        for scale in self.scales:
            plug_in = _number(scale.plug_in.value) if scale.plug_in else "-"
            table.append((scale.kind, scale.layer, *_cells(scale.ratio), plug_in, scale.ratio.remedy))
        for curve in self.curves:
            kind = f"b at {curve.kappa:.0%}"
            table.append((kind, curve.layer, *_cells(curve.ratio), "-", curve.ratio.remedy))
        lines += _aligned(table)
        for curve in self.curves[:1]:
            of = [value / curve.values[-1] if curve.values[-1] > 0 else math.nan for value in curve.values]
            points = ", ".join(f"{b:g}: {a:.0%}" for b, a in zip(curve.batches, of, strict=True))
            lines.append(
                f"alignment of a batch as a share of the largest's ({self.curve_measurements} measurements): {points}"
            )
        return "\n".join(lines)


def make_report(
    records: Sequence[Record],
    layers: Sequence[str],
    kinds: Sequence[Kind],
    columns_of: Sequence[Sequence[str]],
    *,
    matrices: Sequence[bool],
    kappa: float,
    level: float,
    unit: str,
    discarded: int,
    skipped: int,
) -> NoiseReport:
    """Average measurements.

    Args:
        records: At least one, in order.
        layers: Names.
        kinds: What was measured.
        columns_of: Names of the columns, record by record.
        matrices: Which layers have a nuclear scale.
        kappa: κ of the curves.
        level: Of the intervals.
        unit: Of samples.
        discarded: Measurements that had a gradient that is not finite.
        skipped: Measurements for which there were too few micro-batches.
    """
    scales: list[Scale] = []
    for kind in kinds:
        if kind == "alignment":
            continue
        series = {
            name: torch.stack(
                [r.values[:, c.index(f"{kind}.{name}")] for r, c in zip(records, columns_of, strict=True)]
            )
            for name in (("noise", "signal") if kind == "euclidean" else Duals._fields)
        }
        scales.append(_scale(kind, TOTAL, {name: values.sum(1) for name, values in series.items()}, level))
        for place, layer in enumerate(layers):
            if kind != "nuclear" or matrices[place]:
                own = {name: values[:, place] for name, values in series.items()}
                scales.append(_scale(kind, layer, own, level))
    last = records[-1]
    alike = [record for record in records if (record.count, record.samples) == (last.count, last.samples)]
    return NoiseReport(
        scales=tuple(scales),
        curves=_curves(alike, layers, columns_of[-1], kappa, level) if "alignment" in kinds else (),
        measurements=len(records),
        curve_measurements=len(alike),
        steps=(records[0].step, records[-1].step),
        batch=sum(record.samples for record in records) / len(records),
        discarded=discarded,
        skipped=skipped,
        unit=unit,
        level=level,
    )


def _scale(kind: Kind, layer: str, series: dict[str, Tensor], level: float) -> Scale:
    noise = series["noise"]
    if kind == "euclidean":
        signal = series["signal"]
        ratio, plug_in = ratio_of_means(noise, signal, level=level), None
    else:
        signal = series["crossed"]
        ratio = ratio_of_means(noise, signal, level=level).squared()
        plug_in = ratio_of_means(noise, series["plug_in"], level=level).squared()
        if noise.mean() > (1 + RISE) * series["half"].mean():
            ratio, plug_in = _without_upper_end(ratio, plug_in), _without_upper_end(plug_in, plug_in)
    return Scale(kind, layer, ratio, plug_in, float(noise.mean()), float(signal.mean()))


def _without_upper_end(ratio: Ratio, plug_in: Ratio) -> Ratio:
    """As the noise is too small; the lower end is the plug-in scale's, whose signal is surely not too small as well."""
    if ratio.status not in ("bounded", "unbounded"):
        return ratio
    return Ratio(ratio.value, min(ratio.low, plug_in.low), math.inf, "rising")


def _curves(
    records: Sequence[Record], layers: Sequence[str], columns: Sequence[str], kappa: float, level: float
) -> tuple[Curve, ...]:
    count = records[-1].count
    per_micro_batch = records[-1].samples / count
    sizes = nested_sizes(count)
    batches = tuple(size * per_micro_batch for size in sizes)
    places = [columns.index(f"alignment.{size}") for size in sizes]
    values = torch.stack([record.values[:, places] for record in records])  # (n, layers, sizes)
    weights = torch.stack([record.weights for record in records])
    series = {TOTAL: torch.einsum("nl,nls->ns", weights, values)}
    series.update({layer: values[:, place] for place, layer in enumerate(layers)})
    return tuple(
        Curve(layer, batches, tuple(own.mean(0).tolist()), kappa, batch_for(own, batches, kappa=kappa, level=level))
        for layer, own in series.items()
    )


def _ratio_dict(ratio: Ratio) -> dict[str, object]:
    ends = {"value": ratio.value, "low": ratio.low, "high": ratio.high}
    finite = {name: end if math.isfinite(end) else None for name, end in ends.items()}
    return {**finite, "status": ratio.status, "remark": ratio.remedy}


def _cells(ratio: Ratio) -> tuple[str, str]:
    if ratio.status == "at most":
        return f"<= {_number(ratio.value)}", f"to {_number(ratio.high)}"
    if ratio.status in ("unknown", "no signal", "not aligned", "one size"):
        return _number(ratio.value), "-"
    high = f"to {_number(ratio.high)}" if math.isfinite(ratio.high) else "or more"
    return _number(ratio.value), f"{_number(ratio.low)} {high}"


def _number(value: float) -> str:
    return (
        "-"
        if math.isnan(value)
        else "inf"
        if math.isinf(value)
        else f"{value:.3g}"
        if value < 1000
        else f"{value:,.0f}"
    )


def _aligned(table: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
