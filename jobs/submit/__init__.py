"""Jobs that are sent to a cluster through Ray's Jobs API, and found again."""
