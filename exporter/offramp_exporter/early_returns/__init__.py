"""Networks that return early: every course through `forward`, and the rule by which each exit is taken."""
