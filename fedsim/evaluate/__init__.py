"""Safety and helpfulness of the model: benchmarks and their figures with 95 % intervals."""
