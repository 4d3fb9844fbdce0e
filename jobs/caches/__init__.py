"""What `stillhouse cache` does: find logit caches, describe, verify, mend and remove them."""
