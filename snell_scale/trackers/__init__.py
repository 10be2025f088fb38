"""Where a run's figures can be sent to beside its own folder: TensorBoard's files, Weights & Biases, trackio."""
