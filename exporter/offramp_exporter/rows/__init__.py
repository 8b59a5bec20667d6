"""A graph written for one row -> the graph of a batch in which every row is computed as if it were alone."""
