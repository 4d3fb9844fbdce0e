"""Forecast of a job from configs alone: memory, bytes, hours.

Nothing is started and no weight is read. `forecast.forecast` answers for a place (GPUs that are
named, or the CPUs of this machine), `forecast.record` for the cluster that a run has; both give
plain JSON data, which `show` and `jobs.report.page_details` read.
"""
