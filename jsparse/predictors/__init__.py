"""Predictors of active neurons: how they are fitted to text, and their thresholds."""
