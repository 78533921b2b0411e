"""Vision towers: which one is used, and how it computes."""
