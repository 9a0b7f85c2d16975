"""Observing and searching: reports, figures and callbacks over a finished model. Nothing else depends on it."""
