"""What a job will take, foretold from configs alone: memory, bytes, hours.

Nothing is started and no weight is read. `forecast.forecast` answers for a place (GPUs that are
named, or the CPUs of this machine), `record.record` for the cluster that a run has; both give plain
JSON data, which `show` and the report's section `jobs.report.page_details` read.
"""
