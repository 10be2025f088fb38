"""What `analysis.memory_scaling` is made of: memory by size and ranks, savings, speed, communication."""
