"""What an optimizer step costs: time in turns with others, memory, operations, and how exact its direction is."""

from steepest.lab.bench.shapes import SHAPE_SETS, make_shapes
from steepest.lab.bench.step import Bench, Case, Row, measure

__all__ = ["SHAPE_SETS", "Bench", "Case", "Row", "make_shapes", "measure"]
