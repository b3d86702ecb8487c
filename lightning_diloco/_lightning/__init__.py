"""Adapters: the only place that uses Lightning's private API, each use with its reason beside it.

``loops.py`` runs every worker inside one step of Lightning's training loop, ``results.py`` folds what they log,
``data.py`` deals batches to them. They hold no training state: that is the engine's.
"""
