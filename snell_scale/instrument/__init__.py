"""What a run measures about itself: memory by phase and category, throughput, FLOPs, and the environment."""
