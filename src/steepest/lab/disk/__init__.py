"""Files of a study or a run: the only way in which the lab reads and writes them."""
