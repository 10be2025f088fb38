"""What `analysis.report` is made of: the sentences, the page, its plots and its tables."""
