"""Studies: what is run, what its records say, and the page about them."""
