"""The models of the tasks: small, plain, and the same for every method."""
