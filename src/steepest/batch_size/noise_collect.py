"""Gradients of micro-batches, taken where autograd delivers them, and brought together from all ranks.

A plain parameter's hook is on the node that adds to `.grad`, which `torch.autograd.grad` does not reach. It sees what
one call of backward adds, before DistributedDataParallel averages it: ranks times micro-batches are separate samples.
A DTensor's gradient (FSDP2) exists only after it was averaged over ranks: the hook runs then, what the micro-batch has
added is a difference, and its samples are those of all ranks that FSDP2 averages over: all of its mesh, one copy after
the other as well (HSDP), but not the ranks that tensor parallelism divides a layer among, which see the same samples.
"""

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

from steepest.batch_size.noise_layers import Layer
from steepest.ranks import Team, is_sharded, laid_out, local, whole

Store = Literal["cpu"]


class MicroBatchError(ValueError):
    """A step from which no noise can be read, by its number of micro-batches; the same on all ranks."""


def too_few(count: int) -> MicroBatchError:
    """What to say of a step with fewer than two micro-batches.

    Args:
        count: 0 or 1.
    """
    if count == 0:
        return MicroBatchError(
            "NoiseScale saw 0 micro-batches in a measured step: no backward reached the parameters since the last "
            "step; gradients set by hand or made before NoiseScale was built are not seen. Build it before the first "
            "backward, and call backward on measured steps."
        )
    return MicroBatchError(
        f"NoiseScale saw {count} micro-batch on one rank in a measured step; noise is what differs between at least "
        "two. While `noise.measuring` is True, split the batch and call backward for each half (under FSDP2 with "
        "gradient synchronisation on), or train on several ranks with DistributedDataParallel."
    )


