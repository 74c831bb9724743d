"""A race: methods against each other, each with one setting."""
