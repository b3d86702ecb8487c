"""Local steps of all workers, views of their weights, and their place in a checkpoint. Imports nothing of Lightning."""
