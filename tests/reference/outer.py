"""EMA-Nesterov in float64, from the whole history of points: the average of moves is a sum with explicit weights."""

import itertools

import numpy as np


class EmaNesterov:
    """Points x of one tensor or several, and where the look-ahead goes from the last."""

    def __init__(self, start, decay):
        self.points, self.decay = [start], decay

    def ahead(self, point, beta):
        """y of the step that comes.

        Args:
            point: x that the last step came to, one array for each tensor.
            beta: Of the step that comes.
        """
        self.points.append(point)
        count = len(self.points) - 1
        weights = (1 - self.decay) * self.decay ** np.arange(count - 1, -1, -1)
        moves = [[b - a for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(self.points)]
        return [
            x + beta * sum(weight * move[i] for weight, move in zip(weights, moves, strict=True))
            for i, x in enumerate(point)
        ]
