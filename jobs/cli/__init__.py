"""The commands of `stillhouse`: options and exit codes, nothing else."""
