"""Where the parameters of a model sit: under which names, on which modules, inside which owners.

Wrappers (DDP, torch.compile, activation checkpointing, weight averaging) are looked through: they appear neither in
names nor as owners. FSDP2 and parametrizations make subclasses on the fly, so types are compared by `kinds`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

_WRAPPING_ATTRIBUTES = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_WRAPPING_CLASSES = ("DistributedDataParallel", "DataParallel", "AveragedModel", "DeepSpeedEngine")


@dataclass(frozen=True, eq=False)
class Site:
    """A parameter as an attribute of a module.

    Args:
        name: Name in the model, without wrappers.
        leaf: Last part of the name: the attribute of `module`.
        module: The module that has the parameter.
        attribute: Name of `module` in its owner; empty for the model itself.
        owner: The module around `module`; None for the model itself.
        shape: Full shape, also if the parameter is sharded.
        parameter: The parameter.
    """

    name: str
    leaf: str
    module: nn.Module
    attribute: str
    owner: nn.Module | None
    shape: tuple[int, ...]
    parameter: Tensor

    @property
    def numel(self) -> int:
        """Numbers in the whole parameter."""
        return math.prod(self.shape)

    @property
    def long_dims(self) -> int:
        """How many dimensions are longer than one."""
        return sum(size > 1 for size in self.shape)


def kinds(module: nn.Module | None) -> tuple[str, ...]:
    """Class names of a module from the most to the least specific, up to but without `nn.Module`.

    Args:
        module: Any module; None has no kind.

    Returns:
        Names. The subclass that FSDP2 or a parametrization puts before the class of a module is left out.
    """
    classes = [kind for kind in type(module).__mro__ if issubclass(kind, nn.Module) and kind is not nn.Module]
    names = [kind.__name__ for kind in classes]
    while len(names) > 1 and names[0] in (f"FSDP{names[1]}", f"Parametrized{names[1]}"):
        names = names[1:]
    return tuple(names)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside any number of wrappers.

    Args:
        model: A model, wrapped or not.

    Returns:
        The first module that is not a wrapper.
    """
    inside = next((child for name, child in model.named_children() if _is_wrapping(model, name)), None)
    return model if inside is None else unwrap(inside)


def distinct(model: nn.Module) -> list[list[Site]]:
    """The parameters of a model, each with all its sites.

    Args:
        model: A model, wrapped or not, on any device, sharded or not.

    Returns:
        One list per distinct parameter, in the order of registration; more than one site if it is tied.

    Raises:
        ValueError: If a parameter has no shape yet (lazy), or its shape is that of a flattened shard (FSDP1).
    """
    found: dict[int, list[Site]] = {}
    for site in _walk(model):
        found.setdefault(id(site.parameter), []).append(site)
    lazy = [sites[0].name for sites in found.values() if is_lazy(sites[0].parameter)]
    if lazy:
        names = ", ".join(lazy)
        raise ValueError(f"Parameters without a shape yet: {names}. Send one batch through the lazy modules first.")
    for sites in found.values():
        if any(kind.__name__ == "FlatParameter" for kind in type(sites[0].parameter).__mro__):
            shape = sites[0].shape
            raise ValueError(
                f"{sites[0].name} with shape {shape} is a flattened FSDP1 shard, in which matrices cannot be seen. "
                "Use fully_shard (FSDP2), which keeps shapes."
            )
    return list(found.values())


def _walk(model: nn.Module) -> Iterator[Site]:
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        chain = _ancestors(modules, path)
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            shape = () if is_lazy(parameter) else tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3
            names = [name for name, _ in chain if name]
            holder, attribute, leaf_of = chain[-1][1], chain[-1][0], leaf
            owner = chain[-2][1] if len(chain) > 1 else None
            if isinstance(module, ParametrizationList) and leaf == "original":  # ....parametrizations.weight.original
                leaf_of, (attribute, holder) = attribute, chain[-3]
                owner = chain[-4][1] if len(chain) > 3 else None
            yield Site(".".join([*names, leaf]), leaf_of, holder, attribute, owner, shape, parameter)


def _ancestors(modules: dict[str, nn.Module], path: str) -> list[tuple[str, nn.Module]]:
    """(name, module) from the model down to `path`; a wrapper gives its own name to what it wraps."""
    parts = path.split(".") if path else []
    chain: list[tuple[str, nn.Module]] = [("", modules[""])]
    for depth, part in enumerate(parts, start=1):
        name, outer = chain[-1]
        module = modules[".".join(parts[:depth])]
        if _is_wrapping(outer, part):
            chain[-1] = (name, module)
        else:
            chain.append((part, module))
    return chain


def _is_wrapping(outer: nn.Module, attribute: str) -> bool:
    wraps = attribute == "module" and any(name in _WRAPPING_CLASSES for name in kinds(outer))
    return wraps or attribute in _WRAPPING_ATTRIBUTES
