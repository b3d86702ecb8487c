"""What a run tells people: on the console, in progress bars, in loggers, in TensorBoard."""
