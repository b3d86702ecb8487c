"""Processes, and the tensors that workers send each other. Imports nothing of Lightning."""
