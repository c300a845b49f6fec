"""A job on this machine: options, processes, precision, run folder, checkpoints, loop, log."""
