"""What the reports of all studies share: the page, figures, tables, notices, and numbers in words."""
