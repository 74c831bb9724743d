"""The lab: tasks, training runs, races and reports. A run directory is the truth; everything else is read from it."""
