"""Images with one label each, in the layouts that benchmarks and tools use."""
