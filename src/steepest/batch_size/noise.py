"""Noise scales of a training run: what watches somebody's loop, and keeps what it saw."""

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeGuard, cast, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from steepest.batch_size.noise_collect import MicroBatchError, MicroBatches, Ranks, Store
from steepest.batch_size.noise_layers import (
    Kind,
    check_kinds,
    columns,
    find_layers,
    measure_layer,
    second_moment,
    stepping,
)
from steepest.batch_size.noise_report import NoiseReport, Record, make_report
from steepest.checks import Check, choice, flag, instance, number, optional, shown, whole
from steepest.geometry import Norm
from steepest.linalg import PolarMethod
from steepest.ranks import local

Losses = Literal["divided", "whole", "weighted"]
FORMAT = 2
DAMAGED = "The checkpoint is damaged: use another one, or measure anew."
_FACTOR = number(above=True)


def _check_scale(name: str, value: object) -> Any:
    """Check of a number, or of a function that is asked for it at every measurement."""
    return value if callable(value) else _FACTOR(name, value)


def _check_group(name: str, value: object) -> Any:
    """Check of a process group, of which there is none where torch was built without."""
    kind: type | tuple[type, ...] = getattr(dist, "ProcessGroup", ())
    return optional(instance(kind, "a process group, as torch.distributed.new_group() returns it"))(name, value)


_OPTIONS: Mapping[str, Check] = {
    "every": whole(1),
    "level": number(0, 1, above=True),
    "samples": optional(number(above=True)),
    "unit": optional(instance(str, "a text")),
    "losses": choice(get_args(Losses)),
    "store": optional(choice(get_args(Store))),
    "polar": choice(get_args(PolarMethod)),
    "kinds": check_kinds,
    "scale": _check_scale,
    "process_group": _check_group,
}
_SAVED = {"step": whole(0), "discarded": whole(0), "skipped": whole(0), "told": flag, "owed": flag}
_RECORD = {
    "step": whole(0),
    "count": whole(2),
    "samples": number(above=True),
    "values": instance(Tensor, "a tensor"),
    "weights": instance(Tensor, "a tensor"),
}


