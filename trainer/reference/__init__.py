"""Training images → features that evaluations compare with."""
