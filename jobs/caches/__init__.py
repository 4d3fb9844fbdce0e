"""`stillhouse cache`: finds logit caches, describes, verifies, repairs and removes them."""
