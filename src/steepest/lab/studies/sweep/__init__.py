"""A learning-rate sweep: how wide the range is in which a method works."""
