"""Adam on gradients that are multiplied with inverse second moments of inputs: a head's, and a table's of tokens."""

import torch


class Preconditioned:
    """One parameter (rows, d): a head G (K + γ I)^-a, or a table (K + γ I)^-a G, whose K is of one-hot inputs.

    K is an average over refreshes, divided by the sum of its weights; γ is a part of its mean eigenvalue; P has a mean
    diagonal entry of one, and a part of it is used.
    """

    def __init__(self, weight, *, table, every, decay, ridge, exponent, blend, padding=None):
        self.w, self.table, self.padding = weight.detach().clone(), table, padding
        size = weight.shape[0] if table else weight.shape[1]
        self.k, self.mass = torch.zeros(size, size, dtype=weight.dtype), 0.0
        self.p = torch.eye(size, dtype=weight.dtype)
        self.m, self.v = torch.zeros_like(self.w), torch.zeros_like(self.w)
        self.every, self.decay, self.ridge, self.exponent, self.blend = every, decay, ridge, exponent, blend
        self.t = 0

    def step(self, g, inputs, *, lr, betas, eps):
        """One step with the gradient g and what was read: vectors (N, d), or numbers (N,) of rows of the table."""
        self.t += 1
        if self.t % self.every == 0:
            total, count = torch.zeros_like(self.k), 0
            for z in inputs:
                if self.table:
                    if self.padding is not None and int(z) == self.padding:
                        continue
                    one = torch.zeros(len(self.k), dtype=self.k.dtype)
                    one[int(z)] = 1
                    z = one
                total += torch.outer(z, z)
                count += 1
            self.k = self.decay * self.k + (1 - self.decay) * total / count
            self.mass = self.decay * self.mass + 1 - self.decay
            values, vectors = torch.linalg.eigh(self.k / self.mass)
            p = vectors @ torch.diag((values + self.ridge * values.mean()) ** -self.exponent) @ vectors.T
            p = p * len(p) / torch.trace(p)
            self.p = (1 - self.blend) * torch.eye(len(p), dtype=p.dtype) + self.blend * p
        g = self.p @ g if self.table else g @ self.p
        self.m = betas[0] * self.m + (1 - betas[0]) * g
        self.v = betas[1] * self.v + (1 - betas[1]) * g**2
        mean, square = self.m / (1 - betas[0] ** self.t), self.v / (1 - betas[1] ** self.t)
        self.w = self.w - lr * mean / (square.sqrt() + eps)
