"""What a user asks for: the command line, the pipeline, the sweep, the report."""
