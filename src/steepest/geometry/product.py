"""How the norms of layers make one norm of all weights: a tree of maxima, sums and Euclidean norms.

The dual of such a norm is the same tree of dual norms (a maximum's is a sum, a sum's a maximum), and its steepest
direction is each block's own, times a coefficient that multiplies along the tree. With a_l the dual norm of block l, N
the dual of a node and c_l the coefficient below it:

    Max      N = Σ a_l           c_l = 1
    Sum      N = max a_l         c_l = 1 for the largest, else 0
    Euclid   N = sqrt(Σ a_l²)    c_l = a_l / N

Source: Crawshaw, Modi, Liu and Gower, arXiv:2510.09827 (max, l2 and hybrid); nesting derived here.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self, cast

import torch
from torch import Tensor

from steepest.checks import choice, refusal, shown
from steepest.names import unknown_name

__all__ = ["PRODUCTS", "Combined", "Euclid", "Hybrid", "Max", "Product", "Sum", "get_product"]

Label = str  # a role or the name of a parameter group


@dataclass(frozen=True)
class Combined:
    """A product norm at one momentum.

    Args:
        total: N, the dual norm of everything, 0-d.
        coefficients: Per label, what multiplies the steepest direction of each of its blocks: 0-d if it is the same for
            all of them, else one per block.
    """

    total: Tensor
    coefficients: Mapping[Label, Tensor]


@dataclass(frozen=True, repr=False)
class Product(ABC):
    """A node of the tree.

    Args:
        children: Nodes, and labels: a label stands for each of its blocks as a child of its own. None at all: every
            block is a child. A label that the model does not have is passed over.

    Raises:
        TypeError: If a child is neither a node nor a label.
        ValueError: If a label is empty or appears twice in the tree.
    """

    children: tuple["Product | Label", ...]
    name: ClassVar[str]

    def __init__(self, *children: "Product | Label") -> None:
        for child in children:
            if not isinstance(cast(object, child), Product | str):
                raise TypeError(f"{type(self).__name__} takes nodes and labels such as 'matrix', got {shown(child)}.")
            if child == "":
                raise ValueError(f"{type(self).__name__} takes nodes and labels such as 'matrix', got ''.")
        object.__setattr__(self, "children", children)
        labels = self.labels()
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"The label {label!r} appears twice in {self}; a block has one place in the tree.")

    def labels(self) -> list[Label]:
        """Every label of the tree, in order; none if it takes whatever there is."""
        return [label for child in self.children for label in ([child] if isinstance(child, str) else child.labels())]

    def covering(self, labels: Sequence[Label]) -> Self:
        """This tree for a model's labels: what it has no use for left out, nothing left open.

        Args:
            labels: Of the model.

        Raises:
            ValueError: If a label has no place in the tree, or a node without children stands beside others.
        """
        if not self.children:
            return self._with(labels)
        known = self.labels()
        kept = self._kept(labels)  # first of all refuses a node that does not say what it is for
        for label in labels:
            if label not in known:
                raise ValueError(f"{unknown_name('place in the product norm', label, known)} Add it to {self}.")
        return kept

    def _kept(self, labels: Sequence[Label]) -> Self:
        kept: list[Product | Label] = []
        for child in self.children:
            if isinstance(child, str):
                kept += [child] if child in labels else []
            elif not child.children:
                raise ValueError(f"{child} inside of a product norm must say which labels it is for.")
            else:
                inner = child._kept(labels)
                kept += [inner] if inner.children else []
        return self._with(kept)

    def _with(self, children: Sequence["Product | Label"]) -> Self:
        node = object.__new__(type(self))
        object.__setattr__(node, "children", tuple(children))
        return node

    def separable(self, *, regularized: bool) -> bool:
        """Whether each block's step depends on its own momentum only: no global number is needed."""
        alike = Euclid if regularized else Max
        return isinstance(self, alike) and all(
            isinstance(child, str) or child.separable(regularized=regularized) for child in self.children
        )

    def combine(self, duals: Mapping[Label, Tensor]) -> Combined:
        """The dual norm of everything, and the coefficients of the steepest direction.

        Args:
            duals: Dual norms of the blocks, at least 0: one vector (L,) per label, for each label of the tree.

        Returns:
            N and the coefficients. Where all duals of a node are 0, the coefficients are 0 (Euclid), or 1 (Max).
        """
        entries: list[Tensor] = []
        below: list[Mapping[Label, Tensor]] = []
        for child in self.children:
            if isinstance(child, str):
                entries.append(duals[child])
                below.append({child: torch.ones_like(duals[child].sum())})
            else:
                inner = child.combine(duals)
                entries.append(inner.total.unsqueeze(0))
                below.append(inner.coefficients)
        total, weights = self.dual(torch.cat(entries))
        lengths = [len(entry) for entry in entries]
        split = weights.split(lengths) if weights.ndim else [weights] * len(entries)
        split = [weight.squeeze() if len(entry) == 1 else weight for weight, entry in zip(split, entries, strict=True)]
        coefficients = {
            label: weight * own for weight, inner in zip(split, below, strict=True) for label, own in inner.items()
        }
        return Combined(total, coefficients)

    def norm(self, norms: Mapping[Label, Tensor]) -> Tensor:
        """The norm itself.

        Args:
            norms: Norms of the blocks, one vector (L,) per label.

        Returns:
            0-d.
        """
        entries = [
            norms[child] if isinstance(child, str) else child.norm(norms).unsqueeze(0) for child in self.children
        ]
        return self.primal(torch.cat(entries))

    @abstractmethod
    def primal(self, norms: Tensor) -> Tensor:
        """The node's norm: (L,) to 0-d."""

    @abstractmethod
    def dual(self, duals: Tensor) -> tuple[Tensor, Tensor]:
        """The node's dual norm: (L,) to 0-d, and the children's coefficients: (L,), or 0-d if they are all the same."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.children))})"


class Max(Product):
    """Largest of the children's norms: every block takes its full step."""

    name: ClassVar[str] = "max"

    def primal(self, norms: Tensor) -> Tensor:
        """Largest."""
        return norms.amax() if norms.numel() else norms.new_zeros(())

    def dual(self, duals: Tensor) -> tuple[Tensor, Tensor]:
        """Sum, and 1."""
        return duals.sum(), torch.ones_like(duals.sum())


