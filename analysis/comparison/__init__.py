"""What `analysis.compare` is made of: fair groups, paired tests, the Pareto front."""
