"""Safety and helpfulness of the model as it stands: benchmarks, their figures with counts and 95 %
intervals.
"""