class MicroBatches:
    """Records one gradient per call of backward and parameter while it is listening.

    Args:
        layers: Whose parameters are recorded.
        store: "cpu" keeps the gradients in main memory; None where they are.
    """

    def __init__(self, layers: Sequence[Layer], store: Store | None) -> None:
        self._layers = layers
        self._store = store
        self._handles: list[RemovableHandle] = []
        self._nodes: list[Node] = []  # which live as long as somebody holds them, and their hooks with them
        self._heard: set[Tensor] = set()
        self._totals: dict[Tensor, tuple[Tensor, Tensor]] = {}  # under FSDP2: the gradient object, and its value so far
        self.samples: list[float] = []
        self._gradients: list[dict[Tensor, Tensor]] = []
        self._tasks: list[int] = []

    def listen(self) -> None:
        """Install hooks on all parameters that are trainable now."""
        for layer in self._layers:
            parameter = layer.parameter
            if parameter.requires_grad:
                self._heard.add(parameter)
                if is_sharded(parameter):
                    self._handles.append(parameter.register_post_accumulate_grad_hook(self._accumulated))
                else:
                    node = _accumulator(parameter)
                    self._nodes.append(node)
                    self._handles.append(node.register_prehook(_Arrival(self, parameter)))

    def close(self) -> None:
        """Remove the hooks and forget the gradients."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._nodes.clear()
        self._heard.clear()
        self.forget()

    def forget(self) -> None:
        """Drop what was recorded since the last step."""
        self._gradients.clear()
        self._tasks.clear()
        self._totals.clear()
        self.samples.clear()

    def __len__(self) -> int:
        return len(self._gradients)

    def overheard(self) -> bool:
        """Whether a parameter has a gradient that was not listened to, as when it was frozen until now."""
        trainable = (layer.parameter for layer in self._layers if layer.parameter.requires_grad)
        return any(parameter.grad is not None and parameter not in self._heard for parameter in trainable)

    def of(self, layer: Layer) -> Tensor:
        """(J, *local shape): one gradient per micro-batch, zero where the parameter was not used."""
        zero = torch.zeros_like(local([layer.parameter])[0])
        return torch.stack([own.get(layer.parameter, zero).to(zero.device) for own in self._gradients])

    def check(self) -> None:
        """Refuse recordings in which calls of backward were taken for micro-batches wrongly.

        Raises:
            ValueError: If micro-batches have no parameter in common.
        """
        used = [own.keys() for own in self._gradients]
        if len(used) > 1 and any(not (used[0] & other) for other in used[1:]):
            raise ValueError(_NESTED)

    def arrived(self, parameter: Tensor, gradient: Tensor) -> None:
        """Take the gradient that is about to be added.

        Args:
            parameter: Whose.
            gradient: What is added; not kept.

        Raises:
            ValueError: If the gradient is sparse, or backward runs inside backward.
        """
        if gradient.layout != torch.strided:
            raise ValueError(
                f"A gradient of shape {tuple(gradient.shape)} has layout {gradient.layout}; NoiseScale needs a dense "
                "one. Build the embedding with sparse=False."
            )
        own = self._micro_batch(parameter)
        if parameter.grad is None:
            self._drop_earlier(parameter)
        self._keep(own, parameter, gradient.detach())

    def _accumulated(self, parameter: Tensor) -> None:
        gradient = cast(Tensor, parameter.grad)
        total = local([laid_out(gradient.detach(), parameter)])[0]
        before = self._totals.get(parameter)
        own = self._micro_batch(parameter)
        if before is not None and before[0] is not gradient:  # set to None and made anew
            self._drop_earlier(parameter)
            before = None
        self._keep(own, parameter, total if before is None else total - before[1])
        self._totals[parameter] = (gradient, total.clone())

    def _drop_earlier(self, parameter: Tensor) -> None:
        """Forget all but this call of backward, if all gradients of earlier ones were thrown away without a step."""
        earlier = len(self._gradients) - 1
        others = {p for own in self._gradients[:earlier] for p in own}
        # those that this call has reached have a gradient again
        if parameter in others and all(p is parameter or p.grad is None for p in others - self._gradients[-1].keys()):
            del self._gradients[:earlier], self._tasks[:earlier], self.samples[:earlier]
            kept = self._gradients[0]
            self._totals = {p: total for p, total in self._totals.items() if p in kept}

    def _keep(self, own: dict[Tensor, Tensor], parameter: Tensor, gradient: Tensor) -> None:
        if parameter in own:  # two deliveries within one backward
            own[parameter] = own[parameter] + gradient.to(own[parameter].device)
        else:
            own[parameter] = gradient.to(self._store or gradient.device, copy=True)

    def _micro_batch(self, parameter: Tensor) -> dict[Tensor, Tensor]:
        """The record of this call of backward."""
        task = torch._C._current_graph_task_id()
        if task == -1:  # FSDP2 finishes some parameters when backward has just ended
            new = not self._gradients or parameter in self._gradients[-1]
        else:
            new = not self._tasks or self._tasks[-1] != task
            if new and task in self._tasks:
                raise ValueError(_NESTED)
        if new:
            self._gradients.append({})
            self._tasks.append(task)
        return self._gradients[-1]


_NESTED = (
    "Calls of backward of one step have no parameter in common or run inside each other: they are not micro-batches. "
    "Use activation checkpoints with use_reentrant=False, and add up losses of one micro-batch before backward."
)


def _accumulator(parameter: Tensor) -> Node:
    """The node that adds to the parameter's `.grad`."""
    with torch.enable_grad():
        made = cast(Node, parameter.view_as(parameter).grad_fn)
    return cast(Node, made.next_functions[0][0])


class _Arrival:
    """A hook of what arrives at a parameter: does not change the gradient."""

    def __init__(self, record: MicroBatches, parameter: Tensor) -> None:
        self._record = record
        self._parameter = parameter

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        if gradients[0] is not None:
            self._record.arrived(self._parameter, gradients[0])


