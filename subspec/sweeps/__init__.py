"""Sweeps: many runs from one command, each in a process of its own.

A sweep is a folder. ``sweep.json`` lists its jobs, identified by their resolved configurations. Every job has a run
folder below it with the run's files and ``job.json``, its outcome. The same sweep run again therefore runs only missing
jobs, with any launcher.

- :mod:`~subspec.sweeps.sweeper`: a grid of overrides, or the rows of a table experiment.
- :mod:`~subspec.sweeps.search`: overrides proposed by Optuna.
- :mod:`~subspec.records.sweep_folder`, :mod:`~subspec.sweeps.resumable`: finished jobs are not run again.
- :mod:`~subspec.sweeps.launcher`, :mod:`~subspec.sweeps.process`: fresh processes, one at a time per GPU.
- :mod:`~subspec.sweeps.progress`, :mod:`~subspec.sweeps.job_table`: console output and tables.
"""
