"""What training changed: ΔW from the adapters' files, its ranks, and SNELLA's allocation."""