class Ranks:
    """How micro-batches of several ranks come together; with one rank, nothing is exchanged.

    Args:
        model: As it was wrapped or sharded.
        layers: Plain parameters, whose ranks have separate micro-batches, or DTensors, whose have common ones.
        group: Of the ranks with samples of their own; None: those that DistributedDataParallel or fully_shard averages
            gradients over, or else the default group, if there is one.

    Raises:
        ValueError: If plain parameters and DTensors are mixed, or it cannot be known which ranks have samples of their
            own.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], group: "dist.ProcessGroup | None") -> None:
        shares = [is_sharded(layer.parameter) for layer in layers]
        if len(set(shares)) > 1:
            raise ValueError(
                f"The optimizer has sharded parameters and plain ones: {_layout(layers[shares.index(True)])}, "
                f"{layers[shares.index(False)].name!r} is not. Their micro-batches are not of the same samples. Build "
                "one optimizer and one NoiseScale for each kind, or shard all parameters."
            )
        self.common = shares[0] if shares else False
        """Whether all ranks see the same gradients."""
        if self.common:
            self._groups = _averaged_over(model, layers, group)
        else:
            self._groups = [group or _copied_by(model)] if dist.is_available() and dist.is_initialized() else []
        self.size, self.rank = 1, 0
        for one in self._groups:  # a dimension of the mesh each, the last one running fastest
            self.size, self.rank = self.size * dist.get_world_size(one), self.rank * dist.get_world_size(one)
            self.rank += dist.get_rank(one)
            for layer in layers[:1]:
                Team(one or dist.group.WORLD).check_device(layer.name, layer.parameter)

    def owner(self, index: int) -> int:
        """Rank that works on a layer."""
        return index % self.size

    def check(self, count: int, problem: Exception | None, device: torch.device) -> None:
        """Refuse a step together: what is wrong on one rank is an error on all.

        Args:
            count: Micro-batches of this rank.
            problem: What is wrong with them here.
            device: Of exchange.

        Raises:
            MicroBatchError: If ranks differ in their number of micro-batches, or there is one in all, or none.
            ValueError: If something is wrong on one of them.
        """
        extremes = torch.tensor([count, -count, problem is not None], device=device)
        most, least, refused = (
            self._reduced(extremes, dist.ReduceOp.MAX).tolist() if self._groups else extremes.tolist()
        )
        if problem is not None:
            raise problem
        if refused:
            raise ValueError("NoiseScale: another rank refuses what it saw in a measured step; its error says why.")
        if most != -least:
            raise MicroBatchError(
                f"Ranks have between {-least} and {most} micro-batches in one step; NoiseScale needs the same number "
                "on every rank. On measured steps (`noise.measuring`), accumulate equally often everywhere."
            )
        seen = count if self.common else count * self.size
        if seen < 2:
            raise too_few(seen)

    def samples(self, own: Tensor) -> Tensor:
        """(R,): samples of all micro-batches, rank by rank; of sharded gradients each adds up those of all ranks.

        Args:
            own: (J,) on the device of exchange, of this rank.
        """
        if self.common:
            return self._reduced(own.clone(), dist.ReduceOp.SUM)
        if self.size == 1:
            return own
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own, group=self._groups[0])
        return torch.cat(parts)

    def gathered(self, layer: Layer, own: Tensor, owner: int) -> Tensor | None:
        """(R, *shape) on the owner, in the order of `samples`; None elsewhere. All ranks must call it.

        Args:
            layer: Whose gradients.
            own: (J, *local shape).
            owner: Rank that gets them.
        """
        if self.common:
            full = [whole(_like(layer.parameter, gradient)) for gradient in own]
            return torch.stack(full) if self.rank == owner else None
        if self.size == 1:
            return own
        parts = [torch.empty_like(own) for _ in range(self.size)] if self.rank == owner else None
        dist.gather(own.contiguous(), parts, group=self._groups[0], group_dst=owner)
        return torch.cat(parts) if parts is not None else None

    def moment(self, moment: Tensor | None, owner: int) -> Tensor | None:
        """A layer's second moment on the owner; all ranks must call it.

        Args:
            moment: As the optimizer keeps it.
            owner: Rank that gets it.
        """
        return whole(moment) if moment is not None and (self.common or self.rank == owner) else None

    def shared(self, values: Tensor) -> Tensor:
        """The sum over ranks."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def _reduced(self, values: Tensor, how: Any) -> Tensor:
        for group in self._groups:
            dist.all_reduce(values, how, group=group)
        return values


