"""Parts without knowledge of a simulation: errors, keyed draws, artefacts, sums, text."""
