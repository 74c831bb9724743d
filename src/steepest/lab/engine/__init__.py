"""Who trains the runs of a study: workers here and elsewhere, and the queue between them."""