class NoiseScale:
    """Measures, every so many steps, how much of the gradient is noise, from the gradients of the micro-batches.

    Build it after the model was wrapped (DistributedDataParallel) or sharded (FSDP2), with the optimizer. A measured
    step needs two micro-batches at least, that is calls of backward times ranks; under FSDP2 calls of backward alone,
    as all ranks see the same gradient: that of the samples of all of them.
    The first that has fewer is an error; once one was measured, others are counted and the next step is measured.
    In between it costs a counter. Gradients are taken when autograd delivers them: clipping does not matter. A
    measured step keeps a gradient per micro-batch, and with alignment copies of one layer's at a time.

    Args:
        model: Whose layers to name and to see as matrices.
        optimizer: Any; its parameters are measured, and its steps counted. Of one in a wrapper, such as accelerate's
            and Lightning's, the steps inside count.
        every: Of so many steps the last is measured.
        kinds: "euclidean", "l1", "nuclear" and "alignment"; see `estimators`.
        level: Of the intervals.
        samples: Samples per micro-batch and rank. None: tell `micro_batch`, or the unit is the micro-batch.
        unit: What samples are, for printing. Not tokens: those of one sequence are not independent.
        losses: What backward is called on. "divided": each micro-batch's mean loss over the number of calls per step;
            "whole": the mean loss itself; "weighted": the mean loss times its share of the samples of the batch, and
            times the number of ranks if there are many. A constant factor changes no scale, only `noise` and `signal`.
        scale: What losses are multiplied by besides, or a function for it, such as `GradScaler.get_scale`.
        norm: In which steps are taken, for the alignment. None: that of the group, or for torch's optimizers "sign"
            (Adam, AdamW), "frobenius" (SGD) or "spectral" (Muon).
        store: "cpu" keeps the micro-batches' gradients in main memory.
        polar: Of the nuclear scale: "svd" is exact, "auto" faster for large matrices.
        process_group: Of the ranks that have samples of their own. None: those that DistributedDataParallel or
            fully_shard (FSDP2, HSDP) averages gradients over, else the default group, if there is one.

    Raises:
        ValueError: If an option is unknown or out of range, or a layer cannot be measured; in a measured step, if what
            `scale` returns is not above 0.
        TypeError: If an option is of the wrong type, or the optimizer's steps cannot be heard of.

    Example:
        >>> model = nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> noise = NoiseScale(model, optimizer, every=2, samples=8)
        >>> for step in range(10):
        ...     for _ in range(4):
        ...         (model(torch.randn(8, 4)).square().mean() / 4).backward()
        ...     optimizer.step(); optimizer.zero_grad()
        >>> noise.read().measurements
        5
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        every: int = 100,
        kinds: Sequence[Kind] = ("euclidean", "alignment"),
        level: float = 0.9,
        samples: float | None = None,
        unit: str | None = None,
        losses: Losses = "divided",
        scale: float | Callable[[], float] = 1.0,
        norm: Norm | str | None = None,
        store: Store | None = None,
        polar: PolarMethod = "svd",
        process_group: "dist.ProcessGroup | None" = None,
    ) -> None:
        options = {"every": every, "level": level, "samples": samples, "unit": unit}
        options |= {"losses": losses, "store": store, "polar": polar}
        options |= {"kinds": kinds, "scale": scale, "process_group": process_group}
        checked: dict[str, Any] = {
            name: _OPTIONS[name](f"NoiseScale: {name}", value) for name, value in options.items()
        }
        every, level, samples = checked["every"], checked["level"], checked["samples"]
        self._optimizer = optimizer = stepping(optimizer)
        self._every = every
        self._kinds: tuple[Kind, ...] = checked["kinds"]
        self._level = level
        # whole as it was given: so it is told, and saved
        self._samples: float | None = int(samples) if samples is not None and samples.is_integer() else samples
        self._unit = unit
        self._told = samples is not None
        self._losses = losses
        self._scale: float | Callable[[], object] = checked["scale"]
        self._polar: PolarMethod = polar
        self._layers = find_layers(model, optimizer, self._kinds, norm)
        self._ranks = Ranks(model, self._layers, process_group)
        self._record = MicroBatches(self._layers, store)
        self._records: list[Record] = []
        self._discarded = 0
        self._skipped = 0
        self._step = 0
        self._listening = False
        self._moments: dict[str, Tensor | None] | None = None
        self._hooks = [
            # a compiled step breaks its graph here, instead of tracing the estimators
            optimizer.register_step_pre_hook(cast(Any, torch.compiler.disable(self._before_step))),
            optimizer.register_step_post_hook(cast(Any, torch.compiler.disable(self._after_step))),
        ]
        self._due(every == 1)

    @property
    def measuring(self) -> bool:
        """Whether the coming step is measured: the time to split a batch that is otherwise whole."""
        return self._listening

    def micro_batch(self, samples: float) -> None:
        """Tell how many samples the next, or the last, micro-batch has; once for each call of backward.

        Args:
            samples: Of this rank.

        Raises:
            ValueError: If the number is not positive, or steps were measured without it, in micro-batches.
        """
        samples = number(above=True)("micro_batch: samples", samples)
        if self._records and not self._told:
            raise ValueError(
                f"micro_batch was called for the first time after {len(self._records)} measurements, whose unit is the "
                "micro-batch. Call it from the first step on, or build NoiseScale with samples=."
            )
        self._told = True
        if self._listening:
            self._record.samples.append(samples)

    def forget(self) -> None:
        """Forget micro-batches whose gradients you threw away by setting them to zero, without a step."""
        self._record.forget()

    def read(self, last: int | None = None, *, kappa: float = 0.9) -> NoiseReport:
        """Noise scales, averaged over measurements.

        Args:
            last: How many of the latest measurements; None: all.
            kappa: κ in (0, 1): the alignment that a batch shall have, relative to the largest that was looked at.

        Returns:
            Per layer and in all, with intervals. Under several ranks the same on each.

        Raises:
            ValueError: If nothing was measured yet, or an option is out of range.
        """
        last = optional(whole(1))("NoiseScale.read: last", last)
        if not self._records:
            raise ValueError(
                f"Nothing was measured in {self._step} steps; the last of every {self._every} is, unless a gradient is "
                f"not finite ({self._discarded} measurements). Take more steps first, or pass a smaller every=."
            )
        records = self._records[-last:] if last else self._records
        return make_report(
            records,
            [layer.name for layer in self._layers],
            self._kinds,
            [columns(self._kinds, record.count) for record in records],
            matrices=[layer.matrix for layer in self._layers],
            kappa=kappa,
            level=self._level,
            unit=self._unit or ("samples" if self._told else "micro-batches"),
            discarded=self._discarded,
            skipped=self._skipped,
        )

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._listening:
            return
        if _closure(args, kwargs) is None:
            self._measure()
        elif "alignment" in self._kinds:  # backward is about to run, and the moments to change
            self._moments = {layer.name: second_moment(optimizer, layer) for layer in self._layers}

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._listening and _closure(args, kwargs) is not None:
            self._measure()
        self._step += 1
        # a measurement that failed is taken again in the next step
        self._due((self._step + 1) % self._every == 0 or self._listening)

    def _due(self, due: bool) -> None:
        if due != self._listening:
            self._record.close()
            if due:
                self._record.listen()
            self._listening = due

    @torch.no_grad()
    def _measure(self) -> None:
        late, moments = self._record.overheard(), self._moments
        self._moments = None
        members = sum(len(group["params"]) for group in self._optimizer.param_groups)
        if members != len(self._layers):
            raise ValueError(
                f"The optimizer had {len(self._layers)} parameters when NoiseScale was built, and has {members} now. "
                "Build NoiseScale after the last add_param_group; load_state_dict carries nothing over."
            )
        try:
            own, samples, scale = self._sizes()
        except MicroBatchError:
            if not self._records:  # the loop is not made for it; later, it is a rest of an epoch
                raise
            self._record.forget()
            self._skipped += 1
            return
        values = self._ranks.shared(self._rows(self._factors(own, samples, scale), samples, moments)).cpu()
        late = bool(self._ranks.shared(own.new_tensor([float(late)])))
        self._record.forget()
        if late:  # frozen until now on some rank: once more, with its hook
            self._record.close()
            self._record.listen()
        elif not bool(values.isfinite().all()):
            self._discarded += 1
        else:
            total = float(samples.sum())
            self._records.append(Record(self._step, len(samples), total, values, self._weights()))
            self._due(False)

    def _rows(self, factors: Tensor, samples: Tensor, moments: Mapping[str, Tensor | None] | None) -> Tensor:
        """(layers, columns): of the layers that this rank works on; zero elsewhere."""
        width = len(columns(self._kinds, len(samples)))
        rows = torch.zeros(len(self._layers), width, dtype=torch.float64, device=samples.device)
        for index, layer in enumerate(self._layers):
            gradients, owner = self._record.of(layer), self._ranks.owner(index)
            own = factors.to(gradients.device, gradients.dtype).view(-1, *[1] * (gradients.ndim - 1))
            together = self._ranks.gathered(layer, gradients * own, owner)
            found = second_moment(self._optimizer, layer) if moments is None else moments[layer.name]
            moment = self._ranks.moment(found, owner)
            if together is None or owner != self._ranks.rank:
                continue
            rows[index] = measure_layer(
                layer,
                together,
                samples.to(together.device),
                kinds=self._kinds,
                moment=moment,
                method=self._polar,
            )
        return rows

    def _sizes(self) -> tuple[Tensor, Tensor, float]:
        """Samples of this rank's micro-batches, and of all; and what losses were multiplied by besides."""
        device, problem = local([self._layers[0].parameter])[0].device, None
        each, scale = [1.0] * len(self._record), 1.0
        try:
            self._record.check()
            each = self._each()
            given = self._scale() if callable(self._scale) else self._scale
            scale = float(_FACTOR("NoiseScale: what scale() returns", given.item() if _is_one(given) else given))
        except (ValueError, TypeError) as error:  # an error of this rank alone would leave the others waiting
            problem = error
        self._ranks.check(len(self._record), problem, device)
        own = torch.tensor(each, dtype=torch.float64, device=device)
        return own, self._ranks.samples(own), scale

    def _each(self) -> list[float]:
        """Samples of this rank's micro-batches, as they were told."""
        count, told = len(self._record), self._record.samples
        if told and len(told) != count:
            raise ValueError(
                f"micro_batch was called {len(told)} times in a step with {count} calls of backward. Call it once for "
                "each; call forget() after gradients were thrown away."
            )
        if count and not told and self._told and self._samples is None:
            raise ValueError(
                f"micro_batch was called before, but not in a measured step with {count} calls of backward, whose unit "
                "is unknown. Call it once for each call of backward, or pass samples= for those that are not told."
            )
        return told or [1.0 if self._samples is None else float(self._samples)] * count

    def _factors(self, own: Tensor, samples: Tensor, scale: float) -> Tensor:
        """What turns recorded gradients into those of mean losses."""
        if self._losses == "whole":
            return torch.full_like(own, 1 / scale)
        if self._losses == "divided":
            return torch.full_like(own, len(own) / scale)
        # "weighted": recorded = ranks · own / all · mean gradient; what FSDP2 averages over ranks has that share too
        return (
            samples.sum() / (self._ranks.size * own * scale)
            if not self._ranks.common
            else samples.sum() / (samples * scale)
        )

    def _weights(self) -> Tensor:
        """Learning rate of each layer over the largest; equal ones if all are zero."""
        rates = torch.tensor(
            [float(group["lr"]) for group in self._optimizer.param_groups for _ in group["params"]],
            dtype=torch.float64,
            device="cpu",
        )
        most = rates.max()
        return rates / most if most > 0 else torch.ones_like(rates)

    def state_dict(self) -> dict[str, Any]:
        """All measurements, for `torch.save`; a half-recorded step is not in it."""
        return {
            **self._meaning(),
            "step": self._step,
            "discarded": self._discarded,
            "skipped": self._skipped,
            "told": self._told,
            "owed": self._listening,
            "records": [
                {"step": r.step, "count": r.count, "samples": r.samples, "values": r.values, "weights": r.weights}
                for r in self._records
            ],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from saved measurements; all of them are looked at before anything changes.

        Args:
            state_dict: Of the same model, optimizer and options.

        Raises:
            ValueError: If layers, options that numbers depend on, or the format differ, an entry is missing, or a
                number or a shape cannot be.
            TypeError: If an entry is of the wrong type.
        """
        instance(dict, "what state_dict() returned, a dictionary")("The saved noise scale", state_dict)
        for key, expected in self._meaning().items():
            if key not in state_dict or not _same(state_dict[key], expected):
                raise ValueError(
                    f"The saved noise scale has {key}={shown(state_dict.get(key))}, but {expected!r} is needed. Build "
                    "it with the model, optimizer and options that were saved."
                )
        saved = _entries("The saved noise scale", state_dict, {**_SAVED, "records": instance(list, "a list")})
        records = [self._restored(place, record) for place, record in enumerate(saved["records"])]
        if records and self._told and not saved["told"]:
            raise ValueError(
                "The saved noise scale counts in micro-batches, but micro_batch was called on this one. Load before "
                "the first call, and do without it, or measure anew."
            )
        self._records = records
        self._step, self._discarded, self._skipped = saved["step"], saved["discarded"], saved["skipped"]
        self._told = self._told or saved["told"]
        self._record.forget()
        self._due((self._step + 1) % self._every == 0 or saved["owed"])

    def _restored(self, place: int, saved: object) -> Record:
        who = f"Measurement {place} of the saved noise scale"
        record = Record(**_entries(who, instance(dict, "a dictionary")(who, saved), _RECORD))
        shapes = {
            "values": (len(self._layers), len(columns(self._kinds, record.count))),
            "weights": (len(self._layers),),
        }
        for key, shape in shapes.items():
            tensor: Tensor = getattr(record, key)
            if tensor.is_meta:
                raise ValueError(f"{who}: {key} is on the meta device, which holds no numbers. {DAMAGED}")
            if tensor.dtype != torch.float64 or tuple(tensor.shape) != shape or not bool(tensor.isfinite().all()):
                raise ValueError(
                    f"{who}: {key} must be finite float64 of shape {shape}, got {tensor.dtype} of shape "
                    f"{tuple(tensor.shape)}{'' if bool(tensor.isfinite().all()) else ', not all finite'}. {DAMAGED}"
                )
        return record

    def _meaning(self) -> dict[str, Any]:
        """What saved numbers have to agree in."""
        return {
            "format": FORMAT,
            "layers": [layer.name for layer in self._layers],
            "kinds": list(self._kinds),
            "samples": self._samples,
            "unit": self._unit,
            "losses": self._losses,
            "norms": [str(layer.norm) for layer in self._layers],
        }

    def close(self) -> None:
        """Remove all hooks; what was measured can still be read."""
        self._due(False)
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _entries(who: str, saved: Mapping[str, object], checks: Mapping[str, Check]) -> dict[str, Any]:
    """What was saved, every entry checked."""
    if missing := [key for key in checks if key not in saved]:
        raise ValueError(f"{who} has no {missing[0]!r}. {DAMAGED}")
    return {key: check(f"{who}: {key}", saved[key]) for key, check in checks.items()}


def _same(saved: object, expected: object) -> bool:
    """Whether a saved value is the one of here; of another kind, tensors for instance, it is not."""
    if isinstance(expected, list) and isinstance(saved, list):
        pairs = zip(cast(list[object], saved), cast(list[object], expected), strict=False)
        return len(cast(list[object], saved)) == len(cast(list[object], expected)) and all(_same(*own) for own in pairs)
    number_types = (int, float)
    alike = type(saved) in number_types and type(expected) in number_types
    return (alike or type(saved) is type(expected)) and saved == expected


def _is_one(value: object) -> TypeGuard[Tensor]:
    """Whether it is a tensor with one number, as scalers keep theirs."""
    return isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta


def _closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    """What a step was given; torch's hooks get the optimizer as the first argument."""
    given = args[1:] if args and isinstance(args[0], Optimizer) else args
    return kwargs.get("closure", given[0] if given else None)