class Sum(Product):
    """Sum of the children's norms: only the child with the largest dual moves, the first of equals."""

    name: ClassVar[str] = "sum"

    def primal(self, norms: Tensor) -> Tensor:
        """Sum."""
        return norms.sum()

    def dual(self, duals: Tensor) -> tuple[Tensor, Tensor]:
        """Largest, and 1 there."""
        if not duals.numel():
            return duals.new_zeros(()), duals
        total, index = duals.max(dim=0)
        return total, torch.zeros_like(duals).index_fill(0, index, 1.0)


class Euclid(Product):
    """Root of the sum of squares of the children's norms: each child moves in proportion to its dual."""

    name: ClassVar[str] = "euclid"

    def primal(self, norms: Tensor) -> Tensor:
        """Root of the sum of squares."""
        return torch.linalg.vector_norm(norms)

    def dual(self, duals: Tensor) -> tuple[Tensor, Tensor]:
        """Root of the sum of squares, by way of the largest so that squares stay in range, and each child's share."""
        if not duals.numel():
            return duals.new_zeros(()), duals
        largest = duals.amax()
        scaled = duals / torch.where(largest == 0, 1.0, largest)
        length = torch.linalg.vector_norm(scaled)
        return largest * length, scaled / torch.where(length == 0, 1.0, length)


class Hybrid(Euclid):
    """MuonMax's norm: Euclidean over the maximum of all matrices and every other block.

    Args:
        *children: None: Max("matrix") and the other roles.
    """

    name: ClassVar[str] = "hybrid"

    def __init__(self, *children: Product | Label) -> None:
        super().__init__(*(children or (Max("matrix"), "embedding", "head", "vector")))


PRODUCTS: dict[str, type[Product]] = {kind.name: kind for kind in (Max, Sum, Euclid, Hybrid)}
"""Norms of all layers, by the name that `product=` takes."""


def get_product(product: str | Product) -> Product:
    """Turn an option value into a product norm.

    Args:
        product: A tree, or a name in `PRODUCTS`.

    Raises:
        ValueError: If the name is not known.
        TypeError: If it is neither.
    """
    if isinstance(product, str):
        return PRODUCTS[choice(PRODUCTS)("product", product)]()
    if not isinstance(cast(object, product), Product):
        raise TypeError(refusal("product", "a name or a tree such as Hybrid()", product))
    return product
