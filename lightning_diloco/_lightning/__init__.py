"""Adapters: the only folder that uses Lightning's private API, with the reason beside each use. In reading order:

* ``reclassed.py``: live objects of Lightning that have a class of ours for a while
* ``surface.py``: the private functions and attributes in use, checked before every run
* ``hooks.py``: the project's hooks, and the rank under which they run
* ``trainer_state.py``: facts that only private attributes tell
* ``io.py``: checkpoint files that survive a kill
* ``rounds.py``, ``samplers.py``: the indices of each worker
* ``grouping.py``, ``tracing.py``, ``reading.py``: from a loader's batches to a batch of each worker
* ``loaders.py``, ``data.py``: the loaders that training and hooks see; which samples a worker reads
* ``connectors.py``: signals and samplers of a run
* ``results.py``: the values that workers log
* ``turns.py``, ``loops.py``, ``installation.py``: workers inside Lightning's training loop
* ``launching.py``: start and end of further processes
* ``trainers.py``, ``ranks.py``, ``process.py``, ``collectives.py``, ``team.py``, ``fitting.py``: the strategy, layer by
  layer: a Trainer's settings, ranks, a run, barriers and reductions, a worker of several processes, a fit

They hold no training state: that is the engine's.
"""
