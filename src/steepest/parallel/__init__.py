"""One step on many ranks: what a bucket costs on a machine, and who works on which."""

from steepest.parallel.balance import Work, assign, cost, count_work
from steepest.parallel.machine import Machine, calibrate, typical

__all__ = ["Machine", "Work", "assign", "calibrate", "cost", "count_work", "typical"]
