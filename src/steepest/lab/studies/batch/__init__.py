"""A batch-size study: how many steps a loss takes at each batch size."""
