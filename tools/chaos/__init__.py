"""Kills ranks at random moments of every stage, starts the run again, and compares it with one left in peace."""