def _copied_by(model: nn.Module) -> "dist.ProcessGroup | None":
    """The group of the first DistributedDataParallel module, if there is one."""
    wrapped = (module for module in model.modules() if isinstance(module, nn.parallel.DistributedDataParallel))
    return next((module.process_group for module in wrapped), None)


def _averaged_over(model: nn.Module, layers: Sequence[Layer], group: "dist.ProcessGroup | None") -> list[Any]:
    """Groups over which, one after the other, sharded gradients are averaged, and samples added up.

    Args:
        model: Whose modules tell by whom they were sharded.
        layers: Sharded ones.
        group: Whose ranks have samples of their own; None: those that fully_shard averages over.
    """
    if group is not None:
        asked = set(dist.get_process_group_ranks(group))
        for layer in layers:
            kept: set[int] = set(cast(Any, layer.parameter).device_mesh.mesh.flatten().tolist())
            if not asked <= kept:
                raise ValueError(
                    f"{_layout(layer)}, that is on the ranks {sorted(kept)}, but process_group has {sorted(asked)}: "
                    "its gradient is not of the samples of all of these. Pass the ranks whose samples it is of, or "
                    "build one NoiseScale for the parameters of each mesh."
                )
        return [group]
    from torch.distributed.fsdp import FSDPModule

    by_fsdp: dict[Tensor, bool] = {}  # whether each copy is whole, as with `replicate`
    for module in model.modules():
        if isinstance(module, FSDPModule):
            copies = any(kind.__name__ == "ReplicateModule" for kind in type(module).__mro__)
            by_fsdp |= dict.fromkeys(cast(nn.Module, module).parameters(), copies)
    found: dict[frozenset[int], tuple[Layer, list[Any]]] = {}
    for layer in layers:
        parameter: Any = layer.parameter
        if parameter not in by_fsdp:
            raise ValueError(
                f"{_layout(layer)}, but not of a module that fully_shard was applied to. Which ranks have samples of "
                "their own cannot be known then: ranks of tensor parallelism see the same, those of expert parallelism "
                "do not. Pass process_group=, the ranks with samples of their own, such as mesh['dp'].get_group(); of "
                "tensor parallelism alone, a group of this rank only."
            )
        mesh, placements = parameter.device_mesh, parameter.placements
        divided = [axis for axis, one in enumerate(placements) if not one.is_replicate()]
        # copies come first, then what FSDP divides; the dimensions after that are of others
        axes = list(range(1 if by_fsdp[parameter] or not divided else divided[0] + 1))
        place = tuple(slice(None) if axis in axes else at for axis, at in enumerate(mesh.get_coordinate()))
        ranks = frozenset[int](mesh.mesh[place].flatten().tolist())
        found.setdefault(ranks, (layer, [mesh.get_group(axis) for axis in axes]))
    if len(found) > 1:
        (ranks, (layer, _)), (others, (other, _)) = list(found.items())[:2]
        raise ValueError(
            f"{_layout(layer)}, averaged over the ranks {sorted(ranks)}, and {_layout(other)}, averaged over "
            f"{sorted(others)}: their micro-batches are not of the same samples. If they are, as where experts get "
            "tokens of other ranks, pass process_group=, the ranks with samples of their own; else build one optimizer "
            "and one NoiseScale for each."
        )
    return next(iter(found.values()))[1]


def _layout(layer: Layer) -> str:
    """What a sharded layer is, for a message."""
    parameter: Any = layer.parameter
    mesh = parameter.device_mesh
    names = f" {mesh.mesh_dim_names}" if mesh.mesh_dim_names else ""
    placements, shape = tuple(map(str, parameter.placements)), tuple(mesh.shape)
    told = f"{layer.name!r} of shape {tuple(parameter.shape)} is a DTensor"
    return f"{told} with placements {placements} on a mesh of {shape}{names}"


def _like(parameter: Tensor, part: Tensor) -> Any:
    """A DTensor laid out like the parameter."""
    from torch.distributed.tensor import DTensor

    model = cast(DTensor, parameter)
    return DTensor.from_local(
        part, model.device_mesh, model.placements, shape=model.shape, stride=model.stride(), run_check=False
    )
