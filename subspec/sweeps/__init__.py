"""Many runs from one command: which jobs there are, each in a process of its own, and what came of them.

A sweep is a folder. ``sweep.json`` names its jobs (the resolved configuration decides which job is which), every job
has a run folder of its own below it, with the run's files and ``job.json``: how it ended. Running the same sweep
again therefore does only what is missing, whatever stopped it, and whichever launcher runs the jobs.

- :mod:`~subspec.sweeps.sweeper`: a grid of overrides, or the rows of a table experiment.
- :mod:`~subspec.sweeps.search`: Optuna proposes the overrides.
- :mod:`~subspec.records.sweep_folder`, :mod:`~subspec.sweeps.resumable`: what is finished is not run again.
- :mod:`~subspec.sweeps.launcher`, :mod:`~subspec.sweeps.process`: fresh processes, one at a time per GPU.
- :mod:`~subspec.sweeps.progress`, :mod:`~subspec.sweeps.table`: what a person sees.
"""
