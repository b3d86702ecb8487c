"""Adapters: the only place that uses Lightning's private API, each use with its reason beside it.

``loops.py`` runs every worker inside one step of Lightning's training loop, ``installation.py`` puts these loops into
a Trainer, ``results.py`` folds what workers log, ``data.py`` and ``samplers.py`` deal batches to them. ``process.py``
is a Lightning strategy for one process or many, ``launching.py`` starts and ends them, ``team.py`` averages the
gradients of a worker that has several. They hold no training state: that is the engine's.
"""
