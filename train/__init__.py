"""From a corpus to a checkpoint: data, configuration, the loop, checkpoints."""
