"""Safety and helpfulness of the model as it stands, with counts and 95 % intervals; AdvBench, HHH, MT-Bench, XSTest."""
