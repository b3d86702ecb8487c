"""The values of a run: replicas, optimizer states, the outer model, random streams. Imports nothing of Lightning."""
