"""Safety and helpfulness of the model as it stands: AdvBench, HHH, MT-Bench, with counts and 95 % intervals."""
